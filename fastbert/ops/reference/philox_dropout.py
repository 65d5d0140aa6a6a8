"""Dropout whose masks are a function of position, seed and stream: no backend has to store one."""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
DROPOUT_LEVELS = 1 << 16
_MASK32 = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor, rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox 4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the generator of ``tl.philox``.

    ``counter``: four int64 tensors of 32-bit values, broadcastable; ``seed``: one int64, its low and high halves are the key.
    Returns four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        hi0, lo0 = _multiply_32(c0, PHILOX_MULTIPLIERS[0])
        hi1, lo1 = _multiply_32(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + PHILOX_KEY_INCREMENTS[0]) & _MASK32, (k1 + PHILOX_KEY_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply_32(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 arithmetic that never leaves 63 bits."""
    low, high = a * (multiplier & 0xFFFF), a * (multiplier >> 16)
    product_low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (product_low >> 32), product_low & _MASK32


def dropout_threshold(dropout_p: float) -> int:
    """The probability in 1/65536: an element is dropped when its 16 random bits are below this number."""
    return round(dropout_p * DROPOUT_LEVELS)


def dropout_scale(dropout_p: float) -> float:
    """1 / (1 - p) for the probability as it is applied (a multiple of 1/65536); 0 where everything is dropped."""
    kept = DROPOUT_LEVELS - dropout_threshold(dropout_p)
    return DROPOUT_LEVELS / kept if kept else 0.0


def dropout_keep(rows: Tensor, columns: Tensor, plane: Tensor | int, dropout_p: float, seed: Tensor, stream: int) -> Tensor:
    """Which elements survive dropout: bool, broadcast of ``rows``, ``columns`` and ``plane`` (int64 indices below 2**32).

    The counter is (column // 8, row, plane, stream) under the key ``seed``: one Philox call of 128 bits serves eight
    neighbouring columns with 16 bits each (column % 8 counts the 16-bit pieces from the lowest). It depends on nothing but
    these numbers, so every backend draws the same mask and the backward pass recomputes it instead of storing it. Sixteen
    bits set p to within 1/131072 at an eighth of the cost of ``tl.rand``'s one call per element.
    """
    plane = torch.as_tensor(plane, dtype=torch.int64, device=rows.device)
    stream_counter = torch.as_tensor(stream, dtype=torch.int64, device=rows.device)
    words = torch.stack(philox_4x32((columns // 8, rows, plane, stream_counter), seed.reshape(())), dim=-1)
    lane = (columns % 8).expand(words.shape[:-1])
    word = words.gather(-1, (lane // 2).unsqueeze(-1)).squeeze(-1)
    return ((word >> (16 * (lane % 2))) & 0xFFFF) >= dropout_threshold(dropout_p)


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None, stream: int) -> Tensor:
    """Dropout of ``x`` (rows, columns) with the counter-based mask of :func:`dropout_keep`, plane 0."""
    if dropout_p == 0.0:
        return x
    keep = row_keep(x, dropout_p, seed, stream)
    return torch.where(keep, x * dropout_scale(dropout_p), 0.0)


def row_keep(x: Tensor, dropout_p: float, seed: Tensor, stream: int) -> Tensor:
    """Which elements of ``x`` (rows, columns) survive :func:`dropout`."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    return dropout_keep(rows[:, None], columns[None, :], 0, dropout_p, seed, stream)
