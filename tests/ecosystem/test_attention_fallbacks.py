"""``attn_implementation="fastbert"`` where it has to run transformers' sdpa: the same result, a reason, one line in the log."""

from __future__ import annotations

import logging
import re
from collections import Counter

import pytest
import torch
import transformers

from fastbert.model import attention_interface

from ..model.helpers import BATCH, LENGTH, VOCABULARY, mask, small_config
from .attention_helpers import (
    SIZES,
    CausalAttention,
    CrossAttention,
    OneLayer,
    SelfAttention,
    assert_close,
    count_ways,
    heads,
    needs_kernels,
    one_row,
    padding,
    text,
    twins,
)

pytestmark = needs_kernels
BART = {
    "vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


@pytest.fixture
def ran(monkeypatch) -> Counter:
    return count_ways(monkeypatch)


# --- decoders, cross-attention, attention of their own -----------------------------------------------------------------


def test_a_decoder_generates_the_same_tokens(ran):
    plain, fused = twins("BertLMHeadModel", small_config(is_decoder=True, bos_token_id=1, eos_token_id=None, pad_token_id=0))
    prompt = {"input_ids": text()["input_ids"][:2, :5], "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    got, expected = (model.generate(**prompt, max_new_tokens=6, do_sample=False) for model in (fused, plain))
    assert torch.equal(got, expected)
    assert ran["sdpa"] and not ran["fused"]


@pytest.mark.parametrize("length", [LENGTH, 9])
def test_cross_attention_reads_queries_beyond_the_encoders_padding(ran, length):
    """With as many queries as keys the encoder's padding mask looks like that of self-attention."""
    plain, fused = twins("BartModel", transformers.BartConfig(**BART))
    decoder_ids = torch.randint(3, VOCABULARY, (BATCH, length))
    batch = text()
    got, expected = (model(**batch, decoder_input_ids=decoder_ids).last_hidden_state for model in (fused, plain))
    assert_close(got, expected)
    assert ran == {"fused": 2, "sdpa": 4}


def test_cross_attention_of_bert(ran):
    config = small_config(is_decoder=True, add_cross_attention=True, use_cache=False)
    plain, fused = twins("BertLMHeadModel", config)
    states = {"encoder_hidden_states": torch.randn(BATCH, LENGTH, 48), "encoder_attention_mask": mask()}
    ids = text(padded=False)["input_ids"]
    assert_close(fused(ids, **states).logits, plain(ids, **states).logits)
    assert ran == {"sdpa": 6}


def test_a_model_with_attention_of_its_own_stays_as_it_is(ran):
    """MPNet adds the mask to its scores itself: a boolean one would be wrong there, and nobody would notice."""
    plain, fused = twins("MPNetModel", transformers.MPNetConfig(**SIZES), theirs="eager")
    batch = text()
    assert torch.equal(fused(**batch).last_hidden_state, plain(**batch).last_hidden_state)
    assert not ran


# --- reasons ---------------------------------------------------------------------------------------------------------------


def reasons_for(module=None, attention_mask=None, change=lambda *qkv: qkv, **kwargs) -> list[str]:
    qkv = change(*heads())
    return attention_interface.attention_fallback_reasons(module or SelfAttention(), *qkv, attention_mask, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"module": CausalAttention()}, "causal"),
        ({"is_causal": True}, "causal"),
        ({"output_attentions": True}, "attention weights"),
        ({"position_bias": torch.zeros(1)}, "position_bias is given"),
        ({"cache": object()}, "cache is given"),
        ({"change": lambda q, k, v: (q[:, :, :3], k, v)}, "differ in number"),
        ({"change": lambda q, k, v: (q, k[:, :2], v[:, :2])}, "shared by several query heads"),
        ({"change": lambda q, k, v: (q, k, v[..., :6])}, "other head sizes"),
        ({"change": lambda q, k, v: (q, k.bfloat16(), v)}, "differ in dtype"),
        ({"change": lambda q, k, v: (q.double(), k.double(), v.double())}, "no kernel for these tensors .*float64"),
        ({"change": lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta"))}, "none runs on meta"),
        ({"attention_mask": torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)}, "not padding behind tokens alone"),
        ({"attention_mask": torch.zeros(BATCH, 1, 1, LENGTH)}, "not padding behind tokens alone"),
        ({"attention_mask": padding(mask()), "module": CrossAttention()}, "another sequence"),
        ({"attention_mask": padding(mask()), "cu_seq_lens_q": torch.tensor([0, LENGTH])}, "besides cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, LENGTH]), "module": CrossAttention()}, "another sequence"),
    ],
)
def test_each_fallback_has_its_reason(arguments, expected):
    reasons = reasons_for(**arguments)
    assert len(reasons) == 1 and re.search(expected, reasons[0]), reasons


def test_without_a_reason_nothing_falls_back():
    assert reasons_for() == []
    assert reasons_for(attention_mask=padding(mask())) == []
    assert reasons_for(module=CrossAttention()) == [], "without padding, cross-attention over as many keys is the same formula"
    assert reasons_for(module=CausalAttention(), is_causal=False) == []
    assert reasons_for(cu_seq_lens_q=torch.tensor([0, LENGTH])) == []


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
def test_what_cannot_be_differentiated_or_traced_through_the_op_falls_back():
    plain, fused = OneLayer("sdpa"), OneLayer("fastbert")
    x = torch.randn(2, 5, 48)
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode derivatives" in reasons_for()[0]
    batches = torch.randn(4, 2, 5, 48)
    assert_close(*(torch.func.vmap(layer)(batches) for layer in (fused, plain)))
    longer = torch.randn(3, 7, 48)
    with torch.no_grad():
        assert_close(torch.jit.trace(fused, x, check_trace=False)(longer), plain(longer))


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_neither_way_computes_is_refused(name):
    with pytest.raises(ValueError, match=f"needs {name}, which 'fastbert' does not compute"):
        attention_interface.attention_forward(SelfAttention(), *heads(), None, **{name: torch.ones(1)})


def test_a_fallback_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(attention_interface, "_logged", set())
    _, fused = twins("BertLMHeadModel", small_config(is_decoder=True))
    with caplog.at_level(logging.WARNING, attention_interface.__name__):
        fused(**text())
        fused(**text())
    messages = [record.message for record in caplog.records if record.name == attention_interface.__name__]
    assert messages == ["attn_implementation='fastbert' runs BertSelfAttention through sdpa: attention is causal"]


# --- torch.compile ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_in_one_graph_for_all_lengths(ran, fresh_compiler):
    plain, fused = OneLayer("sdpa"), OneLayer("fastbert")
    compiled = torch.compile(fused, fullgraph=True, backend="eager", dynamic=True)
    for shape in ((2, 5, 48), (3, 7, 48)):
        x = torch.randn(shape)
        assert_close(compiled(x), plain(x))
    assert ran["fused"] and not ran["sdpa"]


def test_a_packed_row_compiles_in_one_graph(ran, fresh_compiler):
    plain, fused = OneLayer("sdpa"), OneLayer("fastbert")
    x, row, real = torch.randn(BATCH, LENGTH, 48, requires_grad=True), one_row(text()), mask().bool()
    kinds = {key: row[key] for key in ("cu_seq_lens_q", "cu_seq_lens_k")}
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    outputs = compiled(x[real].unsqueeze(0), **kinds)[0], plain(x, real)[real]
    assert_close(*outputs)
    weights = torch.randn_like(outputs[0])
    assert_close(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in outputs))
    assert ran["fused"] and not ran["sdpa"]


def test_compiled_with_a_mask_runs_through_sdpa_and_says_so(monkeypatch, caplog, fresh_compiler):
    monkeypatch.setattr(attention_interface, "_logged", set())
    x = torch.randn(BATCH, LENGTH, 48)
    with caplog.at_level(logging.WARNING, attention_interface.__name__):
        got = torch.compile(OneLayer("fastbert"), fullgraph=True, backend="aot_eager")(x, mask())
    assert_close(got, OneLayer("sdpa")(x, mask()))
    assert "compiled or captured code cannot know how many tokens a mask leaves" in caplog.text
