"""Whoever watches a part of a model takes part: hooks on every kind of submodule, and forwards replaced on instances.

Each test does the same to a plain and to a fast model, and wants the same numbers, the same calls and a word of ``explain``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation
from transformers.modeling_outputs import ModelOutput
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.model.cache_name import CACHE

from ..model.helpers import BATCH, LENGTH, inputs_for, on_real_tokens
from .helpers import DOORS, assert_same_on_real_tokens, assert_same_training_step, fast_pair, notes_of

NAME = "BertForSequenceClassification"
LAYER = "bert.encoder.layer.1"
IN_LAYER = (
    "attention", "attention.self", "attention.self.query", "attention.self.key", "attention.self.value", "attention.self.dropout",
    "attention.output", "attention.output.dense", "attention.output.dropout", "attention.output.LayerNorm", "intermediate",
    "intermediate.dense", "intermediate.intermediate_act_fn", "output", "output.dense", "output.dropout", "output.LayerNorm",
)  # fmt: skip
EMBEDDINGS = "word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm", "dropout"
HEADS = "bert.pooler", "bert.pooler.dense", "bert.pooler.activation", "dropout", "classifier"
PARTS = [
    "bert", "bert.encoder", "bert.embeddings", *(f"bert.embeddings.{name}" for name in EMBEDDINGS), LAYER,
    *(f"{LAYER}.{name}" for name in IN_LAYER), *HEADS,
]  # fmt: skip
# sdpa takes a probability: transformers calls this module for eager attention only.
NEVER_CALLED = {f"{LAYER}.attention.self.dropout"}
# Not part of what explain explains, transformers' own code on our path, too.
NEVER_FUSED = {"bert", *HEADS}


def scaled(value):
    """A module's inputs or outputs with their first tensor of numbers times 1.5."""
    if isinstance(value, torch.Tensor):
        return value * 1.5 if value.is_floating_point() else value
    if isinstance(value, ModelOutput):
        for key in ("last_hidden_state", "pooler_output"):
            if value.get(key) is not None:
                value[key] = value[key] * 1.5
        return value
    return (scaled(value[0]), *value[1:]) if value else value  # None, too


def forward_hook(module: nn.Module, calls: list) -> None:
    def hook(module, args, output):
        calls.append(getattr(output, "shape", None))
        return scaled(output)

    module.register_forward_hook(hook)


def forward_hook_with_arguments(module: nn.Module, calls: list) -> None:
    def hook(module, args, kwargs, output):
        calls.append(len(args) > 0 or len(kwargs) > 0)
        return scaled(output)

    module.register_forward_hook(hook, with_kwargs=True)


def forward_pre_hook(module: nn.Module, calls: list) -> None:
    def hook(module, args):
        calls.append(getattr(args[0], "shape", None) if args else None)
        return scaled(args)

    module.register_forward_pre_hook(hook)


def backward_hook(module: nn.Module, calls: list) -> None:
    def hook(module, grad_input, grad_output):
        calls.append((grad_output[0].shape, [None if x is None else x.shape for x in grad_input]))
        return tuple(map(scaled, grad_input))

    module.register_full_backward_hook(hook)


def backward_pre_hook(module: nn.Module, calls: list) -> None:
    def hook(module, grad_output):
        calls.append(grad_output[0].shape)
        return tuple(map(scaled, grad_output))

    module.register_full_backward_pre_hook(hook)


def replaced_forward(module: nn.Module, calls: list) -> None:
    """What accelerate, and everybody who binds a method to an instance, does."""
    original = module.forward

    def forward(*args, **kwargs):
        calls.append(True)
        return scaled(original(*args, **kwargs))

    module.forward = forward


WAYS = [forward_hook, forward_hook_with_arguments, forward_pre_hook, backward_hook, backward_pre_hook, replaced_forward]


def cases() -> list:
    """Every part watched in every way; through the second door, which leads to the same layers, in one way."""
    chosen = [("class", part, way) for part in PARTS for way in WAYS] + [("accelerate", part, forward_hook) for part in PARTS]
    # torch's backward hooks look for tensors in tuples: they do not take part where a ModelOutput is returned.
    without = ("bert", "bert.encoder"), (backward_hook, backward_pre_hook)
    return [
        pytest.param(door, part, way, id=f"{door}-{part}-{way.__name__}")
        for door, part, way in chosen
        if not (part in without[0] and way in without[1])
    ]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed with respect to module outputs")
@pytest.mark.parametrize(("door", "part", "watch"), cases())
def test_a_watched_part_is_called(door, part, watch: Callable):
    theirs, ours = fast_pair(door, NAME, num_hidden_layers=2)
    calls = {theirs: [], ours: []}
    for model in (theirs, ours):
        watch(model.get_submodule(part), calls[model])
    assert_same_training_step(ours, theirs, NAME)
    assert calls[ours] == calls[theirs]
    assert bool(calls[ours]) == (part not in NEVER_CALLED)
    if part not in NEVER_FUSED:
        assert notes_of(ours)


@pytest.mark.parametrize("part", ["bert", "bert.encoder", LAYER, "bert.embeddings"])
@pytest.mark.parametrize("door", DOORS)
def test_a_changed_output_reaches_the_language_model_head(door, part):
    """The head reads packed rows, which a hook on the encoder that changes ``last_hidden_state`` knows nothing of."""
    theirs, ours = fast_pair(door, "BertForPreTraining")
    for model in (theirs, ours):
        forward_hook(model.get_submodule(part), [])
    assert_same_training_step(ours, theirs, "BertForPreTraining")


LANGUAGE_MODEL_HEADS = {
    "BertForMaskedLM": ("cls", "cls.predictions", "cls.predictions.transform.dense", "cls.predictions.decoder"),
    "BertForPreTraining": ("cls", "cls.predictions", "cls.predictions.transform", "cls.seq_relationship"),
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in LANGUAGE_MODEL_HEADS.items() for part in parts])
@pytest.mark.parametrize(("door", "watch"), [("class", forward_hook), ("class", backward_hook), ("accelerate", replaced_forward)])
def test_a_watched_language_model_head_is_called(door, watch, name, part):
    theirs, ours = fast_pair(door, name)
    calls = {theirs: [], ours: []}
    for model in (theirs, ours):
        watch(model.get_submodule(part), calls[model])
    assert_same_training_step(ours, theirs, name)
    assert calls[ours] == calls[theirs] != []
    assert fastbert.explain(ours).head or part == "cls.seq_relationship"


@pytest.mark.parametrize("door", DOORS)
def test_a_hook_on_a_layer_sees_padded_hidden_states(door):
    theirs, ours = fast_pair(door, NAME)
    seen = []
    ours.get_submodule(LAYER).register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output.shape)))
    ours(**inputs_for(NAME))
    assert seen == [((BATCH, LENGTH, 48), (BATCH, LENGTH, 48))]


@pytest.mark.parametrize("door", DOORS)
def test_removed_hooks_leave_nothing_behind(door):
    _, ours = fast_pair(door, NAME)
    handles = [ours.get_submodule(part).register_forward_hook(lambda *_: None) for part in PARTS]
    assert notes_of(ours)
    for handle in handles:
        handle.remove()
    assert notes_of(ours) == []


@pytest.mark.parametrize("door", DOORS)
def test_hooks_for_all_modules(door):
    theirs, ours = fast_pair(door, NAME)
    seen = {theirs: [], ours: []}
    for model, names in seen.items():
        paths = {module: path for path, module in model.named_modules()}
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_, n=names, p=paths: n.append(p.get(module)))
        try:
            model(**inputs_for(NAME))
            assert model is theirs or any("hooks for all modules" in note for note in notes_of(ours))
        finally:
            handle.remove()
    assert seen[ours] == seen[theirs]
    assert notes_of(ours) == []


@pytest.mark.parametrize("door", DOORS)
def test_a_hook_before_a_layer_sees_what_transformers_gives_it(door):
    theirs, ours = fast_pair(door, NAME)
    seen = {theirs: [], ours: []}
    for model, calls in seen.items():

        def hook(module, args, kwargs, calls=calls):
            calls.append([None if x is None else (x.shape, x.dtype) for x in args])
            assert kwargs["encoder_attention_mask"] is None and kwargs[CACHE] is None
            return tuple(None if x is None else x.contiguous() for x in args), kwargs

        model.get_submodule(LAYER).register_forward_pre_hook(hook, with_kwargs=True)
    assert_same_training_step(ours, theirs, NAME)
    assert seen[ours] == seen[theirs] != []
    assert "has hooks that see its arguments" in str(notes_of(ours))


CLASSES = [
    hf.BertEmbeddings, hf.BertSelfAttention, hf.BertAttention, hf.BertSelfOutput, hf.BertIntermediate, hf.BertOutput,
    hf.BertPooler, hf.BertLayer, hf.BertEncoder, hf.BertModel, GELUActivation, nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding,
    nn.Tanh,
]  # fmt: skip


def replace_forward(kind: type, wraps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """wraps: by a function that says of itself what the original does, its module too."""
    original = kind.forward

    def forward(*args, **kwargs):
        return scaled(original(*args, **kwargs))

    monkeypatch.setattr(kind, "forward", functools.wraps(original)(forward) if wraps else forward)


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("door", DOORS)
def test_a_forward_replaced_on_a_class_is_called(door, kind, wraps, monkeypatch):
    theirs, ours = fast_pair(door, "BertModel")
    batch = inputs_for("BertModel")
    with torch.no_grad():  # what they leave behind knows the class as it is
        ours(**batch), ours(**batch)
    replace_forward(kind, wraps, monkeypatch)
    for gradients in (torch.no_grad, torch.enable_grad):
        with gradients():
            got, expected = (model(**batch) for model in (ours, theirs))
        assert_same_on_real_tokens(got.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=2e-5, rtol=2e-5)
    assert notes_of(ours) or kind in (hf.BertPooler, nn.Tanh)
    monkeypatch.undo()
    with torch.no_grad():
        got, expected = (model(**batch).last_hidden_state for model in (ours, theirs))
    assert_same_on_real_tokens(got, expected)


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("kind", [hf.BertOnlyMLMHead, hf.BertLMPredictionHead, hf.BertPredictionHeadTransform, nn.LayerNorm])
def test_a_forward_replaced_on_a_heads_class_is_called(kind, wraps, monkeypatch):
    theirs, ours = fast_pair("class", "BertForMaskedLM")
    replace_forward(kind, wraps, monkeypatch)
    assert_same_training_step(ours, theirs, "BertForMaskedLM")
    batch = inputs_for("BertForMaskedLM")
    assert_same_on_real_tokens(*(model(**batch).logits for model in (ours, theirs)))
    assert fastbert.explain(ours).head


@pytest.mark.parametrize("door", DOORS)
def test_hidden_states_are_what_layers_are_called_with(door):
    """The first of them is what a hook of the first layer leaves."""
    theirs, ours = fast_pair(door, "BertModel")
    batch = inputs_for("BertModel")
    for model in (theirs, ours):
        model.encoder.layer[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.5, *inputs[1:]))
    expected, got = (model(**batch, output_hidden_states=True) for model in (theirs, ours))
    for found, right in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(on_real_tokens(found), on_real_tokens(right), atol=2e-5, rtol=2e-5)
    assert "hidden_states[0]" in str(fastbert.explain(ours, output_hidden_states=True))
