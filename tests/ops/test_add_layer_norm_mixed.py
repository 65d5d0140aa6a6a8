"""``add_layer_norm_mixed``, rows in half precision beside a float32 residual, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbert.ops import backends, reference
from fastbert.ops.add_layer_norm import add_layer_norm_mixed

from .helpers import DEVICE, assert_within_budget, device_of, merged, new_seed

EPS = 1e-12
NAMES = ["y", "y_residual", "dx", "dbias", "dresidual", "dweight", "dln_bias"]
HALVES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def cases() -> list:
    """(backend, dtype), "auto" standing for the conversions around ``add_layer_norm`` where no kernel does it all."""
    found = []
    for backend in ("auto", "reference", "triton"):
        for dtype in HALVES:
            reasons = [] if backend == "auto" else backends.not_supported_reasons(backend, "add_layer_norm_mixed", DEVICE, dtype)
            if backend == "triton" and DEVICE == "cpu" and dtype == torch.float16:
                reasons = ["in the interpreter float16 takes the same path as bfloat16, and time"]
            marks = [pytest.mark.skip(reason="; ".join(reasons))] if reasons else []
            found.append(pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}", marks=marks))
    return found


def plain(x, bias, residual, weight, ln_bias, dropout_p, seed):
    """As transformers' BertOutput spells it under autocast: the sum and the LayerNorm in the residual's dtype."""
    z = x.to(residual.dtype) if bias is None else x.to(residual.dtype) + bias
    if dropout_p > 0.0:
        z = torch.where(reference.row_keep(z, dropout_p, seed, 5), z * reference.dropout_scale(dropout_p), 0.0)
    y = F.layer_norm(z + residual, (x.shape[1],), weight, ln_bias, EPS)
    return y.to(x.dtype), y


def results(function, inputs, dys, half, full, device, used=(True, True)):
    """Both results and the gradients of all inputs; x in ``half``, everything else in ``full``."""
    dtypes = (half, full, full, full, full)
    leaves = [None if t is None else t.to(device, dtype).requires_grad_() for t, dtype in zip(inputs, dtypes, strict=True)]
    outputs = function(*leaves)
    pairs = [(y, dy.to(device, y.dtype)) for y, dy, is_used in zip(outputs, dys, used, strict=True) if is_used]
    torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    return [*(y.detach() for y in outputs), *(None if leaf is None else leaf.grad for leaf in leaves)]


def check(backend, dtype, rows, hidden, dropout_p=0.0, with_bias=True, used=(True, True), offset=0.0) -> None:
    device, seed = device_of(backend), new_seed()

    def ours(*leaves):
        return add_layer_norm_mixed(*leaves, EPS, dropout_p=dropout_p, seed=seed.to(device), stream=5, backend=backend)

    def spelled_out(*leaves):
        return plain(*leaves, dropout_p, seed)

    def draw():
        x = torch.randn(rows, hidden, dtype=torch.float64).to(dtype).double()
        others = [torch.randn(shape, dtype=torch.float64).float().double() for shape in (hidden, (rows, hidden), hidden, hidden)]
        inputs = [x, others[0] if with_bias else None, others[1] + offset, *others[2:]]
        dys = [torch.randn(rows, hidden, dtype=torch.float64).to(dtype).double() for _ in range(2)]
        return (
            results(ours, inputs, dys, dtype, torch.float32, device, used),
            results(spelled_out, inputs, dys, dtype, torch.float32, "cpu", used),
            results(spelled_out, inputs, dys, torch.float64, torch.float64, "cpu", used),
        )

    def in_half(found):
        # What is kept for the backward pass is rounded to half precision: plain torch in float32 is no measure of its gradients.
        return [None if t is None else t.to(dtype) for t in found]

    ours_, plain_, truth = merged(draw, rows * hidden)
    assert_within_budget(ours_[:2], plain_[:2], truth[:2], NAMES[:2])
    assert_within_budget(in_half(ours_[2:]), in_half(plain_[2:]), truth[2:], NAMES[2:])


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 8), (3, 7), (37, 96), (5, 768), (2, 1000)])
@pytest.mark.parametrize(("backend", "dtype"), cases())
def test_shapes(backend, dtype, rows, hidden, with_bias, dropout_p):
    check(backend, dtype, rows, hidden, dropout_p, with_bias)


@pytest.mark.parametrize("used", [(True, False), (False, True)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(("backend", "dtype"), cases())
def test_one_of_the_results_is_used(backend, dtype, dropout_p, used):
    check(backend, dtype, 13, 64, dropout_p, used=used)


@pytest.mark.parametrize(("backend", "dtype"), cases())
def test_the_residual_keeps_its_digits(backend, dtype):
    """Rounded to half precision on its way, a residual far from zero would lose what tells its columns apart."""
    device = device_of(backend)
    residual = 1000.0 + torch.arange(64.0, device=device).repeat(3, 1) / 64
    x, ones, zeros = torch.zeros(3, 64, device=device, dtype=dtype), torch.ones(64, device=device), torch.zeros(64, device=device)
    _, y = add_layer_norm_mixed(x, None, residual, ones, zeros, EPS, backend=backend)
    expected = F.layer_norm(residual.double(), (64,))
    assert y.dtype == torch.float32 and (y.double() - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("backend", "dtype"), cases())
def test_no_rows(backend, dtype):
    device = device_of(backend)
    x = torch.zeros(0, 16, device=device, dtype=dtype, requires_grad=True)
    residual = torch.zeros(0, 16, device=device, requires_grad=True)
    bias, weight, ln_bias = (torch.ones(16, device=device, requires_grad=True) for _ in range(3))
    y, y_residual = add_layer_norm_mixed(x, bias, residual, weight, ln_bias, EPS, backend=backend)
    (y.sum() + y_residual.sum()).backward()
    assert (y.shape, y.dtype, y_residual.dtype) == ((0, 16), dtype, torch.float32)
    assert all((t.grad.abs() < 1e-30).all() for t in (bias, weight, ln_bias))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(backend):
    if reasons := backends.not_supported_reasons(backend, "add_layer_norm_mixed", DEVICE, torch.bfloat16):
        pytest.skip("; ".join(reasons))
    x = torch.randn(5, 24, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    parameters = [torch.randn(24, device=DEVICE, requires_grad=True) for _ in range(3)]
    arguments = (x, parameters[0], residual, *parameters[1:], EPS, 0.1, torch.tensor([3], device=DEVICE), 2, backend)
    torch.library.opcheck(torch.ops.fastbert.add_layer_norm_mixed.default, arguments)


def test_bad_input_is_named():
    x, residual, ones = torch.zeros(2, 8), torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="x has dtype torch.float32, expected torch.bfloat16 or torch.float16"):
        add_layer_norm_mixed(x, None, residual, ones, ones, EPS)
    with pytest.raises(ValueError, match=r"residual has shape \(3, 8\), expected \(2, 8\)"):
        add_layer_norm_mixed(x.bfloat16(), None, torch.zeros(3, 8), ones, ones, EPS)
    with pytest.raises(RuntimeError, match="'native' cannot run add_layer_norm_mixed: it has no kernel for"):
        add_layer_norm_mixed(x.bfloat16(), None, residual, ones, ones, EPS, backend="native")
