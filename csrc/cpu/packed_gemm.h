// Sums of A B with B packed: the microkernel of the large products, one for three dtypes.
//
// The depth is counted in groups of 4 bytes of B: 1 float32, 2 bfloat16 or 4 int8 elements of a column (of a weight's row,
// where B is its transpose). As many neighbours in a row of A are broadcast together, and one instruction multiplies them
// with the groups of a vector of columns. B is packed in panels of kPanelColumns, [group][column].
//
// An instruction set without such an instruction has groups of the same names all the same: bfloat16 becomes float32 in the
// registers, which is as fast as float32 and half as much to read; 8-bit integers become 16-bit ones as they are packed.

#pragma once

#include <type_traits>

#include "cpu/encoder_plan.h"
#include "cpu/gemm.h"

namespace fastbert::cpu::FASTBERT_ISA {

// What a group holds, in which form a row of A has as many elements, and how both are multiplied, in one part or in two.
struct FloatGroup {
  using Sum = Vec;
  using Element = float;
  static constexpr int kElements = 1;
  static FASTBERT_INLINE VecUint part(VecUint w, int) { return w; }
  static FASTBERT_INLINE Sum multiply_add(Sum sum, uint32_t a, VecUint w) {
    float element;
    std::memcpy(&element, &a, 4);
    return sum + splat(element) * (Vec)w;
  }
};

#if defined(__AVX512BF16__)
struct BFloat16Group {
  using Sum = Vec;
  using Element = BFloat16;
  static constexpr int kElements = 2;
  static FASTBERT_INLINE VecUint part(VecUint w, int) { return w; }
  static FASTBERT_INLINE Sum multiply_add(Sum sum, uint32_t a, VecUint w) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)));
  }
};
#else
struct BFloat16Group : FloatGroup {
  static constexpr int kElements = 2;
  static FASTBERT_INLINE VecUint part(VecUint w, int part) {
    if (part == 0) return w << 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
    // A mask would take the register that the sums of a tile leave.
    return (VecUint)_mm256_slli_epi32(_mm256_srli_epi32((__m256i)w, 16), 16);
#else
    return w & 0xFFFF0000;
#endif
  }
};
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// A's elements are unsigned: kZeroPoint more than the numbers that they stand for.
struct Int8Group {
  using Sum = VecInt;
  using Element = uint8_t;
  static constexpr int kElements = 4, kZeroPoint = 128;
  static FASTBERT_INLINE VecUint part(VecUint w, int) { return w; }
  static FASTBERT_INLINE Sum multiply_add(Sum sum, uint32_t a, VecUint w) {
#if defined(__AVX512VNNI__)
    return (VecInt)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(static_cast<int>(a)), (__m512i)w);
#else
    return (VecInt)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(static_cast<int>(a)), (__m256i)w);
#endif
  }
};
#else
// Pairs of 16-bit integers: products of unsigned and signed bytes would overflow 16 bits where two of them are added.
struct Int8Group {
  using Sum = VecInt;
  using Element = int16_t;
  static constexpr int kElements = 2, kZeroPoint = 0;
  static FASTBERT_INLINE VecUint part(VecUint w, int) { return w; }
  static FASTBERT_INLINE Sum multiply_add(Sum sum, uint32_t a, VecUint w) {
#if defined(__AVX512BW__)
    return sum + (VecInt)_mm512_madd_epi16(_mm512_set1_epi32(static_cast<int>(a)), (__m512i)w);
#elif defined(__AVX2__)
    return sum + (VecInt)_mm256_madd_epi16(_mm256_set1_epi32(static_cast<int>(a)), (__m256i)w);
#elif defined(__x86_64__)
    return sum + (VecInt)_mm_madd_epi16(_mm_set1_epi32(static_cast<int>(a)), (__m128i)w);
#else
    const VecInt both = (VecInt)w;
    return sum + static_cast<int16_t>(a) * (both << 16 >> 16) + (static_cast<int32_t>(a) >> 16) * (both >> 16);
#endif
  }
};
#endif

// What lies on the left of a group.
template <typename Group>
constexpr int64_t kLeftBytes = Group::kElements * sizeof(typename Group::Element);

template <typename Group>
constexpr int kParts = kLeftBytes<Group> / 4;

// A block of a panel of this many groups (32 KB with 512-bit vectors) stays in the first-level cache while the rows of A
// pass.
constexpr int64_t kGroupBlock = 128;
constexpr int kCacheLine = 64;

// Rows of A, or a part of them: group k of row i is at data + i * row_bytes + k * kGroupBytes. In LeftRows the groups of a
// row lie side by side, in LeftColumns those of kMaxBlockRows rows, 4 bytes each.
template <typename Group>
struct LeftRows {
  const char* data;
  int64_t row_bytes;
  static constexpr int64_t kGroupBytes = kLeftBytes<Group>;

  LeftRows from(int64_t row, int64_t group) const { return {data + row * row_bytes + group * kGroupBytes, row_bytes}; }
};

struct LeftColumns {
  const char* data;
  static constexpr int64_t row_bytes = 4;
  static constexpr int64_t kGroupBytes = kMaxBlockRows * 4;

  LeftColumns from(int64_t row, int64_t group) const { return {data + row * row_bytes + group * kGroupBytes}; }
};

// The vectors of sums of a block of rows and a panel.
constexpr int64_t kSumVectors = kMaxBlockRows * kPanelVectors;

// In the place of a function that finishes sums where none wait.
struct NothingWaits {};

template <typename FinishWaiting>
constexpr bool kSumsWait = !std::is_same_v<FinishWaiting, NothingWaits>;

// tile (Rows, kPanelColumns) = or += the products of one block of groups: its rounding errors grow with the block, not with
// the depth. With each group it asks the memory for kLines cache lines from prefetch on. Where sums wait in the tile to be
// finished, finish_waiting(row, vector) is called for all of them before they are overwritten, spread over the block.
template <typename Group, int Rows, int kLines, typename Left, typename FinishWaiting>
__attribute__((noinline)) void packed_tile(int64_t groups, Left a, const uint32_t* panel, typename Group::Sum* tile,
                                           bool accumulate, const char* prefetch, const FinishWaiting& finish_waiting) {
  using Sum = typename Group::Sum;
  Sum sums[Rows][kPanelVectors];
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) sums[row][v] = Sum{};
  }
  const auto multiply = [&](int64_t count) {
    for (int64_t group = 0; group < count; ++group, a.data += Left::kGroupBytes, panel += kPanelColumns) {
      VecUint w[kPanelVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) std::memcpy(&w[v], panel + v * kWidth, sizeof(VecUint));
#pragma GCC unroll 4
      for (int line = 0; line < kLines; ++line, prefetch += kCacheLine) __builtin_prefetch(prefetch, 0, 2);
#pragma GCC unroll 2
      for (int part = 0; part < kParts<Group>; ++part) {
        VecUint b[kPanelVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v) b[v] = Group::part(w[v], part);
#pragma GCC unroll 8
        for (int row = 0; row < Rows; ++row) {
          uint32_t element;
          std::memcpy(&element, a.data + row * a.row_bytes + part * 4, 4);
#pragma GCC unroll 4
          for (int v = 0; v < kPanelVectors; ++v) sums[row][v] = Group::multiply_add(sums[row][v], element, b[v]);
        }
      }
    }
  };
  if constexpr (kSumsWait<FinishWaiting>) {
    // A row at a time: its vectors do not wait for each other. For two rows the compiler runs out of registers.
    for (int row = 0; row < Rows; ++row) {
      multiply(groups / Rows);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) finish_waiting(row, v);
    }
    multiply(groups % Rows);
  } else {
    multiply(groups);
  }
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      Sum& to = tile[row * kPanelVectors + v];
      to = accumulate ? to + sums[row][v] : sums[row][v];
    }
  }
}

constexpr int kLinesOfGroup = kPanelColumns * 4 / kCacheLine;

// From so many rows on sums can wait. Tiles of nearly equal size then have as many rows as a tile can have or one less, and
// are so many that none asks the memory for more than a line with each group: code that finishes exists for such tiles only.
constexpr int64_t kFewestRowsThatWait = 4 * kTileRows;
constexpr int kFewestTileRowsThatWait = kTileRows - 1;
static_assert(kFewestRowsThatWait >= kLinesOfGroup * kTileRows);
static_assert((kFewestRowsThatWait + 1) / (kFewestRowsThatWait / kTileRows + 1) >= kFewestTileRowsThatWait);

template <typename Group, int kLines, int Rows = kTileRows, typename Left, typename FinishWaiting>
FASTBERT_INLINE void packed_rows(int64_t rows, int64_t groups, Left a, const uint32_t* panel, typename Group::Sum* tile,
                                 bool accumulate, const char* prefetch, const FinishWaiting& finish_waiting) {
  if constexpr (Rows > (kSumsWait<FinishWaiting> ? kFewestTileRowsThatWait : 1)) {
    if (rows < Rows) {
      return packed_rows<Group, kLines, Rows - 1>(rows, groups, a, panel, tile, accumulate, prefetch, finish_waiting);
    }
  }
  packed_tile<Group, Rows, kLines>(groups, a, panel, tile, accumulate, prefetch, finish_waiting);
}

// sums (rows, kPanelColumns) = A (rows, groups) times one panel. The sums of an element do not depend on the rows beside it.
// While a block of the panel is in use the one that follows in memory is asked for, a part by each of the first tiles, as
// many as there are up to kLines: few rows wait for the memory as much as for the arithmetic.
//
// Where the sums of an earlier panel wait to be finished, finish_waiting(row, vector) does it; there are at least
// kFewestRowsThatWait rows then.
template <typename Group, typename Left, typename FinishWaiting>
void multiply_packed_panel(int64_t rows, int64_t groups, Left a, const uint32_t* panel, typename Group::Sum* sums,
                           const FinishWaiting& finish_waiting) {
  constexpr int kLines = kLinesOfGroup;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t lines = tiles == 1 ? kLines : tiles < kLines ? (kLines + 1) / 2 : 1;  // with each group of a tile
  for (int64_t first_group = 0; first_group < groups; first_group += kGroupBlock) {
    const int64_t block = groups - first_group < kGroupBlock ? groups - first_group : kGroupBlock;
    const uint32_t* block_start = panel + first_group * kPanelColumns;
    const char* next_block = reinterpret_cast<const char*>(block_start + block * kPanelColumns);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      // Nearly equal: a last tile of one row would leave most of the arithmetic units idle.
      const int64_t first = tile * rows / tiles, last = (tile + 1) * rows / tiles;
      const Left tile_rows = a.from(first, first_group);
      typename Group::Sum* to = sums + first * kPanelVectors;
      const char* part = next_block + tile * lines * block * kCacheLine;
      const auto run = [&](auto count) {
        constexpr int line_count = decltype(count)::value;
        const auto multiply_rows = [&](const auto& finish) {
          packed_rows<Group, line_count>(last - first, block, tile_rows, block_start, to, first_group > 0, part, finish);
        };
        if constexpr (kSumsWait<FinishWaiting>) {  // alone, as line_count is known later and the call below is looked at now
          if constexpr (line_count <= 1) {
            if (first_group == 0) return multiply_rows([=](int row, int v) { finish_waiting(first + row, v); });
          }
        }
        multiply_rows(NothingWaits());
      };
      if (tile * lines >= kLines) {
        run(std::integral_constant<int, 0>());
      } else if (lines == 1) {
        run(std::integral_constant<int, 1>());
      } else if (lines < kLines) {
        run(std::integral_constant<int, (kLines + 1) / 2>());
      } else {
        run(std::integral_constant<int, kLines>());
      }
    }
  }
}

}  // namespace fastbert::cpu::FASTBERT_ISA

#if defined(__AMX_TILE__)
#include "cpu/tile_gemm.h"
#endif

namespace fastbert::cpu::FASTBERT_ISA {

// Calls finish(row, column, sums, extent) for A (rows, groups), at most kMaxBlockRows rows, times the panels [first_panel,
// last_panel) of a B of so many columns, whose panel i is at panel_at(i). sums: kSumVectors vectors of scratch memory.
//
// What finish does with one panel happens among the multiplications of the next: between the panels each would wait for its
// own results, and the units that multiply would be idle. It is copied, so that what it captured is at hand, and so should
// not capture by reference.
template <typename Group, typename Left, typename PanelAt, typename Finish>
void multiply_packed_panels(int64_t rows, int64_t groups, Left a, int64_t first_panel, int64_t last_panel, int64_t columns,
                            const PanelAt& panel_at, typename Group::Sum* sums, const Finish& finish) {
#if defined(__AMX_TILE__)
  if constexpr (std::is_same_v<Left, LeftRows<Group>> && Group::kElements > 1) {
    if (rows > 0 && groups >= kTileSide) {
      const TileParts parts(rows);
      const Tiles tiles(parts);
      const auto multiply = [&](auto has_two) {
        multiply_panels_of_tiles<Group, decltype(has_two)::value>(parts, groups, a, first_panel, last_panel, columns,
                                                                  panel_at, sums, finish);
      };
      return parts.has_two ? multiply(std::true_type()) : multiply(std::false_type());
    }
  }
#endif
  // 16 registers are full of a tile's sums, and float32's multiplications take so long that it makes no difference.
  constexpr bool worthwhile = kVectorRegisters == 32 && Group::kElements > 1;
  const bool may_wait = worthwhile && rows >= kFewestRowsThatWait;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t column = panel * kPanelColumns;
    const auto multiply = [&](const auto& finish_waiting) {
      multiply_packed_panel<Group>(rows, groups, a, panel_at(panel), sums, finish_waiting);
    };
    const auto finish_previous = [=](int64_t row, int v) {
      finish(row, column - kPanelColumns + v * kWidth, sums[row * kPanelVectors + v], Whole{});
    };
    if (panel == first_panel || !may_wait) {
      multiply(NothingWaits());
    } else if constexpr (worthwhile) {
      multiply(finish_previous);
    }
    if (may_wait && panel + 1 < last_panel) continue;
    for (int64_t row = 0; row < rows; ++row) {
      for_columns(columns - column < kPanelColumns ? columns - column : kPanelColumns, [&](int64_t offset, auto extent) {
        finish(row, column + offset, sums[row * kPanelVectors + offset / kWidth], extent);
      });
    }
  }
}

// A panel of B from where B's columns lie: `count` of them, as rows of whole groups that are `stride` groups apart. The
// other columns of the panel are 0. Groups of any dtype are moved as if they were float32.
inline void pack_panel_of_rows(const float* rows, int64_t stride, int64_t count, int64_t groups, uint32_t* panel) {
  for (int64_t column = 0; column < kPanelColumns; column += kWidth) {
    const float* from = rows + column * stride;
    const int64_t there = count - column < kWidth ? count - column : kWidth;
    for_columns(groups, [&](int64_t group, auto extent) {
      transpose([&](int i) { return i < there ? load(from + i * stride + group, extent) : Vec{}; },
                [&](int i, Vec groups) {
                  if (i < extent.count) std::memcpy(panel + (group + i) * kPanelColumns + column, &groups, sizeof(Vec));
                });
    });
  }
}

}  // namespace fastbert::cpu::FASTBERT_ISA
