"""The backward pass of attention as a process's first GPU work: ``python -m tests.ops.first_gpu_work BACKEND WAY SEQUENCES``.

What a kernel needs is made when somebody first needs it: the device's context in each thread, streams, Triton's drivers, the
descriptors of tensor copies. Usually a forward pass does it, in the main thread. Here the CPU computes the forward pass, and WAY
says who calls the backward kernel: the ``main`` thread, or ``autograd``'s thread of the device, in which nothing has happened
before. Exit code 1 where the gradient is not as right as plain torch's, or where something was on the GPU before.

Without a GPU Triton interprets its kernels and a model of a GPU runs the others, as in the tests.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .. import conftest  # noqa: F401 (first: without a GPU it puts Triton's interpreter and the model of a GPU in place)

# isort: split
from fastbert.ops import reference

from .helpers import DEVICE, assert_within_budget, new_seed

LENGTHS = (128, 77, 1, 130)
HEADS, HEAD_DIM, DROPOUT_P, STREAM = 2, 64, 0.1, 7


class GivenForward(torch.autograd.Function):
    """Attention whose forward pass is over: ``saved`` is what its backward kernel reads."""

    @staticmethod
    def forward(ctx, qkv: Tensor, saved: dict[str, Tensor], backend: str) -> Tensor:
        ctx.saved, ctx.backend = saved, backend
        return saved["out"].view_as(saved["out"])

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None]:
        return dqkv_of(dout, ctx.saved, ctx.backend), None, None


def dqkv_of(dout: Tensor, saved: dict[str, Tensor], backend: str) -> Tensor:
    return torch.ops.fastbert.attention_backward(
        dout, saved["qkv"], saved["out"], saved["lse"], saved["cu_seqlens"], max(LENGTHS), HEAD_DIM**-0.5, DROPOUT_P, saved["seed"],
        STREAM, backend,
    )  # fmt: skip


def called_by(way: str, dout: Tensor, saved: dict[str, Tensor], backend: str) -> Tensor:
    if way == "autograd":
        qkv = saved["qkv"].requires_grad_()
        GivenForward.apply(qkv, saved, backend).backward(dout)
        return qkv.grad
    return dqkv_of(dout, saved, backend)


def after_forward(qkv: Tensor, cu_seqlens: Tensor, seed: Tensor) -> dict[str, Tensor]:
    out, lse = reference.attention_forward(qkv, cu_seqlens, max(LENGTHS), HEAD_DIM**-0.5, DROPOUT_P, seed, STREAM)
    return {"qkv": qkv, "out": out, "lse": lse, "cu_seqlens": cu_seqlens, "seed": seed}


def main(backend: str, way: str, sequences: int) -> None:
    torch.manual_seed(5)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(sequences)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    qkv = torch.randn(sum(lengths), 3, HEADS, HEAD_DIM).to(torch.bfloat16)
    dout = torch.randn(sum(lengths), HEADS, HEAD_DIM).to(torch.bfloat16)
    saved = after_forward(qkv, cu_seqlens, new_seed())
    plain = dqkv_of(dout, saved, "reference")
    truth = dqkv_of(dout.double(), after_forward(qkv.double(), cu_seqlens, new_seed()), "reference")

    assert not torch.cuda.is_initialized(), "something was on the GPU before the backward pass"
    moved = {name: tensor.to(DEVICE) for name, tensor in saved.items()}
    found = called_by(way, dout.to(DEVICE), moved, backend)
    assert_within_budget([found.cpu()], [plain], [truth], ["dqkv"])
    print(f"dqkv is right: {tuple(found.shape)} on {found.device}")


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]))
