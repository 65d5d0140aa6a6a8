"""Every backend of ``linear_gelu`` against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbert.ops import linear_gelu
from fastbert.ops.backends import implementation
from fastbert.ops.reference import gelu_derivative

from .helpers import assert_within_budget, backend_cases, device_of, gradients, merged, rounded

SHAPES = [(1, 8, 5), (3, 7, 33), (40, 96, 130), (130, 40, 64), (70, 136, 264)]
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def inputs_for(rows, in_features, out_features, dtype, with_bias):
    x, weight = (
        torch.randn(rows, in_features, dtype=torch.float64),
        torch.randn(out_features, in_features, dtype=torch.float64),
    )
    bias = torch.randn(out_features, dtype=torch.float64) if with_bias else None
    return rounded(x, weight, bias, dtype=dtype), torch.randn(rows, out_features, dtype=torch.float64).to(dtype).double()


def plain(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


def check_gradients(backend, dtype, rows, in_features, out_features, with_bias, recompute):
    device = device_of(backend)

    def draw():
        inputs, dy = inputs_for(rows, in_features, out_features, dtype, with_bias)
        return (
            gradients(lambda *leaves: linear_gelu(*leaves, recompute=recompute, backend=backend), inputs, dy, dtype, device),
            gradients(plain, inputs, dy, dtype),
            gradients(plain, inputs, dy, torch.float64),
        )

    assert_within_budget(*merged(draw, rows * out_features), ["y", "dx", "dweight", "dbias"])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), backend_cases("linear_gelu"))
def test_with_gradients(backend, dtype, rows, in_features, out_features, with_bias, recompute):
    check_gradients(backend, dtype, rows, in_features, out_features, with_bias, recompute)


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (3, 33), (130, 264)])
@pytest.mark.parametrize(("backend", "dtype"), [case for case in backend_cases("linear_gelu") if case.values[0] != "auto"])
def test_the_bias_gradient_in_the_dtype_of_the_parameter(backend, dtype, rows, columns):
    """Of half precision under autocast the sums, in float32, are not rounded: as far from the truth as in float32."""
    device, module = device_of(backend), implementation("linear_gelu", backend)
    u, dy = (torch.randn(rows, columns, dtype=torch.float64).to(dtype) for _ in range(2))
    bias = torch.randn(columns, dtype=torch.float64).to(dtype)
    du, dbias = module.bias_gelu_backward(dy.to(device), u.to(device), bias.to(device), torch.float32)
    assert (du.dtype, dbias.dtype) == (dtype, torch.float32)
    expected = (dy.double() * gelu_derivative(u.double() + bias.double())).sum(0)
    torch.testing.assert_close(dbias.double().cpu(), expected, rtol=2e-3, atol=2e-3 * max(1, rows) ** 0.5)
    assert module.bias_gelu_backward(dy.to(device), u.to(device), None, torch.float32)[1] is None


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("linear_gelu"))
def test_recomputing_keeps_no_preactivation(backend, dtype):
    device = device_of(backend)
    x, weight = (torch.randn(n, 8, device=device, dtype=dtype, requires_grad=True) for n in (6, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_gelu(x, weight, None, recompute=True, backend=backend)
    assert sum(saved) == x.numel() + weight.numel()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), backend_cases("linear_gelu"))
def test_without_gradients(backend, dtype, rows, in_features, out_features, with_bias):
    device = device_of(backend)

    def draw():
        inputs, _ = inputs_for(rows, in_features, out_features, dtype, with_bias)
        ours = linear_gelu(*(None if t is None else t.to(device, dtype) for t in inputs), backend=backend)
        return [ours], [plain(*(None if t is None else t.to(dtype) for t in inputs))], [plain(*inputs)]

    assert_within_budget(*merged(draw, rows * out_features), ["y"])


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("linear_gelu"))
def test_no_rows(backend, dtype):
    device = device_of(backend)
    x = torch.zeros(0, 8, device=device, dtype=dtype, requires_grad=True)
    weight = torch.ones(5, 8, device=device, dtype=dtype, requires_grad=True)
    bias = torch.ones(5, device=device, dtype=dtype, requires_grad=True)
    linear_gelu(x, weight, bias, backend=backend).sum().backward()
    assert all((t.grad == 0).all() for t in (weight, bias))
    assert linear_gelu(x.detach(), weight.detach(), bias.detach(), backend=backend).shape == (0, 5)


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("linear_gelu"))
def test_a_row_of_a_wider_matrix(backend, dtype):
    """One row counts as contiguous whatever the distance to the next one would be."""
    device = device_of(backend)
    x = torch.randn(1, 20, device=device, dtype=dtype)[:, :8]
    weight = torch.randn(16, 8, device=device, dtype=dtype)
    assert torch.equal(linear_gelu(x, weight, None, backend=backend), linear_gelu(x.clone(), weight, None, backend=backend))


def test_gelu_of_extreme_values():
    x = torch.tensor([[-1e4], [-20.0], [0.0], [20.0], [1e4]], requires_grad=True)
    y = linear_gelu(x, torch.ones(1, 1), None)
    y.backward(torch.ones_like(y))
    assert torch.equal(y.detach().flatten(), torch.tensor([0.0, 0.0, 0.0, 20.0, 1e4]))
    assert torch.equal(x.grad.flatten(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"expected \(rows, in_features\) and \(out_features, in_features\)"):
        linear_gelu(torch.zeros(2, 4), torch.zeros(3, 5), None)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), expected \(3,\)"):
        linear_gelu(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(4))
