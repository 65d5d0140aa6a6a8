// AdamW and LAMB over all parameters at once, with the clipping of the gradients' norm in the same pass: the gradients in
// memory stay as they are. A block takes a chunk of one tensor; a table on the device says where the tensors are.
//
// Bytes per parameter: the norm reads the gradient (4). AdamW reads parameter, gradient and both averages and writes all but
// the gradient (28). LAMB needs the norms of the parameter and of its direction before it can move: a first pass reads the
// same and writes the averages (24), a second one reads parameter and averages and writes the parameter (16).
//
// Sums are made of those over chunks, in order, in double: the same bits in every run, and few roundings however large the
// model. Which elements are added up together depends on their number alone, not on addresses.

#include "cuda/adam.h"
#include "cuda/launch.h"
#include "cuda/launcher.cuh"

namespace fastbert::cuda {

namespace {

constexpr int kBlock = 256;        // threads
constexpr int kFinalBlock = 1024;  // of the one block that adds up all chunks
constexpr int kWarp = 32;
constexpr int kWidth = 4;  // elements of a thread's accesses, 16 bytes
constexpr int kChunk = static_cast<int>(kOptimizerChunk);
constexpr int kWordsPerLaunch = 480;  // a kernel's parameters are 4 KB at most

struct TableWords {
  uint64_t words[kWordsPerLaunch];
};

struct Groups {
  OptimizerGroup of[kMaxOptimizerGroups];
};

// What a block works on: the elements from offset on of a tensor.
struct Chunk {
  int64_t tensor, offset;
  int count;
};

__device__ Chunk chunk_of_block(const OptimizerParams& p) {
  const int64_t tensor = p.chunk_tensors[blockIdx.x];
  const OptimizerTensor& t = p.tensors[tensor];
  const int64_t offset = (static_cast<int64_t>(blockIdx.x) - t.first_chunk) * kChunk, left = t.numel - offset;
  return {tensor, offset, left < kChunk ? static_cast<int>(left) : kChunk};
}

__device__ __forceinline__ bool in_one_access(const float* first, int count) {
  return count >= kWidth && reinterpret_cast<uintptr_t>(first) % (kWidth * sizeof(float)) == 0;
}

// The first count, at most kWidth, elements; the others are 0.
__device__ __forceinline__ void load(const float* first, int count, float (&values)[kWidth]) {
  if (in_one_access(first, count)) {
    const float4 four = *reinterpret_cast<const float4*>(first);
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = i < count ? first[i] : 0.0f;
  }
}

__device__ __forceinline__ void store(float* first, int count, const float (&values)[kWidth]) {
  if (in_one_access(first, count)) {
    *reinterpret_cast<float4*>(first) = make_float4(values[0], values[1], values[2], values[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) first[i] = values[i];
    }
  }
}

__device__ __forceinline__ double squares(const float (&values)[kWidth]) {
  return static_cast<double>((values[0] * values[0] + values[1] * values[1]) +
                             (values[2] * values[2] + values[3] * values[3]));
}

// The sum over the block, in every thread.
template <int kThreads>
__device__ double block_sum(double value) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double partial[kWarps];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
  __syncthreads();  // the last call's sums have been read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) value += partial[warp];
  return value;
}

template <int kThreads>
__device__ double sum_of_chunks(const double* partials, int64_t count) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  return block_sum<kThreads>(sum);
}

__device__ __forceinline__ bool left_out(const OptimizerParams& p) { return p.found_inf != nullptr && *p.found_inf != 0.0f; }

__global__ void __launch_bounds__(kBlock)
    write_kernel(uint64_t* target, int count, const __grid_constant__ TableWords words) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kBlock) target[i] = words.words[i];
}

__global__ void __launch_bounds__(kBlock) assign_kernel(const OptimizerTensor* tensors, int32_t* chunk_tensors) {
  const OptimizerTensor& t = tensors[blockIdx.x];
  const int64_t chunks = (t.numel + kChunk - 1) / kChunk;
  for (int64_t i = threadIdx.x; i < chunks; i += kBlock) chunk_tensors[t.first_chunk + i] = static_cast<int32_t>(blockIdx.x);
}

__global__ void __launch_bounds__(kBlock) norm_kernel(const __grid_constant__ OptimizerParams p) {
  const Chunk chunk = chunk_of_block(p);
  const float* const gradients = p.gradients[chunk.tensor] + chunk.offset;
  double sum = 0.0;
  for (int i = kWidth * static_cast<int>(threadIdx.x); i < chunk.count; i += kWidth * kBlock) {
    float values[kWidth];
    load(gradients + i, chunk.count - i, values);
    sum += squares(values);
  }
  sum = block_sum<kBlock>(sum);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kFinalBlock)
    norm_of_chunks_kernel(const double* partials, int64_t num_chunks, float max_norm, float* norm, float* clip) {
  const double sum = sum_of_chunks<kFinalBlock>(partials, num_chunks);
  if (threadIdx.x == 0) {
    *norm = static_cast<float>(sqrt(sum));
    *clip = clip_factor(*norm, max_norm);
  }
}

// Counts the step, once per tensor, before the blocks of its elements want to know it.
__global__ void __launch_bounds__(kBlock)
    count_kernel(const __grid_constant__ OptimizerParams p, const __grid_constant__ Groups groups) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= p.num_tensors || left_out(p)) return;
  const OptimizerTensor& t = p.tensors[i];
  const OptimizerGroup& group = groups.of[t.group];
  const float step = *t.step + 1.0f;
  *t.step = step;
  p.coefficients[i] = optimizer_coefficients(group, group.device_rate != nullptr ? *group.device_rate : group.rate, step);
}

// The averages, and the step of AdamW or the sums of squares that LAMB's step needs.
template <bool kLamb>
__global__ void __launch_bounds__(kBlock) update_kernel(const __grid_constant__ OptimizerParams p) {
  if (left_out(p)) return;
  const Chunk chunk = chunk_of_block(p);
  const OptimizerTensor t = p.tensors[chunk.tensor];
  const OptimizerCoefficients c = p.coefficients[chunk.tensor];
  const float* const gradients = p.gradients[chunk.tensor] + chunk.offset;
  const float clip = p.clip == nullptr ? 1.0f : *p.clip;
  double parameter_squares = 0.0, direction_squares = 0.0;
  for (int i = kWidth * static_cast<int>(threadIdx.x); i < chunk.count; i += kWidth * kBlock) {
    const int64_t first = chunk.offset + i;
    const int count = chunk.count - i;
    float x[kWidth], gradient[kWidth], m[kWidth], v[kWidth], r[kWidth];
    load(t.parameter + first, count, x);
    load(gradients + i, count, gradient);
    load(t.average + first, count, m);
    load(t.square + first, count, v);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      average(c, clip * gradient[k], m[k], v[k]);
      r[k] = k < count ? direction(c, x[k], m[k], v[k]) : 0.0f;
    }
    store(t.average + first, count, m);
    store(t.square + first, count, v);
    if constexpr (kLamb) {
      parameter_squares += squares(x);
      direction_squares += squares(r);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x[k] -= c.rate * r[k];
      store(t.parameter + first, count, x);
    }
  }
  if constexpr (kLamb) {
    parameter_squares = block_sum<kBlock>(parameter_squares);
    direction_squares = block_sum<kBlock>(direction_squares);
    if (threadIdx.x == 0) {
      p.partials[blockIdx.x] = parameter_squares;
      p.partials[p.num_chunks + blockIdx.x] = direction_squares;
    }
  }
}

__global__ void __launch_bounds__(kBlock) lamb_kernel(const __grid_constant__ OptimizerParams p) {
  if (left_out(p)) return;
  const Chunk chunk = chunk_of_block(p);
  const OptimizerTensor t = p.tensors[chunk.tensor];
  const OptimizerCoefficients c = p.coefficients[chunk.tensor];
  float rate = c.rate;
  if (c.trust_ratio != 0.0f) {
    const int64_t chunks = (t.numel + kChunk - 1) / kChunk;
    const double parameter_squares = sum_of_chunks<kBlock>(p.partials + t.first_chunk, chunks);
    const double direction_squares = sum_of_chunks<kBlock>(p.partials + p.num_chunks + t.first_chunk, chunks);
    rate *= trust_ratio(parameter_squares, direction_squares);
  }
  for (int i = kWidth * static_cast<int>(threadIdx.x); i < chunk.count; i += kWidth * kBlock) {
    const int64_t first = chunk.offset + i;
    const int count = chunk.count - i;
    float x[kWidth], m[kWidth], v[kWidth];
    load(t.parameter + first, count, x);
    load(t.average + first, count, m);
    load(t.square + first, count, v);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x[k] -= rate * direction(c, x[k], m[k], v[k]);
    store(t.parameter + first, count, x);
  }
}

void count_step(const char* name, const OptimizerParams& p, const OptimizerGroup* groups, int64_t num_groups, void* stream) {
  if (num_groups > kMaxOptimizerGroups) throw std::invalid_argument("too many groups of parameters");
  Groups all{};
  for (int64_t i = 0; i < num_groups; ++i) all.of[i] = groups[i];
  const auto blocks = static_cast<unsigned>((p.num_tensors + kBlock - 1) / kBlock);
  launch(name, count_kernel, blocks, kBlock, 0, stream, p, all);
}

unsigned blocks_of(const OptimizerParams& p) { return static_cast<unsigned>(p.num_chunks); }

}  // namespace

void write_words(uint64_t* target, const uint64_t* words, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kWordsPerLaunch) {
    TableWords some{};
    const int64_t left = count - first;
    const int now = left < kWordsPerLaunch ? static_cast<int>(left) : kWordsPerLaunch;
    for (int i = 0; i < now; ++i) some.words[i] = words[first + i];
    launch("write_words", write_kernel, 1, kBlock, 0, stream, target + first, now, some);
  }
}

void assign_chunks(const OptimizerTensor* tensors, int64_t num_tensors, int32_t* chunk_tensors, void* stream) {
  if (num_tensors == 0) return;
  launch("assign_chunks", assign_kernel, static_cast<unsigned>(num_tensors), kBlock, 0, stream, tensors, chunk_tensors);
}

void gradient_norm(const OptimizerParams& p, float max_norm, float* norm, float* clip, void* stream) {
  if (p.num_chunks > 0) launch("gradient_norm", norm_kernel, blocks_of(p), kBlock, 0, stream, p);
  launch("gradient_norm", norm_of_chunks_kernel, 1, kFinalBlock, 0, stream, p.partials, p.num_chunks, max_norm, norm, clip);
}

void adamw(const OptimizerParams& p, const OptimizerGroup* groups, int64_t num_groups, void* stream) {
  if (p.num_tensors == 0) return;
  count_step("adamw", p, groups, num_groups, stream);
  if (p.num_chunks > 0) launch("adamw", update_kernel<false>, blocks_of(p), kBlock, 0, stream, p);
}

void lamb(const OptimizerParams& p, const OptimizerGroup* groups, int64_t num_groups, void* stream) {
  if (p.num_tensors == 0) return;
  count_step("lamb", p, groups, num_groups, stream);
  if (p.num_chunks == 0) return;
  launch("lamb", update_kernel<true>, blocks_of(p), kBlock, 0, stream, p);
  launch("lamb", lamb_kernel, blocks_of(p), kBlock, 0, stream, p);
}

}  // namespace fastbert::cuda
