"""``attn_implementation="fastbert"`` under transformers' own models, beside the same model with sdpa."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from transformers import masking_utils

import fastbert
from fastbert.model import attention_interface
from fastbert.model.cache_name import CACHE
from fastbert.model.packing import Packing

from ..model.helpers import BATCH, LENGTH, LENGTHS, assert_same_gradients, inputs_for, mask, small_config
from ..ops.helpers import DEVICE
from .attention_helpers import (
    ENCODERS,
    SIZES,
    CrossAttention,
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


@pytest.fixture
def ran(monkeypatch) -> Counter:
    return count_ways(monkeypatch)


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


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_before_the_first_token(ran, name):
    """A model may pool the first column all the same, where padding has looked at the tokens."""
    plain, fused = twins(name, ENCODERS[name])
    batch = {**text(True), "attention_mask": mask().flip(1)}
    with torch.no_grad():
        assert_close(fused(**batch).last_hidden_state, plain(**batch).last_hidden_state)
    assert ran == {"sdpa": 2}


def test_images_have_no_mask(ran):
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    plain, fused = twins("ViTModel", config)
    pixels = torch.randn(3, 3, 16, 16)
    assert_close(fused(pixels).last_hidden_state, plain(pixels).last_hidden_state)
    assert ran == {"fused": 2}


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
        lambda config: masking_utils.create_causal_mask(config, embeds, real, **{CACHE: None}),
        lambda config: masking_utils.create_causal_mask(config, embeds, None, **{CACHE: None}),
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


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its successor is too new for transformers 5.12
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
