"""``int8_linear`` on every backend: integers are exact, what follows them is held against float64; rounding against plain float."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from fastbert.ops import backends, int8_linear, native, reference
from fastbert.ops.int8_linear import quantize_weight

from .helpers import NAMES, assert_within_budget, backend_cases, device_of, merged

SHAPES = [(1, 8, 5), (3, 1, 9), (3, 7, 33), (40, 96, 130), (130, 40, 64), (300, 136, 264)]
pytestmark = pytest.mark.usefixtures("nan_filled_memory")
CASES = [case for case in backend_cases("int8_linear") if case.values[0] in ("reference", "native")]


def inputs_for(rows, in_features, out_features, dtype, with_bias, device="cpu"):
    x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(out_features) if with_bias else None
    return [None if t is None else t.to(device) for t in (x, *quantize_weight(torch.randn(out_features, in_features)), bias)]


def as_linear(x, weight, weight_scale, bias, activation, dtype):
    """The Linear that the op stands for, in ``dtype``, on the values that x and the weights are rounded to."""
    largest = x.float().abs().amax(1, keepdim=True)
    q = (x.float() * (torch.tensor(127.0) / largest)).round()
    x, weight = q.double() * (largest.double() / 127), weight * weight_scale.double()[:, None]
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return F.gelu(y) if activation == "gelu" else y


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_against_float64(backend, dtype, rows, in_features, out_features, with_bias, activation):
    device = device_of(backend)

    def draw():
        inputs = inputs_for(rows, in_features, out_features, dtype, with_bias)
        ours = int8_linear(*(None if t is None else t.to(device) for t in inputs), activation=activation, backend=backend)
        return [ours], *([as_linear(*inputs, activation, precision)] for precision in (dtype, torch.float64))

    assert_within_budget(*merged(draw, rows * out_features), ["y"])


@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 8, 5), (40, 96, 130), (257, 768, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_native_takes_the_integers_of_the_reference(dtype, rows, in_features, out_features):
    """A half rounded the other way would move a result by a step, 1/127 of the row; the order of float operations by 1e-7."""
    if reasons := backends.not_supported_reasons("native", "int8_linear", "cpu", dtype):
        pytest.skip("; ".join(reasons))
    x, weight, scale, _ = inputs_for(rows, in_features, out_features, dtype, False)
    x *= torch.logspace(-3, 3, rows)[:, None]
    # Many values at exactly half a step: x * (127 / 127) is x.
    x[0] = torch.randint(-126, 126, (in_features,)) + 0.5
    x[0, 0] = 127.0
    ours, expected = (int8_linear(x, weight, scale, None, backend=b).double() for b in ("native", "reference"))
    size = expected.abs().amax(1, keepdim=True)
    assert ((ours - expected).abs() / size).max() <= (2e-7 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_rounding_is_half_to_even_and_symmetric():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])
    q, step = reference.quantize_rows(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]
    assert step.item() == 1.0
    weight, scale = quantize_weight(torch.tensor([[-254.0, 1.0, 3.0, 5.0], [0.0, 0.0, 0.0, 0.0]]))
    assert weight.tolist() == [[-127, 0, 2, 2], [0, 0, 0, 0]]
    assert scale.tolist() == [2.0, 0.0]


def test_rows_without_a_step():
    x = torch.tensor([[0.0, 0.0], [1e-40, 0.0], [1.0, torch.inf], [1.0, torch.nan]])
    q, step = reference.quantize_rows(x)
    assert q[:2].tolist() == [[0, 0], [0, 0]]
    assert step[0] == 0 and step[1] < 1e-41 and step[2:].isnan().all()


def test_quantized_weights_are_within_half_a_step():
    w = torch.randn(50, 300) * torch.logspace(-30, 30, 50)[:, None]
    weight, scale = quantize_weight(w)
    assert weight.dtype == torch.int8 and scale.dtype == torch.float32
    assert (weight.abs().amax(1) == 127).all()
    assert ((weight.double() * scale.double()[:, None] - w.double()).abs() <= 0.5001 * scale.double()[:, None]).all()


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_close_to_a_linear(backend, dtype, activation):
    """Each factor is off by up to half a step of 1/127: about 1% of the result's standard deviation."""
    device = device_of(backend)
    x, w, bias = torch.randn(64, 256, dtype=dtype), torch.randn(96, 256), torch.randn(96)
    ours = int8_linear(*(t.to(device) for t in (x, *quantize_weight(w), bias)), activation=activation, backend=backend)
    expected = F.linear(x.double(), w.double(), bias.double())
    expected = F.gelu(expected) if activation == "gelu" else expected
    error = (ours.cpu().double() - expected).square().mean().sqrt() / expected.std()
    assert 0.002 < error < 0.02


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_zeros_and_tiny_values_give_the_bias(backend, dtype, activation):
    device = device_of(backend)
    _, weight, scale, bias = inputs_for(1, 16, 24, dtype, True, device)
    x = torch.zeros(4, 16, dtype=dtype, device=device)
    x[1, 3] = torch.finfo(dtype).smallest_normal if dtype != torch.float16 else 0.0
    x[2] = -0.0
    x[3, 5] = 1e-40 if dtype != torch.float16 else 0.0
    expected = bias.to(dtype) if activation == "none" else F.gelu(bias).to(dtype)
    y = int8_linear(x, weight, scale, bias, activation=activation, backend=backend)
    torch.testing.assert_close(y, expected.expand(4, -1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_what_is_not_finite_makes_its_row_nan_and_no_other(backend, dtype, activation, value):
    device = device_of(backend)
    x, weight, scale, bias = inputs_for(40, 32, 24, dtype, True, device)
    expected = int8_linear(x, weight, scale, bias, activation=activation, backend=backend)
    x[7, 31] = value
    y = int8_linear(x, weight, scale, bias, activation=activation, backend=backend)
    assert y[7].isnan().all()
    others = torch.arange(40, device=device) != 7
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_largest_sums_are_exact(backend, sign):
    """127 * 127 * 3072 fits 16 bits nowhere and 24 bits of float32 neither."""
    weight = torch.full((40, 3072), 127, dtype=torch.int8)
    y = int8_linear(torch.full((5, 3072), sign * 127.0), weight, torch.ones(40), None, backend=backend)
    assert (y.double() == float(torch.tensor(sign * 127.0 * 127 * 3072))).all()


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_the_largest_floats(backend, dtype):
    device = device_of(backend)
    x = torch.full((2, 8), 0.99 * torch.finfo(dtype).max, dtype=dtype, device=device)
    weight, scale = quantize_weight(torch.eye(8, device=device))
    y = int8_linear(x, weight, scale, None, backend=backend)
    torch.testing.assert_close(y.double(), x.double(), atol=0, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_rows_do_not_depend_on_the_rows_beside_them(backend, dtype):
    device = device_of(backend)
    x, weight, scale, bias = inputs_for(300, 64, 48, dtype, True, device)
    together = int8_linear(x, weight, scale, bias, activation="gelu", backend=backend)
    for row in (0, 127, 128, 299):
        alone = int8_linear(x[row : row + 1], weight, scale, bias, activation="gelu", backend=backend)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_no_rows_and_rows_of_a_wider_matrix(backend, dtype):
    device = device_of(backend)
    x, weight, scale, bias = inputs_for(9, 32, 24, dtype, True, device)
    assert int8_linear(x[:0], weight, scale, bias, backend=backend).shape == (0, 24)
    wide = torch.randn(9, 70, device=device).to(dtype)
    wide[:, 3:35] = x
    assert torch.equal(
        int8_linear(wide[:, 3:35], weight, scale, bias, backend=backend), int8_linear(x, weight, scale, bias, backend=backend)
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_results_do_not_depend_on_the_number_of_threads(backend):
    inputs, threads, results = inputs_for(500, 256, 384, torch.float32, True), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(int8_linear(*inputs, activation="gelu", backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_opcheck(backend):
    for activation in ("none", "gelu"):
        opcheck(torch.ops.fastbert.int8_linear.default, (*inputs_for(5, 8, 6, torch.float32, True), activation, backend))


def test_compiles_without_graph_breaks():
    inputs = inputs_for(5, 8, 6, torch.float32, True)
    compiled = torch.compile(lambda *a: int8_linear(*a, activation="gelu") * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), int8_linear(*inputs, activation="gelu") * 2)


def test_under_autocast_results_have_its_dtype():
    x, *others = inputs_for(5, 8, 6, torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        y = int8_linear(x, *others)
    assert torch.equal(y, int8_linear(x.bfloat16(), *others))


def test_a_gradient_is_refused():
    x, *others = inputs_for(5, 8, 6, torch.float32, True)
    with pytest.raises(RuntimeError, match=r"has no derivative.*under torch.no_grad\(\)"):
        int8_linear(x.requires_grad_(), *others)
    with torch.no_grad():
        assert not int8_linear(x, *others).requires_grad


def test_bad_input_is_named():
    x, weight, scale, bias = inputs_for(2, 4, 3, torch.float32, True)
    with pytest.raises(ValueError, match=r"expected \(rows, in_features\) and \(out_features, in_features\)"):
        int8_linear(torch.zeros(2, 5), weight, scale, bias)
    with pytest.raises(ValueError, match=r"weight_scale has shape \(2,\), expected \(3,\)"):
        int8_linear(x, weight, scale[:2], bias)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), expected \(3,\)"):
        int8_linear(x, weight, scale, torch.zeros(4))
    with pytest.raises(ValueError, match="weight is torch.float32, expected torch.int8"):
        int8_linear(x, weight.float(), scale, bias)
    with pytest.raises(ValueError, match="weight_scale is torch.bfloat16, expected torch.float32"):
        int8_linear(x, weight, scale.bfloat16(), bias)
    with pytest.raises(ValueError, match="activation is 'relu', expected one of"):
        int8_linear(x, weight, scale, bias, activation="relu")
    with pytest.raises(ValueError, match="in_features is 0, expected 1 to 133144"):
        int8_linear(torch.zeros(2, 0), torch.zeros(3, 0, dtype=torch.int8), scale, bias)


def test_a_matmul_that_saturates_is_not_used(monkeypatch):
    """What CPUs without VNNI do: pairs of products are added up in 16 bits."""

    def saturating(a, b, out=None):
        return (a.double() @ b.double()).clamp(-32768, 32767).to(torch.int32)

    native.int8_unavailable_reasons.cache_clear()
    backends.select.cache_clear()
    try:
        monkeypatch.setattr(torch, "_int_mm", saturating)
        assert backends.select("int8_linear", "auto", "cpu", torch.float32) == "reference"
        with pytest.raises(RuntimeError, match="cannot run int8_linear: torch's int8 matmul saturates on this CPU"):
            int8_linear(*inputs_for(2, 4, 3, torch.float32, True), backend="native")
    finally:
        native.int8_unavailable_reasons.cache_clear()
        backends.select.cache_clear()
