// A softmax that needs no maxima, for scores whose size is known before they are computed.
//
// |q . k| <= |q| |k| (Cauchy-Schwarz), and a softmax does not depend on what is subtracted from all scores of a row. Where
// |q| max |k| is small enough to subtract it instead of the row's maximum, the probabilities are made of the sums while they
// are in registers: the scores are never stored. In BERT nearly every head's are.

#pragma once

#include "cpu/attention_layout.h"
#include "cpu/softmax.h"

namespace fastbert::cpu::FASTBERT_ISA {

// In powers of two. The probabilities lie between 2^(-2 * 48) and 1, whatever the scores are: bfloat16 holds them, and of
// their products with values only those below 2^-30 in the output's units are lost to denormal numbers.
constexpr float kLargestBound = 48.0f;

// max |k| of packed keys; a NaN does not count.
template <typename Dot>
float largest_norm(RightMatrix packed_keys, const Shape& shape) {
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

// Sets rows.shift of a block of queries to |q| times key_norm, which includes the scores' factor; whether all of them are
// small enough. Queries with a NaN are: so are their results.
template <typename Dot>
bool bound_scores(LeftMatrix queries, int64_t num_rows, int64_t head_groups, float key_norm, const SoftmaxRows& rows) {
  for (int64_t row = 0; row < num_rows; ++row) {
    Vec squares{};
    for_columns(head_groups, [&](int64_t group, auto extent) {
      const Vec query = load(queries.data + row * queries.row_stride + group, extent);
      squares = Dot::multiply_add(query, query, squares);
    });
    store(rows.lanes + row * kWidth, squares);
  }
  Vec largest{};
  for_columns(num_rows, [&](int64_t row, auto extent) {
    const Vec squares = combine_lanes(rows.lanes + row * kWidth, [](Vec a, Vec b) { return a + b; });
    Vec bounds;
    for (int i = 0; i < kWidth; ++i) bounds[i] = __builtin_sqrtf(squares[i]) * key_norm;
    store(rows.shift + row, bounds);
    largest = maximum(within(bounds, 0.0f, extent), largest);
  });
  return max_lanes(largest) <= kLargestBound;
}

// The end of scores = scale * Q K^T: stores 2^(score - shift), rounded to bfloat16, and adds them up by lane as they are
// stored, so that a row's probabilities sum to one. Columns beyond the row's length are 0.
struct StoreProbabilities {
  float* probabilities;  // rows of bfloat16, `leading` floats apart
  int64_t leading;
  SoftmaxRows rows;
  int64_t length;
  float scale;

  template <int Vectors>
  FASTBERT_INLINE void operator()(int64_t row, int64_t column, const Vec (&scores)[Vectors]) const {
#if defined(__AVX512BF16__)
    Vec e[Vectors + 1];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) e[v] = exp2_for_bfloat16(scores[v] * scale - rows.shift[row]);
    const int64_t last = column + (Vectors - 1) * kWidth;
    if (last + kWidth > length) e[Vectors - 1] = within(e[Vectors - 1], 0.0f, Part{static_cast<int>(length - last)});
    e[Vectors] = Vec{};

    BFloat16* to = reinterpret_cast<BFloat16*>(probabilities + row * leading) + column;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    Vec sums = column == 0 ? Vec{} : load(rows.lanes + row * kWidth);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v += 2) {
      const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)e[v + 1], (__m512)e[v]);
      std::memcpy(to + v * kWidth, &pair, sizeof(pair));
      sums = (Vec)_mm512_dpbf16_ps((__m512)sums, pair, ones);
    }
    store(rows.lanes + row * kWidth, sums);
#endif
  }
};

}  // namespace fastbert::cpu::FASTBERT_ISA
