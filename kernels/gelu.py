"""The exact erf-GELU (Hendrycks and Gimpel, 2016), u * Phi(u), and its derivative Phi(u) + u * phi(u), on float32 tiles.

Two ways to Phi: erf, whose instructions no pass over memory hides, and for what is rounded to half precision Abramowitz and
Stegun's 7.1.26: the exponential that phi needs, too, a reciprocal and a dozen others, with an absolute error of 7.5e-8, about
that of 1 + erf in float32 itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
RSQRT_TWO_PI = tl.constexpr(0.3989422804014327)
MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
P_SQRT_HALF = tl.constexpr(0.3275911 * 0.7071067811865476)


@triton.jit
def gaussian(u, dtype: tl.constexpr):
    """Phi(u) and phi(u), the standard normal distribution's function and density, for results in ``dtype``."""
    exponential = tl.exp2(u * u * MINUS_HALF_LOG2_E)
    if dtype == tl.float32:
        distribution = 0.5 + 0.5 * tl.erf(u * SQRT_HALF)
    else:
        t = 1.0 / (tl.abs(u) * P_SQRT_HALF + 1.0)
        polynomial = (((t * 1.061405429 - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
        tail = 0.5 * polynomial * t * exponential
        distribution = tl.where(u < 0.0, tail, 1.0 - tail)
    return distribution, exponential * RSQRT_TWO_PI
