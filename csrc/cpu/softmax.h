// The softmax of a block of rows, in powers of two: scores arrive multiplied with log2(e), exp(x) is exp2(x log2(e)).
// The polynomials are minimax fits (Lawson's algorithm) made for this file.

#pragma once

#include "cpu/philox.h"
#include "cpu/vec_math.h"

namespace fastbert::cpu::FASTBERT_ISA {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// log2(x) of normal positive x, to a relative error of 1e-7; exactly 0 for 1, NaN for NaN. x = 2^n (1 + z) with 1 + z
// between sqrt(1/2) and sqrt(2), and log2(1 + z) = z q(z) with q good to 2.6e-8.
FASTBERT_INLINE Vec log2(Vec x) {
  constexpr float q[] = {1.4426950036522797f,  -0.7213473468215243f,  0.4809106429870882f,
                         -0.3607036812435549f, 0.2879162453457461f,   -0.23894485511031005f,
                         0.21571566823475594f, -0.20726953690802055f, 0.12583659088953483f};
  constexpr uint32_t sqrt_half = 0x3F3504F3;
  const VecInt n = (VecInt)((VecUint)x - sqrt_half) >> 23;
  const Vec z = (Vec)((VecUint)x - ((VecUint)n << 23)) - 1.0f;
  const Vec y = polynomial(z, q) * z + __builtin_convertvector(n, Vec);
  return x == x ? y : x;
}

// Lane i of the result is the combination of the lanes of vector i.
template <typename Combine>
FASTBERT_INLINE Vec combine_lanes(const float* vectors, Combine combine) {
  Vec v[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) v[i] = load(vectors + i * kWidth);
#pragma GCC unroll 4
  for (int count = kWidth / 2; count > 0; count /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      Vec low, high;
      interleave(v[i], v[i + count], low, high, std::make_integer_sequence<int, kWidth>{});
      v[i] = combine(low, high);
    }
  }
  return v[0];
}

// What is known of a block of rows, each array as long as a whole number of vectors.
struct SoftmaxRows {
  float* lanes;      // (rows, kWidth): the maxima of each row's scores by lane, then the sums
  float* max;        // (rows,)
  float* out_scale;  // (rows,): what a row of the product with V is to be multiplied with
};

// The end of scores = scale * Q K^T: stores them and their maxima by lane. Columns beyond the row's length do not count.
struct StoreScores {
  float* scores;
  int64_t leading;
  float* maxima;
  int64_t length;
  float scale;

  template <int Vectors>
  FASTBERT_INLINE void operator()(int64_t row, int64_t column, const Vec (&sums)[Vectors]) const {
    float* row_maxima = maxima + row * kWidth;
    Vec max = column == 0 ? splat(-__builtin_inff()) : load(row_maxima);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int64_t first = column + v * kWidth;
      const Vec score = sums[v] * scale;
      store(scores + row * leading + first, score);
      const bool whole = v < Vectors - 1 || first + kWidth <= length;
      max = maximum(whole ? score : within(score, -__builtin_inff(), Part{static_cast<int>(length - first)}), max);
    }
    store(row_maxima, max);
  }
};

// Overwrites a row of scores with store_probability(column, 2^(score - max)), 0 beyond the length; returns the sums by lane.
template <bool kDropout, typename StoreProbability>
FASTBERT_INLINE Vec exponentiate_row(const float* scores, int64_t length, float max, const uint16_t* bits,
                                     uint32_t threshold, StoreProbability&& store_probability) {
  Vec sums{};
  for_columns(length, [&](int64_t column, auto extent) {
    const Vec e = within(exp2(load(scores + column) - max), 0.0f, extent);
    sums += e;
    store_probability(column, kDropout ? drop(e, bits + column, threshold) : e);
  });
  return sums;
}

}  // namespace fastbert::cpu::FASTBERT_ISA
