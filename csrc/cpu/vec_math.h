// exp and the normal distribution on vectors. The polynomials are minimax fits (Lawson's algorithm) made for this file.

#pragma once

#include "cpu/vec.h"

namespace fastbert::cpu::FASTBERT_ISA {

template <int N>
FASTBERT_INLINE Vec polynomial(Vec x, const float (&coefficients)[N]) {
  Vec y = splat(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) y = y * x + coefficients[i];
  return y;
}

// exp(x) to 1 unit in the last place or so; 0 below -87 (the results there would be close to denormal), exp(88) above 88,
// NaN for NaN. x = n ln 2 + r, exp(x) = 2^n exp(r), and exp(r) = 1 + r + r^2 q(r) with q good to 3.1e-9.
FASTBERT_INLINE Vec exp(Vec x) {
  constexpr float q[] = {0.49999993431891704f, 0.16666520396767037f, 0.04166839083115681f, 0.008368745320396876f,
                         0.001381453790346389f};
  constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the lowest bits

  const Vec clamped = minimum(splat(88.0f), x);
  const Vec shifted = clamped * log2_e + round_to_integer;
  const Vec n = shifted - round_to_integer;
  const Vec r = (clamped - n * ln2_high) - n * ln2_low;
  const Vec mantissa = (polynomial(r, q) * r + 1.0f) * r + 1.0f;
  const Vec y = (Vec)((VecInt)mantissa + ((VecInt)shifted << 23));
  return x < -87.0f ? Vec{} : y;
}

struct Normal {
  Vec cdf;  // Phi(u)
  Vec pdf;  // phi(u)
};

// The standard normal distribution, both tails to a relative error of a few 1e-7: Phi is not made of 1 + erf, which loses
// all its digits for u below -3. Near 0 Phi(u) = 1/2 + u s(u^2), good to 3e-12; beyond 1 Phi(-a) = exp(-a^2 / 2) t((a - 3) /
// (a + 3)), good to 1.1e-8 (the variable is that of Shepherd and Laframboise, "Chebyshev approximation of (1 + 2x) exp(x^2)
// erfc x", 1981).
FASTBERT_INLINE Normal normal_distribution(Vec u) {
  constexpr float s[] = {0.3989422917366028f,     -0.06649038195610046f,  0.009973541833460331f, -0.00118725944776088f,
                         0.00011527063907124102f, -9.23337120184442e-06f, 5.243601890470018e-07f};
  constexpr float t[] = {0.12151394784450531f,    -0.20640261471271515f,    0.12322478741407394f,
                         -0.046213336288928986f,  0.0061364020220935345f,   0.002901966916397214f,
                         -0.0010088972048833966f, -0.00031570743885822594f, 0.00016180217789951712f};
  constexpr float inverse_sqrt_two_pi = 0.3989422804014327f;

  const Vec magnitude = u < 0.0f ? -u : u;
  const Vec a = minimum(splat(20.0f), magnitude);
  const Vec square = u * u;
  const Vec bell = exp(-0.5f * square);
  const Vec tail = bell * polynomial((a - 3.0f) / (a + 3.0f), t);
  const Vec outer = u < 0.0f ? tail : 1.0f - tail;
  const Vec inner = u * polynomial(square, s) + 0.5f;
  return {a < 1.0f ? inner : outer, bell * inverse_sqrt_two_pi};
}

FASTBERT_INLINE Vec gelu(Vec u, const Normal& normal) { return u * normal.cdf; }

#if defined(__AVX512BF16__)
// 2^x for what is then rounded to bfloat16, to a relative error of 8.6e-5 (a twentieth of the rounding's); exactly 1 for 0,
// NaN for NaN. x = n + f with 0 <= f < 1; the instruction that scales by 2^x takes n of it.
FASTBERT_INLINE Vec exp2_for_bfloat16(Vec x) {
  constexpr float q[] = {1.0f, 0.695116788f, 0.227644965f, 0.0770670623f};
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (Vec)_mm512_scalef_ps((__m512)polynomial(f, q), (__m512)x);
}

// gelu(u) for what is then rounded to bfloat16, to a relative error of 2.5e-4 (a sixteenth of the rounding's) down to u =
// -5.6 and to 2e-8 in absolute terms beyond, in a third of the instructions. Phi(u) = 1 / (1 + 2^(u g(|u|))), the log-odds
// u g fitted to 1.2e-4; the reciprocal is the instruction's, good to 2^-14. -0 for a large negative u, NaN for NaN and -inf.
FASTBERT_INLINE Vec gelu_for_bfloat16(Vec u) {
  constexpr float g[] = {-2.29912292f,   -0.0168638312f,  -0.0744651484f, -0.0244651680f,
                         0.00926639296f, -0.00118091892f, 5.47380892e-05f};
  const Vec magnitude = (Vec)((VecInt)u & 0x7FFFFFFF);
  const Vec x = u * polynomial(minimum(splat(5.6f), magnitude), g);
  return u * (Vec)_mm512_rcp14_ps((__m512)(exp2_for_bfloat16(x) + 1.0f));
}
#endif

FASTBERT_INLINE Vec gelu_derivative(Vec u, const Normal& normal) { return normal.cdf + u * normal.pdf; }

}  // namespace fastbert::cpu::FASTBERT_ISA
