"""The C++ kernels on every instruction set that this CPU has, and on any number of threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from fastbert.ops import attention, backends, linear_gelu, mlm_loss, native

from . import test_add_layer_norm, test_attention, test_embedding_layer_norm, test_gelu_layer_norm, test_linear_gelu, test_mlm_loss
from .helpers import gradients
from .test_registration import arguments_of

REASON = backends.unavailable_reason("native")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SETS = native.supported_instruction_sets() if REASON is None else ()


@pytest.fixture(params=SETS)
def instruction_set(request):
    before = native.instruction_set()
    native.set_instruction_set(request.param)
    yield request.param
    native.set_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_is_right(instruction_set, dtype, nan_filled_memory):
    for head_dim in (8, 40, 64):
        test_attention.check("native", dtype, [17, 0, 1, 66], heads=2, head_dim=head_dim, dropout_p=0.2)
    for hidden in (7, 96, 768):
        test_add_layer_norm.check("native", dtype, 21, hidden, dropout_p=0.2)
        test_embedding_layer_norm.check("native", dtype, 21, hidden, dropout_p=0.2)
        test_gelu_layer_norm.test_shapes("native", dtype, 21, hidden, True, 2.0)
    test_linear_gelu.check_gradients("native", dtype, 40, 96, 130, with_bias=True, recompute=False)
    test_mlm_loss.test_loss_and_gradients("native", dtype, "mean", True, 0.1, False)


def test_gelu_and_its_derivative_over_the_whole_range(instruction_set):
    """Against float64, relative to gelu itself, from the last normal numbers of its left tail to where it is the identity."""
    u = torch.cat([torch.linspace(-13, 13, 200_001), torch.logspace(-38, 0, 20_000), -torch.logspace(-38, 0, 20_000)])[:, None]
    u.requires_grad_()
    y = linear_gelu(u, torch.ones(1, 1), None, backend="native")
    y.backward(torch.ones_like(y))
    v = u.detach().double()
    cdf, pdf = 0.5 * torch.erfc(-v * 0.5**0.5), (-0.5 * v * v).exp() / math.tau**0.5
    error = (y.detach().double() - v * cdf).abs()
    budget = 4e-7 + 1.2e-7 * torch.where(v < 0, v * v / 2, 0.0)  # exp(-u^2 / 2) is as exact as its argument
    smallest = torch.finfo(torch.float32).tiny  # normal number: a denormal one may be 0
    assert (error <= budget * (v * cdf).abs() + smallest).all(), (error / (v * cdf).abs() - budget).max()
    assert (u.grad.double() - (cdf + v * pdf)).abs().max() < 2e-7


def test_every_nan_stays_one(instruction_set):
    """Of those that lie in memory that nobody wrote, too: the shifts of an exponential make numbers of some."""
    for pattern in (0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1, -0x400000):
        nan = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
        qkv, bounds = torch.randn(5, 3, 1, 8), torch.tensor([0, 5], dtype=torch.int32)
        qkv[2, 0, 0, 0] = nan
        out = attention(qkv, bounds, 5, backend="native")
        assert out[2].isnan().all() and out[[0, 1, 3, 4]].isfinite().all()
        weight = torch.randn(300, 8)
        weight[5, 0] = nan
        assert mlm_loss(torch.randn(4, 8), weight, None, torch.arange(4), backend="native")[0].isnan()


@pytest.mark.parametrize("op", backends.OPS)
def test_results_do_not_depend_on_the_number_of_threads(op):
    """Float32, forward and backward, the same bits."""
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            runs.append(_run_large(op))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def _run_large(op: str) -> list[torch.Tensor]:
    """Large enough for several threads. The matmuls of linear_gelu and mlm_loss are torch's, and left out."""
    if op == "attention":
        lengths = [130, 5, 64, 200]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        qkv, dout = torch.randn(sum(lengths), 3, 4, 64), torch.randn(sum(lengths), 4, 64)
        out, lse = native.attention_forward(qkv, cu_seqlens, 200, 0.125)
        return [out, lse, native.attention_backward(dout, qkv, out, lse, cu_seqlens, 200, 0.125)]
    x, dy, weight, bias = torch.randn(500, 256), torch.randn(500, 256), torch.randn(256), torch.randn(256)
    if op == "embedding_layer_norm":
        ids, table = [torch.randint(40, (500,)) for _ in range(3)], torch.randn(40, 256)
        y, mean, rstd = native.embedding_layer_norm_forward(*ids, table, table, table, weight, bias, 1e-12)
        arguments = (dy, *ids, table, table, table, weight, mean, rstd, -1, (True, True, True))
        return [y, *native.embedding_layer_norm_backward(*arguments)]
    if op == "add_layer_norm":
        y, z, mean, rstd = native.add_layer_norm_forward(x, bias, dy, weight, bias, 1e-12)
        return [y, z, *(t for t in native.add_layer_norm_backward(dy, z, mean, rstd, weight, True) if t is not None)]
    if op == "gelu_layer_norm":
        y, mean, rstd = native.gelu_layer_norm_forward(x, bias, weight, bias, 1e-12)
        return [y, *native.gelu_layer_norm_backward(dy, x, bias, weight, mean, rstd)]
    if op == "linear_gelu":
        eye = torch.eye(256)
        y, u = native.linear_gelu_forward(x, eye, bias, True)
        return [y, native.linear_gelu_backward(dy, x, eye, bias, u)[2]]
    labels = torch.randint(256, (500,))
    row_max, row_sum, label_logit = torch.full((500,), -torch.inf), torch.zeros(500), torch.zeros(500)
    native.mlm_loss_forward(x, bias, labels, 0, row_max, row_sum, label_logit, None)
    dbias = torch.empty(256)
    native.mlm_loss_backward(x, bias, labels, 0, 256, row_max, row_sum, torch.ones(500), 0.0, dbias)
    return [row_max, row_sum, label_logit, x, dbias]


def test_an_unknown_instruction_set_is_refused():
    code = "import fastbert.ops.native"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTBERT_CPU_ISA": "mmx"}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "FASTBERT_CPU_ISA=mmx: no instruction set 'mmx' here: this CPU supports baseline" in done.stderr


def test_dtypes_without_kernels_take_the_reference_and_say_so():
    assert backends.select("attention", "auto", "cpu", torch.float16) == "reference"
    assert backends.not_supported_reasons("native", "attention", "cpu", torch.float64) == ["it has no kernels for float64"]
    with pytest.raises(RuntimeError, match="no kernels for float64"):
        linear_gelu(torch.zeros(1, 2).double(), torch.zeros(3, 2).double(), None, backend="native")


@pytest.mark.parametrize("op", backends.OPS)
def test_double_backward_is_refused(op):
    """The kernels' backward has no derivative: asking for one is an error, not a silent zero."""
    leaves, call, _ = arguments_of(op, 0.0, torch.float32)
    out = call(*leaves, backend="native")
    grads = torch.autograd.grad((out * out).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative: fastbert's ops can be differentiated once"):
        torch.autograd.grad(sum(grad.sum() for grad in grads), leaves)


def test_gradients_helper_sees_a_wrong_gradient():
    """The harness itself: a function with a wrong derivative must not pass."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2.001 * dy

    x, dy = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    right = gradients(lambda t: 2 * t, [x], dy, torch.float64)
    wrong = gradients(Wrong.apply, [x], dy, torch.float32)
    plain = gradients(lambda t: 2 * t, [x], dy, torch.float32)
    from .helpers import assert_within_budget

    with pytest.raises(AssertionError, match="dx: error"):
        assert_within_budget(wrong, plain, right, ["y", "dx"])
