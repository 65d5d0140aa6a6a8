"""What the C++ attention must get right on every instruction set, beside what ``test_attention.py`` asks of every backend."""

from __future__ import annotations

import math

import pytest
import torch

from fastbert.ops import backends, native

from . import test_attention
from .helpers import assert_within_budget, new_seed
from .test_native import instruction_set  # noqa: F401 (a fixture)

REASON = backends.unavailable_reason("native")
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("instruction_set", "nan_filled_memory"),
]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@both_dtypes
@pytest.mark.parametrize("head_dim", [1, 7, 33, 65])
def test_odd_sizes(dtype, head_dim):
    """Two bfloat16 make one group of a dot product: the last one of an odd size is alone."""
    test_attention.check("native", dtype, [1, 3, 31, 0, 129], heads=3, head_dim=head_dim, dropout_p=0.2)


@both_dtypes
@pytest.mark.parametrize(("length", "head_dim"), [(515, 64), (301, 16), (37, 160), (50, 256)])
def test_several_blocks(dtype, length, head_dim):
    """Of queries, of keys, and of the depth of either product."""
    test_attention.check("native", dtype, [length, 5], heads=2, head_dim=head_dim)


@both_dtypes
def test_extreme_scores(dtype):
    test_attention.test_large_scores_do_not_overflow("native", dtype)
    test_attention.test_scores_far_below_every_bound_on_them("native", dtype)
    for lse, length in ((-100.0, 20), (-200.0, 21)):
        test_attention.test_gradients_where_all_scores_are_far_below_zero("native", dtype, lse, length)


@both_dtypes
@pytest.mark.parametrize("softmax_scale", [-0.3, 0.0, 2.0])
def test_any_softmax_scale(dtype, softmax_scale):
    qkv, cu_seqlens, longest = test_attention.packed([21, 40], 2, 24)
    qkv = qkv.to(dtype)
    out, lse = native.attention_forward(qkv, cu_seqlens, longest, softmax_scale)
    plain, truth = (test_attention.plain(x, cu_seqlens, softmax_scale) for x in (qkv, qkv.double()))
    assert_within_budget([out], [plain], [truth], ["out"])
    scores = [x[:, 0].transpose(0, 1) @ x[:, 1].permute(1, 2, 0) * softmax_scale for x in qkv.double().split([21, 40])]
    truth = torch.cat([s.logsumexp(-1) for s in scores], dim=-1)
    torch.testing.assert_close(lse.double(), truth, rtol=1e-6, atol=1e-6)


def without_lse(qkv: torch.Tensor, cu_seqlens: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """What an encoder layer for inference calls: bfloat16 then does without maxima where bounds on the scores allow it."""
    total, _, heads, head_dim = qkv.shape
    out = qkv.new_full((total, heads, head_dim), torch.nan)
    native.EXTENSION.attention_forward(
        qkv.data_ptr(), cu_seqlens.data_ptr(), out.data_ptr(), 0, total, cu_seqlens.numel() - 1, heads, head_dim,
        softmax_scale, native.NO_DROPOUT, native.DTYPES[qkv.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


@both_dtypes
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("head_dim", [7, 32, 64, 160, 256])
def test_without_lse(dtype, head_dim, scale):
    """Bounds on the scores below the limit, around it and above it; panels of keys of 1 to 4 vectors; blocks of the depth."""
    qkv, cu_seqlens, _ = test_attention.packed([1, 3, 0, 32, 50, 64, 129, 515], 2, head_dim, scale)
    qkv[200:, 0, 1] *= 3.0
    qkv = qkv.to(dtype)
    plain, truth = (test_attention.plain(x, cu_seqlens, -(head_dim**-0.5)) for x in (qkv, qkv.double()))
    assert_within_budget([without_lse(qkv, cu_seqlens, -(head_dim**-0.5))], [plain], [truth], ["out"])


@both_dtypes
@pytest.mark.parametrize("bound", [47.0, 49.0, 200.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_at_their_bound_without_lse(dtype, bound, sign):
    """All keys alike, the query like them or opposite: powers of two of +- bound, whose softmax is uniform."""
    qkv, cu_seqlens, _ = test_attention.packed([1, 70], 1, 16)
    qkv[:, 0], qkv[:, 1] = 2.0, 2.0
    qkv = qkv.to(dtype)
    out = without_lse(qkv, cu_seqlens, sign * bound * math.log(2) / (16 * 4))
    means = [values.mean(0, keepdim=True).expand_as(values) for values in qkv[:, 2].double().split([1, 70])]
    torch.testing.assert_close(out.double(), torch.cat(means), rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert torch.equal(out[0], qkv[0, 2]), "one key's value is the result to the last bit"


@both_dtypes
@pytest.mark.parametrize(("query", "key"), [(0.0, 3e19), (1e-19, 1e19), (1e19, 1e-19), (0.0, 0.0)])
def test_norms_that_overflow_or_vanish_without_lse(dtype, query, key):
    """Squares that are infinite or taken as 0: the scores are finite, one for all keys."""
    qkv, cu_seqlens, _ = test_attention.packed([7, 40], 1, 1)
    qkv[:, 0], qkv[:, 1] = query, key
    qkv = qkv.to(dtype)
    out = without_lse(qkv, cu_seqlens, 200.0)
    means = [values.mean(0, keepdim=True).expand_as(values) for values in qkv[:, 2].double().split([7, 40])]
    torch.testing.assert_close(out.double(), torch.cat(means), rtol=0, atol=4 * torch.finfo(dtype).eps)


@both_dtypes
def test_without_lse_neither_threads_nor_neighbours_change_a_bit(dtype):
    """One query of a head is beyond the limit, the others are not: whoever computes them, all take the same way."""
    lengths = [400, 30]
    qkv, cu_seqlens, _ = test_attention.packed(lengths, 2, 64)
    qkv[390, 0] *= 8.0
    qkv = qkv.to(dtype)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(without_lse(qkv, cu_seqlens, 0.125)[:400])
            runs.append(without_lse(qkv[:400].clone(), bounds(lengths[:1]), 0.125))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize(("dtype", "softmax_scale"), [(torch.float32, 0.2), (torch.bfloat16, 20.0)])
def test_lse_may_be_left_out(dtype, softmax_scale):
    """The same bits in float32, and in bfloat16 where no bound on the scores is small enough."""
    qkv, cu_seqlens, longest = test_attention.packed([50], 2, 32)
    qkv = qkv.to(dtype)
    out, _ = native.attention_forward(qkv, cu_seqlens, longest, softmax_scale)
    assert torch.equal(without_lse(qkv, cu_seqlens, softmax_scale), out)


@both_dtypes
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_without_lse(dtype, place, value):
    """As softmax has it: a query's row, and a key's or a value's sequence, in that head alone."""
    qkv, cu_seqlens, _ = test_attention.packed([5, 40], 2, 16)
    qkv[20, place, 1, 3] = value
    qkv = qkv.to(dtype)
    out, expected = without_lse(qkv, cu_seqlens, 0.25), test_attention.plain(qkv.double(), cu_seqlens, 0.25)
    assert torch.equal(out.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(out.double()[finite], expected[finite], rtol=0, atol=4 * torch.finfo(dtype).eps)


@both_dtypes
@pytest.mark.parametrize("head_dim", [7, 8])
def test_a_head_never_reads_its_neighbours(dtype, head_dim):
    """What lies behind the row of a head, and behind the last row of a sequence, may be anything."""
    qkv, cu_seqlens, longest = test_attention.packed([5, 7], 2, head_dim)
    qkv, dout = qkv.to(dtype), torch.randn(12, 2, head_dim).to(dtype)
    for head, rows in ((0, slice(0, 5)), (1, slice(5, 12)), (0, slice(5, 12))):
        poisoned = torch.full_like(qkv, torch.nan)
        poisoned[rows, :, head] = qkv[rows, :, head]
        dpoisoned = torch.full_like(dout, torch.nan)
        dpoisoned[rows, head] = dout[rows, head]
        results = []
        for x, dx in ((qkv, dout), (poisoned, dpoisoned)):
            out, lse = native.attention_forward(x, cu_seqlens, longest, 0.4)
            dqkv = native.attention_backward(dx, x, out, lse, cu_seqlens, longest, 0.4)
            results.append((out[rows, head], lse[head, rows], dqkv[rows, :, head]))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both_dtypes
def test_nan_stays_nan(dtype):
    """In the rows that it reaches, and nowhere else."""
    qkv = torch.randn(9, 3, 1, 16).to(dtype)
    qkv[2, 0, 0, 3] = torch.nan
    qkv[8, 2, 0, 5] = torch.nan
    out, lse = native.attention_forward(qkv, bounds([4, 5]), 5, 0.25)
    expected = torch.zeros(9, 16, dtype=torch.bool)
    expected[2] = True
    expected[4:, 5] = True
    assert torch.equal(out[:, 0].isnan(), expected)
    assert torch.equal(lse[0].isnan(), torch.arange(9) == 2)


def test_the_exponential_is_exact_to_its_arguments_rounding():
    """Pairs of keys with the scores 0 and x: softmax is exp(x) / (1 + exp(x)), from 1/2 to the smallest normal numbers."""
    x = torch.linspace(-87, 0, 20001)
    qkv = torch.zeros(2 * x.numel(), 3, 1, 1)
    qkv[:, 0] = 1.0
    qkv[1::2, 1, 0, 0], qkv[1::2, 2] = x, 1.0
    out, lse = native.attention_forward(qkv, bounds([2] * x.numel()), 2, 1.0)
    truth = x.double().sigmoid()
    error = (out[::2, 0, 0].double() - truth).abs() / truth
    assert (error <= 3e-7 + 1.2e-7 * x.abs()).all(), (error - 1.2e-7 * x.abs()).max()
    torch.testing.assert_close(lse[0, ::2].double(), torch.log1p(x.double().exp()), rtol=1e-6, atol=1e-7)


def test_one_key_is_copied_exactly():
    qkv = torch.randn(40, 3, 2, 24)
    out, lse = native.attention_forward(qkv, bounds([1] * 40), 1, 0.2)
    assert torch.equal(out, qkv[:, 2])
    torch.testing.assert_close(lse, (qkv[:, 0] * qkv[:, 1]).sum(-1).t() * 0.2, rtol=1e-5, atol=1e-6)


@both_dtypes
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_bits_do_not_depend_on_the_number_of_threads(dtype, dropout_p):
    lengths, seed = [130, 5, 64, 211], new_seed()
    cu_seqlens = bounds(lengths)
    qkv, dout = torch.randn(sum(lengths), 3, 4, 64).to(dtype), torch.randn(sum(lengths), 4, 64).to(dtype)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, lse = native.attention_forward(qkv, cu_seqlens, 211, 0.125, dropout_p, seed, 5)
            dqkv = native.attention_backward(dout, qkv, out, lse, cu_seqlens, 211, 0.125, dropout_p, seed, 5)
            runs.append((out, lse, dqkv))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
