// C = A B + bias in float32, each of A and B as it lies or transposed: the products of a linear layer in training.
//
// The blocking of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008). A block of the depth at
// a time, B is packed in panels of kTileColumns and shared; a block of A's rows is packed in panels of kTileRows and stays
// in the second-level cache while B's panels pass by; a tile of C stays in registers while the depth runs. Packing is where
// a transposition happens, so all three products (x W^T, dy W, dy^T x) run at one speed, and an element's sum has the same
// order whatever the number of threads.

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

// 28 accumulators, two vectors of B and a broadcast of A fill 32 registers; 12 + 2 + 1 of 16.
constexpr int kTileRows = kVectorRegisters == 32 ? 14 : 6;
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kWidth;
static_assert(kMaxPackedColumns % kTileColumns == 0, "the workspace is sized for whole panels");
constexpr int64_t kMaxDepth = 256;
// With 512-bit vectors a block of A has 504 rows and takes half a megabyte, a panel of B 32 KB; measured: a third of that
// block costs 5%.
constexpr int64_t kBlockPanels = 36;
// Of a wider C so many columns at a time: each block of the depth adds to all of them, which stay in the last-level cache.
constexpr int64_t kChunkPanels = 1536 / kTileColumns;
// A thread that is held up must not hold up the others for long: so many tasks for each.
constexpr int64_t kTasksPerThread = 2;

int64_t depth_block(int64_t depth) {
  const int64_t blocks = (depth + kMaxDepth - 1) / kMaxDepth;
  return round_up((depth + blocks - 1) / blocks, kWidth);
}

// to[k * kColumns + i] = from[i * stride + k] for i below count, 0 for the others. A vector that reaches over its kColumns
// is stored before those that it overlaps; the last one reaches up to kWidth - 1 floats behind the panel.
template <int kColumns>
void pack_transposed(const float* from, int64_t stride, int64_t count, int64_t depth, float* to) {
  constexpr int kGroups = (kColumns + kWidth - 1) / kWidth;
  for_columns(depth, [&](int64_t k, auto extent) {
    for (int group = kGroups - 1; group >= 0; --group) {
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const int64_t row = group * kWidth + i;
        square[i] = row < count ? load(from + row * stride + k, extent) : Vec{};
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (i < extent.count) store(to + (k + i) * kColumns + group * kWidth, square[i]);
      }
    }
  });
}

// The same of a matrix whose rows are the depth: to[k * kColumns + i] = from[k * stride + i].
template <int kColumns>
void pack_straight(const float* from, int64_t stride, int64_t count, int64_t depth, float* to) {
  constexpr int kGroups = (kColumns + kWidth - 1) / kWidth;
  // A vector that reaches over the panel reads elements of the next one, which the matrix must have.
  const bool whole = count >= kGroups * kWidth;
  for (int64_t k = 0; k < depth; ++k) {
    for (int group = kGroups - 1; group >= 0; --group) {
      const int64_t left = count - group * kWidth;
      const float* element = from + k * stride + group * kWidth;
      const Vec v = whole      ? load(element)
                    : left > 0 ? load(element, Part{static_cast<int>(left < kWidth ? left : kWidth)})
                               : Vec{};
      store(to + k * kColumns + group * kWidth, v);
    }
  }
}

// A panel of kColumns of the `count` vectors that are left of a matrix, in the depths [0, depth).
template <int kColumns>
void pack_panel(const float* from, int64_t vector_stride, int64_t depth_stride, int64_t count, int64_t depth, float* to) {
  if (depth_stride == 1) {
    pack_transposed<kColumns>(from, vector_stride, count < kColumns ? count : kColumns, depth, to);
  } else {
    pack_straight<kColumns>(from, depth_stride, count, depth, to);
  }
}

// c (kTileRows, kTileColumns) = or += a panel of A times one of B; bias (kTileColumns,) or null, for the first.
template <bool kAccumulate>
__attribute__((noinline)) void multiply_tile(int64_t depth, const float* a, const float* b, float* c, int64_t c_stride,
                                             const float* bias) {
  Vec sums[kTileRows][kTileVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      sums[row][v] = Vec{};
      __builtin_prefetch(c + row * c_stride + v * kWidth, 1);
    }
  }
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kTileColumns) {
    Vec b_row[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) b_row[v] = load(b + v * kWidth);
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; ++row) {
      const Vec element = splat(a[row]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sums[row][v] += element * b_row[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      if (!kAccumulate && bias != nullptr) sums[row][v] += load(bias + v * kWidth);
      float* to = c + row * c_stride + v * kWidth;
      store(to, kAccumulate ? load(to) + sums[row][v] : sums[row][v]);
    }
  }
}

// The same where only the first rows and columns of the tile exist.
void multiply_part_of_tile(int64_t depth, const float* a, const float* b, float* c, int64_t c_stride, const float* bias,
                           int64_t rows, int64_t columns, bool accumulate) {
  float tile[kTileRows * kTileColumns];
  multiply_tile<false>(depth, a, b, tile, kTileColumns, nullptr);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      float& to = c[row * c_stride + column];
      const float start = accumulate ? to : bias != nullptr ? bias[column] : 0.0f;
      to = start + tile[row * kTileColumns + column];
    }
  }
}

// What a thread does at a time: all sums of a block of rows and columns, given B packed.
struct Block {
  int64_t first_row_panel, last_row_panel, first_column_panel, last_column_panel;
};

void multiply_block(const MatmulParams& p, int64_t depth_per_block, int64_t packed_columns, const Block& block) {
  const int64_t row_panels = block.last_row_panel - block.first_row_panel;
  float* packed_a = thread_scratch(static_cast<size_t>(row_panels * kTileRows * depth_per_block + kWidth));
  for (int64_t first_k = 0; first_k < p.depth; first_k += depth_per_block) {
    const int64_t depth = p.depth - first_k < depth_per_block ? p.depth - first_k : depth_per_block;
    for (int64_t panel = 0; panel < row_panels; ++panel) {
      const int64_t row = (block.first_row_panel + panel) * kTileRows;
      pack_panel<kTileRows>(p.a + row * p.a_row_stride + first_k * p.a_depth_stride, p.a_row_stride, p.a_depth_stride,
                            p.rows - row, depth, packed_a + panel * kTileRows * depth);
    }
    for (int64_t column_panel = block.first_column_panel; column_panel < block.last_column_panel; ++column_panel) {
      const int64_t column = column_panel * kTileColumns, columns = p.columns - column;
      const float* b = p.packed_b + first_k * packed_columns + column * depth;
      const float* bias = p.bias == nullptr ? nullptr : p.bias + column;
      for (int64_t panel = 0; panel < row_panels; ++panel) {
        const int64_t row = (block.first_row_panel + panel) * kTileRows, rows = p.rows - row;
        const float* a = packed_a + panel * kTileRows * depth;
        float* c = p.c + row * p.c_row_stride + column;
        if (rows < kTileRows || columns < kTileColumns) {
          multiply_part_of_tile(depth, a, b, c, p.c_row_stride, bias, rows < kTileRows ? rows : kTileRows,
                                columns < kTileColumns ? columns : kTileColumns, first_k > 0);
        } else if (first_k > 0) {
          multiply_tile<true>(depth, a, b, c, p.c_row_stride, nullptr);
        } else {
          multiply_tile<false>(depth, a, b, c, p.c_row_stride, bias);
        }
      }
    }
  }
}

}  // namespace

// Two parallel loops, since every one ends with a wait for the slowest thread.
void matmul(const MatmulParams& p, int num_threads) {
  const int64_t row_panels = (p.rows + kTileRows - 1) / kTileRows;
  const int64_t column_panels = (p.columns + kTileColumns - 1) / kTileColumns;
  const int64_t packed_columns = column_panels * kTileColumns;
  const int64_t depth_per_block = depth_block(p.depth), depth_blocks = (p.depth + depth_per_block - 1) / depth_per_block;
  parallel_for(depth_blocks * column_panels, num_threads, [&](int64_t task) {
    const int64_t first_k = task / column_panels * depth_per_block, column = task % column_panels * kTileColumns;
    const int64_t depth = p.depth - first_k < depth_per_block ? p.depth - first_k : depth_per_block;
    pack_panel<kTileColumns>(p.b + column * p.b_column_stride + first_k * p.b_depth_stride, p.b_column_stride,
                             p.b_depth_stride, p.columns - column, depth,
                             p.packed_b + first_k * packed_columns + column * depth);
  });

  // Equal blocks, of at most kBlockPanels x kChunkPanels, and where there are few of them smaller ones.
  const int64_t wanted = kTasksPerThread * num_threads;
  const int64_t column_blocks = (column_panels + kChunkPanels - 1) / kChunkPanels;
  int64_t row_blocks = (row_panels + kBlockPanels - 1) / kBlockPanels;
  if (num_threads > 1 && row_blocks * column_blocks < wanted) row_blocks = (wanted + column_blocks - 1) / column_blocks;
  row_blocks = row_blocks < row_panels ? row_blocks : row_panels;
  parallel_for(row_blocks * column_blocks, num_threads, [&](int64_t task) {
    const int64_t row_block = task / column_blocks, column_block = task % column_blocks;
    multiply_block(p, depth_per_block, packed_columns,
                   {row_block * row_panels / row_blocks, (row_block + 1) * row_panels / row_blocks,
                    column_block * column_panels / column_blocks, (column_block + 1) * column_panels / column_blocks});
  });
}

}  // namespace fastbert::cpu::FASTBERT_ISA
