// C = A B + bias, each of A and B as it lies or transposed: the products of a linear layer in training; in float32 a GELU's
// forward and backward pass too, where the sums of the product before it end. (In bfloat16 that would be slower than a pass
// of its own: the pieces of a row that a tile stores are two lines of two matrices, on another page for each row.)
//
// The microkernel of inference (packed_gemm.h) with B packed anew in each call, by all threads: a chunk of its columns at a
// time, so that what is packed stays in the last-level cache. Then a thread takes a block of A's rows, which, up to a depth
// of 2,000, stays in its second-level cache while B's panels pass by. Rows whose depth is contiguous are read as they lie (x
// W^T and dy W); those of a transposed A (dy^T x) are copied, the block's columns side by side. So all three products run at
// nearly one speed, and an element's sum has the same order whatever the number of threads.

#include <numeric>

#include "cpu/encoder_plan.h"
#include "cpu/kernels.h"
#include "cpu/packed_gemm.h"
#include "cpu/vec_math.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

static_assert(kMatmulPanelColumns % kPanelColumns == 0, "chunks are whole panels");

// Groups of B's depth that a thread packs at a time, of all panels.
constexpr int64_t kPackedGroups = 64;
// Multiply-adds below which waking threads takes longer than what they save.
constexpr int64_t kWorthThreads = 1 << 18;
// Lines of a transposed A are a page or more apart, where no hardware prefetcher looks: so many lines ahead.
constexpr int64_t kLinesAhead = 8;

// A vector of groups of a matrix whose rows are the depth, from the first of their rows on. A row that is not there is 0.
template <typename Extent>
FASTBERT_INLINE VecUint load_groups(const float* row, int64_t, int64_t, Extent extent) {
  return (VecUint)load(row, extent);
}

template <typename Extent>
FASTBERT_INLINE VecUint load_groups(const BFloat16* row, int64_t stride, int64_t rows_left, Extent extent) {
  const VecUint first = __builtin_convertvector(load_half(row, extent), VecUint);
  if (rows_left < 2) return first;
  return first | __builtin_convertvector(load_half(row + stride, extent), VecUint) << 16;
}

// to[group][column], kColumns wide, of the groups [first, last) of a matrix whose rows are the depth; 0 behind its `count`
// columns. Asks the memory for what lies `ahead` of each element. see(group, column, groups) gets every vector of groups.
template <typename Group, int kColumns, typename T, typename See>
void pack_columns(const T* matrix, int64_t stride, int64_t depth, int64_t count, int64_t first, int64_t last, int64_t ahead,
                  uint32_t* to, const See& see) {
  for (int64_t group = first; group < last; ++group) {
    const int64_t k = group * Group::kElements;
    const T* row = matrix + k * stride;
    const auto move = [&](int64_t column, auto extent) {
      for (int element = 0; element < Group::kElements; ++element) {
        __builtin_prefetch(row + element * stride + column + ahead);
      }
      const VecUint groups = load_groups(row + column, stride, depth - k, extent);
      std::memcpy(to + group * kColumns + column, &groups, sizeof(VecUint));
      see(group, column, groups);
    };
    if (count >= kColumns) {
#pragma GCC unroll 4
      for (int64_t column = 0; column < kColumns; column += kWidth) move(column, Whole{});
    } else {
      std::memset(to + group * kColumns, 0, kColumns * 4);
      for_columns(count, move);
    }
  }
}

// The sums of columns over the depth, of what pack_columns sees of them, in float32: 16 groups at a time, and 16 such sums,
// so that the rounding errors of a long sum stay small.
template <typename Group>
struct ColumnSums {
  static constexpr int kLevels = 3, kAtATime = 16;
  Vec sums[kMaxBlockRows / kWidth][kLevels];  // of the last few groups, of the last few of those, of all others

  FASTBERT_INLINE void operator()(int64_t group, int64_t column, VecUint groups) {
    constexpr uint32_t one = Group::kElements == 1 ? 0x3F800000 : 0x3F803F80;
    Vec(&level)[kLevels] = sums[column / kWidth];
    if (group == 0) level[0] = level[1] = level[2] = Vec{};
    level[0] = Group::multiply_add(level[0], one, groups);
    int64_t done = group + 1;
    for (int i = 0; i + 1 < kLevels && done % kAtATime == 0; ++i, done /= kAtATime) {
      level[i + 1] += level[i];
      level[i] = Vec{};
    }
  }

  Vec total(int64_t column) const {
    const Vec(&level)[kLevels] = sums[column / kWidth];
    return level[2] + level[1] + level[0];
  }
};

// A block's rows of a transposed A, copied: those of a group of the depth side by side or, for tiles, the groups of a row.
template <typename Group>
struct CopiedRows {
  uint32_t* to;
  int64_t groups;

#if defined(__AMX_TILE__)
  static constexpr bool kInRows = Group::kElements > 1;
#else
  static constexpr bool kInRows = false;
#endif

  static int64_t size(int64_t groups) { return kMaxBlockRows * (kInRows ? odd_lines(groups) + kWidth : groups); }

  template <typename T, typename See>
  void copy(const T* a, int64_t depth_stride, int64_t depth, int64_t rows, See&& see) const {
    const int64_t ahead = kLinesAhead * depth_stride;
    if constexpr (!kInRows) {
      pack_columns<Group, kMaxBlockRows>(a, depth_stride, depth, rows, 0, groups, ahead, to, see);
    } else {
      uint32_t* side_by_side = to + kMaxBlockRows * odd_lines(groups);  // a few groups at a time
      for (int64_t first = 0; first < groups; first += kWidth) {
        const int64_t count = groups - first < kWidth ? groups - first : kWidth, skipped = first * Group::kElements;
        pack_columns<Group, kMaxBlockRows>(
            a + skipped * depth_stride, depth_stride, depth - skipped, rows, 0, count, ahead, side_by_side,
            [&](int64_t group, int64_t column, VecUint elements) { see(first + group, column, elements); });
        for (int64_t row = 0; row < rows; row += kWidth) turn(side_by_side + row, to + row * odd_lines(groups) + first);
      }
    }
  }

  auto left() const {
    const char* data = reinterpret_cast<const char*>(to);
    if constexpr (kInRows) {
      return LeftRows<Group>{data, odd_lines(groups) * 4};
    } else {
      return LeftColumns{data};
    }
  }

 private:
  // A square of groups; of one at the end of the depth what is behind it, too, which nobody reads.
  void turn(const uint32_t* from, uint32_t* rows) const {
    const auto load_row = [&](int i) {
      Vec row;
      std::memcpy(&row, from + i * kMaxBlockRows, sizeof(Vec));
      return row;
    };
    transpose(load_row, [&](int i, Vec row) { std::memcpy(rows + i * odd_lines(groups), &row, sizeof(Vec)); });
  }
};

// What becomes of the sums of a block of rows and a chunk of columns; see MatmulEnd.
template <typename T>
struct StoreProduct {
  const float* bias;
  T* c;
  int64_t stride;

  StoreProduct(const MatmulParams& p, int64_t row, int64_t column)
      : bias(p.bias == nullptr ? nullptr : p.bias + column),
        c(static_cast<T*>(p.c) + row * p.c_row_stride + column),
        stride(p.c_row_stride) {}
  template <typename Extent>
  FASTBERT_INLINE void operator()(int64_t row, int64_t column, Vec sum, Extent extent) const {
    if (bias != nullptr) sum += load(bias + column, extent);
    store(c + row * stride + column, sum, extent);
  }
};

struct StoreGelu {
  const float* bias;
  float *c, *y;
  int64_t stride;

  StoreGelu(const MatmulParams& p, int64_t row, int64_t column)
      : bias(p.bias == nullptr ? nullptr : p.bias + column),
        c(static_cast<float*>(p.c) + row * p.c_row_stride + column),
        y(p.y + row * p.c_row_stride + column),
        stride(p.c_row_stride) {}
  template <typename Extent>
  FASTBERT_INLINE void operator()(int64_t row, int64_t column, Vec sum, Extent extent) const {
    const int64_t at = row * stride + column;
    store(c + at, sum, extent);
    if (bias != nullptr) sum += load(bias + column, extent);
    store(y + at, gelu(sum, normal_distribution(sum)), extent);
  }
};

struct StoreGeluGradient {
  const float *bias, *u;
  float *c, *y;
  int64_t stride;

  StoreGeluGradient(const MatmulParams& p, int64_t row, int64_t column)
      : bias(p.bias == nullptr ? nullptr : p.bias + column),
        u(p.u + row * p.c_row_stride + column),
        c(static_cast<float*>(p.c) + row * p.c_row_stride + column),
        y(p.y == nullptr ? nullptr : p.y + row * p.c_row_stride + column),
        stride(p.c_row_stride) {}
  template <typename Extent>
  FASTBERT_INLINE void operator()(int64_t row, int64_t column, Vec sum, Extent extent) const {
    const int64_t at = row * stride + column;
    Vec x = load(u + at, extent);
    if (bias != nullptr) x += load(bias + column, extent);
    const Normal normal = normal_distribution(x);
    store(c + at, sum * gelu_derivative(x, normal), extent);
    if (y != nullptr) store(y + at, gelu(x, normal), extent);
  }
};

template <typename Group, typename T, typename End>
struct Product {
  const MatmulParams& p;
  int64_t first_column, columns;  // the chunk
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b) + first_column * p.b_column_stride;
  uint32_t* packed_b = static_cast<uint32_t*>(p.packed_b);
  int64_t groups = (p.depth + Group::kElements - 1) / Group::kElements;
  int64_t panels = (columns + kPanelColumns - 1) / kPanelColumns;
  bool a_is_transposed = p.a_depth_stride != 1 || p.row_sums != nullptr;

  uint32_t* panel_of_b(int64_t panel) const { return packed_b + panel * groups * kPanelColumns; }

  void pack_b(int num_threads) const {
    if (p.b_depth_stride == 1) {
      parallel_for(panels, num_threads, [&](int64_t panel) {
        const int64_t column = panel * kPanelColumns;
        pack_panel_of_rows(reinterpret_cast<const float*>(b + column * p.b_column_stride),
                           p.b_column_stride / Group::kElements, columns - column, groups, panel_of_b(panel));
      });
      return;
    }
    parallel_for((groups + kPackedGroups - 1) / kPackedGroups, num_threads, [&](int64_t piece) {
      const int64_t first = piece * kPackedGroups, last = first + kPackedGroups < groups ? first + kPackedGroups : groups;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kPanelColumns;
        // The next panel's lines are a whole piece of the depth away by the time that they are needed.
        pack_columns<Group, kPanelColumns>(b + column, p.b_depth_stride, p.depth, columns - column, first, last,
                                           kPanelColumns, panel_of_b(panel), [](int64_t, int64_t, VecUint) {});
      }
    });
  }

  // A block of at most kMaxBlockRows rows.
  void multiply(int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel) const {
    constexpr int64_t sums_size = kSumVectors * kWidth;
    const int64_t rows = last_row - first_row;
    float* scratch =
        thread_scratch(static_cast<size_t>(sums_size + (a_is_transposed ? CopiedRows<Group>::size(groups) : 0)));
    Vec* sums = reinterpret_cast<Vec*>(scratch);
    if (!a_is_transposed) {
      const LeftRows<Group> left{reinterpret_cast<const char*>(a + first_row * p.a_row_stride),
                                 p.a_row_stride * static_cast<int64_t>(sizeof(T))};
      return multiply_panels(left, first_row, rows, first_panel, last_panel, sums);
    }
    const CopiedRows<Group> copied{reinterpret_cast<uint32_t*>(scratch + sums_size), groups};
    const auto copy = [&](auto&& see) { copied.copy(a + first_row, p.a_depth_stride, p.depth, rows, see); };
    if (p.row_sums != nullptr && first_column == 0 && first_panel == 0) {
      ColumnSums<Group> column_sums;
      copy([&](int64_t group, int64_t column, VecUint elements) { column_sums(group, column, elements); });
      for_columns(rows,
                  [&](int64_t row, auto extent) { store(p.row_sums + first_row + row, column_sums.total(row), extent); });
    } else {
      copy([](int64_t, int64_t, VecUint) {});
    }
    multiply_panels(copied.left(), first_row, rows, first_panel, last_panel, sums);
  }

  template <typename Left>
  void multiply_panels(Left left, int64_t first_row, int64_t rows, int64_t first_panel, int64_t last_panel,
                       Vec* sums) const {
    multiply_packed_panels<Group>(
        rows, groups, left, first_panel, last_panel, columns, [&](int64_t panel) { return panel_of_b(panel); }, sums,
        End(p, first_row, first_column));
  }

  // As many blocks for each thread, of whole tiles; where there are too few rows, their columns are cut.
  void multiply_all(int num_threads) const {
    const int64_t most = (p.rows + kFewestRows - 1) / kFewestRows;
    const int64_t wanted = round_up((p.rows + kMaxBlockRows - 1) / kMaxBlockRows, num_threads);
    const int64_t row_blocks = wanted < most ? wanted : most;
    const int64_t pieces_wanted = num_threads / std::gcd(row_blocks, int64_t{num_threads});
    const int64_t pieces = pieces_wanted < panels ? pieces_wanted : panels;
    parallel_for(row_blocks * pieces, num_threads, [&](int64_t task) {
      const int64_t block = task / pieces, piece = task % pieces;
      multiply(first_row_of(block, row_blocks, p.rows), first_row_of(block + 1, row_blocks, p.rows), piece * panels / pieces,
               (piece + 1) * panels / pieces);
    });
  }
};

template <typename Group, typename T, typename End>
void multiply_chunks(const MatmulParams& p, int num_threads) {
  if (p.rows * p.depth * p.columns < kWorthThreads) num_threads = 1;
  const int64_t width = matmul_chunk_columns(p.depth, p.columns, p.dtype);
  // One region of threads for all loops, since every region ends with a wait for the slowest thread.
  together(num_threads, [&] {
    for (int64_t column = 0; column < p.columns; column += width) {
      const Product<Group, T, End> chunk{p, column, p.columns - column < width ? p.columns - column : width};
      chunk.pack_b(num_threads);
      chunk.multiply_all(num_threads);
    }
  });
}

}  // namespace

void matmul(const MatmulParams& p, int num_threads) {
  // dispatch.cpp lets pass what the instruction set can do.
#if defined(__AVX512BF16__)
  if (p.dtype == DType::bfloat16) {
    return p.c_dtype == DType::bfloat16 ? multiply_chunks<BFloat16Group, BFloat16, StoreProduct<BFloat16>>(p, num_threads)
                                        : multiply_chunks<BFloat16Group, BFloat16, StoreProduct<float>>(p, num_threads);
  }
#endif
  if (p.end == MatmulEnd::gelu) return multiply_chunks<FloatGroup, float, StoreGelu>(p, num_threads);
  if (p.end == MatmulEnd::gelu_gradient) return multiply_chunks<FloatGroup, float, StoreGeluGradient>(p, num_threads);
  multiply_chunks<FloatGroup, float, StoreProduct<float>>(p, num_threads);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
