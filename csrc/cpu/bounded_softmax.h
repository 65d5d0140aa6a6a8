// A softmax that needs no maxima, for scores whose size is known before they are computed.
//
// |q . k| <= |q| |k| (Cauchy-Schwarz), and a softmax does not depend on what is subtracted from all scores of a row. Where
// max |q| max |k| of a head of a sequence is small enough to be subtracted instead of each row's maximum, the probabilities
// are made of the sums while they are in registers: the scores are never stored. In BERT nearly every head's are.

#pragma once

#include "cpu/attention_layout.h"
#include "cpu/softmax.h"

namespace fastbert::cpu::FASTBERT_ISA {

// In powers of two. The probabilities lie between 2^(-2 * 48) and 1, whatever the scores are: bfloat16 holds them, and of
// their products with values only those below 2^-30 in the output's units are lost to denormal numbers.
constexpr float kLargestBound = 48.0f;

// The dot products take squares below the smallest normal number, 2^-126, as 0: norms come out too small by this at most,
// for head_dim up to 256.
constexpr float kLostOfNorm = 2e-18f;

// max |k| of packed keys; a NaN does not count.
template <typename Dot>
float largest_key(RightMatrix packed_keys, const Shape& shape) {
  const int64_t depth = groups<Dot>(shape.head_dim);
  Vec largest{};
  for (int64_t panel = 0; panel < shape.padded_length; panel += kPanelColumns) {
    const int64_t left = shape.padded_length - panel, width = left < kPanelColumns ? left : kPanelColumns;
    for (int64_t column = 0; column < width; column += kWidth) {
      const float* keys = packed_keys.data + panel * depth + column;
      Vec squares{};
      for (int64_t group = 0; group < depth; ++group) {
        const Vec key = load(keys + group * width);
        squares = Dot::multiply_add(key, key, squares);
      }
      largest = maximum(squares, largest);
    }
  }
  return __builtin_sqrtf(max_lanes(largest));
}

// max |q| of a sequence's queries; a NaN does not count. lanes: (kWidth, kWidth) of scratch memory.
template <typename Dot, typename T>
float largest_query(Rows<T> queries, const Shape& shape, float* lanes) {
  Vec largest{};
  for_columns(shape.length, [&](int64_t first, auto extent) {
    for (int i = 0; i < extent.count; ++i) {
      Vec squares{};
      for (int64_t d = 0; d < shape.head_dim; d += kWidth * Dot::kElements) {
        const Vec query = load_groups<Dot>(queries[first + i] + d, shape.head_dim - d);
        squares = Dot::multiply_add(query, query, squares);
      }
      store(lanes + i * kWidth, squares);
    }
    const Vec squares = combine_lanes(lanes, [](Vec a, Vec b) { return a + b; });
    largest = maximum(within(squares, 0.0f, extent), largest);
  });
  return __builtin_sqrtf(max_lanes(largest));
}

// A bound on the scores of all queries of a sequence in powers of two, not only of those that a thread has: results do not
// depend on how the work is divided.
template <typename Dot, typename T>
float bound_scores(Rows<T> queries, RightMatrix packed_keys, const Shape& shape, float scale, float* lanes) {
  return (largest_query<Dot>(queries, shape, lanes) + kLostOfNorm) * (largest_key<Dot>(packed_keys, shape) + kLostOfNorm) *
         __builtin_fabsf(scale);
}

// The end of scores = scale * Q K^T: stores 2^(score - bound), rounded to bfloat16, and adds them up by lane as they are
// stored, so that a row's probabilities sum to one. Columns beyond the row's length are 0.
struct StoreProbabilities {
  float* probabilities;  // rows of bfloat16, `leading` floats apart
  int64_t leading;
  float* sums;  // (rows, kWidth): by lane
  int64_t length;
  float scale, bound;

  template <int Vectors>
  FASTBERT_INLINE void operator()([[maybe_unused]] int64_t row, [[maybe_unused]] int64_t column,
                                  [[maybe_unused]] const Vec (&scores)[Vectors]) const {
#if defined(__AVX512BF16__)
    Vec e[Vectors + 1];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) e[v] = exp2_for_bfloat16(scores[v] * scale - bound);
    const int64_t last = column + (Vectors - 1) * kWidth;
    if (last + kWidth > length) e[Vectors - 1] = within(e[Vectors - 1], 0.0f, Part{static_cast<int>(length - last)});
    e[Vectors] = Vec{};

    BFloat16* to = reinterpret_cast<BFloat16*>(probabilities + row * leading) + column;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    float* row_sums = sums + row * kWidth;
    Vec lanes = column == 0 ? Vec{} : load(row_sums);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v += 2) {
      const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)e[v + 1], (__m512)e[v]);
      std::memcpy(to + v * kWidth, &pair, sizeof(pair));
      lanes = (Vec)_mm512_dpbf16_ps((__m512)lanes, pair, ones);
    }
    store(row_sums, lanes);
#endif
  }
};

}  // namespace fastbert::cpu::FASTBERT_ISA
