"""What our own matmul makes of its sums beside the product: GELU, its derivative, and the sums of a bias' gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbert.ops import backends, native
from fastbert.ops import linear as products
from fastbert.ops.linear import linear_parameter_gradients

from .helpers import assert_within_budget, merged
from .test_native import instruction_set  # noqa: F401 (a fixture)

REASON = backends.unavailable_reason("native")
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.usefixtures("nan_filled_memory")]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1), (13, 300, 33), (97, 7, 200), (200, 65, 1601)]


def skip_unless_multiplied(dtype) -> None:
    if not native.multiplies(dtype):
        pytest.skip(f"{native.instruction_set()} has no matmul of {dtype}")


def operands(rows, depth, columns, with_bias):
    return torch.randn(rows, depth), torch.randn(columns, depth).t() / depth**0.5, torch.randn(columns) if with_bias else None


def add(u, bias):
    return u if bias is None else u + bias


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_gelu(instruction_set, rows, depth, columns, with_bias):  # noqa: F811
    def draw():
        a, b, bias = operands(rows, depth, columns, with_bias)

        def plain(a, b, bias):
            u = a @ b
            return [u, F.gelu(add(u, bias))]

        truth = plain(a.double(), b.double(), None if bias is None else bias.double())
        return list(native.matmul_gelu(a, b, bias)), plain(a, b, bias), truth

    assert_within_budget(*merged(draw, rows * columns), ["u", "y"])


@pytest.mark.parametrize("gelu_wanted", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_gelu_gradient(instruction_set, rows, depth, columns, with_bias, gelu_wanted):  # noqa: F811
    def draw():
        a, b, bias = operands(rows, depth, columns, with_bias)
        u = 2 * torch.randn(rows, columns)

        def plain(a, b, u, bias):
            leaf = u.clone().requires_grad_()
            y = F.gelu(add(leaf, bias))
            return [*torch.autograd.grad(y, leaf, a @ b), y.detach() if gelu_wanted else None]

        truth = plain(a.double(), b.double(), u.double(), None if bias is None else bias.double())
        return list(native.matmul_gelu_gradient(a, b, u, bias, gelu_wanted)), plain(a, b, u, bias), truth

    assert_within_budget(*merged(draw, rows * columns), ["du", "y"])


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 1, 1), (1, 37, 5), (5, 1, 40), (97, 300, 33), (33, 7, 1601), (300, 5001, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_sums(instruction_set, dtype, rows, depth, columns):  # noqa: F811
    """The gradients of a linear layer's weight and bias, dy^T x and the sums of dy's columns; one row, and a long depth."""
    skip_unless_multiplied(dtype)

    def draw():
        dy, x = torch.randn(depth, rows).to(dtype) + 0.5, torch.randn(depth, columns).to(dtype)
        product, sums = native.matmul_and_row_sums(dy.t(), x)
        assert sums.dtype == torch.float32
        plain = [dy.t() @ x, dy.float().sum(0)]
        return [product, sums], plain, [dy.double().t() @ x.double(), dy.double().sum(0)]

    assert_within_budget(*merged(draw, rows * columns), ["dweight", "dbias"])


def test_row_sums_of_any_strides():
    for dy in (
        torch.randn(40, 31)[:, ::2],
        torch.randn(16, 40).t(),
        torch.randn(1, 16).expand(40, 16),
        torch.randn(40, 62)[:, 5:21],
    ):
        x = torch.randn(40, 7)
        product, sums = native.matmul_and_row_sums(dy.t(), x)
        torch.testing.assert_close(product, dy.t() @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sums, dy.sum(0), rtol=1e-4, atol=1e-4)


def test_nothing_depends_on_the_number_of_threads():
    threads, runs = torch.get_num_threads(), []
    a, b, bias = operands(500, 70, 300, True)
    u, dy = torch.randn(500, 300), torch.randn(500, 40)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results = (native.matmul_gelu(a, b, bias), native.matmul_gelu_gradient(a, b, u, bias, True))
            halves = native.matmul_and_row_sums(dy.bfloat16().t(), u.bfloat16()) if native.multiplies(torch.bfloat16) else ()
            runs.append([t for group in (*results, native.matmul_and_row_sums(dy.t(), u), halves) for t in group])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in runs[1:] for x, y in zip(runs[0], other, strict=True))


def test_gelu_is_not_for_bfloat16():
    a, b, bias = (t.bfloat16() for t in operands(3, 4, 5, True))
    with pytest.raises(ValueError, match="this instruction set has no matmul of this dtype"):
        native.matmul_gelu(a, b, bias)


def test_what_is_not_finite_stays_in_its_column():
    dy = torch.randn(70, 40)
    dy[3, 5], dy[9, 20] = float("inf"), float("nan")
    _, sums = native.matmul_and_row_sums(dy.t(), torch.randn(70, 9))
    assert sums[5] == float("inf") and sums[20].isnan() and sums[[i for i in range(40) if i not in (5, 20)]].isfinite().all()


@pytest.mark.parametrize("library", ["fastbert", "torch"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_of_parameters(wanted, library, monkeypatch):
    monkeypatch.setattr(products, "choice", lambda *_: library)
    dy, x = torch.randn(30, 12), torch.randn(30, 9)
    gradients = linear_parameter_gradients(dy, x, *wanted)
    for got, expected, needed in zip(gradients, (dy.t() @ x, dy.sum(0)), wanted, strict=True):
        assert (got is None) == (not needed)
        if needed:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
