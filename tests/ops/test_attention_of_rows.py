"""``attention_of_rows``: what attention of all rows gives for some, from fewer queries."""

from __future__ import annotations

import pytest
import torch

from fastbert.ops import attention, backends
from fastbert.ops.attention_of_rows import attention_of_rows

from .helpers import assert_within_budget, backend_cases, gradients, merged, new_seed, rounded
from .test_attention import packed, plain
from .test_native import instruction_set  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
LENGTHS = [17, 0, 1, 65, 2, 130]
ROWS = {
    "first of each": [0, 17, 17, 18, 83, 85],
    "some": [3, 4, 4, 16, 20, 50, 82, 100, 101, 102, 214],
    "of one sequence": [90],
    "none": [],
    "all": list(range(215)),
}
needs_native = pytest.mark.skipif(
    backends.unavailable_reason("native") is not None, reason=str(backends.unavailable_reason("native"))
)


def check(backend, dtype, rows, **settings) -> None:
    """Plain torch, which sets the budget, is the reference: with a saved lse one row's gradient is less exact than autograd's."""
    results = merged(lambda: draw(backend, dtype, rows, **settings), len(rows) * 64)
    assert_within_budget(*results, ["out", "dq", "dkv"])


def draw(backend, dtype, rows, head_dim=32, dropout_p=0.0, lengths=LENGTHS, heads=2, scale=1.0, orders=1):
    """orders: in which plain torch adds up the products of queries and keys; the least exact result counts. Where scores are large
    its error is that of one row whose largest ones are nearly equal, many times more or less in each order."""
    qkv, cu_seqlens, longest = packed(lengths, heads, head_dim, scale)
    (qkv,) = rounded(qkv, dtype=dtype)
    rows, seed, softmax_scale = torch.tensor(rows, dtype=torch.int64), new_seed(), head_dim**-0.5
    dout = torch.randn(len(rows), heads, head_dim, dtype=torch.float64).to(dtype).double()

    def of(backend):
        settings = {"softmax_scale": softmax_scale, "dropout_p": dropout_p, "seed": seed, "stream": 7, "backend": backend}
        return lambda q, kv: attention_of_rows(q, kv, rows, cu_seqlens, longest, **settings)

    def spelled_out(q, kv):
        """Of all rows, the others' queries 0."""
        all_q = q.new_zeros(len(kv), *q.shape[1:])
        results = []
        for i, row in enumerate(rows.tolist()):  # one by one, since a row may be there twice
            qkv = torch.cat([all_q.index_copy(0, rows[i : i + 1], q[i : i + 1]).unsqueeze(1), kv], dim=1)
            results.append(plain(qkv, cu_seqlens, softmax_scale, dropout_p, seed, 7)[row])
        return torch.stack(results) if results else q * kv.sum()

    def in_order(function, order):
        back = order.argsort()
        return lambda q, kv: function(q[..., order], kv[..., order])[..., back]

    inputs = [qkv[rows, 0], qkv[:, 1:]]
    truth = gradients(spelled_out, inputs, dout, torch.float64)
    plain_orders = [torch.arange(head_dim).roll(i) for i in range(orders)]
    results = [gradients(in_order(of("reference"), order), inputs, dout, dtype) for order in plain_orders]
    least_exact = [
        max(candidates, key=lambda candidate, exact=exact: (candidate.double() - exact).abs().max() if candidate.numel() else 0)
        for *candidates, exact in zip(*results, truth, strict=True)
    ]
    return gradients(of(backend), inputs, dout, dtype), least_exact, truth


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_reference(rows, dropout_p):
    """In float64, where nothing but a mistake makes a difference."""
    ours, _, truth = draw("reference", torch.float64, rows, dropout_p=dropout_p)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "rows", [rows for name, rows in ROWS.items() if name != "all"], ids=[name for name in ROWS if name != "all"]
)
@pytest.mark.parametrize(("backend", "dtype"), backend_cases("attention_of_rows"))
def test_rows(backend, dtype, rows, dropout_p):
    check(backend, dtype, rows, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_native
def test_every_instruction_set(instruction_set, dtype):  # noqa: F811
    for head_dim in (7, 64):
        check("native", dtype, [0, 3, 18, 60, 61, 100], head_dim=head_dim, dropout_p=0.2)
    check("native", dtype, [5, 9], lengths=[20], head_dim=16, scale=8.0, orders=16)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_native
def test_the_same_bits_as_of_all_rows(dtype, rows, dropout_p):
    """Dropout masks, too; and of gradients those of queries, which no other row has a part in."""
    qkv, cu_seqlens, longest = packed([*LENGTHS, 700], 2, 64)
    qkv, rows = qkv.to(dtype).requires_grad_(), torch.tensor(rows, dtype=torch.int64)
    settings = {"dropout_p": dropout_p, "seed": new_seed(), "stream": 3}
    expected = attention(qkv, cu_seqlens, longest, **settings)[rows]
    got = attention_of_rows(qkv[:, 0][rows], qkv[:, 1:], rows, cu_seqlens, longest, **settings)
    assert torch.equal(got, expected)
    dout = torch.randn_like(got)
    (wanted,), (found,) = (torch.autograd.grad(out, qkv, dout) for out in (expected, got))
    if len(rows.unique()) == len(rows):
        assert torch.equal(found[:, 0], wanted[:, 0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=torch.finfo(dtype).eps * 8 * float(wanted.abs().max()) + 1e-30)


@needs_native
def test_results_do_not_depend_on_the_number_of_threads():
    qkv, cu_seqlens, longest = packed([300, 40, 7], 2, 32)
    qkv = qkv.float().requires_grad_()
    rows, threads, runs = torch.arange(0, 347, 3), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = attention_of_rows(qkv[:, 0][rows], qkv[:, 1:], rows, cu_seqlens, longest, dropout_p=0.1, seed=new_seed())
            runs.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_gradcheck_of_the_reference():
    qkv, cu_seqlens, longest = packed([3, 0, 5, 1], 2, 4)
    rows = torch.tensor([0, 2, 3, 3, 7])
    leaves = [qkv[:, 0][rows].requires_grad_(), qkv[:, 1:].contiguous().requires_grad_()]
    for dropout_p in (0.0, 0.3):
        settings = {"dropout_p": dropout_p, "seed": new_seed(), "backend": "reference"}
        assert torch.autograd.gradcheck(lambda q, kv: attention_of_rows(q, kv, rows, cu_seqlens, longest, **settings), leaves)  # noqa: B023


def test_opcheck():
    qkv, cu_seqlens, longest = packed([3, 0, 5, 1], 2, 4)
    rows, qkv = torch.tensor([0, 2, 3, 3, 7]), qkv.float()
    leaves = [qkv[:, 0][rows].requires_grad_(), qkv[:, 1:].contiguous().requires_grad_()]
    torch.library.opcheck(
        torch.ops.fastbert.attention_of_rows.default, (*leaves, rows, cu_seqlens, longest, 0.5, 0.3, new_seed(), 2, "auto")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 8)}, "expected \\(n, num_heads, head_dim\\)"),
        ({"kv": torch.zeros(8, 3, 2, 4)}, "kv has shape"),
        ({"kv": torch.zeros(8, 2, 2, 4).double()}, "expected one dtype"),
        ({"rows": torch.tensor([1])}, "rows has shape"),
        ({"rows": torch.tensor([1, 5], dtype=torch.int32)}, "int64 rows"),
        ({"rows": torch.tensor([5, 1])}, "in rising order"),
        ({"rows": torch.tensor([1, 8])}, "from 0 to total - 1 = 7"),
        ({"rows": torch.tensor([-1, 3])}, "in rising order"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "expected steps that never fall"),
        ({"max_seqlen": 7}, "the longest sequence has 8 tokens"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "q": torch.zeros(2, 2, 4), "kv": torch.zeros(8, 2, 2, 4), "rows": torch.tensor([1, 5]),
        "cu_seqlens": torch.tensor([0, 8], dtype=torch.int32), "max_seqlen": 8,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        attention_of_rows(**{**arguments, **change})


def test_other_backends_are_refused_with_their_reason():
    q, kv = torch.zeros(1, 2, 8), torch.zeros(4, 2, 2, 8)
    for backend in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match="no kernel for attention_of_rows"):
            attention_of_rows(q, kv, torch.tensor([1]), torch.tensor([0, 4], dtype=torch.int32), 4, backend=backend)
