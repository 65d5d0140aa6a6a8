"""Weights that autocast has in half precision, converted for all layers at once: the bits of one by one, and never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastbert.model import encoder, in_half
from fastbert.model.packing import Packing

from ..ops.helpers import DEVICE
from .test_trained_layer import assert_same, model_of, results

pytestmark = pytest.mark.gpu
DTYPE = torch.bfloat16


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast(DEVICE, DTYPE, enabled=enabled)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(model.bert.encoder.layer)


def rows_for(model: nn.Module) -> torch.Tensor:
    return torch.randn(7, model.config.hidden_size, device=DEVICE)


@pytest.fixture
def convert_everywhere(monkeypatch: pytest.MonkeyPatch) -> list[Packing]:
    """On a CPU, too; the packings of the forward passes."""
    packings = []

    def convert_for(layers, x, packing):
        in_half.convert_if_wanted(layers, x, packing)
        packings.append(packing)

    monkeypatch.setattr(encoder, "convert_for", convert_for)
    return packings


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 20, "intermediate_size": 13}])
def test_they_are_the_parameters_rounded(sizes):
    model = model_of(**sizes)
    with autocast():
        found = in_half.converted(layers_of(model), rows_for(model))
    assert list(found) == layers_of(model)
    for layer, made in found.items():
        attention = layer.attention.self
        projections = attention.query, attention.key, attention.value
        expected = (
            torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections]),
            layer.attention.output.dense.weight, layer.intermediate.dense.weight, layer.intermediate.dense.bias,
            layer.output.dense.weight,
        )  # fmt: skip
        for tensor, parameter in zip(made.tensors, expected, strict=True):
            assert torch.equal(tensor, parameter.to(DTYPE)) and not tensor.requires_grad
            assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_has_the_same_bits(dropout, convert_everywhere, monkeypatch):
    model = model_of(dropout)
    found = results(model, autocast=True)
    (packing,) = convert_everywhere
    assert packing.in_half == {}  # every layer has taken its own
    monkeypatch.setattr(encoder, "convert_for", lambda *_: None)
    assert_same(found, results(model, autocast=True))


def test_copies_of_a_layer_take_theirs(convert_everywhere, monkeypatch):
    model = model_of(0.0)
    model.bert.encoder.layer[2] = copy.deepcopy(model.bert.encoder.layer[1])
    taken, take = [], Packing.take_in_half
    monkeypatch.setattr(Packing, "take_in_half", lambda *arguments: taken.append(take(*arguments)) or taken[-1])
    results(model, autocast=True)
    (packing,) = convert_everywhere
    assert packing.in_half == {} and len(taken) == 3 and None not in taken


def test_what_has_changed_since_is_converted_again(convert_everywhere, monkeypatch):
    """By a hook of the layer before, in the middle of a forward pass."""
    model = model_of(0.0)
    first, second, _ = layers_of(model)

    def negate(*_):
        with torch.no_grad():
            second.output.dense.weight.neg_()

    first.register_forward_hook(negate)
    found = results(model, autocast=True)
    negate()  # as it was
    monkeypatch.setattr(encoder, "convert_for", lambda *_: None)
    assert_same(found, results(model, autocast=True))


def test_a_layer_takes_them_once():
    model = model_of()
    layer, packing = layers_of(model)[0], Packing.from_mask(None, (1, 7), torch.device(DEVICE))
    with autocast():
        packing.in_half = in_half.converted([layer], rows_for(model))
    assert packing.take_in_half(layer, DTYPE) is not None
    assert packing.take_in_half(layer, DTYPE) is None


def test_of_another_dtype_they_are_not_taken():
    model = model_of()
    layer, packing = layers_of(model)[0], Packing.from_mask(None, (1, 7), torch.device(DEVICE))
    with autocast():
        packing.in_half = in_half.converted([layer], rows_for(model))
    assert packing.take_in_half(layer, torch.float16) is None


def test_which_layers_have_some():
    """Not those that are frozen, that multiply something else than their parameters, or whose parameters are no float32."""
    model = model_of(num_hidden_layers=5)
    layers = layers_of(model)
    layers[0].requires_grad_(False)
    layers[1].attention.self.key.register_forward_hook(lambda *_: None)
    layers[2].bfloat16()
    layers[3].output.dense = nn.Sequential(layers[3].output.dense)
    with autocast():
        found = in_half.converted(layers, rows_for(model))
    assert list(found) == layers[4:]


def test_when_they_are_wanted():
    x = torch.randn(2, 4, device=DEVICE)
    with autocast():
        assert in_half.is_wanted(x)
        assert not in_half.is_wanted(x.bfloat16())
        with torch.no_grad():
            assert not in_half.is_wanted(x)
    assert not in_half.is_wanted(x)


def test_a_cpu_converts_as_it_goes():
    model = model_of().cpu()
    packing = Packing.from_mask(None, (1, 7), torch.device("cpu"))
    with torch.autocast("cpu", DTYPE):
        in_half.convert_for(layers_of(model), torch.randn(7, model.config.hidden_size), packing)
    assert packing.in_half == {}
