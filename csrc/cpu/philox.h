// The random bits of dropout: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one
// counter per 64-bit lane. One call serves eight neighbouring columns with 16 bits each (fastbert/ops/reference).

#pragma once

#include "cpu/vec.h"
#include "fastbert.h"

namespace fastbert::cpu::FASTBERT_ISA {

constexpr int kCountersPerVector = kWidth / 2;
constexpr int kColumnsPerPhilox = 8;
// dropout_bits writes whole vectors of counters: its buffer holds a multiple of this many columns.
constexpr int kDropoutColumns = kCountersPerVector * kColumnsPerPhilox;

// Writes the 16 bits of each of the columns 0 .. columns - 1 of one row; bits: round_up(columns, kDropoutColumns) elements.
inline void dropout_bits(uint16_t* bits, int64_t columns, int64_t row, int64_t plane, const Dropout& dropout) {
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const VecUint64 multiplier0 = VecUint64{} + 0xD2511F53, multiplier1 = VecUint64{} + 0xCD9E8D57;
  VecUint64 counter{};
  for (int lane = 0; lane < kCountersPerVector; ++lane) counter[lane] = lane;

  for (int64_t first = 0; first < columns; first += kDropoutColumns, counter += kCountersPerVector) {
    // Only the low halves of c0 .. c3 count until the end.
    VecUint64 c0 = counter;
    VecUint64 c1 = VecUint64{} + static_cast<uint32_t>(row);
    VecUint64 c2 = VecUint64{} + static_cast<uint32_t>(plane);
    VecUint64 c3 = VecUint64{} + dropout.stream;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const VecUint64 product0 = multiply_low_halves(c0, multiplier0);
      const VecUint64 product1 = multiply_low_halves(c2, multiplier1);
      c0 = (product1 >> 32) ^ c1 ^ (VecUint64{} + key0);
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ (VecUint64{} + key1);
      c3 = product0;
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    const VecUint64 low = (c0 & 0xFFFFFFFF) | (c1 << 32), high = (c2 & 0xFFFFFFFF) | (c3 << 32);
    Vec words[2];
    interleave_pairs((Vec)low, (Vec)high, words[0], words[1], std::make_integer_sequence<int, kWidth>{});
    std::memcpy(bits + first, words, sizeof(words));
  }
}

// v where the element is kept, 0 where it is dropped; bits: those of v's columns.
template <typename Extent = Whole>
FASTBERT_INLINE Vec drop(Vec v, const uint16_t* bits, uint32_t threshold, Extent extent = {}) {
  const VecUint random = __builtin_convertvector(load_half(bits, extent), VecUint);
  return random >= threshold ? v : Vec{};
}

}  // namespace fastbert::cpu::FASTBERT_ISA
