// How attention lays out one head: block sizes, scratch memory, and the packed copies that the matrix products read.

#pragma once

#include "cpu/gemm.h"
#include "cpu/philox.h"
#include "cpu/vec.h"

namespace fastbert::cpu::FASTBERT_ISA {

// The dot product for matrices of T.
template <typename T>
struct DotFor {
  using Type = FloatDot;
};
#if defined(__AVX512BF16__)
template <>
struct DotFor<BFloat16> {
  using Type = BFloat16Dot;
};
#endif

constexpr int64_t kMinQueryBlock = 24;
constexpr int64_t kScoreFloats = 48 * 1024;  // of a block of queries: 192 KB of the second-level cache

// A product's depth along keys or queries is whole tiles where the instruction set has them; what is behind the last one is
// 0.
#if defined(__AMX_TILE__)
template <typename Dot>
constexpr int64_t kGroupMultiple = Dot::kElements == 2 ? kTileSide : 1;
constexpr int64_t kRowMultiple = 2 * kTileSide;
#else
template <typename Dot>
constexpr int64_t kGroupMultiple = 1;
constexpr int64_t kRowMultiple = 1;
#endif

template <typename Dot>
constexpr int64_t depth_of(int64_t rows) {
  return round_up(groups<Dot>(rows), kGroupMultiple<Dot>);
}

// What an item needs to know of a head's size, and the leading dimensions of the packed copies.
struct Shape {
  int64_t length, head_dim;
  int64_t padded_length, padded_head_dim;  // whole vectors
  int64_t depth_length;                    // rows along which a product's depth may go
  int64_t score_leading;
  int64_t query_block;  // whole tiles; the blocks of an item are of nearly equal size

  Shape(int64_t length, int64_t head_dim, int64_t queries)
      : length(length),
        head_dim(head_dim),
        padded_length(round_up(length, kWidth)),
        padded_head_dim(round_up(head_dim, kWidth)),
        depth_length(round_up(length, kRowMultiple)),
        score_leading(odd_lines(length)) {
    const int64_t fitting = kScoreFloats / score_leading, largest = fitting < kMinQueryBlock ? kMinQueryBlock : fitting;
    const int64_t blocks = queries > largest ? (queries + largest - 1) / largest : 1;
    query_block = round_up((queries + blocks - 1) / blocks, kTileRows);
  }
};

// Cuts a thread's scratch memory into arrays that start on a cache line; on a null base it only measures.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* floats(int64_t count) {
    float* start = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count, 16);
    return start;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

// Rows of the caller's, `stride` elements apart.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;

  const T* operator[](int64_t row) const { return data + row * stride; }
  Rows from(int64_t row, int64_t column = 0) const { return {data + row * stride + column, stride}; }
};

// A vector of groups from the first `elements` of a row; the others are 0.
template <typename Dot, typename T>
FASTBERT_INLINE Vec load_groups(const T* from, int64_t elements) {
  if constexpr (Dot::kElements == 1) {
    return elements >= kWidth ? load(from) : load(from, Part{static_cast<int>(elements)});
  } else {
#if defined(__AVX512BF16__)
    const __mmask32 mask = elements >= 2 * kWidth ? ~__mmask32{0} : (__mmask32{1} << elements) - 1;
    return (Vec)_mm512_maskz_loadu_epi16(mask, from);
#endif
  }
}

// Packs rows (rows, head_dim) as A, (rows, padded_head_dim) groups along head_dim.
template <typename Dot, typename T>
void pack_left(Rows<T> from, int64_t rows, const Shape& shape, float* to) {
  for (int64_t row = 0; row < rows; ++row, to += shape.padded_head_dim) {
    for (int64_t group = 0, d = 0; d < shape.head_dim; group += kWidth, d += kWidth * Dot::kElements) {
      store(to + group, load_groups<Dot>(from[row] + d, shape.head_dim - d));
    }
  }
}

// The rows as A: where they lie if that is possible, otherwise packed.
template <typename Dot, typename T>
LeftMatrix as_left(Rows<T> from, int64_t rows, const Shape& shape, float* to) {
  if (sizeof(T) * Dot::kElements == sizeof(float) && shape.head_dim % Dot::kElements == 0) {
    return {reinterpret_cast<const float*>(from.data), from.stride / Dot::kElements, 1};
  }
  pack_left<Dot>(from, rows, shape, to);
  return {to, shape.padded_head_dim, 1};
}

// Packs rows (rows, head_dim) as B, (depth_of(rows), padded_head_dim) groups along the rows.
template <typename Dot, typename T>
RightMatrix pack_right(Rows<T> from, int64_t rows, const Shape& shape, float* to) {
  float* const data = to;
  for (int64_t row = 0; row < rows; row += Dot::kElements, to += shape.padded_head_dim) {
    for_columns(shape.head_dim, [&](int64_t d, auto extent) {
      if constexpr (Dot::kElements == 1) {
        store(to + d, load(from[row] + d, extent));
      } else {
        const VecUint low = __builtin_convertvector(load_half(from[row] + d, extent), VecUint);
        VecUint high{};
        if (row + 1 < rows) high = __builtin_convertvector(load_half(from[row + 1] + d, extent), VecUint);
        store(to + d, (Vec)(low | (high << 16)));
      }
    });
  }
  std::memset(to, 0, (depth_of<Dot>(rows) - groups<Dot>(rows)) * shape.padded_head_dim * sizeof(float));
  return {data, shape.padded_head_dim};
}

// Of rows of A along the keys, whose columns up to padded_length are there: the others of the depth, 0.
template <typename Dot>
void fill_depth(float* rows, int64_t num_rows, const Shape& shape) {
  if constexpr (kGroupMultiple<Dot> > 1) {
    const int64_t behind = depth_of<Dot>(shape.length) * Dot::kElements - shape.padded_length;
    for (int64_t row = 0; row < num_rows && behind > 0; ++row) {
      std::memset(reinterpret_cast<BFloat16*>(rows + row * shape.score_leading) + shape.padded_length, 0, behind * 2);
    }
  }
}

// Packs the transpose of rows (length, head_dim) as B, panels of (groups(head_dim), padded_length); the padding is 0.
template <typename Dot, typename T>
RightMatrix pack_transposed(Rows<T> from, const Shape& shape, float* to) {
  const int64_t depth = groups<Dot>(shape.head_dim);
  for (int64_t panel = 0; panel < shape.padded_length; panel += kPanelColumns) {
    const int64_t left = shape.padded_length - panel, width = left < kPanelColumns ? left : kPanelColumns;
    float* panel_to = to + panel * depth;
    for (int64_t column = 0; column < width; column += kWidth) {
      const int64_t first = panel + column;
      const int64_t rows = shape.length - first < kWidth ? shape.length - first : kWidth;
      for_columns(depth, [&](int64_t group, auto extent) {
        const int64_t d = group * Dot::kElements;
        transpose([&](int i) { return i < rows ? load_groups<Dot>(from[first + i] + d, shape.head_dim - d) : Vec{}; },
                  [&](int i, Vec groups) {
                    if (i < extent.count) store(panel_to + (group + i) * width + column, groups);
                  });
      });
    }
  }
  return {to, 0};
}

// A product's A whose rows lie side by side, as the product reads it: where that is by tiles, a copy in `to`, whose rows are
// the groups of the depth and 0 behind them.
template <typename Dot>
LeftMatrix turned(LeftMatrix a, int64_t rows, int64_t depth, float* to) {
  if constexpr (kGroupMultiple<Dot> == 1) {
    return a;
  } else {
    const int64_t leading = odd_lines(depth);
    for (int64_t row = 0; row < rows; row += kWidth) {
      for (int64_t group = 0; group < depth; group += kWidth) {
        const float* first = a.data + row + group * a.depth_stride;
        transpose([&](int i) { return group + i < depth ? load(first + i * a.depth_stride) : Vec{}; },
                  [&](int i, Vec groups) { store(to + (row + i) * leading + group, groups); });
      }
    }
    return {to, leading, 1};
  }
}

// Stores a vector of elements of A, (rows, depth) groups along the depth: those from `element` on of one row.
template <typename Dot>
FASTBERT_INLINE void store_elements(float* row, int64_t element, Vec v) {
  if constexpr (Dot::kElements == 1) {
    store(row + element, v);
  } else {
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(reinterpret_cast<BFloat16*>(row) + element, &halves, sizeof(halves));
#endif
  }
}

// Groups of two elements each, lane by lane.
template <typename Dot>
FASTBERT_INLINE Vec make_groups(Vec first, Vec second);

#if defined(__AVX512BF16__)
template <typename Dot>
FASTBERT_INLINE Vec make_groups(Vec first, Vec second) {
  static_assert(Dot::kElements == 2);
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
  return (Vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

// The end of a product (rows, head_dim): its rows, each multiplied with a factor, in the caller's dtype and place.
template <typename T>
struct StoreScaled {
  T* to;
  int64_t stride, head_dim;
  const float* scales;
  int64_t scale_stride;  // 0: one factor for all rows

  template <int Vectors>
  FASTBERT_INLINE void operator()(int64_t row, int64_t column, const Vec (&sums)[Vectors]) const {
    const Vec scale = splat(scales[row * scale_stride]);
    T* first = to + row * stride + column;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int64_t left = head_dim - column - v * kWidth;
      if (v < Vectors - 1 || left >= kWidth) {
        store(first + v * kWidth, sums[v] * scale);
      } else {
        store(first + v * kWidth, sums[v] * scale, Part{static_cast<int>(left)});
      }
    }
  }
};

}  // namespace fastbert::cpu::FASTBERT_ISA
