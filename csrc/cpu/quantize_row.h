// A row of activations in 8-bit integers, with a scale of its own.

#pragma once

#include <type_traits>

#include "cpu/packed_gemm.h"

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

// q = round(x 127 / max |x|), ties to even, stored with Int8Group's zero point as elements of its left side; returns
// max |x| / 127, NaN for a row that has an infinity or a NaN, so that the results of the whole row are NaN. columns is a
// multiple of Int8Group's elements.
template <typename T>
float quantize_row(const T* x, int64_t columns, Int8Group::Element* q) {
  constexpr int bytes = sizeof(Int8Group::Element);
  const float largest = largest_magnitude(x, columns);
  if (!(largest < __builtin_inff())) {
    std::memset(q, 0, columns * bytes);
    return __builtin_nanf("");
  }
  const float scale = largest > 0.0f ? 127.0f / largest : 0.0f;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits, here with the zero point added.
  constexpr float round_to_integer = 12582912.0f + Int8Group::kZeroPoint;
  constexpr uint32_t lowest_bits = (1u << (8 * bytes)) - 1;
  const auto quantize = [&](Vec v) { return (VecUint)(v * scale + round_to_integer) & lowest_bits; };
  if constexpr (sizeof(T) == 2) {
    // Neighbours are taken apart and put together where they are: half the instructions of widening and narrowing.
    for_columns(columns / 2, [&](int64_t pair, auto extent) {
      const VecUint both = (VecUint)load_int(reinterpret_cast<const int32_t*>(x) + pair, extent);
      const VecUint pairs = quantize((Vec)(both << 16)) | quantize((Vec)(both & 0xFFFF0000)) << (8 * bytes);
      typedef std::conditional_t<bytes == 1, uint16_t, uint32_t> Pair;
      typedef Pair VecPair __attribute__((vector_size(kWidth * 2 * bytes)));
      const VecPair narrow = __builtin_convertvector(pairs, VecPair);
      copy_elements(q + 2 * pair, &narrow, extent, 2 * bytes);
    });
  } else {
    for_columns(columns, [&](int64_t column, auto extent) {
      typedef std::make_unsigned_t<Int8Group::Element> Element;
      typedef Element VecElement __attribute__((vector_size(kWidth * bytes)));
      const VecElement narrow = __builtin_convertvector(quantize(load(x + column, extent)), VecElement);
      copy_elements(q + column, &narrow, extent, bytes);
    });
  }
  return largest / 127.0f;
}

}  // namespace fastbert::cpu::FASTBERT_ISA
