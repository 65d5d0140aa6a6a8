"""Every backend of ``attention`` against float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from fastbert.ops import attention, backends, cuda, reference

from .. import cuda_on_host
from .helpers import DEVICE, SMALLEST, assert_within_budget, backend_cases, device_of, gradients, new_seed, rounded

LENGTHS = {
    "one token": [1, 5],
    "mixed": [17, 0, 1, 65, 2],
    "block edges": [64, 128, 63],
    "longer than a block": [130, 33],
    "three blocks of keys": [300, 7],
    "no sequence": [],
    "only empty ones": [0, 0],
}
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.fixture(autouse=True)
def few_processors(monkeypatch):
    """Triton's on-chip backward is for batches that fill the GPU: here for all."""
    if importlib.util.find_spec("triton"):
        monkeypatch.setattr("fastbert_kernels.attention.num_processors", lambda x: 1)


def every_kernel() -> pytest.MarkDecorator:
    """All backends and dtypes, and the CUDA kernels for both architectures where the model of a GPU runs them."""
    cases = []
    for case in backend_cases("attention"):
        backend, _ = case.values
        for value in (90, 80) if backend == "cuda" and DEVICE == "cpu" else (None,):
            name = case.id if value is None else f"{case.id}-sm{value}"
            cases.append(pytest.param(*case.values, value, id=name, marks=case.marks))
    return pytest.mark.parametrize(("backend", "dtype", "capability"), cases, indirect=["capability"])


@pytest.fixture(autouse=True)
def capability(request) -> Iterator[None]:
    """The model's GPU is of this compute capability."""
    value = getattr(request, "param", None)
    if value is None or DEVICE == "cuda" or cuda_on_host.compiler() is None:
        yield
        return
    with cuda_on_host.capability(value):
        yield


def usual_head_dim(backend: str, others: int) -> int:
    """Hopper's CUDA kernels are for 64 alone; less costs less in Triton's interpreter."""
    return 64 if backend == "cuda" else others


def packed(lengths: list[int], heads: int, head_dim: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, int]:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, dtype=torch.float64) * scale
    return qkv, cu_seqlens, max(lengths, default=0)


def plain(qkv, cu_seqlens, softmax_scale, dropout_p=0.0, seed=None, stream=0):
    """Attention as transformers' eager implementation spells it, in qkv's dtype, sequence by sequence."""
    outs = []
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3).unbind(0)
        p = torch.softmax(q @ k.transpose(1, 2) * softmax_scale, dim=-1)
        if dropout_p > 0.0 and end > start:
            keep = reference.attention_keep(qkv.shape[2], torch.arange(start, end), end - start, dropout_p, seed, stream)
            p = torch.where(keep, p * reference.dropout_scale(dropout_p), 0.0)
        outs.append((p.to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(outs) if outs else qkv[:, 0]


def skip_unless_supported(backend, device, dtype, head_dim) -> None:
    if reasons := backends.not_supported_reasons(backend, "attention", device, dtype, head_dim):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def check(backend, dtype, lengths, heads, head_dim, dropout_p=0.0, scale=1.0, max_seqlen=None, large_keys=0) -> None:
    device, seed = device_of(backend), new_seed()
    skip_unless_supported(backend, device, dtype, head_dim)
    qkv, cu_seqlens, longest = packed(lengths, heads, head_dim, scale)
    qkv[:large_keys, 1] *= 6.0
    (qkv,) = rounded(qkv, dtype=dtype)
    softmax_scale = head_dim**-0.5
    dout = torch.randn(qkv.shape[0], heads, head_dim, dtype=torch.float64).to(dtype).double()

    def ours(x):
        return attention(
            x, cu_seqlens.to(device), max_seqlen or longest, softmax_scale=softmax_scale,
            dropout_p=dropout_p, seed=seed.to(device), stream=7, backend=backend,
        )  # fmt: skip

    def spelled_out(x):
        return plain(x, cu_seqlens, softmax_scale, dropout_p, seed, 7)

    assert_within_budget(
        gradients(ours, [qkv], dout, dtype, device),
        gradients(spelled_out, [qkv], dout, dtype),
        gradients(spelled_out, [qkv], dout, torch.float64),
        ["out", "dqkv"],
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_kernel()
def test_lengths(backend, dtype, lengths, dropout_p):
    heads = 1 if sum(lengths) > 300 else 2  # Triton's interpreter takes seconds for a long sequence
    check(backend, dtype, lengths, heads=heads, head_dim=usual_head_dim(backend, 32), dropout_p=dropout_p)


@pytest.mark.parametrize("head_dim", [1, 8, 24, 40, 64, 80, 96, 128])
@pytest.mark.parametrize(("backend", "dtype"), backend_cases("attention"))
def test_head_dims(backend, dtype, head_dim):
    lengths = [70, 3] if backend == "cuda" else [19, 3]  # its tiles of wide heads are others, too
    check(backend, dtype, lengths, heads=3, head_dim=head_dim, dropout_p=0.1)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "dtype"), backend_cases("attention"))
def test_max_seqlen_is_a_bound(backend, dtype, dropout_p):
    """A batch may hold shorter sequences than a captured graph was made for; Triton takes other kernels beyond 512."""
    check(backend, dtype, [70, 0, 3], heads=2, head_dim=24, dropout_p=dropout_p, max_seqlen=600)


@every_kernel()
def test_large_scores_do_not_overflow(backend, dtype):
    check(backend, dtype, [20, 5], heads=2, head_dim=usual_head_dim(backend, 16), scale=8.0)


@every_kernel()
def test_maxima_that_differ_from_tile_to_tile(backend, dtype):
    """With the longest sequence that Hopper's kernels take; Triton's interpreter takes a second for less."""
    length = 512 if backend == "cuda" else 190
    check(backend, dtype, [length], heads=1, head_dim=usual_head_dim(backend, 32), dropout_p=0.1, large_keys=50)


@every_kernel()
def test_scores_far_below_every_bound_on_them(backend, dtype):
    """All keys alike and the query opposite: scores of -40, where |query| |key| allows for 40. Their softmax is uniform."""
    device, head_dim = device_of(backend), usual_head_dim(backend, 16)
    qkv, cu_seqlens, longest = packed([5, 70], 1, head_dim)
    qkv[:, 0], qkv[:, 1] = 3.0, -3.0
    (qkv,) = rounded(qkv, dtype=dtype)
    scale = 40 / (head_dim * 9)
    out = attention(qkv.to(device, dtype), cu_seqlens.to(device), longest, softmax_scale=scale, backend=backend)
    means = [values.mean(0, keepdim=True).expand_as(values) for values in qkv[:, 2].split([5, 70])]
    torch.testing.assert_close(out.cpu().double(), torch.cat(means), rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "lse"), [(torch.bfloat16, -100.0), (torch.float16, -20.0)])
@pytest.mark.parametrize(
    ("backend", "capability"),
    [("reference", None), ("native", None), ("triton", None), ("cuda", 90), ("cuda", 80)],
    indirect=["capability"],
)
def test_gradients_where_all_scores_are_far_below_zero(backend, dtype, lse, length=20):
    """exp(-lse) of keys that are not there, padding of a tile, overflows the dtype."""
    device = device_of(backend)
    skip_unless_supported(backend, device, dtype, 64)
    qkv, cu_seqlens, longest = packed([length], 2, 64)
    qkv[:, 0], qkv[:, 1] = 2.0, -2.0
    (qkv,) = rounded(qkv + 0.01 * torch.randn_like(qkv), dtype=dtype)
    scale = -lse / (64 * 4)
    dout = torch.randn(length, 2, 64, dtype=torch.float64).to(dtype).double()

    def ours(x):
        return attention(x, cu_seqlens.to(device), longest, softmax_scale=scale, backend=backend)

    def spelled_out(x):
        return plain(x, cu_seqlens, scale)

    assert_within_budget(
        gradients(ours, [qkv], dout, dtype, device),
        gradients(spelled_out, [qkv], dout, dtype),
        gradients(spelled_out, [qkv], dout, torch.float64),
        ["out", "dqkv"],
    )


@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_float16_in_the_interpreter(scale):
    """float16 takes bfloat16's way, except that the range of its probabilities allows for smaller bounds on the scores."""
    if DEVICE == "cuda":
        pytest.skip("on a GPU all tests run in float16")
    check("triton", torch.float16, [70, 9], heads=2, head_dim=32, dropout_p=0.1, scale=scale)


@every_kernel()
def test_dropout_mask_is_the_references_bit_for_bit(backend, dtype):
    """Equal keys make uniform probabilities; one-hot values then show which of them survived."""
    device, lengths, heads = device_of(backend), [40, 9, 64], 2
    head_dim = 64
    qkv, cu_seqlens, longest = packed(lengths, heads, head_dim)
    qkv.zero_()
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        qkv[start : start + length, 2] = torch.eye(length, head_dim, dtype=torch.float64).unsqueeze(1)
    seed = new_seed()
    out = attention(
        qkv.to(device, dtype), cu_seqlens.to(device), longest,
        dropout_p=0.4, seed=seed.to(device), stream=3, backend=backend,
    ).cpu()  # fmt: skip
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        keep = reference.attention_keep(heads, torch.arange(start, start + length), length, 0.4, seed, 3)
        assert torch.equal(out[start : start + length, :, :length].transpose(0, 1).double() > SMALLEST, keep)


@pytest.mark.parametrize("dropout_p", [0.0, 1.0])
@every_kernel()
def test_dropout_of_everything_and_of_nothing(backend, dtype, dropout_p):
    device, head_dim = device_of(backend), usual_head_dim(backend, 8)
    qkv, cu_seqlens, longest = packed([5], 1, head_dim)

    def ours(x):
        seed = new_seed().to(device)
        return attention(x, cu_seqlens.to(device), longest, dropout_p=dropout_p, seed=seed, backend=backend)

    for result in gradients(ours, [qkv], torch.ones(5, 1, head_dim), dtype, device):
        assert result.isfinite().all()
        assert (result == 0).all() == (dropout_p == 1.0)


@every_kernel()
def test_two_runs_give_the_same_bits(backend, dtype):
    device, head_dim = device_of(backend), usual_head_dim(backend, 32)
    qkv, cu_seqlens, longest = packed([70, 40, 3], 2, head_dim)
    dout = torch.randn(qkv.shape[0], 2, head_dim)
    runs = [
        gradients(lambda x: attention(x, cu_seqlens.to(device), longest, backend=backend), [qkv], dout, dtype, device)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_kernel()
def test_tensors_may_start_anywhere(backend, dtype):
    """A slice of a flat tensor, say; accesses of 16 bytes and bulk copies must start at a multiple of that."""
    device, head_dim, lengths = device_of(backend), usual_head_dim(backend, 32), [20, 3]
    qkv, cu_seqlens, longest = packed(lengths, 1, head_dim)
    dout = torch.randn(sum(lengths), 1, head_dim)

    def run(offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, gradient = (torch.cat([torch.zeros(offset), t.flatten()]).to(device, dtype)[offset:].view(t.shape) for t in (qkv, dout))
        out = attention(x.requires_grad_(), cu_seqlens.to(device), longest, backend=backend)
        return out, *torch.autograd.grad(out, x, gradient)

    assert all(map(torch.equal, run(0), run(1)))


@every_kernel()
def test_a_sequence_of_nan_leaves_its_neighbours_alone(backend, dtype):
    """Tiles reach beyond a sequence's end, where a probability of 0 times NaN would be NaN."""
    device, head_dim, lengths = device_of(backend), usual_head_dim(backend, 32), [20, 3, 30]
    qkv, cu_seqlens, longest = packed(lengths, 1, head_dim)
    dout = torch.randn(sum(lengths), 1, head_dim, dtype=torch.float64)

    def ours(x):
        return attention(x, cu_seqlens.to(device), longest, backend=backend)

    clean = gradients(ours, [qkv], dout, dtype, device)
    qkv[20:23] = dout[20:23] = float("nan")
    for with_nan, without in zip(gradients(ours, [qkv], dout, dtype, device), clean, strict=True):
        assert with_nan[20:23].isnan().all()
        assert torch.equal(with_nan[:20], without[:20])
        assert torch.equal(with_nan[23:], without[23:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(6, 2, 1, 8)}, r"expected \(total, 3, num_heads, head_dim\)"),
        ({"cu_seqlens": torch.tensor([0, 4, 6])}, "expected int32"),
        ({"cu_seqlens": torch.tensor([0, 4, 5], dtype=torch.int32)}, "to total = 6"),
        ({"cu_seqlens": torch.tensor([0, 7, 6], dtype=torch.int32)}, "never fall"),
        ({"max_seqlen": 3}, "longest sequence has 4 tokens"),
        ({"dropout_p": 0.1}, "needs a seed"),
        ({"dropout_p": 1.5}, "probability from 0 to 1"),
        ({"backend": "fastest"}, "unknown backend 'fastest'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"qkv": torch.zeros(6, 3, 1, 8), "cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32), "max_seqlen": 4}
    with pytest.raises(ValueError, match=message):
        attention(**{**arguments, **change})


@pytest.mark.parametrize("capability", [90] if DEVICE == "cpu" else [None], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [
        *((torch.bfloat16, lengths) for lengths in ([1], [64, 128], [130, 3, 65, 200], [512, 40], [321])),
        *((torch.float16, lengths) for lengths in ([1], [64, 128], [130, 3, 65])),  # where the bits lie is no matter of the dtype
    ],
)
def test_the_bits_that_dropout_drew(lengths, dtype, capability):
    """Gradients made with them are those of bits that are drawn again; where the kernel reads none there are none."""
    skip_unless_supported("cuda", DEVICE, dtype, 64)
    qkv, cu_seqlens, longest = packed(lengths, 2, 64)
    qkv, cu_seqlens, dropout = qkv.to(DEVICE, dtype), cu_seqlens.to(DEVICE), (0.3, new_seed().to(DEVICE), 5)
    arguments = qkv, cu_seqlens, longest + 7, 0.125
    out, lse, bits = cuda.attention_forward_and_bits(*arguments, *dropout)
    for found, expected in zip((out, lse), cuda.attention_forward(*arguments, *dropout), strict=True):
        assert torch.equal(found, expected)
    dout = torch.randn_like(out)
    again = cuda.attention_backward(dout, qkv, out, lse, *arguments[1:], *dropout)
    assert torch.equal(cuda.attention_backward(dout, qkv, out, lse, *arguments[1:], *dropout, bits), again)
    if DEVICE == "cpu" or torch.cuda.get_device_capability() == (9, 0):
        assert (bits is None) == (longest + 7 > 512)
        assert bits is None or bits.shape == (2, -(-(longest + 7) // 64), sum(lengths), 2)
    assert cuda.attention_forward_and_bits(*arguments, 0.0)[2] is None


def test_an_explicit_backend_is_never_replaced():
    refused = "backend 'cuda' cannot run attention: .*head_dim is 12, its kernels take multiples of 8 up to 128"
    with pytest.raises(RuntimeError, match=refused):
        attention(torch.zeros(1, 3, 1, 12), torch.tensor([0, 1], dtype=torch.int32), 1, backend="cuda")


def test_the_cuda_backend_refuses_a_scale_that_turns_scores_around():
    with pytest.raises(ValueError, match="positive softmax_scale"):
        cuda.attention_forward(torch.zeros(1, 3, 1, 8), torch.tensor([0, 1], dtype=torch.int32), 1, softmax_scale=-1.0)


@pytest.mark.parametrize("capability", [90] if DEVICE == "cpu" else [None], indirect=True)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [[190, 20], [20, 500]])
def test_a_sequence_longer_than_max_seqlen_is_left_out(lengths, dropout_p, capability):
    """The chip has room for max_seqlen, and so have the bits that dropout drew."""
    skip_unless_supported("cuda", DEVICE, torch.bfloat16, 64)
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("of other GPUs' kernels nothing has the size of max_seqlen")
    qkv, cu_seqlens, longest = packed(lengths, 2, 64)
    (qkv,), seed, bound = rounded(qkv, dtype=torch.bfloat16), new_seed(), longest - 100
    arguments = qkv.to(DEVICE, torch.bfloat16), cu_seqlens.to(DEVICE), bound, 0.125, dropout_p, seed.to(DEVICE), 7
    out, _, _ = cuda.attention_forward_and_bits(*arguments)
    expected = plain(qkv, cu_seqlens, 0.125, dropout_p, seed, 7)
    for length, found, right in zip(lengths, out.cpu().double().split(lengths), expected.split(lengths), strict=True):
        if length > bound:
            assert found.isnan().all()
        else:
            torch.testing.assert_close(found, right, rtol=0, atol=2e-2)
