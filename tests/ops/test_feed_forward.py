"""``feed_forward`` against float64, and what it keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from fastbert.ops import backends
from fastbert.ops import linear as products
from fastbert.ops.feed_forward import feed_forward

from .helpers import assert_within_budget, gradients, merged, rounded

REASON = backends.unavailable_reason("native")
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"it is linear_gelu and linear then: {REASON}"),
    pytest.mark.usefixtures("nan_filled_memory"),
]
NAMES = ["y", "dx", "dweight", "dbias", "dout_weight"]


def plain(x, weight, bias, out_weight):
    return F.linear(F.gelu(F.linear(x, weight, bias)), out_weight)


def inputs_for(rows, width, dtype, with_bias=True):
    inputs = [
        torch.randn(*shape, dtype=torch.float64) for shape in ((rows, width), (3 * width, width), (3 * width,), (width, 3 * width))
    ]
    if not with_bias:
        inputs[2] = None
    return rounded(*inputs, dtype=dtype), torch.randn(rows, width, dtype=torch.float64).to(dtype).double()


@pytest.mark.parametrize("library", ["fastbert", "torch"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (40, 33), (130, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_gradients(dtype, rows, width, with_bias, library, monkeypatch):
    """Whichever multiplies: our own applies GELU and its derivative to the sums, behind another's they are passes of their own."""
    if library not in products.candidates("forward", dtype):
        pytest.skip(f"{library} does not multiply {dtype} on this CPU")
    monkeypatch.setattr(products, "choice", lambda *_: library)

    def draw():
        inputs, dy = inputs_for(rows, width, dtype, with_bias)
        return tuple(
            gradients(function, inputs, dy, number)
            for function, number in ((feed_forward, dtype), (plain, dtype), (plain, torch.float64))
        )

    assert_within_budget(*merged(draw, rows * width), NAMES)


def test_under_autocast():
    """As close to float64 as torch's own operators under autocast, with gradients in the parameters' dtype."""
    inputs, dy = inputs_for(40, 32, torch.bfloat16)

    def autocast(function):
        def run(*leaves):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*leaves)

        return run

    results = [gradients(autocast(function), inputs, dy, torch.float32) for function in (feed_forward, plain)]
    assert results[0][0].dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in results[0][1:])
    truth = gradients(plain, inputs, dy, torch.float64)
    # What is computed in bfloat16 has its rounding, whatever it is stored in.
    ours, theirs = ([t.to(torch.bfloat16) for t in result] for result in results)
    assert_within_budget(ours, theirs, truth, NAMES)


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_one_gradient_alone(wanted):
    inputs, dy = inputs_for(20, 8, torch.float32)
    leaves = [t.float().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    feed_forward(*leaves).backward(dy.float())
    expected = gradients(plain, inputs, dy, torch.float32)[1 + wanted]
    assert torch.allclose(leaves[wanted].grad, expected, rtol=1e-4, atol=1e-4)
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != wanted)


def test_one_wide_tensor_is_kept():
    inputs, _ = inputs_for(50, 16, torch.float32)
    leaves = [t.float().requires_grad_() for t in inputs]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        feed_forward(*leaves)
    assert sorted(t.numel() for t in saved) == sorted([*(leaf.numel() for leaf in leaves), 50 * 48])


def test_without_gradients_nothing_is_kept():
    inputs, _ = inputs_for(20, 8, torch.float32)
    leaves = [t.float().requires_grad_() for t in inputs]
    with torch.no_grad():
        assert torch.allclose(feed_forward(*leaves), plain(*leaves), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert feed_forward(*leaves).grad_fn is None


def test_no_rows():
    leaves = [torch.ones(shape, requires_grad=True) for shape in ((0, 4), (8, 4), (8,), (3, 8))]
    feed_forward(*leaves).sum().backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


def test_as_an_operator():
    inputs, _ = inputs_for(6, 8, torch.float32)
    leaves = [t.float().requires_grad_() for t in inputs]
    opcheck(torch.ops.fastbert.feed_forward.default, tuple(leaves))
    y = feed_forward(*leaves)
    (dx,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dx.sum().backward()


def test_compiled_it_is_the_two_operators():
    """In one graph, with the same results."""
    inputs, dy = inputs_for(6, 8, torch.float32)
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        gradients(compiled, inputs, dy, torch.float32), gradients(feed_forward, inputs, dy, torch.float32), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
