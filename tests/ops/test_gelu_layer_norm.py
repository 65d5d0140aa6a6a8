"""Every backend of ``gelu_layer_norm`` against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbert.ops import gelu_layer_norm

from .helpers import SMALLEST, assert_within_budget, backend_cases, device_of, gradients, merged, rounded, skip_unless_width_suits

EPS = 1e-12
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def plain(x, bias, weight, ln_bias):
    """As transformers' BertPredictionHeadTransform spells it, in x's dtype."""
    return F.layer_norm(F.gelu(x if bias is None else x + bias), (x.shape[1],), weight, ln_bias, EPS)


SHAPES = [(1, 8), (3, 7), (37, 96), (70, 40), (5, 768), (2, 1000)]


# How rows and columns are cut into blocks has nothing to do with what is done to an element, as bias and scale say.
@pytest.mark.parametrize(
    ("rows", "hidden", "with_bias", "scale"),
    [(*shape, *options) for shape in SHAPES for options in ((True, 6.0), (False, 1.0))]
    + [(37, 96, True, 1.0), (37, 96, False, 6.0)],
)
@pytest.mark.parametrize(("backend", "dtype"), backend_cases("gelu_layer_norm"))
def test_shapes(backend, dtype, rows, hidden, with_bias, scale):
    skip_unless_width_suits(backend, hidden)
    device = device_of(backend)

    def draw():
        x = torch.randn(rows, hidden, dtype=torch.float64) * scale
        bias, weight, ln_bias = (torch.randn(hidden, dtype=torch.float64) for _ in range(3))
        inputs = rounded(x, bias if with_bias else None, weight, ln_bias, dtype=dtype)
        dy = torch.randn(rows, hidden, dtype=torch.float64).to(dtype).double()
        return (
            gradients(lambda *leaves: gelu_layer_norm(*leaves, EPS, backend=backend), inputs, dy, dtype, device),
            gradients(plain, inputs, dy, dtype),
            gradients(plain, inputs, dy, torch.float64),
        )

    assert_within_budget(*merged(draw, rows * hidden), ["y", "dx", "dbias", "dweight", "dln_bias"])


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("gelu_layer_norm"))
def test_extreme_values(backend, dtype):
    """Far out GELU is x or 0, and its derivative 1 or 0: no NaN from inf * 0 or exp's underflow."""
    device = device_of(backend)
    x = torch.tensor([[-6e4, -100.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 6e4]], device=device, dtype=dtype, requires_grad=True)
    weight, ln_bias = torch.ones(8, device=device, dtype=dtype), torch.zeros(8, device=device, dtype=dtype)
    y = gelu_layer_norm(x, None, weight, ln_bias, EPS, backend=backend)
    y.backward(torch.ones_like(y))
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("gelu_layer_norm"))
def test_no_rows(backend, dtype):
    device = device_of(backend)
    x = torch.zeros(0, 16, device=device, dtype=dtype, requires_grad=True)
    bias, weight, ln_bias = (torch.ones(16, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gelu_layer_norm(x, bias, weight, ln_bias, EPS, backend=backend).sum().backward()
    assert all((t.grad.double().abs() < SMALLEST).all() for t in (bias, weight, ln_bias))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(4,\)"):
        gelu_layer_norm(torch.zeros(2, 4), torch.zeros(3), torch.ones(4), torch.zeros(4), EPS)
