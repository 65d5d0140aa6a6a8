// Sums of A B by AMX's tiles, from the operands of packed_gemm.h, which includes this where the instruction set has them.
//
// All else happens among the multiplications: what is done with the sums of the panel before, and asking the memory for the
// next part of B.

#pragma once

#include "cpu/tiles.h"

namespace fastbert::cpu::FASTBERT_ISA {

// Half a panel of a block of so many groups is 48 KB: smaller ones would stay in the first-level cache, but sums that are
// read and written once more for each block cost more than that saves.
constexpr int64_t kTileGroupBlock = 384;

// packed_gemm.h's multiply_packed_panels for at least kTileSide groups. What is left of the depth behind whole tiles is for
// vectors.
template <typename Group, bool kHasTwo, typename PanelAt, typename Finish>
void multiply_panels_of_tiles(const TileParts& parts, int64_t groups, LeftRows<Group> a, int64_t first_panel,
                              int64_t last_panel, int64_t columns, const PanelAt& panel_at, typename Group::Sum* sums,
                              const Finish& finish) {
  constexpr int passes = kHasTwo ? 2 : 1, vectors = kPanelVectors / passes;  // of columns, for each row of a part
  static_assert(kPanelVectors == 4 && kWidth == kTileSide);
  const int64_t in_tiles = groups / kTileSide * kTileSide;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const uint32_t* packed = panel_at(panel);
    const int64_t column = panel * kPanelColumns;
    for (int64_t first_group = 0; first_group < in_tiles; first_group += kTileGroupBlock) {
      const int64_t block = least(in_tiles - first_group, kTileGroupBlock), steps = block / kTileSide;
      const uint32_t* block_start = packed + first_group * kPanelColumns;
      // The block that follows in memory, a few lines after each step of this one.
      const char* next = reinterpret_cast<const char*>(block_start + block * kPanelColumns);
      const int64_t all_steps = passes * parts.count * steps;
      const int64_t lines = (block * kLinesOfGroup + all_steps - 1) / all_steps;
      for (int pass = 0; pass < passes; ++pass) {
        for (int64_t part = 0; part < parts.count; ++part) {
          typename Group::Sum* to = sums + part * parts.size * kPanelVectors + pass * vectors;
          const LeftRows<Group> rows = a.from(parts.first_row(part), first_group);
          // The last panel's sums wait here to be finished.
          const int64_t first_row = parts.first_row(part), end = first_group == 0 && panel > first_panel ? parts.size : 0;
          const int64_t rows_of_step = (end + steps - 1) / steps;
          int64_t waiting = part + 1 == parts.count ? parts.repeated : 0;
          const TileRows of_part{to, kPanelColumns * 4}, nothing{nullptr, 0};
          multiply_tiles<std::is_same_v<Group, Int8Group>, kHasTwo>(
              parts, steps, {rows.data, rows.row_bytes}, {block_start + pass * vectors * kTileSide, kPanelColumns * 4},
              first_group > 0 ? of_part : nothing, of_part, [&] {
                for (int64_t line = 0; line < lines; ++line, next += kCacheLine) __builtin_prefetch(next, 0, 2);
                for (const int64_t until = least(waiting + rows_of_step, end); waiting < until; ++waiting) {
#pragma GCC unroll 4
                  for (int v = 0; v < vectors; ++v) {
                    finish(first_row + waiting, column - kPanelColumns + (pass * vectors + v) * kWidth,
                           to[waiting * kPanelVectors + v], Whole{});
                  }
                }
              });
        }
      }
    }
    for (int64_t part = 0; part < parts.count && in_tiles < groups; ++part) {
      for (int64_t row = 0; row < parts.size; row += kTileRows) {
        packed_rows<Group, 0>(least(parts.size - row, kTileRows), groups - in_tiles,
                              a.from(parts.first_row(part) + row, in_tiles), packed + in_tiles * kPanelColumns,
                              sums + (part * parts.size + row) * kPanelVectors, true, nullptr, NothingWaits());
      }
    }
    if (panel + 1 < last_panel) continue;
    for (int64_t row = 0; row < parts.rows; ++row) {
      const typename Group::Sum* of_row = sums + parts.place_of(row) * kPanelVectors;
      for_columns(least(columns - column, kPanelColumns),
                  [&](int64_t offset, auto extent) { finish(row, column + offset, of_row[offset / kWidth], extent); });
    }
  }
}

}  // namespace fastbert::cpu::FASTBERT_ISA
