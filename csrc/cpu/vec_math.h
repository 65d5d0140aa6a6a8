// exp, powers of two and the normal distribution on vectors. The polynomials are minimax fits (Lawson's algorithm) made for
// this file.

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
  const Vec y = (Vec)((VecUint)mantissa + ((VecUint)shifted << 23));  // unsigned: what is out of range wraps around
  return x < -87.0f ? Vec{} : x == x ? y : x;                         // the shift makes a number of some NaNs
}

// 2^x for x up to 127, to 1.5 units in the last place; exactly 1 for 0; 0 below -126, where results would be denormal; NaN
// for NaN. x = n + f with |f| <= 1/2, and 2^f = 1 + f q(f) with q good to 9.1e-8.
FASTBERT_INLINE Vec exp2(Vec x) {
  constexpr float q[] = {0.6931469775983881f, 0.240222420848647f, 0.0555073374436362f, 0.00967151266306757f,
                         0.0013264726863273582f};
  constexpr float smallest = -126.0f;
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Vec f = x - n;
  const Vec y = polynomial(f, q) * f + 1.0f;
  const __mmask16 large = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(smallest), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(large, (__m512)y, (__m512)n);
#else
  constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the lowest bits
  const Vec shifted = x + round_to_integer;
  const Vec f = x - (shifted - round_to_integer);
  const Vec y = polynomial(f, q) * f + 1.0f;
  return x < smallest ? Vec{} : x == x ? (Vec)((VecUint)y + ((VecUint)shifted << 23)) : x;
#endif
}

struct Normal {
  Vec cdf;  // Phi(u)
  Vec pdf;  // phi(u)
};

// The standard normal distribution, both tails to a relative error of a few 1e-7 (more where a^2 / 2 is large and its own
// rounding counts): Phi is not made of 1 + erf, which loses all its digits for u below -3. Phi(-a) = exp(-a^2 / 2) p(a) /
// q(a), the quotient good to 5e-9 for all a >= 0 (the form of Cody's approximations, "Rational Chebyshev approximations for
// the error function", 1969; fitted here by Lawson's algorithm).
FASTBERT_INLINE Normal normal_distribution(Vec u) {
  constexpr float p[] = {0.5f, 0.43568626f, 0.18130670f, 0.039984159f, 0.0040201889f};
  constexpr float q[] = {1.0f, 1.6692574f, 1.1944840f, 0.46438020f, 0.10023280f, 0.010076975f};
  constexpr float minus_half_log2_e = -0.72134752f, inverse_sqrt_two_pi = 0.3989422804014327f;

  const Vec a = minimum(splat(20.0f), u < 0.0f ? -u : u);
  const Vec bell = exp2(a * a * minus_half_log2_e);
  const Vec tail = bell * polynomial(a, p) / polynomial(a, q);
  return {u < 0.0f ? tail : 1.0f - tail, bell * inverse_sqrt_two_pi};
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
// -5.6 and to 2e-8 in absolute terms beyond, in two thirds of the instructions. Phi(u) = 1 / (1 + 2^(u g(|u|))), the
// log-odds u g fitted to 1.2e-4; the reciprocal is the instruction's, good to 2^-14. -0 for a large negative u, NaN for NaN
// and -inf.
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
