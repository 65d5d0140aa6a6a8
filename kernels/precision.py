"""Products and roundings of tiles, the same on a GPU and in Triton's interpreter.

The interpreter (``TRITON_INTERPRET=1`` when the module is imported) keeps bfloat16 as raw 16-bit integers: its ``tl.dot``
would multiply those, its casts cut the mantissa off instead of rounding to nearest even, and its ``tl.fma`` rounds the product.
These functions give it the arithmetic of the hardware, so that what the tests measure there holds on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a ``tl.dot``: for float32 torch's own setting for matmuls (``allow_tf32`` and its successors).

    The other dtypes have but one, whatever is set, or a changed setting would compile their kernels anew. Read through
    ``fp32_precision``, because reading ``allow_tf32`` raises once a program has used the newer setting.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32; PRECISION is the ``input_precision`` of float32 operands."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """float32 ``x`` in DTYPE, rounded to nearest even."""
    if INTERPRETED:
        if tl.bfloat16 == DTYPE:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def fma(a, b, c):
    """a * b + c of float32, rounded once."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b, c)
