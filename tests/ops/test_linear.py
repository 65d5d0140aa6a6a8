"""``linear`` and its three products, by every library that there is to choose from."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbert.ops import backends
from fastbert.ops import linear as products
from fastbert.ops.linear import linear, linear_dweight, linear_dweight_into, linear_dx, linear_forward, linear_forward_into

from .helpers import assert_within_budget, gradients, merged
from .test_linear_gelu import SHAPES, inputs_for

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
CHOICES = [
    pytest.param(product, dtype, name, id=f"{product}-{str(dtype).removeprefix('torch.')}-{name}")
    for product in products.PRODUCTS
    for dtype in products.DTYPES
    for name in products.candidates(product, dtype)
]
no_native = pytest.mark.skipif(backends.unavailable_reason("native") is not None, reason="the C++ kernels are not built")


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("dtype", products.DTYPES)
def test_linear(dtype, rows, in_features, out_features, with_bias):
    def draw():
        inputs, dy = inputs_for(rows, in_features, out_features, dtype, with_bias)
        return tuple(
            gradients(function, inputs, dy, number)
            for function, number in ((linear, dtype), (F.linear, dtype), (F.linear, torch.float64))
        )

    assert_within_budget(*merged(draw, rows * out_features), ["y", "dx", "dweight", "dbias"])


@pytest.mark.parametrize(("product", "dtype", "name"), CHOICES)
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 8, 5), (40, 96, 130), (270, 300, 64)])
def test_every_candidate_is_right(product, dtype, name, rows, in_features, out_features, monkeypatch):
    monkeypatch.setattr(products, "choice", lambda *_: name)

    def draw():
        (x, weight, bias), dy = inputs_for(rows, in_features, out_features, dtype, True)
        ours, plain = {
            "forward": (lambda x, w, b, dy: linear_forward(x, w, b), lambda x, w, b, dy: F.linear(x, w, b)),
            "dx": (lambda x, w, b, dy: linear_dx(dy, w), lambda x, w, b, dy: dy @ w),
            "dweight": (lambda x, w, b, dy: linear_dweight(dy, x), lambda x, w, b, dy: dy.t() @ x),
        }[product]
        operands = [t.to(dtype) for t in (x, weight, bias, dy)]
        return [ours(*operands)], [plain(*operands)], [plain(x, weight, bias, dy)]

    assert_within_budget(*merged(draw, rows * out_features), [product])


@pytest.mark.parametrize(("product", "dtype", "name"), [c for c in CHOICES if c.values[0] != "dx"])
def test_results_in_given_memory(product, dtype, name, monkeypatch):
    """A block of the logits has rows further apart than it is wide."""
    monkeypatch.setattr(products, "choice", lambda *_: name)
    rows, in_features, out_features = 30, 16, 41
    x, weight, dy = (torch.randn(shape).to(dtype) for shape in ((rows, in_features), (out_features, in_features), (rows, 64)))
    if product == "forward":
        got, expected = linear_forward_into(torch.empty(rows, 64, dtype=dtype)[:, :out_features], x, weight), x @ weight.t()
    else:
        got = torch.empty(out_features, in_features, dtype=dtype)
        linear_dweight_into(got, dy[:, :out_features], x)
        expected = dy[:, :out_features].t() @ x
    torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@no_native
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 1, 1), (13, 300, 33), (29, 7, 100), (14, 16, 32), (75, 513, 65)])
def test_matmul_of_operands_as_they_lie(rows, depth, columns, transposed):
    from fastbert.ops import native

    def operand(a, b, transpose):
        return torch.randn(b, a).t() if transpose else torch.randn(a, b)

    def draw():
        a, b, bias = operand(rows, depth, transposed[0]), operand(depth, columns, transposed[1]), torch.randn(columns)
        return [native.matmul(a, b, bias)], [torch.addmm(bias, a, b)], [torch.addmm(bias.double(), a.double(), b.double())]

    assert_within_budget(*merged(draw, rows * columns), ["c"])


@no_native
def test_matmul_takes_any_strides():
    from fastbert.ops import native

    a, b = torch.randn(20, 2, 30)[:, 1], torch.randn(60, 80)[::2, ::2]
    torch.testing.assert_close(native.matmul(a, b), a @ b)
    torch.testing.assert_close(native.matmul(a[:1].expand(5, 30), b), a[:1].expand(5, 30) @ b)


@no_native
def test_matmul_on_every_instruction_set():
    from fastbert.ops import native

    before = native.instruction_set()
    a, b, bias = torch.randn(45, 290), torch.randn(70, 290).t(), torch.randn(70)
    try:
        for name in native.supported_instruction_sets():
            native.set_instruction_set(name)
            torch.testing.assert_close(native.matmul(a, b, bias), torch.addmm(bias, a, b), rtol=1e-5, atol=1e-4)
    finally:
        native.set_instruction_set(before)


@no_native
@pytest.mark.parametrize(("rows", "depth", "columns"), [(500, 300, 200), (20, 700, 900), (5, 40, 30)])
def test_matmul_does_not_depend_on_the_number_of_threads(rows, depth, columns):
    from fastbert.ops import native

    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(native.matmul(a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_without_onednn_torch_multiplies(monkeypatch):
    monkeypatch.setattr(products, "onednn_unavailable_reason", lambda: "for a test")
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert not products.is_ours(x, weight)
    assert torch.equal(linear_forward(x, weight, None), F.linear(x, weight))
    assert torch.equal(linear_dx(x @ weight.t(), weight), x @ weight.t() @ weight)
