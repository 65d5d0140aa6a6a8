// What happens to one block of the masked-LM head's logits between its two matmuls, forward and backward.
//
// Bytes per logit: forward reads it (2 in a 16-bit dtype), backward reads it and writes its gradient in the same place (4),
// in one pass each. At an H200's 21 bytes per cycle and multiprocessor the forward has 12 instructions of a thread for each
// 16-bit logit, of which one is an exponential (the units for these take 16 per cycle, 10 logits arrive): the maximum is
// looked at once per 16 bytes, not per logit. The bias comes from the caches, in the forward with every row (a
// multiprocessor's four blocks read the same at about the same time), in the backward once for all of a thread's rows.

#include "cuda/ptx.cuh"
#include "cuda/rows.cuh"

namespace fastbert::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kVectorsAtOnce = 4;   // a thread's loads in flight in the forward
constexpr int kRowsAtOnce = 4;      // and in the backward
constexpr int kBackwardBlocks = 2;  // of the backward on a multiprocessor: 32 KB in flight

// The instruction's two last bits are beyond what 16-bit logits know; float32 logits leave time for all digits.
template <typename T>
struct Exp {
  __device__ __forceinline__ float operator()(float x) const {
    if constexpr (sizeof(T) == 4) return expf(x);
    return exp2_approximate(x * 1.4426950408889634f);
  }
};

// Whether all rows start at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ bool are_aligned(const void* rows, int64_t row_stride) {
  return (reinterpret_cast<uintptr_t>(rows) | static_cast<uintptr_t>(row_stride) * sizeof(T)) % 16 == 0;
}

// The elements of a row of block elements from column on, outside of it 0.
template <typename T>
__device__ __forceinline__ uint4 fetch(const T* row, int64_t column, int64_t block, bool aligned) {
  if (aligned && column + kWidthOf<T> <= block) return *reinterpret_cast<const uint4*>(row + column);
  uint4 packed = make_uint4(0, 0, 0, 0);
  T* elements = reinterpret_cast<T*>(&packed);
#pragma unroll
  for (int i = 0; i < kWidthOf<T>; ++i) {
    if (column + i < block) elements[i] = row[column + i];
  }
  return packed;
}

template <typename T>
__device__ __forceinline__ void store(T* row, int64_t column, int64_t block, bool aligned, const float* values) {
  if (aligned && column + kWidthOf<T> <= block) {
    *reinterpret_cast<uint4*>(row + column) = pack_vector<T>(values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidthOf<T>; ++i) {
    if (column + i < block) row[column + i] = from_float<T>(values[i]);
  }
}

// The bias of these columns; null gives 0.
template <typename T>
__device__ __forceinline__ void load_bias(const void* bias, int64_t column, int64_t block, bool aligned,
                                          float (&values)[kWidthOf<T>]) {
  unpack_vector<T>(fetch(static_cast<const T*>(bias), column, bias == nullptr ? 0 : block, aligned), values);
}

template <typename T>
__device__ __forceinline__ void add_scores(SoftmaxSums& sums, const float (&scores)[kWidthOf<T>]) {
  constexpr int kWidth = kWidthOf<T>;
  const Exp<T> exp;
  float max = sums.max;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) max = fmaxf(max, scores[i]);
  const float base = softmax_base(max);
  sums.sum *= exp(sums.max - base);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums.sum += exp(scores[i] - base);
  sums.max = max;
}

// A block of threads per row. Threads fold what they read into statistics of their own, which become one in the end.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(MlmLossForwardParams p) {
  constexpr int kWidth = kWidthOf<T>, kWarps = kThreads / kWarp;
  constexpr int64_t kStep = kThreads * kWidth;
  __shared__ float warp_maxima[kWarps];
  __shared__ float2 warp_sums[kWarps];  // of the exponentials and of the logits
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(p.logits) + row * p.row_stride;
  const bool aligned = are_aligned<T>(p.logits, p.row_stride), bias_aligned = are_aligned<T>(p.bias, 0);

  SoftmaxSums sums{-INFINITY, 0.0f};
  float logit_sum = 0.0f;
  for (int64_t first = threadIdx.x * kWidth; first < p.block; first += kVectorsAtOnce * kStep) {
    uint4 packed[kVectorsAtOnce];
#pragma unroll
    for (int v = 0; v < kVectorsAtOnce; ++v) packed[v] = fetch(logits, first + v * kStep, p.block, aligned);
#pragma unroll
    for (int v = 0; v < kVectorsAtOnce; ++v) {
      const int64_t column = first + v * kStep;
      if (column >= p.block) break;
      float scores[kWidth], bias[kWidth];
      unpack_vector<T>(packed[v], scores);
      load_bias<T>(p.bias, column, p.block, bias_aligned, bias);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) scores[i] += bias[i];
      if (p.logit_sum != nullptr) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) logit_sum += scores[i];  // 0 outside of the row
      }
      if (column + kWidth > p.block) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) scores[i] = column + i < p.block ? scores[i] : -INFINITY;
      }
      add_scores<T>(sums, scores);
    }
  }

  // The block's maximum first, so that a score's exponential is brought to another maximum once.
  const int warp = threadIdx.x / kWarp;
  float max = sums.max;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFF, max, offset));
  if (threadIdx.x % kWarp == 0) warp_maxima[warp] = max;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) max = fmaxf(max, warp_maxima[i]);
  const Exp<T> exp;
  float sum = sums.sum * exp(sums.max - softmax_base(max));
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, offset);
    if (p.logit_sum != nullptr) logit_sum += __shfl_xor_sync(0xFFFFFFFF, logit_sum, offset);
  }
  if (threadIdx.x % kWarp == 0) warp_sums[warp] = make_float2(sum, logit_sum);
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 1; i < kWarps; ++i) {
    sum += warp_sums[i].x;
    logit_sum += warp_sums[i].y;
  }
  const SoftmaxSums merged = merge(exp, {p.row_max[row], p.row_sum[row]}, {max, sum});
  p.row_max[row] = merged.max;
  p.row_sum[row] = merged.sum;
  if (p.logit_sum != nullptr) p.logit_sum[row] += logit_sum;
  const int64_t label = p.labels[row] - p.first_class;
  if (label >= 0 && label < p.block) {
    const float bias = p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[label]);
    p.label_logit[row] = to_float(logits[label]) + bias;
  }
}

// A block of threads owns a tile of columns and walks down the rows in strides, adding up the bias's gradient on the way.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) backward_kernel(MlmLossBackwardParams p) {
  constexpr int kWidth = kWidthOf<T>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (column >= p.block) return;
  const bool aligned = are_aligned<T>(p.logits, p.row_stride);
  const float smoothing = p.label_smoothing / static_cast<float>(p.num_classes);
  float bias[kWidth], dbias[kWidth] = {};
  load_bias<T>(p.bias, column, p.block, are_aligned<T>(p.bias, 0), bias);

  for (int64_t first = blockIdx.y * kRowsAtOnce; first < p.rows; first += gridDim.y * kRowsAtOnce) {
    uint4 packed[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const T* logits = static_cast<const T*>(p.logits) + (first + r) * p.row_stride;
      packed[r] = fetch(logits, column, first + r < p.rows ? p.block : 0, aligned);
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int64_t row = first + r;
      if (row >= p.rows) break;
      const int64_t from_column = p.labels[row] - p.first_class - column;
      const int label = from_column >= 0 && from_column < kWidth ? static_cast<int>(from_column) : -1;
      const float max = p.row_max[row], normalizer = 1.0f / p.row_sum[row], dloss = p.dloss[row];
      float values[kWidth];
      unpack_vector<T>(packed[r], values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float target = label == i ? smoothing + (1.0f - p.label_smoothing) : smoothing;
        values[i] = softmax_gradient(Exp<T>(), values[i] + bias[i], max, normalizer, target, dloss);
        dbias[i] += values[i];
      }
      store(static_cast<T*>(p.logits) + row * p.row_stride, column, p.block, aligned, values);
    }
  }

  if (p.dbias == nullptr) return;
  float* line = p.partials + blockIdx.y * p.block;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (column + i < p.block) line[column + i] = dbias[i];
  }
}

int64_t num_tiles(int64_t block, DType dtype) {
  const int64_t tile = kThreads * (dtype == DType::float32 ? kWidthOf<float> : kWidthOf<__half>);
  return (block + tile - 1) / tile;
}

}  // namespace

int64_t mlm_loss_lines(int64_t rows, int64_t block, DType dtype) {
  const int64_t tiles = num_tiles(block, dtype), wanted = num_processors() * kBackwardBlocks;
  const int64_t filling = (wanted + tiles - 1) / tiles, most = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  return most < 1 ? 1 : filling < most ? filling : most;
}

void mlm_loss_forward(const MlmLossForwardParams& p, void* stream) {
  if (p.rows == 0) return;
  for_dtype(p.dtype, [&]<typename T>() {
    launch("mlm_loss forward", forward_kernel<T>, static_cast<unsigned>(p.rows), kThreads, 0, stream, p);
  });
}

void mlm_loss_backward(const MlmLossBackwardParams& p, void* stream) {
  if (p.block == 0) return;
  const int64_t lines = mlm_loss_lines(p.rows, p.block, p.dtype);
  const dim3 grid(static_cast<unsigned>(num_tiles(p.block, p.dtype)), static_cast<unsigned>(lines));
  for_dtype(p.dtype, [&]<typename T>() { launch("mlm_loss backward", backward_kernel<T>, grid, kThreads, 0, stream, p); });
  if (p.dbias != nullptr) sum_lines("mlm_loss backward", {p.partials, lines, 1, p.block, {p.dbias}, p.dtype}, stream);
}

}  // namespace fastbert::cuda
