// What the row kernels share: a row of up to 4,096 elements in the registers of a group of 32, 128 or 256 threads, read and
// written 16 bytes at a time, with reductions over the group.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/arithmetic.h"
#include "cuda/launch.h"
#include "cuda/launcher.cuh"

namespace fastbert::cuda {

constexpr int kBlock = 256;             // threads
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

// The threads that share a row, and which of its columns each holds: vector v of thread t starts at column
// (v * kThreads + t) * kWidth, so that neighbours read neighbouring 16 bytes.
template <typename T, int kThreads>
struct Group {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
  static constexpr int kVectors = kElementsPerThread / kWidth;
  static constexpr int kGroups = kBlock / kThreads;

  int thread = threadIdx.x % kThreads;
  int group = threadIdx.x / kThreads;

  __device__ __forceinline__ int column(int vector) const { return (vector * kThreads + thread) * kWidth; }

  // Elements outside of the row are 0.
  __device__ __forceinline__ void load(const T* row, int64_t hidden, float (&values)[kElementsPerThread]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) < hidden) {
        const uint4 packed = *reinterpret_cast<const uint4*>(row + column(v));
        const T* elements = reinterpret_cast<const T*>(&packed);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[v * kWidth + i] = to_float(elements[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[v * kWidth + i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void store(T* row, int64_t hidden, const float (&values)[kElementsPerThread]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) < hidden) {
        uint4 packed;
        T* elements = reinterpret_cast<T*>(&packed);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) elements[i] = from_float<T>(values[v * kWidth + i]);
        *reinterpret_cast<uint4*>(row + column(v)) = packed;
      }
    }
  }

  // The same columns of a float32 parameter; null gives 0.
  __device__ __forceinline__ void load_parameter(const float* parameter, int64_t hidden,
                                                 float (&values)[kElementsPerThread]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kWidth; i += 4) {
        float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (parameter != nullptr && column(v) < hidden) four = *reinterpret_cast<const float4*>(parameter + column(v) + i);
        values[v * kWidth + i] = four.x;
        values[v * kWidth + i + 1] = four.y;
        values[v * kWidth + i + 2] = four.z;
        values[v * kWidth + i + 3] = four.w;
      }
    }
  }

  __device__ __forceinline__ void store_parameter(float* parameter, int64_t hidden,
                                                  const float (&values)[kElementsPerThread]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) < hidden) {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
          *reinterpret_cast<float4*>(parameter + column(v) + i) = make_float4(
              values[v * kWidth + i], values[v * kWidth + i + 1], values[v * kWidth + i + 2], values[v * kWidth + i + 3]);
        }
      }
    }
  }

  __device__ __forceinline__ bool holds(int element, int64_t hidden) const { return column(element / kWidth) < hidden; }

  // Sums of a and b over the group, in every thread. All threads of the block call it together.
  __device__ __forceinline__ float2 sum(float a, float b) const {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      a += __shfl_xor_sync(0xFFFFFFFF, a, offset);
      b += __shfl_xor_sync(0xFFFFFFFF, b, offset);
    }
    if constexpr (kThreads > kWarp) {
      constexpr int kWarps = kThreads / kWarp;
      __shared__ float2 partial[kBlock / kWarp];
      __syncthreads();  // the last call's sums have been read
      if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = make_float2(a, b);
      __syncthreads();
      a = b = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        a += partial[group * kWarps + warp].x;
        b += partial[group * kWarps + warp].y;
      }
    }
    return make_float2(a, b);
  }

  // Mean and 1 / sqrt(variance + eps) of a row; the variance from centred values, or a large mean would eat its digits.
  __device__ __forceinline__ float2 moments(const float (&values)[kElementsPerThread], int64_t hidden, float eps) const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) total += values[i];
    const float mean = sum(total, 0.0f).x / static_cast<float>(hidden);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      if (holds(i, hidden)) squares += (values[i] - mean) * (values[i] - mean);
    }
    return make_float2(mean, rsqrtf(sum(squares, 0.0f).x / static_cast<float>(hidden) + eps));
  }

  // values becomes 0 where dropped, scaled where kept.
  __device__ __forceinline__ void drop(float (&values)[kElementsPerThread], int64_t row, const Dropout& dropout) const {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
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
};

// Second stage of the parameters' gradients: sums (sums, hidden) of partials (groups, 3, hidden), in the groups' order,
// hence the same bits in every run. A sum that is null is not wanted.
void sum_groups(const char* op, const float* partials, int64_t groups, int64_t hidden, float* first, float* second,
                float* third, void* stream);

// Calls body.template operator()<T, kThreads>() for the dtype and the smallest group that holds a row.
template <typename Body>
void for_shape(DType dtype, int64_t hidden, const Body& body) {
  const auto with_threads = [&](auto element) {
    using T = decltype(element);
    if (hidden <= 32 * kElementsPerThread) {
      body.template operator()<T, 32>();
    } else if (hidden <= 128 * kElementsPerThread) {
      body.template operator()<T, 128>();
    } else {
      body.template operator()<T, 256>();
    }
  };
  if (dtype == DType::float32) {
    with_threads(float{});
  } else if (dtype == DType::bfloat16) {
    with_threads(__nv_bfloat16{});
  } else {
    with_threads(__half{});
  }
}

}  // namespace fastbert::cuda
