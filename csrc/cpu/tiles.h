// AMX's tiles, for the products of gemm.h and packed_gemm.h.
//
// A tile is 16 rows of 64 bytes: of A, 16 rows of 16 groups; of B, 16 groups of 16 columns, as both headers pack them. One
// instruction adds the products of both to a tile of 16 x 16 sums, in 16 cycles. Two tiles of A and two of B are loaded for
// four such instructions, in less than that time.

#pragma once

#include "cpu/vec.h"

namespace fastbert::cpu::FASTBERT_ISA {

constexpr int64_t kTileSide = 16;  // rows of a tile, and the groups or sums of each

// The standard library's could be compiled for one instruction set and linked into another.
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A block of rows in parts of one tile or two above each other, all of the same size, so that one configuration does for
// them. The last part ends with the rows and so begins among those of the part before; its sums lie behind the others' all
// the same.
struct TileParts {
  int64_t rows;
  int64_t count = (rows + 2 * kTileSide - 1) / (2 * kTileSide);
  int64_t size = (rows + count - 1) / count;
  int64_t repeated = count * size - rows;  // rows of the last part that belong to the one before
  bool has_two = size > kTileSide;
  int64_t upper = has_two ? (size + 1) / 2 : size;

  explicit TileParts(int64_t rows) : rows(rows) {}
  int64_t first_row(int64_t part) const { return part * size - (part + 1 == count ? repeated : 0); }
  int64_t place_of(int64_t row) const { return row < (count - 1) * size ? row : row + repeated; }
};

// This thread's tiles, while it is there: sums in 0 to 3, then A in 4 and, where a part has two tiles of rows, 5; B in the
// others.
class Tiles {
 public:
  explicit Tiles(const TileParts& parts) {
    Configuration configuration;
    const auto lower = static_cast<uint8_t>(parts.has_two ? parts.size - parts.upper : parts.upper);
    const auto upper = static_cast<uint8_t>(parts.upper), all = static_cast<uint8_t>(kTileSide);
    const uint8_t rows[] = {upper, upper, lower, lower, upper, parts.has_two ? lower : all, all, all};
    for (int tile = 0; tile < 8; ++tile) {
      configuration.rows[tile] = rows[tile];
      configuration.row_bytes[tile] = 4 * kTileSide;
    }
    _tile_loadconfig(&configuration);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

// The compiler does not know which memory the instructions on tiles read.
FASTBERT_INLINE void memory_is_written() { asm volatile("" ::: "memory"); }

// The names of tiles are a part of the instructions.
#define FASTBERT_MULTIPLY_TILES(sums, a, b) \
  if constexpr (kOfBytes) {                 \
    _tile_dpbusd(sums, a, b);               \
  } else {                                  \
    _tile_dpbf16ps(sums, a, b);             \
  }

// Rows of groups or sums in memory.
struct TileRows {
  const void* first;
  int64_t row_bytes;
};

// sums = addend (or 0, where that is null) + the products of a part's rows and of two tiles of B's columns or, where the
// part is one tile of rows, four. kOfBytes: unsigned ones of A, signed ones of B; otherwise both are bfloat16. steps: tiles
// along the depth, after each of which after_step() runs.
template <bool kOfBytes, bool kHasTwo, typename AfterStep>
FASTBERT_INLINE void multiply_tiles(const TileParts& parts, int64_t steps, TileRows a, TileRows b, TileRows addend,
                                    TileRows sums, const AfterStep& after_step) {
  constexpr int64_t tile_bytes = 4 * kTileSide;
  const auto place = [&](TileRows rows, int tile) {
    const int64_t row = kHasTwo && tile >= 2 ? parts.upper : 0, column = kHasTwo ? tile % 2 : tile;
    return static_cast<char*>(const_cast<void*>(rows.first)) + row * rows.row_bytes + column * tile_bytes;
  };
  const char *a0 = static_cast<const char*>(a.first), *lower_a = a0 + parts.upper * a.row_bytes;
  const char* b0 = static_cast<const char*>(b.first);
  memory_is_written();
  if (addend.first != nullptr) {
    _tile_loadd(0, place(addend, 0), addend.row_bytes);
    _tile_loadd(1, place(addend, 1), addend.row_bytes);
    _tile_loadd(2, place(addend, 2), addend.row_bytes);
    _tile_loadd(3, place(addend, 3), addend.row_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a0, a.row_bytes);
    if constexpr (kHasTwo) {
      _tile_loadd(6, b0, b.row_bytes);
      FASTBERT_MULTIPLY_TILES(0, 4, 6);
      _tile_loadd(7, b0 + tile_bytes, b.row_bytes);
      FASTBERT_MULTIPLY_TILES(1, 4, 7);
      _tile_loadd(5, lower_a, a.row_bytes);
      FASTBERT_MULTIPLY_TILES(2, 5, 6);
      FASTBERT_MULTIPLY_TILES(3, 5, 7);
    } else {
      _tile_loadd(5, b0, b.row_bytes);
      FASTBERT_MULTIPLY_TILES(0, 4, 5);
      _tile_loadd(6, b0 + tile_bytes, b.row_bytes);
      FASTBERT_MULTIPLY_TILES(1, 4, 6);
      _tile_loadd(7, b0 + 2 * tile_bytes, b.row_bytes);
      FASTBERT_MULTIPLY_TILES(2, 4, 7);
      _tile_loadd(5, b0 + 3 * tile_bytes, b.row_bytes);
      FASTBERT_MULTIPLY_TILES(3, 4, 5);
    }
    a0 += tile_bytes;
    lower_a += tile_bytes;
    b0 += kTileSide * b.row_bytes;
    after_step();
  }
  memory_is_written();
  _tile_stored(0, place(sums, 0), sums.row_bytes);
  _tile_stored(1, place(sums, 1), sums.row_bytes);
  _tile_stored(2, place(sums, 2), sums.row_bytes);
  _tile_stored(3, place(sums, 3), sums.row_bytes);
  memory_is_written();
}

#undef FASTBERT_MULTIPLY_TILES

}  // namespace fastbert::cpu::FASTBERT_ISA
