"""Attention beside what torch and flash-attn have for it: on padded rows with a mask, on nested tensors, and on packed rows.

torch's ``math`` takes part on CPUs alone: on a GPU it is what ``torch eager`` spells out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert.ops import attention

from .op_contenders import STREAM, Case, Contender, Offer, Scale, gpu_package, leaf, seed_on

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CPU_SDPA = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa math": SDPBackend.MATH}
_HALF_ONLY, _NO_DROPOUT = "it computes in float16 and bfloat16 only", "it has no dropout"
_CUDA_ONLY = "it runs on CUDA devices only"


def cases(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    named = {f"S{n}": (n,) * (scale.tokens // n) for n in scale.lengths}
    named[scale.mix_name] = scale.mix * max(1, scale.tokens // sum(scale.mix))
    heads = hidden // scale.head_dim
    for name, lengths in named.items():
        for dropout_p in (0.0, 0.1):
            total, longest = sum(lengths), max(lengths)
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
            qkv = leaf(total, 3, heads, scale.head_dim, device=device, dtype=dtype)
            dout = torch.randn(total, heads, scale.head_dim, device=device).to(dtype)
            seed = seed_on(device)

            def ours(backend, bounds=cu_seqlens, longest=longest, dropout_p=dropout_p, seed=seed):
                return lambda x: attention(x, bounds, longest, dropout_p=dropout_p, seed=seed, stream=STREAM, backend=backend)

            shape = {"lengths": lengths, "num_heads": heads, "head_dim": scale.head_dim, "dropout": dropout_p > 0}
            peers = {
                **_on_padded_rows(qkv.detach(), cu_seqlens, lengths, dout, dropout_p),
                **_on_packed_rows(qkv.detach(), cu_seqlens, lengths, dout, dropout_p),
            }
            yield Case("attention", name, hidden, dropout_p, shape, ours, [qkv], dout, scale.head_dim, peers, compiled=None)


def _together(out: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    return [out, torch.stack(tuple(grads), 1)]


def _on_padded_rows(qkv: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...], dout: Tensor, dropout_p: float) -> dict[str, Offer]:
    longest, batch = max(lengths), len(lengths)
    real = torch.arange(longest, device=qkv.device) < cu_seqlens.diff()[:, None]
    mask = None if min(lengths) == longest else real[:, None, None, :]

    def padded(x: Tensor) -> Tensor:
        """(total, heads, head_dim) -> (batch, heads, longest, head_dim), in the memory order that a projection leaves."""
        rows = x.new_zeros(batch, longest, *x.shape[1:])
        rows[real] = x
        return rows.transpose(1, 2)

    def unpadded(out: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
        return _together(out.transpose(1, 2)[real], [g.transpose(1, 2)[real] for g in grads])

    @functools.cache
    def inputs() -> tuple[list[Tensor], Tensor]:
        return [padded(t).detach().requires_grad_() for t in qkv.unbind(1)], padded(dout)

    def contender(run: Callable[..., Tensor]) -> Callable[[], Contender]:
        return lambda: Contender(run, *inputs(), unpadded, comparable=dropout_p == 0)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout_p) @ v

    def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)

        return run

    peers: dict[str, Offer] = {"torch eager": contender(eager)}
    backends = SDPA if qkv.is_cuda else CPU_SDPA
    peers |= {name: contender(sdpa(backend)) for name, backend in backends.items()}
    return peers | {name: _CUDA_ONLY for name in SDPA if name not in backends}


def _on_packed_rows(qkv: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...], dout: Tensor, dropout_p: float) -> dict[str, Offer]:
    longest, device = max(lengths), qkv.device.type

    @functools.cache
    def apart() -> list[Tensor]:
        return [t.contiguous().requires_grad_() for t in qkv.unbind(1)]

    def nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        jagged = [
            torch.nested.nested_tensor_from_jagged(t, cu_seqlens, min_seqlen=min(lengths), max_seqlen=longest).transpose(1, 2)
            for t in (q, k, v)
        ]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*jagged, dropout_p=dropout_p).transpose(1, 2).values()

    def varlen() -> Contender:
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

        run = lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)  # noqa: E731
        return Contender(run, apart(), dout, _together)

    def flash_attn() -> Contender:
        from flash_attn import flash_attn_varlen_qkvpacked_func  # FlashAttention-2, release 2.8

        def run(packed: Tensor) -> Tensor:
            return flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, longest, dropout_p=dropout_p)

        return Contender(run, [qkv.clone().requires_grad_()], dout, comparable=dropout_p == 0)

    half_only = [_HALF_ONLY] if qkv.dtype == torch.float32 else []
    against = [*half_only, *([_NO_DROPOUT] if dropout_p else []), *([] if qkv.is_cuda else [_CUDA_ONLY])]
    return {
        "sdpa flash, nested": (lambda: Contender(nested, apart(), dout, _together, comparable=dropout_p == 0))
        if qkv.is_cuda
        else _CUDA_ONLY,
        "varlen_attn": "; ".join(against) or varlen,
        "flash-attn": gpu_package("flash_attn", "flash-attn --no-build-isolation", device, flash_attn, *half_only),
    }
