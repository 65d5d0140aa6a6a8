// Small matrix products on packed float32: a tile of C stays in registers while the depth runs, each element of A is
// broadcast and multiplied with a few vectors of B.

#pragma once

#include "cpu/prefetch.h"
#include "cpu/vec.h"

namespace fastbert::cpu::FASTBERT_ISA {

// kTileRows x kPanelVectors accumulators, a row of B and a broadcast of A fill the registers: 24 + 4 + 1 of 32, 12 + 2 + 1
// of 16.
constexpr int kTileRows = 6;
constexpr int kPanelVectors = kVectorRegisters == 32 ? 4 : 2;
constexpr int kPanelColumns = kPanelVectors * kWidth;
// A panel of B of this depth stays in the first-level cache (32 KB with 512-bit vectors) while the rows of A pass by.
constexpr int64_t kDepthBlock = 128;

// A: element (row, k) is data[row * row_stride + k * depth_stride].
struct LeftMatrix {
  const float* data;
  int64_t row_stride, depth_stride;
};

// B: element (k, column) is data[k * leading + column]; or, with leading 0, packed in panels: kPanelColumns columns, then
// the next, each (depth, width), the last one as wide as what is left.
struct RightMatrix {
  const float* data;
  int64_t leading;
};

template <int Rows, int Vectors>
inline void multiply_tile(int64_t depth, LeftMatrix a, const float* b, int64_t b_leading, float* c, int64_t c_leading,
                          bool accumulate) {
  Vec sums[Rows][Vectors];
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sums[row][v] = Vec{};
  }
  const float* a_column = a.data;
  for (int64_t k = 0; k < depth; ++k, a_column += a.depth_stride, b += b_leading) {
    Vec b_row[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) b_row[v] = load(b + v * kWidth);
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      const Vec a_element = splat(a_column[row * a.row_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[row][v] += a_element * b_row[v];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      float* to = c + row * c_leading + v * kWidth;
      store(to, accumulate ? sums[row][v] + load(to) : sums[row][v]);
    }
  }
}

template <int Vectors, int Rows = kTileRows>
FASTBERT_INLINE void multiply_rows(int64_t rows, int64_t depth, LeftMatrix a, const float* b, int64_t b_leading, float* c,
                                   int64_t c_leading, bool accumulate) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_rows<Vectors, Rows - 1>(rows, depth, a, b, b_leading, c, c_leading, accumulate);
  }
  multiply_tile<Rows, Vectors>(depth, a, b, b_leading, c, c_leading, accumulate);
}

template <int Vectors = kPanelVectors>
FASTBERT_INLINE void multiply_panel(int64_t vectors, int64_t rows, int64_t depth, LeftMatrix a, const float* b,
                                    int64_t b_leading, float* c, int64_t c_leading, bool accumulate,
                                    Prefetcher& prefetcher) {
  if constexpr (Vectors > 1) {
    if (vectors < Vectors) {
      return multiply_panel<Vectors - 1>(vectors, rows, depth, a, b, b_leading, c, c_leading, accumulate, prefetcher);
    }
  }
  // Groups of nearly equal size: a last group of one row would leave most of the arithmetic units idle.
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * rows / groups, last = (group + 1) * rows / groups;
    const LeftMatrix a_rows{a.data + first * a.row_stride, a.row_stride, a.depth_stride};
    multiply_rows<Vectors>(last - first, depth, a_rows, b, b_leading, c + first * c_leading, c_leading, accumulate);
    prefetcher.step();
  }
}

// C (rows, columns) = A B, or C += A B. columns is a multiple of kWidth. Each element of C is a sum of sums over
// kDepthBlock products (whose rounding errors grow with the block, not with the depth), the same in whatever tile it falls.
// The prefetcher makes a step per tile.
inline void multiply(int64_t rows, int64_t columns, int64_t depth, LeftMatrix a, RightMatrix b, float* c, int64_t c_leading,
                     bool accumulate, Prefetcher& prefetcher) {
  for (int64_t first_k = 0; first_k < depth; first_k += kDepthBlock) {
    const int64_t block = depth - first_k < kDepthBlock ? depth - first_k : kDepthBlock;
    const LeftMatrix a_block{a.data + first_k * a.depth_stride, a.row_stride, a.depth_stride};
    for (int64_t column = 0; column < columns; column += kPanelColumns) {
      const int64_t vectors = columns - column < kPanelColumns ? (columns - column) / kWidth : kPanelVectors;
      const bool packed = b.leading == 0;
      const int64_t leading = packed ? vectors * kWidth : b.leading;
      const float* panel = b.data + (packed ? column * depth : column) + first_k * leading;
      multiply_panel(vectors, rows, block, a_block, panel, leading, c + column, c_leading, accumulate || first_k > 0,
                     prefetcher);
    }
  }
}

// How many tiles, and so steps of the prefetcher, multiply() makes.
constexpr int64_t count_tiles(int64_t rows, int64_t columns, int64_t depth) {
  return (rows + kTileRows - 1) / kTileRows * ((columns + kPanelColumns - 1) / kPanelColumns) *
         ((depth + kDepthBlock - 1) / kDepthBlock);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
