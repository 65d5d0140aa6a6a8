"""Calls that are answered as one before was: the same results, and none after anything that decides about a call has changed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastbert
from fastbert.model import request
from fastbert.ops import native

from .helpers import LENGTH, VOCABULARY, inputs_for, pair, small_config

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=str(native.unavailable_reason()))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry per call of a model that may be answered: whether it was."""
    seen: list[bool] = []
    answer = request.answer

    def counted(*arguments):
        answered = answer(*arguments)
        seen.append(answered is not None)
        return answered

    monkeypatch.setattr(request, "answer", counted)
    return seen


def batch_for(model: nn.Module, name: str = "BertModel") -> dict[str, torch.Tensor]:
    return {key: value for key, value in inputs_for(name).items() if "label" not in key}


def called_before(model: nn.Module, answers: list[bool]) -> nn.Module:
    """The model after calls that end with one that was answered."""
    with torch.no_grad():
        for _ in range(3):
            model(**batch_for(model))
    assert answers[-1], "the third call still looks at everything itself"
    answers.clear()
    return model


def run(model: nn.Module, *, ordinary: bool, **batch):
    """The output, or the error, of a call that may be answered or (``ordinary``) has to look at everything itself."""
    with pytest.MonkeyPatch.context() as patch:
        if ordinary:
            patch.setattr(request, "answer", lambda *_: None)
        try:
            output = model(**batch)
        except (ValueError, RuntimeError, IndexError, TypeError, NotImplementedError) as error:
            return type(error), str(error)
    fields = enumerate(output) if isinstance(output, tuple) else output.items()
    return type(output), {key: value for key, value in fields if not isinstance(value, Cache)}


def assert_same_as_ordinary(model: nn.Module, **batch) -> None:
    (ours_type, ours), (expected_type, expected) = (run(model, ordinary=ordinary, **batch) for ordinary in (False, True))
    assert ours_type == expected_type
    if isinstance(expected, str):
        assert ours == expected
    else:
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def model_of(dtype: str, **changes) -> nn.Module:
    model = pair("BertModel", **changes)[1]
    return model if dtype == "float32" else fastbert.quantize(model) if dtype == "int8" else model.bfloat16()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_same_results(answers, dtype):
    model = called_before(model_of(dtype), answers)
    whole = batch_for(model)
    ids, types = whole["input_ids"], whole["token_type_ids"]
    batches = [
        whole,
        {"input_ids": ids},
        {"input_ids": ids, "token_type_ids": types},
        {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])},
        {"input_ids": ids[:1, :1]},
        {"input_ids": ids, "return_dict": True},
    ]
    with torch.inference_mode():
        for batch in batches:
            assert_same_as_ordinary(model, **batch)
    assert answers == [True] * len(batches)


def test_a_model_without_a_pooler(answers):
    theirs = transformers.BertModel(small_config(), add_pooling_layer=False).eval()
    model = called_before(fastbert.accelerate(theirs), answers)
    with torch.no_grad():
        assert_same_as_ordinary(model, **batch_for(model))
    assert answers == [True]


@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertForSequenceClassification", "BertForMaskedLM"])
def test_heads(answers, name):
    """A head that reads first rows alone leaves most of the last layer out, where that is worth it: here it is not."""
    theirs, ours = pair(name)
    batch = {key: value[:1] for key, value in batch_for(ours, name).items()}
    with torch.no_grad():
        for _ in range(4):
            assert (ours(**batch).logits - theirs(**batch).logits).abs().max() < 2e-5
    assert answers[-1]


def _other_attention(*_, **__):
    raise AssertionError("somebody else's attention was called")


def _config(**changes) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name, value in changes.items():
            setattr(model.config, name, value)

    return change


def _hook(*_):
    return None


def _scaled(module: nn.Module, _, output):
    return 2 * output


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "hidden states": _config(output_hidden_states=True),
    "tuples": _config(return_dict=False),
    "eager": lambda model: model.set_attn_implementation("eager"),
    "decoder": _config(is_decoder=True),
    "causal": _config(is_causal=True),
    "a causal layer": lambda model: setattr(model.encoder.layer[1].attention.self, "is_causal", True),
    "another GELU": lambda model: setattr(model.encoder.layer[1].intermediate.intermediate_act_fn, "approximate", "tanh"),
    "fewer positions": _config(max_position_embeddings=8),
    "another configuration": lambda model: setattr(model, "config", small_config(return_dict=False)),
    "a weight in place": lambda model: model.encoder.layer[1].output.dense.weight.mul_(2),
    "a weight through data": lambda model: model.encoder.layer[1].output.dense.weight.data.mul_(2),
    "another weight": lambda model: setattr(model.encoder.layer[0].output.dense, "weight", nn.Parameter(torch.ones(48, 96))),
    "an embedding": lambda model: model.embeddings.word_embeddings.weight.mul_(2),
    "another embedding": lambda model: model.resize_token_embeddings(VOCABULARY + 7),
    "the pooler's weight": lambda model: model.pooler.dense.weight.mul_(2),
    "no pooler": lambda model: setattr(model, "pooler", None),
    "another pooler": lambda model: setattr(model, "pooler", copy.deepcopy(model.pooler)),
    "fewer layers": lambda model: model.encoder.layer.__delitem__(2),
    "more layers": lambda model: model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0])),
    "layers in another order": lambda model: setattr(model.encoder, "layer", nn.ModuleList(reversed(model.encoder.layer))),
    "another encoder": lambda model: setattr(model, "encoder", copy.deepcopy(model.encoder)),
    "other embeddings": lambda model: setattr(model, "embeddings", copy.deepcopy(model.embeddings)),
    "a hook on the encoder": lambda model: model.encoder.register_forward_hook(_hook),
    "a hook on a layer": lambda model: model.encoder.layer[0].register_forward_pre_hook(_hook),
    "a hook on the embeddings": lambda model: model.embeddings.register_forward_hook(_scaled),
    "a hook on the pooler": lambda model: model.pooler.register_forward_hook(_scaled),
    "a forward of a layer": lambda model: setattr(model.encoder.layer[2], "forward", lambda x, *_, **__: x),
    "a forward of the encoder": lambda model: setattr(
        model.encoder, "forward", partial(type(model.encoder).forward, model.encoder)
    ),
    "dropout": lambda model: model.encoder.layer[0].attention.output.dropout.train(),
    "bfloat16": lambda model: model.bfloat16(),
    "float64": lambda model: model.double(),
    "cast and back": lambda model: model.bfloat16().float(),
    "other weights": lambda model: model.load_state_dict(pair("BertModel")[0].state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_is_answered_after_a_change(answers, change):
    model = called_before(pair("BertModel")[1], answers)
    batch = batch_for(model)
    with torch.no_grad():
        change(model)
        run(model, ordinary=False, **batch)
        assert answers == [False]
        assert_same_as_ordinary(model.eval(), **batch)


CALLS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, object]]] = {
    "positions": lambda batch: {**batch, "position_ids": torch.arange(LENGTH)[None] + 3},
    "embedded tokens": lambda batch: {"inputs_embeds": torch.ones(2, 5, 48)},
    "a packed row": lambda batch: {"input_ids": torch.ones(1, 9).long(), "cu_seq_lens_q": torch.tensor([0, 4, 9])},
    "hidden states": lambda batch: {**batch, "output_hidden_states": True},
    "attentions": lambda batch: {**batch, "output_attentions": True},
    "a tuple": lambda batch: {**batch, "return_dict": False},
    "a causal mask": lambda batch: {**batch, "is_causal": True},
    "a mask with heads": lambda batch: {**batch, "attention_mask": batch["attention_mask"][:, None, None].bool()},
    "a mask of floats": lambda batch: {**batch, "attention_mask": batch["attention_mask"].float()},
    "ids of int32": lambda batch: {**batch, "input_ids": batch["input_ids"].int()},
    "ids that are not contiguous": lambda batch: {"input_ids": batch["input_ids"].t()},
    "token types for all": lambda batch: {**batch, "token_type_ids": batch["token_type_ids"][:1]},
    "no tokens": lambda batch: {"input_ids": batch["input_ids"][:, :0]},
    "no sequences": lambda batch: {"input_ids": batch["input_ids"][:0]},
    "nothing but padding": lambda batch: {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])},
    "one dimension": lambda batch: {"input_ids": batch["input_ids"][0]},
    "an id in no table": lambda batch: {"input_ids": batch["input_ids"] + VOCABULARY},
    "a negative id": lambda batch: {"input_ids": batch["input_ids"] - VOCABULARY},
    "a token type in no table": lambda batch: {**batch, "token_type_ids": batch["token_type_ids"] + 2},
    "too long": lambda batch: {"input_ids": torch.ones(1, 41).long()},
    "another mask": lambda batch: {**batch, "attention_mask": torch.ones(1, 3).long()},
    "other token types": lambda batch: {**batch, "token_type_ids": torch.zeros(2, 3).long()},
    "the meta device": lambda batch: {"input_ids": batch["input_ids"].to("meta")},
}


@pytest.mark.parametrize("changed", CALLS.values(), ids=CALLS)
def test_another_call_is_not_answered(answers, changed):
    """Or has the same results, or the same error; and the next call like the first ones is answered again."""
    model = called_before(pair("BertModel")[1], answers)
    batch = batch_for(model)
    with torch.no_grad():
        assert_same_as_ordinary(model, **changed(batch))
        assert not any(answers)
        for _ in range(3):
            model(**batch)
    assert answers[-1]


def test_modes_of_torch(answers):
    model = called_before(pair("BertModel")[1], answers)
    batch = batch_for(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_same_as_ordinary(model, **batch)
    with torch.no_grad(), FlopCounterMode(display=False):
        assert_same_as_ordinary(model, **batch)
    handle = torch.nn.modules.module.register_module_forward_hook(_hook)
    with torch.no_grad():
        assert_same_as_ordinary(model, **batch)
    handle.remove()
    assert_same_as_ordinary(model, **batch)  # with gradients
    assert not any(answers)


def test_an_attention_that_somebody_registers(answers, monkeypatch):
    model = called_before(pair("BertModel")[1], answers)
    name = model.config._attn_implementation
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, _other_attention)
    with torch.no_grad(), pytest.raises(AssertionError, match="somebody else's attention"):
        model(**batch_for(model))
    assert answers == [False]


def test_another_instruction_set(answers):
    model, before = called_before(pair("BertModel")[1], answers), native.instruction_set()
    try:
        native.set_instruction_set("baseline")
        with torch.no_grad():
            model(**batch_for(model))
    finally:
        native.set_instruction_set(before)
    assert answers == ([True] if before == "baseline" else [False])


def test_training_frees_what_was_packed(answers):
    model = called_before(pair("BertModel")[1], answers)
    kept = [*(request._requests[model].stack,), request._requests[model].pooler]
    model(**batch_for(model)).pooler_output.sum().backward()
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_layers_of_another_model_are_not_kept(answers):
    """Of two models with the same first layer, the layers that were packed last are those of the one that was called last."""
    first = pair("BertModel")[1]
    second = copy.deepcopy(first)
    second.encoder.layer[0] = first.encoder.layer[0]
    for model in (second, first):
        called_before(model, answers)
    request._requests.pop(second, None)
    request.keep(second)
    assert second not in request._requests
    with torch.no_grad():
        second.encoder.layer[2].output.dense.weight.mul_(2)
        for model in (first, second, first, second):
            assert_same_as_ordinary(model, **batch_for(model))


def test_a_model_is_not_kept_alive(answers):
    model = called_before(pair("BertModel")[1], answers)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
