// What the row kernels share: a row of up to 4,096 elements in the registers of a group of 32, 64, 128 or 256 threads, read
// and written 16 bytes at a time, with reductions over the group.
//
// What bounds them on an H200 (132 multiprocessors, 4.8 TB/s, 1.7 GHz): a multiprocessor's share is 21 bytes per cycle, and
// at 0.7 us of latency 25 KB must be on their way to it at any time. The forward kernels get that from many resident blocks
// (64 registers: 1,024 threads, each with two operands of 32 bytes in flight). The backward kernels keep sums over all their
// rows in registers, three per column, which leaves 384 threads; there the loads of the next row are in flight during the
// work on this one (2 operands x 32 bytes x 384 threads: 24 KB; in float32 twice the bytes of 256 threads). 16 bits of 768
// columns leave 300 cycles for a row of the forward, 1,200 instructions of a warp: a group must not be wider than its row
// needs, or idle lanes take the time that Philox needs.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/arithmetic.h"
#include "cuda/launch.h"
#include "cuda/launcher.cuh"

namespace fastbert::cuda {

constexpr int kElementsPerThread = 16;  // more, and the backward's three sums per element spill
constexpr int kWarp = 32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// How many elements of T are 16 bytes.
template <typename T>
inline constexpr int kWidthOf = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ void unpack_vector(const uint4& packed, float* values) {
  const T* elements = reinterpret_cast<const T*>(&packed);
#pragma unroll
  for (int i = 0; i < kWidthOf<T>; ++i) values[i] = to_float(elements[i]);
}

template <typename T>
__device__ __forceinline__ uint4 pack_vector(const float* values) {
  uint4 packed;
  T* elements = reinterpret_cast<T*>(&packed);
#pragma unroll
  for (int i = 0; i < kWidthOf<T>; ++i) elements[i] = from_float<T>(values[i]);
  return packed;
}

// The threads that share a row, and which of its columns each holds: vector v of thread t starts at column
// (v * kThreads + t) * kWidth, so that neighbours read neighbouring 16 bytes. Groups that have no row take part in their
// block's barriers, with a width of 0: nothing is read, all elements are 0, nothing is written.
template <typename T, int kThreads>
struct Group {
  static constexpr int kWidth = kWidthOf<T>;
  static constexpr int kVectors = kElementsPerThread / kWidth;
  static constexpr int kBlock = kThreads > 128 ? kThreads : 128;
  static constexpr int kGroups = kBlock / kThreads;
  // The blocks of a forward that a multiprocessor holds at least, with 64 or 80 registers per thread.
  static constexpr int kForwardBlocks = (sizeof(T) == 4 ? 768 : 1024) / kBlock;
  // The blocks of a backward that a multiprocessor holds, with up to 168 registers per thread, or 255 in float32.
  static constexpr int kResidentBlocks = kThreads > 128 ? 1 : sizeof(T) == 4 ? 2 : 3;

  // Elements as they are in memory: half the registers of those in use, for 16-bit dtypes.
  struct Packed {
    uint4 vectors[kVectors];
  };

  int thread = threadIdx.x % kThreads;
  int group = threadIdx.x / kThreads;
  int turn = 0;  // which of the two sets of partial sums the next reduction uses

  __device__ __forceinline__ int column(int vector) const { return (vector * kThreads + thread) * kWidth; }
  __device__ __forceinline__ bool holds(int element, int64_t hidden) const { return column(element / kWidth) < hidden; }

  // Elements outside of the row are 0.
  __device__ __forceinline__ Packed fetch(const void* rows, int64_t offset, int64_t hidden) const {
    Packed packed;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      packed.vectors[v] = make_uint4(0, 0, 0, 0);
      if (column(v) < hidden) {
        packed.vectors[v] = *reinterpret_cast<const uint4*>(static_cast<const T*>(rows) + offset + column(v));
      }
    }
    return packed;
  }

  __device__ __forceinline__ void unpack(const Packed& packed, float (&values)[kElementsPerThread]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) unpack_vector<T>(packed.vectors[v], values + v * kWidth);
  }

  // The same columns of a parameter; null gives 0.
  __device__ __forceinline__ void load_parameter(const void* parameter, int64_t hidden,
                                                 float (&values)[kElementsPerThread]) const {
    unpack(fetch(parameter, 0, parameter == nullptr ? 0 : hidden), values);
  }

  __device__ __forceinline__ void store(void* rows, int64_t offset, int64_t hidden,
                                        const float (&values)[kElementsPerThread]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) < hidden) {
        *reinterpret_cast<uint4*>(static_cast<T*>(rows) + offset + column(v)) = pack_vector<T>(values + v * kWidth);
      }
    }
  }

  // Sums of a and b over the group, in every thread. All threads of the block call it together.
  __device__ __forceinline__ float2 sum(float a, float b) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      a += __shfl_xor_sync(0xFFFFFFFF, a, offset);
      b += __shfl_xor_sync(0xFFFFFFFF, b, offset);
    }
    if constexpr (kThreads > kWarp) {
      constexpr int kWarps = kThreads / kWarp;
      // Two sets, in turns: who writes one again has passed the barrier of the other, before which all have read this one.
      __shared__ float2 partial[2][kBlock / kWarp];
      if (threadIdx.x % kWarp == 0) partial[turn][threadIdx.x / kWarp] = make_float2(a, b);
      __syncthreads();
      a = b = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        a += partial[turn][group * kWarps + warp].x;
        b += partial[turn][group * kWarps + warp].y;
      }
      turn ^= 1;
    }
    return make_float2(a, b);
  }

  // Mean and 1 / sqrt(variance + eps) of a row; the variance from centred values, or a large mean would eat its digits.
  __device__ __forceinline__ float2 moments(const float (&values)[kElementsPerThread], int64_t hidden, float eps) {
    const float inverse_hidden = 1.0f / static_cast<float>(hidden);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) total += values[i];
    const float mean = sum(total, 0.0f).x * inverse_hidden;
    float deviations = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      const float deviation = holds(i, hidden) ? values[i] - mean : 0.0f;
      deviations += deviation;
      squares += deviation * deviation;
    }
    // The sum of the centred values, which exactly would be 0, is what rounding made of a mean far from zero.
    const float2 sums = sum(deviations, squares);
    const float correction = sums.x * inverse_hidden;
    const float variance = fmaxf(sums.y * inverse_hidden - correction * correction, 0.0f);
    return make_float2(mean + correction, rsqrtf(variance + eps));
  }

  // values becomes 0 where dropped, scaled where kept.
  __device__ __forceinline__ void drop(float (&values)[kElementsPerThread], int64_t row, int64_t hidden,
                                       const Dropout& dropout) const {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) >= hidden) continue;
      // Two float32 vectors of a thread pair share the call of their eight columns; recomputing it costs less than a
      // shuffle.
      const uint32_t first = static_cast<uint32_t>(column(v));
      const Words words = philox(first / 8, static_cast<uint32_t>(row), 0, dropout.stream, seed);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        float& value = values[v * kWidth + i];
        value = keeps(words, first + i, dropout.threshold) ? value * dropout.scale : 0.0f;
      }
    }
  }

  // line (hidden,) float32 = the sum of the block's groups' values, in their order; null where it is not wanted.
  __device__ __forceinline__ void store_block_sum(float* line, int64_t hidden,
                                                  const float (&values)[kElementsPerThread]) const {
    if (line == nullptr) return;
    if constexpr (kGroups == 1) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (column(v) >= hidden) continue;
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
          const float* four = values + v * kWidth + i;
          *reinterpret_cast<float4*>(line + column(v) + i) = make_float4(four[0], four[1], four[2], four[3]);
        }
      }
    } else {
      constexpr int kFours = kThreads * kElementsPerThread / 4;
      __shared__ float4 sums[kGroups][kFours];
      __syncthreads();  // the last call's sums have been read
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
          const float* four = values + v * kWidth + i;
          sums[group][(column(v) + i) / 4] = make_float4(four[0], four[1], four[2], four[3]);
        }
      }
      __syncthreads();
      for (int four = threadIdx.x; 4 * four < hidden; four += kBlock) {
        float4 total = sums[0][four];
#pragma unroll
        for (int other = 1; other < kGroups; ++other) {
          const float4 more = sums[other][four];
          total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w);
        }
        *reinterpret_cast<float4*>(line + 4 * four) = total;
      }
    }
  }
};

// Blocks of a forward: a row for each group.
template <typename G>
unsigned forward_blocks(int64_t rows) {
  return static_cast<unsigned>((rows + G::kGroups - 1) / G::kGroups);
}

// The sum of load(i) for i below count, by a block of (32, kLanes) threads: a warp loads from neighbouring addresses, its
// threads' sums are theirs alone. The result is that of threads with threadIdx.y == 0; the order depends on count alone.
// 128 loads per column are on their way at once: a few hundred sums that other blocks have just written take three or four
// times the latency of the second-level cache. A kernel calls it once: its shared memory is not free for a second time.
constexpr int kLanes = 16;

template <typename Load>
__device__ __forceinline__ float sum_in_lanes(int64_t count, const Load& load) {
  constexpr int kAtOnce = 8;
  __shared__ float lane_sums[kLanes][kWarp];
  float totals[kAtOnce] = {};
  for (int64_t first = threadIdx.y; first < count; first += kLanes * kAtOnce) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kLanes < count) totals[i] += load(first + i * kLanes);
    }
  }
#pragma unroll
  for (int half = kAtOnce / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) totals[i] += totals[i + half];
  }
  lane_sums[threadIdx.y][threadIdx.x] = totals[0];
  __syncthreads();
  if (threadIdx.y != 0) return 0.0f;
  float lanes[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) lanes[i] = lane_sums[i][threadIdx.x];
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Second stage of the parameters' gradients: sums[i] (width,) = the sum over lines of partials (lines, num_sums, width); a
// sum that is null is not wanted.
struct LineSums {
  const float* partials;
  int64_t lines, num_sums, width;
  void* sums[3];
  DType dtype;  // of the sums
};
void sum_lines(const char* op, const LineSums& p, void* stream);

// Calls body.template operator()<T>() for the dtype.
template <typename Body>
void for_dtype(DType dtype, const Body& body) {
  if (dtype == DType::float32) {
    body.template operator()<float>();
  } else if (dtype == DType::bfloat16) {
    body.template operator()<__nv_bfloat16>();
  } else {
    body.template operator()<__half>();
  }
}

// Calls body.template operator()<T, kThreads>() for the dtype and the smallest group that holds a row.
template <typename Body>
void for_shape(DType dtype, int64_t hidden, const Body& body) {
  for_dtype(dtype, [&]<typename T>() {
    if (hidden <= 32 * kElementsPerThread) {
      body.template operator()<T, 32>();
    } else if (hidden <= 64 * kElementsPerThread) {
      body.template operator()<T, 64>();
    } else if (hidden <= 128 * kElementsPerThread) {
      body.template operator()<T, 128>();
    } else {
      body.template operator()<T, 256>();
    }
  });
}

}  // namespace fastbert::cuda
