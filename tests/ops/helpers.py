"""How every backend of an op is tested: float64 is the truth, plain torch in the same dtype sets the error budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastbert.ops import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Triton's interpreter rounds a float32 zero to a bfloat16 of 1e-38; above this a number is not zero.
SMALLEST = 1e-30


def backend_cases(op: str) -> list:
    """(backend, dtype) pairs that this machine can run; the others appear as skipped, with their reasons."""
    cases = []
    for backend in backends.BACKENDS:
        device = "cpu" if backend == "native" else DEVICE
        for dtype in FLOATS:
            reasons = backends.not_supported_reasons(backend, op, device, dtype)
            if backend == "triton" and device == "cpu" and dtype == torch.float16:
                reasons = ["in the interpreter float16 takes the same path as bfloat16, and time"]
            marks = [pytest.mark.skip(reason=f"{backend}: {'; '.join(reasons)}")] if reasons else []
            cases.append(pytest.param(backend, dtype, id=f"{backend}-{NAMES[dtype]}", marks=marks))
    return cases


def skip_unless_width_suits(backend: str, hidden: int) -> None:
    """The CUDA kernels refuse rows that 16-byte accesses do not fit."""
    if backend == "cuda" and hidden % 8:
        pytest.skip("cuda: it takes rows of a multiple of 8 elements")


def device_of(backend: str) -> str:
    return "cpu" if backend == "native" else DEVICE


def assert_within_budget(
    ours: Sequence[Tensor | None], plain: Sequence[Tensor | None], truth: Sequence[Tensor | None], names: Sequence[str]
) -> None:
    """The error against float64 is at most twice that of plain torch in the same dtype.

    One rounding of the largest value to that dtype is granted on top: where plain torch happens to hit the truth, twice its
    error would be 0.
    """
    for name, a, b, c in zip(names, ours, plain, truth, strict=True):
        assert (a is None) == (c is None), f"{name}: {'no' if a is None else 'a'} result"
        if a is None:
            continue
        assert a.shape == c.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(c.shape)}"
        if a.numel() == 0:
            continue
        assert a.dtype == b.dtype, f"{name}: {a.dtype}, expected {b.dtype}"
        assert torch.isfinite(a).all(), f"{name}: not finite"
        c = c.to(a.device)
        error, budget = (a.double() - c).abs().max(), (b.to(a.device).double() - c).abs().max()
        one_rounding = torch.finfo(a.dtype).eps * c.abs().max()
        assert error <= 2 * budget + one_rounding, f"{name}: error {error:.3e}, plain torch's {budget:.3e}"


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dout: Tensor, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor | None]:
    """[output, gradients of the inputs...] of ``function`` on copies of the inputs in ``dtype``."""
    leaves = [None if x is None else x.detach().to(device, dtype, copy=True).requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(dout.to(device, out.dtype))
    return [out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


Draw = tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]


def merged(draw: Callable[[], Draw], elements: int) -> Draw:
    """(ours, plain, truth) of several draws where one has few elements: the largest error of a handful is a matter of luck.

    No more than eight: the numbers are the same each time, and Triton's interpreter takes its time for every one.
    """
    draws = [draw() for _ in range(min(8, max(1, 2000 // max(elements, 1))))]

    def together(results: Sequence[Tensor | None]) -> Tensor | None:
        return None if results[0] is None else torch.cat([r.flatten() for r in results])

    return tuple([together(results) for results in zip(*(d[i] for d in draws), strict=True)] for i in range(3))


def rounded(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    """float64 tensors whose values ``dtype`` holds exactly, so that rounding the inputs is no part of anybody's error."""
    return [None if t is None else t.to(dtype).double() for t in tensors]


def new_seed(device: str = "cpu") -> Tensor:
    """A seed with both of its 32-bit halves in use."""
    return torch.tensor([0x1234567890ABCDE], dtype=torch.int64, device=device)
