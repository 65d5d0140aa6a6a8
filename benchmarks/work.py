"""What each op has to do at the least, written once: FLOPs of its matmuls and bytes that must cross memory, per direction.

    flops("attention", "forward", lengths=(128,) * 512, num_heads=12, head_dim=64)
    bytes("add_layer_norm", "backward", rows=65536, hidden=768, dropout=True)
    floor_seconds(work("attention", "forward", ...), ceilings)  # no machine with these ceilings can be faster

FLOPs are multiply-adds times two of matmuls over real tokens; row-wise arithmetic counts 0, since memory bounds it. Bytes count
every input once and every output once, with what the backward pass keeps; statistics (a few bytes per row), biases and
LayerNorm's parameters are left out: less than 1%. A kernel that reads something twice is therefore seen to reach less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

DIRECTIONS = ("forward", "backward")


class Work(NamedTuple):
    flops: int
    bytes: int


def attention(
    direction: str, *, lengths: Sequence[int], num_heads: int, head_dim: int, element_size: int = 2, dropout: bool = False
) -> Work:
    """lengths: tokens of each sequence. Forward two matmuls, backward five, as FlashAttention counts (scores are recomputed).

    Bytes: qkv in, out out; backward qkv, out and its gradient in, qkv's gradient out.
    """
    pairs, elements = sum(n * n for n in lengths), sum(lengths) * num_heads * head_dim
    matmuls, tensors = (2, 4) if direction == "forward" else (5, 8)
    return Work(2 * matmuls * pairs * num_heads * head_dim, tensors * elements * element_size)


def add_layer_norm(direction: str, *, rows: int, hidden: int, element_size: int = 2, dropout: bool = False) -> Work:
    """Forward x, residual in, y and z (for the backward pass) out; backward dy, z in, dresidual and with dropout dx out."""
    tensors = 4 if direction == "forward" or dropout else 3
    return Work(0, tensors * rows * hidden * element_size)


def add_layer_norm_mixed(direction: str, *, rows: int, hidden: int, element_size: int = 2, dropout: bool = False) -> Work:
    """Forward x, float32 residual in, y, y in float32 and z out; backward y's gradient, z in, dx and float32 dresidual out."""
    of_rows, of_float32 = (3, 2) if direction == "forward" else (3, 1)
    return Work(0, (of_rows * element_size + of_float32 * 4) * rows * hidden)


def gelu_layer_norm(direction: str, *, rows: int, hidden: int, element_size: int = 2) -> Work:
    """Forward x in, y out; backward dy, x in, dx out."""
    return Work(0, (2 if direction == "forward" else 3) * rows * hidden * element_size)


def embedding_layer_norm(
    direction: str, *, rows: int, hidden: int, vocabulary: int, element_size: int = 2, dropout: bool = False
) -> Work:
    """Forward a word's row in, y out. Backward dy and a word's row in, the word embeddings' gradient out (dense, as torch's).

    Positions and types have so few rows that caches hold them.
    """
    written = 0 if direction == "forward" else vocabulary * hidden
    return Work(0, (2 * rows * hidden + written) * element_size)


def linear_gelu(direction: str, *, rows: int, in_features: int, out_features: int, element_size: int = 2) -> Work:
    """Forward x, weight in, y and the pre-activation (for the backward pass) out; backward dy, the pre-activation, x, weight
    in, dx and dweight out."""
    x, weight, y = rows * in_features, in_features * out_features, rows * out_features
    product = 2 * rows * in_features * out_features
    if direction == "forward":
        return Work(product, (x + weight + 2 * y) * element_size)
    return Work(2 * product, (2 * x + 2 * weight + 2 * y) * element_size)


def linear(direction: str, *, rows: int, in_features: int, out_features: int, element_size: int = 2) -> Work:
    """Forward x, weight in, y out; backward dy, x, weight in, dx and dweight out."""
    x, weight, y = rows * in_features, in_features * out_features, rows * out_features
    product = 2 * rows * in_features * out_features
    if direction == "forward":
        return Work(product, (x + weight + y) * element_size)
    return Work(2 * product, (2 * x + 2 * weight + y) * element_size)


def feed_forward(direction: str, *, rows: int, hidden: int, intermediate: int, element_size: int = 2) -> Work:
    """Forward x and both weights in, y and the pre-activation (for the backward pass) out; backward dy, the pre-activation, x and
    both weights in, dx and both weights' gradients out."""
    x, weights, wide = rows * hidden, 2 * hidden * intermediate, rows * intermediate
    products = 2 * rows * weights
    if direction == "forward":
        return Work(products, (2 * x + weights + wide) * element_size)
    return Work(2 * products, (3 * x + 2 * weights + wide) * element_size)


def int8_linear(direction: str, *, rows: int, in_features: int, out_features: int, element_size: int = 4) -> Work:
    """Forward, all that there is: x in and y out in the activations' dtype, the weight in with one byte per element."""
    moved = rows * (in_features + out_features) * element_size + in_features * out_features
    return Work(2 * rows * in_features * out_features, moved)


def mlm_loss(direction: str, *, rows: int, hidden: int, vocabulary: int, element_size: int = 2) -> Work:
    """rows: labelled ones. Forward one matmul; backward two, although an implementation that stores no logits needs a third to
    recompute them. Bytes: hidden and weight in, backward their gradients out."""
    product = 2 * rows * hidden * vocabulary
    operands = (rows + vocabulary) * hidden * element_size
    return Work(product, operands) if direction == "forward" else Work(2 * product, 2 * operands)


_OPS = {
    function.__name__: function
    for function in (
        attention,
        add_layer_norm,
        add_layer_norm_mixed,
        gelu_layer_norm,
        embedding_layer_norm,
        linear,
        linear_gelu,
        feed_forward,
        int8_linear,
        mlm_loss,
    )
}


def work(op: str, direction: str, **shape) -> Work:
    """The FLOPs and bytes of ``op`` in one direction ("forward" or "backward"); ``shape`` as the op's function above takes it."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}, expected 'forward' or 'backward'")
    return _OPS[op](direction, **shape)


def flops(op: str, direction: str, **shape) -> int:
    return work(op, direction, **shape).flops


def bytes(op: str, direction: str, **shape) -> int:
    return work(op, direction, **shape).bytes


def floor_seconds(required: Work, ceilings: Mapping[str, float]) -> float:
    """The least time on a machine with the ceilings matmul_flops (FLOP/s) and copy_bytes (B/s): its slower unit's (the roofline
    of Williams, Waterman and Patterson, 2009)."""
    return max(required.flops / ceilings["matmul_flops"], required.bytes / ceilings["copy_bytes"])
