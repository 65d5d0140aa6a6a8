"""Every backend of ``add_layer_norm`` against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbert.ops import add_layer_norm, reference

from .helpers import (
    SMALLEST,
    assert_within_budget,
    backend_cases,
    device_of,
    gradients,
    merged,
    new_seed,
    rounded,
    skip_unless_width_suits,
)

EPS = 1e-12
NAMES = ["y", "dx", "dbias", "dresidual", "dweight", "dln_bias"]
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def plain(x, bias, residual, weight, ln_bias, dropout_p=0.0, seed=None, stream=0):
    """As transformers' BertOutput spells it, in x's dtype."""
    x = x if bias is None else x + bias
    if dropout_p > 0.0:
        x = torch.where(reference.row_keep(x, dropout_p, seed, stream), x * reference.dropout_scale(dropout_p), 0.0)
    return F.layer_norm(x + residual, (x.shape[1],), weight, ln_bias, EPS)


def check(backend, dtype, rows, hidden, dropout_p=0.0, with_bias=True, scale=1.0, offset=0.0) -> None:
    skip_unless_width_suits(backend, hidden)
    device, seed = device_of(backend), new_seed()

    def ours(*leaves):
        return add_layer_norm(*leaves, EPS, dropout_p=dropout_p, seed=seed.to(device), stream=5, backend=backend)

    def spelled_out(*leaves):
        return plain(*leaves, dropout_p, seed, 5)

    def draw():
        x, residual = (torch.randn(rows, hidden, dtype=torch.float64) * scale + offset for _ in range(2))
        bias, weight, ln_bias = (torch.randn(hidden, dtype=torch.float64) for _ in range(3))
        inputs = rounded(x, bias if with_bias else None, residual, weight, ln_bias, dtype=dtype)
        dy = torch.randn(rows, hidden, dtype=torch.float64).to(dtype).double()
        return (
            gradients(ours, inputs, dy, dtype, device),
            gradients(spelled_out, inputs, dy, dtype),
            gradients(spelled_out, inputs, dy, torch.float64),
        )

    assert_within_budget(*merged(draw, rows * hidden), NAMES)


SHAPES = [(1, 8), (3, 7), (37, 96), (130, 40), (5, 768), (2, 1000)]


# How rows and columns are cut into blocks has nothing to do with what is done to an element. The bias has to do with dropout (it is
# dropped, too, and so is its gradient), at any shape.
@pytest.mark.parametrize(
    ("rows", "hidden", "with_bias", "dropout_p"),
    [(*shape, *options) for shape in SHAPES for options in ((True, 0.2), (False, 0.0))]
    + [(37, 96, True, 0.0), (37, 96, False, 0.2)],
)
@pytest.mark.parametrize(("backend", "dtype"), backend_cases("add_layer_norm"))
def test_shapes(backend, dtype, rows, hidden, with_bias, dropout_p):
    check(backend, dtype, rows, hidden, dropout_p, with_bias)


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("add_layer_norm"))
def test_rows_far_from_zero(backend, dtype):
    """A variance computed as E[x^2] - E[x]^2 would have no correct digit here."""
    check(backend, dtype, 9, 64, offset=50.0)


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("add_layer_norm"))
def test_no_rows(backend, dtype):
    device = device_of(backend)
    x, residual = (torch.zeros(0, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    bias, weight, ln_bias = (torch.ones(16, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    y = add_layer_norm(x, bias, residual, weight, ln_bias, EPS, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 16)
    assert all((t.grad.double().abs() < SMALLEST).all() for t in (bias, weight, ln_bias))


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("add_layer_norm"))
def test_constant_rows_are_finite(backend, dtype):
    """Variance 0: BERT's eps of 1e-12 is all that stands between the row and a division by 0."""
    device = device_of(backend)
    x = torch.full((3, 48), 2.0, device=device, dtype=dtype)
    weight, ln_bias = torch.ones(48, device=device, dtype=dtype), torch.full((48,), 0.5, device=device, dtype=dtype)
    y = add_layer_norm(x, None, torch.zeros_like(x), weight, ln_bias, EPS, backend=backend)
    assert torch.equal(y, torch.full_like(y, 0.5))


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("add_layer_norm"))
def test_dropout_mask_is_the_references_bit_for_bit(backend, dtype):
    """The gradient of x is 0 exactly where x was dropped."""
    device, rows, hidden = device_of(backend), 33, 88 if backend == "cuda" else 83
    seed = new_seed()
    x = torch.randn(rows, hidden, device=device, dtype=dtype, requires_grad=True)
    weight, ln_bias = torch.rand(hidden, device=device, dtype=dtype) + 1, torch.zeros(hidden, device=device, dtype=dtype)
    y = add_layer_norm(
        x, None, torch.zeros_like(x), weight, ln_bias, EPS, dropout_p=0.35, seed=seed.to(device), stream=11, backend=backend
    )
    y.backward(torch.randn_like(y))
    keep = reference.row_keep(torch.zeros(rows, hidden), 0.35, seed, 11)
    assert torch.equal(x.grad.cpu().double().abs() > SMALLEST, keep)


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("add_layer_norm"))
def test_a_probability_so_small_that_nothing_is_dropped(backend, dtype):
    check(backend, dtype, 5, 40, dropout_p=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"expected \(rows, hidden\)"),
        ({"residual": torch.zeros(3, 4)}, r"residual has shape \(3, 4\), expected \(2, 4\)"),
        ({"weight": torch.zeros(5)}, r"weight has shape \(5,\), expected \(4,\)"),
        ({"dropout_p": 0.1}, "needs a seed"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "x": torch.zeros(2, 4), "bias": None, "residual": torch.zeros(2, 4), "weight": torch.ones(4), "ln_bias": torch.zeros(4),
        "eps": EPS,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**{**arguments, **change})
