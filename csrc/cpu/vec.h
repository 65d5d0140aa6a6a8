// A vector of float32 as wide as the instruction set allows, on the vector extensions of GCC and clang.
//
// Each op's source is compiled once per instruction set, with FASTBERT_ISA naming it; everything that such a source defines
// or instantiates lives in the namespace of that name, so that the linker can never replace a function of one instruction
// set by its twin of another.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTBERT_INLINE inline __attribute__((always_inline))

namespace fastbert::cpu::FASTBERT_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kVectorRegisters = 32;
#else
constexpr int kWidth = 4;
constexpr int kVectorRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecInt __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecUint __attribute__((vector_size(kWidth * 4)));
typedef uint64_t VecUint64 __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kWidth * 2)));

struct BFloat16 {
  uint16_t bits;
};

// How much of a vector a load or store touches: all of it, or the first few elements (the others load as 0).
struct Whole {
  static constexpr int count = kWidth;
};
struct Part {
  int count;
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// At least n words of 4 bytes that are an odd number of cache lines: in rows of so many, walking down a column touches all
// sets of the cache.
constexpr int64_t odd_lines(int64_t n) { return (round_up(n, 16) / 16 | 1) * 16; }

// x - 0 is x for every x, -0 too, and compiles to a broadcast alone (0 + x would not).
FASTBERT_INLINE Vec splat(float x) { return x - Vec{}; }

// With a constant size the compiler makes one move of a memcpy, with a variable one it calls the library.
FASTBERT_INLINE void copy_elements(void* to, const void* from, Whole, int size) { std::memcpy(to, from, kWidth * size); }
FASTBERT_INLINE void copy_elements(void* to, const void* from, Part part, int size) {
  std::memcpy(to, from, part.count * size);
}

template <typename Extent = Whole>
FASTBERT_INLINE Vec load(const float* from, Extent extent = {}) {
  Vec v{};
  copy_elements(&v, from, extent, 4);
  return v;
}

template <typename Extent = Whole>
FASTBERT_INLINE VecInt load_int(const int32_t* from, Extent extent = {}) {
  VecInt v{};
  copy_elements(&v, from, extent, 4);
  return v;
}

template <typename Extent = Whole>
FASTBERT_INLINE VecHalf load_half(const void* from, Extent extent = {}) {
  VecHalf v{};
  copy_elements(&v, from, extent, 2);
  return v;
}

template <typename Extent = Whole>
FASTBERT_INLINE Vec load(const BFloat16* from, Extent extent = {}) {
  return (Vec)(__builtin_convertvector(load_half(from, extent), VecUint) << 16);
}

template <typename Extent = Whole>
FASTBERT_INLINE void store(float* to, Vec v, Extent extent = {}) {
  copy_elements(to, &v, extent, 4);
}

// Rounds to nearest, ties to even; a NaN stays one.
FASTBERT_INLINE VecUint bfloat16_bits(Vec v) {
  const VecUint bits = (VecUint)v;
  const VecUint rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return v == v ? rounded : (bits >> 16) | 0x40;
}

template <typename Extent = Whole>
FASTBERT_INLINE void store(BFloat16* to, Vec v, Extent extent = {}) {
#if defined(__AVX512BF16__)
  const VecHalf half = (VecHalf)_mm512_cvtneps_pbh((__m512)v);  // denormal numbers become 0
#else
  const VecHalf half = __builtin_convertvector(bfloat16_bits(v), VecHalf);
#endif
  copy_elements(to, &half, extent, 2);
}

FASTBERT_INLINE float to_float(float x) { return x; }
FASTBERT_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// v where the extent has a column, otherwise elsewhere.
FASTBERT_INLINE Vec within(Vec v, float, Whole) { return v; }
FASTBERT_INLINE Vec within(Vec v, float otherwise, Part part) {
  VecInt lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < part.count ? v : splat(otherwise);
}

// Calls body(first, extent) for the columns first .. first + extent.count - 1, in whole vectors and one part at the end.
template <typename Body>
FASTBERT_INLINE void for_columns(int64_t columns, Body&& body) {
  int64_t first = 0;
  for (; first + kWidth <= columns; first += kWidth) body(first, Whole{});
  if (first < columns) body(first, Part{static_cast<int>(columns - first)});
}

// The same with a third argument that counts 0 1 2 3 0 1 ...: sums kept in four vectors need not wait for one another.
constexpr int kSlots = 4;
template <typename Body>
FASTBERT_INLINE void for_columns_in_slots(int64_t columns, Body&& body) {
  int64_t first = 0;
  for (; first + kSlots * kWidth <= columns; first += kSlots * kWidth) {
#pragma GCC unroll 4
    for (int slot = 0; slot < kSlots; ++slot) body(first + slot * kWidth, Whole{}, slot);
  }
  for_columns(columns - first, [&](int64_t column, auto extent) { body(first + column, extent, 0); });
}

template <int... Lane>
FASTBERT_INLINE Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane...);
#else
  return __builtin_shuffle(a, b, VecInt{Lane...});
#endif
}

template <int Distance, int... Lane>
FASTBERT_INLINE Vec swap_lanes(Vec v, std::integer_sequence<int, Lane...>) {
  return shuffle<(Lane ^ Distance)...>(v, v);
}

template <int Distance = kWidth / 2, typename Combine>
FASTBERT_INLINE Vec reduce_lanes(Vec v, Combine combine) {
  v = combine(v, swap_lanes<Distance>(v, std::make_integer_sequence<int, kWidth>{}));
  if constexpr (Distance > 1) return reduce_lanes<Distance / 2>(v, combine);
  return v;
}

// The larger and the smaller of two; b where either is NaN. (A comparison and a blend would be two instructions on x86-64.)
FASTBERT_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

FASTBERT_INLINE Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Vec)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

FASTBERT_INLINE float sum_lanes(Vec v) {
  return reduce_lanes(v, [](Vec a, Vec b) { return a + b; })[0];
}
FASTBERT_INLINE float max_lanes(Vec v) { return reduce_lanes(v, maximum)[0]; }

FASTBERT_INLINE float sum_slots(const Vec (&v)[kSlots]) { return sum_lanes((v[0] + v[1]) + (v[2] + v[3])); }
FASTBERT_INLINE float max_slots(const Vec (&v)[kSlots]) {
  return max_lanes(maximum(maximum(v[0], v[1]), maximum(v[2], v[3])));
}

// a0 b0 a1 b1 ..., in two vectors.
template <int... Lane>
FASTBERT_INLINE void interleave(Vec a, Vec b, Vec& low, Vec& high, std::integer_sequence<int, Lane...>) {
  low = shuffle<(Lane % 2 * kWidth + Lane / 2)...>(a, b);
  high = shuffle<(Lane % 2 * kWidth + (kWidth + Lane) / 2)...>(a, b);
}

// The same for pairs of neighbouring lanes.
template <int... Lane>
FASTBERT_INLINE void interleave_pairs(Vec a, Vec b, Vec& low, Vec& high, std::integer_sequence<int, Lane...>) {
  low = shuffle<(Lane / 2 % 2 * kWidth + Lane / 4 * 2 + Lane % 2)...>(a, b);
  high = shuffle<(Lane / 2 % 2 * kWidth + kWidth / 2 + Lane / 4 * 2 + Lane % 2)...>(a, b);
}

// Transposes a square, log2(kWidth) perfect shuffles: from(i) is a row of it, to(i, column) takes a column.
template <typename From, typename To>
FASTBERT_INLINE void transpose(const From& from, const To& to) {
  Vec square[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) square[i] = from(i);
#pragma GCC unroll 4
  for (int stride = 1; stride < kWidth; stride *= 2) {
    Vec mixed[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      interleave(square[i], square[i + kWidth / 2], mixed[2 * i], mixed[2 * i + 1],
                 std::make_integer_sequence<int, kWidth>{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) square[i] = mixed[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) to(i, square[i]);
}

// The 64-bit products of the low halves of the 64-bit lanes; their high halves are ignored.
FASTBERT_INLINE VecUint64 multiply_low_halves(VecUint64 a, VecUint64 b) {
#if defined(__AVX512F__)
  return (VecUint64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecUint64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (VecUint64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

}  // namespace fastbert::cpu::FASTBERT_ISA
