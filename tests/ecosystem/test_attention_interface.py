"""``attn_implementation="fastbert"`` under transformers' own models, beside the same model with sdpa."""

from __future__ import annotations

import copy
import gc
import logging
import re
from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from transformers import masking_utils

import fastbert
from fastbert.model import attention_interface
from fastbert.model.packing import Packing
from fastbert.ops import backends

from ..model.helpers import BATCH, LENGTH, LENGTHS, VOCABULARY, assert_same_gradients, inputs_for, mask, small_config
from ..ops.helpers import DEVICE

no_kernels = backends.unavailable_reason("native")
pytestmark = pytest.mark.skipif(no_kernels is not None, reason=f"without C++ kernels all of it runs through sdpa: {no_kernels}")
attention_interface.register_attention()
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
ENCODERS = {
    "BertModel": transformers.BertConfig(**SIZES),
    "RobertaModel": transformers.RobertaConfig(**SIZES),
    "ElectraModel": transformers.ElectraConfig(**SIZES, embedding_size=24),
    "DistilBertModel": transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=48, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40
    ),
    "EuroBertModel": transformers.EuroBertConfig(**SIZES, mask_token_id=3),
}


@pytest.fixture
def ran(monkeypatch) -> Counter:
    """How many calls of attention went which way, "fused" or "sdpa"."""
    counted = Counter()

    def counting(name, function):
        def call(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(attention_interface, "attention", counting("fused", attention_interface.attention))
    sdpa = attention_interface.sdpa_attention_forward
    monkeypatch.setattr(attention_interface, "sdpa_attention_forward", counting("sdpa", sdpa))
    return counted


def twins(name: str, config: transformers.PreTrainedConfig, theirs: str = "sdpa") -> tuple[nn.Module, nn.Module]:
    """Twice the same model of transformers: with its own attention, and with ours."""
    model_class = getattr(transformers, name)
    plain = model_class._from_config(copy.deepcopy(config), attn_implementation=theirs).eval()
    fused = model_class._from_config(copy.deepcopy(config), attn_implementation="fastbert").eval()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def text(padded: bool = True) -> dict[str, torch.Tensor]:
    batch = {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH))}
    return {**batch, "attention_mask": mask()} if padded else batch


def one_row(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The real tokens of a padded batch one after the other, as DataCollatorWithFlattening gives them."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {
        "input_ids": batch["input_ids"][mask().bool()].unsqueeze(0),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0),
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS),
    }  # fmt: skip


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


class SelfAttention(nn.Module):
    """What the attention function sees of a layer."""

    is_causal = False

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        raise NotImplementedError


class CrossAttention(SelfAttention):
    def forward(self, hidden_states, key_value_states=None, attention_mask=None):
        raise NotImplementedError


class CausalAttention(SelfAttention):
    is_causal = True


class OneLayer(nn.Module):
    """What a model does with masks and attention: the part of it that is worth compiling in a test."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        config = small_config(attn_implementation=implementation, attention_probs_dropout_prob=0.0)
        self.attention = transformers.models.bert.modeling_bert.BertSelfAttention(config)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        made = masking_utils.create_bidirectional_mask(self.attention.config, hidden_states, attention_mask)
        return self.attention(hidden_states, made, **kwargs)[0]


def heads(length: int = LENGTH, batch: int = BATCH, **options) -> list[torch.Tensor]:
    """Query, key and value (batch, 4, length, 12)."""
    return [torch.randn(batch, 4, length, 12, **options) for _ in range(3)]


def padding(real: torch.Tensor) -> torch.Tensor:
    return real.bool()[:, None, None, :]


# --- the same numbers as sdpa ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_give_the_outputs_and_gradients_of_sdpa(ran, name, padded):
    plain, fused = twins(name, ENCODERS[name])
    batch = text(padded)
    weights = torch.randn(BATCH, LENGTH, 48) * (mask()[..., None] if padded else 1)
    outputs = [model(**batch).last_hidden_state for model in (plain, fused)]
    assert_close(outputs[1] * weights, outputs[0] * weights)
    for output in outputs:
        (output * weights).sum().backward()
    assert_same_gradients(fused, plain, 1e-4)
    assert ran == {"fused": 2}


def test_images_have_no_mask(ran):
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    plain, fused = twins("ViTModel", config)
    pixels = torch.randn(3, 3, 16, 16)
    assert_close(fused(pixels).last_hidden_state, plain(pixels).last_hidden_state)
    assert ran == {"fused": 2}


def test_a_model_with_attention_of_its_own_stays_as_it_is(ran):
    """MPNet adds the mask to its scores itself: a boolean one would be wrong there, and nobody would notice."""
    plain, fused = twins("MPNetModel", transformers.MPNetConfig(**SIZES), theirs="eager")
    batch = text()
    assert torch.equal(fused(**batch).last_hidden_state, plain(**batch).last_hidden_state)
    assert not ran


@pytest.mark.gpu
def test_bfloat16(ran):
    """No further from float64 than twice sdpa's own error, on the real tokens and in the gradients."""
    inputs = [x.to(DEVICE, torch.bfloat16) for x in heads()]
    module, real = SelfAttention(), mask().to(DEVICE)
    weights = torch.randn(BATCH, LENGTH, 4, 12, device=DEVICE) * real[..., None, None]
    sdpa = attention_interface.sdpa_attention_forward
    results = []
    for function, dtype in ((sdpa, torch.float64), (sdpa, torch.bfloat16), (attention_interface.attention_forward, torch.bfloat16)):
        query, key, value = (x.to(dtype).requires_grad_() for x in inputs)
        output, _ = function(module, query, key, value, padding(real))
        assert output.dtype == dtype
        weighted = output.double() * weights
        results.append([weighted, *torch.autograd.grad(weighted.sum(), (query, key, value))])
    for exact, theirs, ours in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert ran["fused"] == 1


def test_scaling_and_layout():
    query, key, value = heads()
    module = SelfAttention()
    got, weights = attention_interface.attention_forward(module, query, key, value, None, scaling=0.7)
    expected, _ = attention_interface.sdpa_attention_forward(module, query, key, value, None, scaling=0.7)
    assert weights is None
    assert got.shape == (BATCH, LENGTH, 4, 12) and got.is_contiguous()
    assert_close(got, expected)


# --- masks -----------------------------------------------------------------------------------------------------------------


def bidirectional(attention_mask, **changes):
    config = small_config(attn_implementation="fastbert")
    embeds = torch.zeros(BATCH, LENGTH, 48)
    return masking_utils.create_bidirectional_mask(config, embeds, attention_mask, **changes)


def test_padding_is_one_row_per_sequence_and_no_padding_is_no_mask():
    got = bidirectional(mask())
    assert got.dtype == torch.bool and torch.equal(got, padding(mask()))
    assert bidirectional(torch.ones(BATCH, LENGTH)) is None
    assert bidirectional(None) is None


def test_other_masks_are_those_of_sdpa(ran):
    sdpa = small_config(attn_implementation="sdpa")
    ours = small_config(attn_implementation="fastbert")
    embeds, real = torch.zeros(BATCH, LENGTH, 48), mask()

    def near(batch_index, head_index, q_index, kv_index):
        return (q_index - kv_index).abs() < 3

    for make in (
        lambda config: masking_utils.create_causal_mask(config, embeds, real, past_key_values=None),
        lambda config: masking_utils.create_causal_mask(config, embeds, None, past_key_values=None),
        lambda config: masking_utils.create_bidirectional_mask(config, embeds, real, and_mask_function=near),
        lambda config: masking_utils.create_bidirectional_mask(config, embeds, real[:, :9], encoder_hidden_states=embeds[:, :9]),
    ):
        expected, got = make(sdpa), make(ours)
        assert (got is None and expected is None) or torch.equal(got, expected)


def test_a_mask_that_has_to_be_whole_is_whole():
    """Models that join it with another one say that they need every query's row, padding or not."""
    sizes = {"batch_size": BATCH, "q_length": LENGTH, "kv_length": LENGTH}
    for real in (mask().bool(), None):
        got = attention_interface.make_attention_mask(
            **sizes, mask_function=masking_utils.bidirectional_mask_function, attention_mask=real, allow_is_causal_skip=False
        )
        assert got.shape == (BATCH, 1, LENGTH, LENGTH)
        assert torch.equal(got, (padding(mask()) if real is not None else torch.tensor(True)).expand_as(got))


def test_a_mask_for_each_query_runs_through_sdpa(ran):
    plain, fused = twins("BertModel", small_config())
    batch = text()
    batch["attention_mask"] = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    assert torch.equal(fused(**batch).last_hidden_state, plain(**batch).last_hidden_state)
    assert ran == {"sdpa": 3}


def test_sliding_windows_run_through_sdpa_and_the_other_layers_fused(ran):
    config = transformers.ModernBertConfig(
        **{**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    )
    plain, fused = twins("ModernBertModel", config)
    batch = text()
    real = mask()[..., None]
    assert_close(fused(**batch).last_hidden_state * real, plain(**batch).last_hidden_state * real)
    assert ran == {"fused": 1, "sdpa": 1}


def test_padding_gets_zeros():
    query, key, value = heads()
    output, _ = attention_interface.attention_forward(SelfAttention(), query, key, value, padding(mask()))
    assert (output[mask() == 0] == 0).all()
    assert (output[mask() == 1] != 0).all()


def test_padding_is_taken_out_once_for_all_layers(monkeypatch):
    calls = Counter()
    from_mask = Packing.from_mask.__func__

    def counting(cls, real, shape, device):
        calls["from_mask"] += 1
        return from_mask(cls, real, shape, device)

    monkeypatch.setattr(Packing, "from_mask", classmethod(counting))
    _, fused = twins("BertModel", small_config())
    fused(**text())
    with torch.inference_mode():
        fused(**text())
    assert calls["from_mask"] == 2


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_changes_in_place_between_calls_is_read_again(inference):
    """The model's tensors are views of the caller's where that one is boolean already."""
    plain, fused = twins("BertModel", small_config())
    with torch.inference_mode(inference):
        ids, real = text()["input_ids"], mask().bool()
        for _ in range(2):
            got, expected = (model(ids, attention_mask=real).last_hidden_state for model in (fused, plain))
            assert_close(got * real[..., None], expected * real[..., None])
            real[:, LENGTH // 2 :] = False
        direct = padding(real)
        query, key, value = heads()
        first, _ = attention_interface.attention_forward(SelfAttention(), query, key, value, direct)
        direct[:, :, :, 1:] = False
        second, _ = attention_interface.attention_forward(SelfAttention(), query, key, value, direct)
        assert first[0, 1].any() and not second[0, 1].any()


def test_nothing_that_was_read_outlives_its_tensor():
    _, fused = twins("BertModel", small_config())
    known = attention_interface._known
    before = len(known)
    batch = text()
    row = {key: value for key, value in one_row(batch).items() if not key.startswith("max_length")}
    fused(**batch)
    fused(**row)
    euro = twins("EuroBertModel", ENCODERS["EuroBertModel"])[1]
    euro(row["input_ids"], position_ids=row["position_ids"])
    assert len(known) == before + 2, "cu_seq_lens_q and position_ids are still alive"
    del row
    gc.collect()
    assert len(known) == before


# --- packed rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [(), ("max_length_q", "max_length_k", "position_ids")])
def test_a_packed_row_gives_what_its_sequences_give(ran, missing):
    plain, fused = twins("BertModel", small_config())
    batch = text()
    row = {key: value for key, value in one_row(batch).items() if key not in missing}
    if missing:  # transformers' BERT numbers positions by columns
        row["position_ids"] = one_row(batch)["position_ids"]
    real = mask().bool()
    expected = plain(**batch).last_hidden_state[real]
    got = fused(**row).last_hidden_state[0]
    assert_close(got, expected)
    assert ran == {"fused": 3}
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    assert_same_gradients(fused, plain, 1e-4)


def test_positions_alone_separate_sequences_where_attention_gets_them(ran):
    plain, fused = twins("EuroBertModel", ENCODERS["EuroBertModel"])
    batch = text()
    row = {key: value for key, value in one_row(batch).items() if key in ("input_ids", "position_ids")}
    assert_close(fused(**row).last_hidden_state[0], plain(**batch).last_hidden_state[mask().bool()])
    assert ran == {"fused": 2}


def test_positions_of_queries_do_not_cut_the_keys_of_cross_attention():
    query, key, value = heads(length=4, batch=1)
    positions = torch.tensor([[0, 1, 0, 1]])
    got, _ = attention_interface.attention_forward(CrossAttention(), query, key, value, None, position_ids=positions)
    expected, _ = attention_interface.sdpa_attention_forward(CrossAttention(), query, key, value, None)
    assert_close(got, expected)


def test_positions_of_a_batch_say_nothing_about_a_later_row():
    module, positions = SelfAttention(), torch.tensor([[0, 1, 0, 1]])
    for batch, length in ((2, 4), (1, 4)):
        query, key, value = heads(length=length, batch=batch)
        got, _ = attention_interface.attention_forward(module, query, key, value, None, position_ids=positions)
        halves = [x.unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        apart, _ = attention_interface.sdpa_attention_forward(module, *halves, None)
        together, _ = attention_interface.sdpa_attention_forward(module, query, key, value, None)
        assert_close(got, together if batch == 2 else apart.flatten(0, 1).unsqueeze(0))


def test_positions_that_change_in_place_are_read_again():
    query, key, value = heads(length=8, batch=1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    module = SelfAttention()
    split, _ = attention_interface.attention_forward(module, query, key, value, None, position_ids=positions)
    positions[0] = torch.arange(8)
    whole, _ = attention_interface.attention_forward(module, query, key, value, None, position_ids=positions)
    expected, _ = attention_interface.sdpa_attention_forward(module, query, key, value, None)
    assert_close(whole, expected)
    assert not torch.allclose(split, whole)


def test_a_packed_row_stays_separate_where_it_runs_through_sdpa(ran):
    """sdpa knows no packed rows, and transformers gives its mask none for cu_seq_lens_q."""
    plain, fused = twins("BertLMHeadModel", small_config(is_decoder=True, use_cache=False))
    batch = text()
    assert_close(fused(**one_row(batch)).logits[0], plain(**batch).logits[mask().bool()])
    query, key, value = heads(length=sum(LENGTHS), batch=1)
    kinds = {key: value for key, value in one_row(batch).items() if key.startswith("cu_seq")}
    fused_output, _ = attention_interface.attention_forward(SelfAttention(), query, key, value, None, **kinds)
    for real in (torch.ones(1, 1, 1, sum(LENGTHS), dtype=torch.bool), torch.zeros(1, 1, sum(LENGTHS), sum(LENGTHS))):
        output, _ = attention_interface.attention_forward(SelfAttention(), query, key, value, real, **kinds)
        assert_close(output, fused_output)
    assert ran == {"sdpa": 3 + 2, "fused": 1}


def test_bad_packing_is_named():
    query, key, value = heads()
    module, ends = SelfAttention(), torch.tensor([0, 3, LENGTH], dtype=torch.int32)
    with pytest.raises(ValueError, match="batch size is 6; expected 1"):
        attention_interface.attention_forward(module, query, key, value, None, cu_seq_lens_q=ends)
    query, key, value = heads(batch=1)
    with pytest.raises(ValueError, match="expected steps that never fall from 0 to total = 21"):
        attention_interface.attention_forward(module, query, key, value, None, cu_seq_lens_q=ends[:2], max_length_q=3)
    with pytest.raises(ValueError, match="end at 21 and 21, expected the number of queries and of keys, 21 and 9"):
        attention_interface.attention_forward(module, query, key[:, :, :9], value[:, :, :9], None, cu_seq_lens_q=ends)


# --- dropout ---------------------------------------------------------------------------------------------------------------


def dropping(checkpointing: dict | None = None) -> nn.Module:
    torch.manual_seed(1)
    model = twins("BertModel", small_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5))[1].train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def test_manual_seed_governs_dropout_and_each_layer_draws_its_own(monkeypatch):
    seeds = []
    original = attention_interface.attention

    def recording(*args, seed, **kwargs):
        seeds.append(int(seed))
        return original(*args, seed=seed, **kwargs)

    monkeypatch.setattr(attention_interface, "attention", recording)
    model, batch = dropping(), text()
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(model(**batch).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert len(set(seeds[:3])) == 3 and seeds[:3] == seeds[3:6]


def test_dropout_keeps_the_expected_value():
    query, key, value = heads(length=16, batch=1)
    module = SelfAttention()
    outputs = [attention_interface.attention_forward(module, query, key, value, None, dropout=0.3)[0] for _ in range(1000)]
    expected, _ = attention_interface.attention_forward(module, query, key, value, None)
    spread = torch.stack(outputs).std(0) / 1000**0.5
    assert ((torch.stack(outputs).mean(0) - expected).abs() < 5 * spread).all()


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["saved", "reentrant"])
def test_a_recomputed_layer_draws_the_same_dropout_mask(ran, checkpointing):
    batch = inputs_for("BertModel")
    gradients = []
    for options in (None, checkpointing):
        model = dropping(options)
        torch.manual_seed(7)
        output = model(**batch).last_hidden_state
        (output * mask()[..., None]).square().sum().backward()
        gradients.append(model)
    assert_same_gradients(gradients[1], gradients[0], 1e-6)
    assert ran == {"fused": 3 + 6}


# --- decoders and cross-attention ------------------------------------------------------------------------------------------


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
        ({"attention_mask": torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)}, "not padding alone"),
        ({"attention_mask": torch.zeros(BATCH, 1, 1, LENGTH)}, "not padding alone"),
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


# --- fastbert's own models, loading and saving -------------------------------------------------------------------------------


def test_fastberts_own_model_runs_packed_whatever_the_name(ran):
    plain, _ = twins("BertModel", small_config())
    ours = fastbert.BertModel._from_config(small_config(), attn_implementation="fastbert").eval()
    ours.load_state_dict(plain.state_dict())
    batch = text()
    output = ours(**batch)
    assert output.packed.shape == (sum(LENGTHS), 48)
    assert_close(output.last_hidden_state * mask()[..., None], plain(**batch).last_hidden_state * mask()[..., None])
    assert not ran


def test_a_live_model_changes_its_attention(ran):
    plain, _ = twins("BertModel", small_config())
    batch = text()
    before = plain(**batch).last_hidden_state
    assert not ran
    plain.set_attn_implementation("fastbert")
    assert_close(plain(**batch).last_hidden_state * mask()[..., None], before * mask()[..., None])
    assert ran == {"fused": 3}
    ours = fastbert.BertModel(small_config()).eval()
    ours.load_state_dict(plain.state_dict())
    ours.set_attn_implementation("fastbert")
    assert ours.config._attn_implementation == "fastbert"
    assert_close(ours(**batch).last_hidden_state * mask()[..., None], before * mask()[..., None])


def test_saved_and_loaded(ran, tmp_path):
    _, fused = twins("BertForMaskedLM", small_config())
    fused.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="fastbert").eval()
    assert loaded.config._attn_implementation == "fastbert"
    batch = text()
    assert torch.equal(loaded(**batch).logits, fused(**batch).logits)
    assert ran == {"fused": 6}
    plain = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa", "a checkpoint must load where fastbert is not installed"
