"""The ops as torch operators: opcheck, gradcheck in float64, torch.compile without graph breaks."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastbert.ops import (
    add_layer_norm,
    attention,
    backends,
    embedding_layer_norm,
    gelu_layer_norm,
    linear_gelu,
    mlm_loss,
    registration,
)

from .helpers import DEVICE, device_of, new_seed

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skip(reason="; ".join(reasons)) if reasons else [])
    for name in backends.BACKENDS
    for reasons in [backends.not_supported_reasons(name, "add_layer_norm", device_of(name), torch.float32)]
]


def arguments_of(op: str, dropout_p: float, dtype: torch.dtype, device: str = "cpu"):
    """(tensors that need gradients, call(*tensors, backend) of the public function, arguments of the operator)."""

    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()

    seed = new_seed(device) if dropout_p else None
    if op == "attention":
        cu_seqlens = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32, device=device)
        leaves = [leaf(9, 3, 2, 8 if dtype == torch.bfloat16 else 4)]  # CUDA C++ has neither float32 nor fewer
        call = lambda qkv, backend: attention(  # noqa: E731
            qkv, cu_seqlens, 5, dropout_p=dropout_p, seed=seed, stream=2, backend=backend
        )
        return leaves, call, lambda backend: (*leaves, cu_seqlens, 5, 0.5, dropout_p, seed, 2, backend)
    if op == "embedding_layer_norm":
        ids = [torch.tensor(i, device=device) for i in ([1, 4, 4, 2, 0], [0, 1, 1, 0, 1], [0, 1, 2, 0, 1])]
        leaves = [leaf(5, 8), leaf(3, 8), leaf(2, 8), leaf(8), leaf(8)]
        call = lambda *a, backend: embedding_layer_norm(  # noqa: E731
            *ids, *a, 1e-5, dropout_p=dropout_p, seed=seed, stream=2, backend=backend
        )
        return leaves, call, lambda backend: (*ids, *leaves, 0, 1e-5, dropout_p, seed, 2, backend)
    if op == "add_layer_norm":
        leaves = [leaf(5, 8), leaf(8), leaf(5, 8), leaf(8), leaf(8)]
        call = lambda *a, backend: add_layer_norm(  # noqa: E731
            *a, 1e-5, dropout_p=dropout_p, seed=seed, stream=2, backend=backend
        )
        return leaves, call, lambda backend: (*leaves, 1e-5, dropout_p, seed, 2, backend)
    if op == "gelu_layer_norm":
        leaves = [leaf(5, 8), leaf(8), leaf(8), leaf(8)]
        call = lambda *a, backend: gelu_layer_norm(*a, 1e-5, backend=backend)  # noqa: E731
        return leaves, call, lambda backend: (*leaves, 1e-5, backend)
    if op == "linear_gelu":
        leaves = [leaf(5, 7), leaf(6, 7), leaf(6)]
        return leaves, linear_gelu, lambda backend: (*leaves, True, backend)
    labels = torch.tensor([1, -100, 10, 0, -100, 3], device=device)
    leaves = [leaf(6, 5), leaf(11, 5), leaf(11)]
    call = lambda *a, backend: mlm_loss(*a, labels, label_smoothing=0.1, backend=backend)[0]  # noqa: E731
    return leaves, call, lambda backend: (*leaves, labels, -100, 0.1, backend)


def dtype_for(backend: str, op: str, device: str) -> torch.dtype:
    """The widest that the backend has kernels for; skips where there is none."""
    for dtype in (torch.float32, torch.bfloat16):
        if not (reasons := backends.not_supported_reasons(backend, op, device, dtype)):
            return dtype
    pytest.skip(f"{backend}: {'; '.join(reasons)}")


# The op with its probabilities of dropout, where it has one.
WITH_DROPOUT = ("attention", "add_layer_norm", "embedding_layer_norm")
CASES = [(op, dropout_p) for op in backends.OPS for dropout_p in ((0.0, 0.3) if op in WITH_DROPOUT else (0.0,))]


@pytest.mark.parametrize(("op", "dropout_p"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(op, backend, dropout_p):
    device = device_of(backend)
    _, _, operator_arguments = arguments_of(op, dropout_p, dtype_for(backend, op, device), device)
    opcheck(getattr(torch.ops.fastbert, op).default, operator_arguments(backend))


@pytest.mark.parametrize(("op", "dropout_p"), CASES)
def test_gradcheck_of_the_reference(op, dropout_p):
    leaves, call, _ = arguments_of(op, dropout_p, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: call(*a, backend="reference"), leaves)


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_compiles_without_graph_breaks(op, backend):
    torch._dynamo.reset()  # it gives up on a function that it has compiled too often
    dtype = torch.float32 if backend == "auto" else dtype_for(backend, op, DEVICE)
    leaves, call, _ = arguments_of(op, 0.3, dtype, DEVICE)
    compiled = torch.compile(lambda *a: call(*a, backend=backend) * 2, fullgraph=True, backend="aot_eager")
    expected = call(*leaves, backend=backend) * 2
    dout = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, dout)
    got = compiled(*leaves)
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(got, leaves, dout), wanted, strict=True))


def test_philox_gives_the_published_numbers():
    """The known-answer vectors of Random123 (philox4x32, 10 rounds): zeros, ones and pi."""
    from fastbert.ops.reference import philox_4x32

    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        seed = key[0] | (key[1] << 32)
        seed = seed - (1 << 64) if seed >= 1 << 63 else seed
        words = philox_4x32(tuple(torch.tensor(c) for c in counter), torch.tensor(seed))
        assert tuple(int(w) for w in words) == expected


def test_dropout_rate():
    """Of a million elements the share that survives is 1 - p within five standard deviations."""
    from fastbert.ops.reference import dropout_keep

    for p in (0.1, 0.5):
        rows, columns = torch.arange(1000)[:, None], torch.arange(1000)[None, :]
        kept = dropout_keep(rows, columns, 3, p, new_seed(), 9).double().mean()
        assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5


def test_tensors_on_several_devices_are_refused():
    """Their addresses are all that a kernel gets: those of another device end the process."""
    with pytest.raises(RuntimeError, match=r"fastbert::op got tensors on cpu, meta: move them to one device"):
        registration.check_devices("fastbert::op", (torch.zeros(2), None, 0.1, torch.zeros(2, device="meta")))
    registration.check_devices("fastbert::op", (None, torch.zeros(2), torch.zeros(3)))
