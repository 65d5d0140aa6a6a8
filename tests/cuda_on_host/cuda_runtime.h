// What csrc/cuda uses of CUDA's language and runtime, for a C++ compiler: see simt.h.

#pragma once

#include <algorithm>
#include <cmath>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static thread_local

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// --- warps and blocks --------------------------------------------------------------------------------------------------

inline void __syncthreads(simt::Location where = simt::Location::current()) {
  const dim3& size = simt::block_size();
  simt::sync(0, static_cast<int>(size.x * size.y * size.z), where);
}

namespace simt {
template <typename T>
T shuffle(unsigned mask, T value, int source, const char* what, const Location& where) {
  if (mask != 0xFFFFFFFF) throw std::logic_error("shuffles are of whole warps here");
  return exchange(value, what, where)[source & 31];
}
}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, simt::Location where = simt::Location::current()) {
  return simt::shuffle(mask, value, source, "__shfl_sync", where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, simt::Location where = simt::Location::current()) {
  return simt::shuffle(mask, value, simt::lane() ^ lanes, "__shfl_xor_sync", where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int lanes, simt::Location where = simt::Location::current()) {
  return simt::shuffle(mask, value, std::min(simt::lane() + lanes, 31), "__shfl_down_sync", where);
}
inline unsigned __ballot_sync(unsigned, bool predicate, simt::Location where = simt::Location::current()) {
  const bool* votes = simt::exchange(predicate, "__ballot_sync", where);
  unsigned ballot = 0;
  for (int i = 0; i < simt::kWarp; ++i) ballot |= static_cast<unsigned>(votes[i]) << i;
  return ballot;
}
inline bool __any_sync(unsigned mask, bool predicate, simt::Location where = simt::Location::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, simt::Location where = simt::Location::current()) {
  return __ballot_sync(mask, predicate, where) == 0xFFFFFFFF;
}
inline void __syncwarp(unsigned = 0xFFFFFFFF, simt::Location where = simt::Location::current()) {
  simt::exchange(0, "__syncwarp", where);
}
inline void __threadfence() {}

template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

// --- numbers -----------------------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
using std::max;
using std::min;
