// Small matrix products: a tile of C stays in registers while the depth runs, each element of A is broadcast and multiplied
// with a few vectors of B.
//
// The depth is counted in groups of 4 bytes: one float32 (FloatDot), or two neighbouring bfloat16 (BFloat16Dot) whose
// products one instruction adds to a float32. C is float32. AMX multiplies tiles of the latter from the same operands.

#pragma once

#include "cpu/prefetch.h"
#include "cpu/vec.h"

#if defined(__AMX_TILE__)
#include "cpu/tiles.h"
#endif

namespace fastbert::cpu::FASTBERT_ISA {

// kTileRows x kPanelVectors accumulators, a row of B and a broadcast of A fill the registers: 24 + 4 + 1 of 32, 12 + 2 + 1
// of 16.
constexpr int kTileRows = 6;
constexpr int kPanelVectors = kVectorRegisters == 32 ? 4 : 2;
constexpr int kPanelColumns = kPanelVectors * kWidth;
// A panel of B of so many groups stays in the first-level cache (32 KB with 512-bit vectors) while the rows of A pass by.
constexpr int64_t kDepthBlock = 128;

// Counts of the depth in groups; the last group of an odd depth is filled up with 0.
struct FloatDot {
  static constexpr int kElements = 1;
  static FASTBERT_INLINE Vec broadcast(const float* group) { return splat(*group); }
  static FASTBERT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct BFloat16Dot {
  static constexpr int kElements = 2;
  static FASTBERT_INLINE Vec broadcast(const float* group) {
    int32_t pair;
    std::memcpy(&pair, group, 4);
    return (Vec)(VecInt{} + pair);
  }
  static FASTBERT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <typename Dot>
constexpr int64_t groups(int64_t elements) {
  return (elements + Dot::kElements - 1) / Dot::kElements;
}

// A: group (row, k) is data[row * row_stride + k * depth_stride].
struct LeftMatrix {
  const float* data;
  int64_t row_stride, depth_stride;
};

// B: group (k, column) is data[k * leading + column]; or, with leading 0, packed in panels: kPanelColumns columns, then
// the next, each (depth, width), the last one as wide as what is left.
struct RightMatrix {
  const float* data;
  int64_t leading;
};

// Where sums over the first blocks of the depth wait for the last one; with `accumulate` they are there from the start.
struct Partial {
  float* data;
  int64_t leading;
  bool accumulate = false;
};

// The simplest end of a product: its rows are stored.
struct StoreRows {
  float* data;
  int64_t leading;

  template <int Vectors>
  FASTBERT_INLINE void operator()(int64_t row, int64_t column, const Vec (&sums)[Vectors]) const {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(data + row * leading + column + v * kWidth, sums[v]);
  }
};

// The rows and columns of C from (row, column): what the tile covers, and how `finish` knows it.
struct TilePlace {
  int64_t row, column;
};

template <typename Dot, int Rows, int Vectors, typename Finish>
FASTBERT_INLINE void multiply_tile(TilePlace place, int64_t depth, LeftMatrix a, const float* b, int64_t b_leading,
                                   const Partial& addend, const Finish& finish) {
  Vec sums[Rows][Vectors];
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sums[row][v] = Vec{};
  }
  const float* a_column = a.data + place.row * a.row_stride;
  for (int64_t k = 0; k < depth; ++k, a_column += a.depth_stride, b += b_leading) {
    Vec b_row[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) b_row[v] = load(b + v * kWidth);
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      const Vec a_group = Dot::broadcast(a_column + row * a.row_stride);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[row][v] = Dot::multiply_add(a_group, b_row[v], sums[row][v]);
    }
  }
  if (addend.accumulate) {
    const float* c = addend.data + place.row * addend.leading + place.column;
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[row][v] += load(c + row * addend.leading + v * kWidth);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) finish(place.row + row, place.column, sums[row]);
}

template <typename Dot, int Vectors, int Rows = kTileRows, typename Finish>
FASTBERT_INLINE void multiply_rows(int64_t rows, TilePlace place, int64_t depth, LeftMatrix a, const float* b,
                                   int64_t b_leading, const Partial& addend, const Finish& finish) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_rows<Dot, Vectors, Rows - 1>(rows, place, depth, a, b, b_leading, addend, finish);
  }
  multiply_tile<Dot, Rows, Vectors>(place, depth, a, b, b_leading, addend, finish);
}

// Never inlined: within a larger function the compiler runs out of registers and keeps sums in memory.
template <typename Dot, int Vectors, typename Finish>
__attribute__((noinline)) void multiply_tiles(int64_t rows, int64_t column, int64_t depth, LeftMatrix a, const float* b,
                                              int64_t b_leading, const Partial& addend, const Finish& finish,
                                              Prefetcher& prefetcher) {
  // Tiles of nearly equal size: a last one of one row would leave most of the arithmetic units idle.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * rows / tiles, last = (tile + 1) * rows / tiles;
    multiply_rows<Dot, Vectors>(last - first, {first, column}, depth, a, b, b_leading, addend, finish);
    prefetcher.step();
  }
}

template <typename Dot, int Vectors = kPanelVectors, typename Finish>
FASTBERT_INLINE void multiply_panel(int64_t vectors, int64_t rows, int64_t column, int64_t depth, LeftMatrix a,
                                    const float* b, int64_t b_leading, const Partial& addend, const Finish& finish,
                                    Prefetcher& prefetcher) {
  if constexpr (Vectors > 1) {
    if (vectors < Vectors) {
      return multiply_panel<Dot, Vectors - 1>(vectors, rows, column, depth, a, b, b_leading, addend, finish, prefetcher);
    }
  }
  multiply_tiles<Dot, Vectors>(rows, column, depth, a, b, b_leading, addend, finish, prefetcher);
}

#if defined(__AMX_TILE__)
template <int Vectors = kPanelVectors, typename Finish>
FASTBERT_INLINE void finish_row(int vectors, int64_t row, int64_t column, const float* sums, const Finish& finish) {
  if constexpr (Vectors > 1) {
    if (vectors < Vectors) return finish_row<Vectors - 1>(vectors, row, column, sums, finish);
  }
  Vec of_row[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) of_row[v] = load(sums + v * kWidth);
  finish(row, column, of_row);
}

// multiply() of bfloat16 and a depth of whole tiles. Of a panel of fewer columns than tiles have, what lies behind its rows
// is multiplied too, and left.
template <bool kHasTwo, typename Finish>
void multiply_by_tiles(const TileParts& parts, int64_t columns, int64_t depth, LeftMatrix a, RightMatrix b,
                       const Partial& partial, const Finish& finish, Prefetcher& prefetcher) {
  constexpr int passes = kHasTwo ? 2 : 1;
  alignas(64) float sums[2 * kTileSide * kPanelColumns];
  for (int64_t column = 0; column < columns; column += kPanelColumns) {
    const int vectors = static_cast<int>(least(columns - column, kPanelColumns) / kWidth);
    const bool packed = b.leading == 0;
    const int64_t leading = packed ? vectors * kWidth : b.leading;
    const float* panel = b.data + (packed ? column * depth : column);
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t first_row = parts.first_row(part);
      for (int pass = 0; pass * kPanelVectors < passes * vectors; ++pass) {
        const int64_t first_column = pass * kPanelColumns / passes;
        const float* addend = partial.data + first_row * partial.leading + column + first_column;
        multiply_tiles<false, kHasTwo>(parts, depth / kTileSide, {a.data + first_row * a.row_stride, a.row_stride * 4},
                                       {panel + first_column, leading * 4},
                                       {partial.accumulate ? addend : nullptr, partial.leading * 4},
                                       {sums + first_column, kPanelColumns * 4}, [] {});
      }
      for (int64_t row = part + 1 == parts.count ? parts.repeated : 0; row < parts.size; ++row) {
        finish_row(vectors, first_row + row, column, sums + row * kPanelColumns, finish);
        if (row % kTileRows == 0) prefetcher.step();
      }
    }
  }
}
#endif

// C (rows, columns) = A B, or C += A B where the partial sums accumulate. columns is a multiple of kWidth, depth counts
// groups. finish(row, column, sums) takes the finished vectors of one row from a column on. Each element of C is a sum of
// sums over kDepthBlock groups (whose rounding errors grow with the block, not with the depth), the same in whatever tile it
// falls. The prefetcher makes a step per tile.
template <typename Dot, typename Finish>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, LeftMatrix a, RightMatrix b, Partial partial,
                     const Finish& finish, Prefetcher& prefetcher) {
#if defined(__AMX_TILE__)
  if constexpr (Dot::kElements == 2) {
    if (rows > 0 && a.depth_stride == 1 && depth % kTileSide == 0) {
      const TileParts parts(rows);
      const Tiles tiles(parts);
      return parts.has_two ? multiply_by_tiles<true>(parts, columns, depth, a, b, partial, finish, prefetcher)
                           : multiply_by_tiles<false>(parts, columns, depth, a, b, partial, finish, prefetcher);
    }
  }
#endif
  for (int64_t first_k = 0; first_k < depth; first_k += kDepthBlock) {
    const bool last = depth - first_k <= kDepthBlock;
    const int64_t block = last ? depth - first_k : kDepthBlock;
    const LeftMatrix a_block{a.data + first_k * a.depth_stride, a.row_stride, a.depth_stride};
    for (int64_t column = 0; column < columns; column += kPanelColumns) {
      const int64_t vectors = columns - column < kPanelColumns ? (columns - column) / kWidth : kPanelVectors;
      const bool packed = b.leading == 0;
      const int64_t leading = packed ? vectors * kWidth : b.leading;
      const float* panel = b.data + (packed ? column * depth : column) + first_k * leading;
      if (last) {
        multiply_panel<Dot>(vectors, rows, column, block, a_block, panel, leading, partial, finish, prefetcher);
      } else {
        const StoreRows to_be_continued{partial.data, partial.leading};
        multiply_panel<Dot>(vectors, rows, column, block, a_block, panel, leading, partial, to_be_continued, prefetcher);
      }
    }
    partial.accumulate = true;
  }
}

// A thread's share of some rows is not cut smaller than this.
constexpr int64_t kFewestRows = 4 * kTileRows;

// Where a block of whole tiles begins, of `blocks` that share some rows. The first ones have a tile more than the others, so
// that threads that take turns at them end together: were every second block the larger one, one of two threads would have
// them all.
constexpr int64_t first_row_of(int64_t block, int64_t blocks, int64_t rows) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, larger = tiles % blocks;
  const int64_t row = (block * (tiles / blocks) + (block < larger ? block : larger)) * kTileRows;
  return row < rows ? row : rows;
}

// How many tiles, and so steps of the prefetcher, multiply() makes.
constexpr int64_t count_tiles(int64_t rows, int64_t columns, int64_t depth) {
  return (rows + kTileRows - 1) / kTileRows * ((columns + kPanelColumns - 1) / kPanelColumns) *
         ((depth + kDepthBlock - 1) / kDepthBlock);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
