// A row of activations in int8, with a scale of its own.

#pragma once

#include <type_traits>

#include "cpu/vec.h"

namespace fastbert::cpu::FASTBERT_ISA {

// The larger of two, lane by lane, as unsigned integers: for floats without their signs their order, with infinity above all
// numbers and NaN above infinity.
template <typename Bits>
FASTBERT_INLINE Bits larger_bits(Bits a, Bits b) {
  return a > b ? a : b;
}

// max |x|; infinity or NaN where there is one.
template <typename T>
float largest_magnitude(const T* x, int64_t columns) {
  using Element = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  typedef Element Bits __attribute__((vector_size(sizeof(Vec))));
  constexpr int elements = sizeof(Bits) / sizeof(T), slots = 2;
  constexpr Element no_sign = static_cast<Element>(-1) / 2;
  Bits maxima[slots]{};
  int64_t column = 0;
  for (; column + slots * elements <= columns; column += slots * elements) {
#pragma GCC unroll 2
    for (int slot = 0; slot < slots; ++slot) {
      Bits bits;
      std::memcpy(&bits, x + column + slot * elements, sizeof(Bits));
      maxima[slot] = larger_bits<Bits>(bits & no_sign, maxima[slot]);
    }
  }
  for (; column < columns; column += elements) {
    Bits bits{};
    std::memcpy(&bits, x + column, (columns - column < elements ? columns - column : elements) * sizeof(T));
    maxima[0] = larger_bits<Bits>(bits & no_sign, maxima[0]);
  }
  VecUint lanes = (VecUint)larger_bits<Bits>(maxima[0], maxima[1]);
  if constexpr (sizeof(T) == 2) lanes = larger_bits<VecUint>(lanes << 16, lanes & 0xFFFF0000);
  return reduce_lanes((Vec)lanes, [](Vec a, Vec b) { return (Vec)larger_bits<VecUint>((VecUint)a, (VecUint)b); })[0];
}

// q = round(x 127 / max |x|), ties to even, stored with Int8Group's zero point; returns max |x| / 127, NaN for a row that
// has an infinity or a NaN, so that the results of the whole row are NaN. columns is a multiple of Int8Group's elements.
template <typename T>
float quantize_row(const T* x, int64_t columns, uint8_t* q) {
  const float largest = largest_magnitude(x, columns);
  if (!(largest < __builtin_inff())) {
    std::memset(q, 0, columns);
    return __builtin_nanf("");
  }
  const float scale = largest > 0.0f ? 127.0f / largest : 0.0f;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits, here with the zero point added.
  constexpr float round_to_integer = 12582912.0f + 128.0f;
  const auto quantize = [&](Vec v) { return (VecUint)(v * scale + round_to_integer) & 0xFF; };
  if constexpr (sizeof(T) == 2) {
    // Neighbours are taken apart and put together where they are: half the instructions of widening and narrowing.
    for_columns(columns / 2, [&](int64_t pair, auto extent) {
      const VecUint both = (VecUint)load_int(reinterpret_cast<const int32_t*>(x) + pair, extent);
      const VecUint bytes = quantize((Vec)(both << 16)) | quantize((Vec)(both & 0xFFFF0000)) << 8;
      const VecHalf pairs = __builtin_convertvector(bytes, VecHalf);
      copy_elements(q + 2 * pair, &pairs, extent, 2);
    });
  } else {
    for_columns(columns, [&](int64_t column, auto extent) {
      typedef uint8_t VecByte __attribute__((vector_size(kWidth)));
      const VecByte bytes = __builtin_convertvector(quantize(load(x + column, extent)), VecByte);
      copy_elements(q + column, &bytes, extent, 1);
    });
  }
  return largest / 127.0f;
}

}  // namespace fastbert::cpu::FASTBERT_ISA
