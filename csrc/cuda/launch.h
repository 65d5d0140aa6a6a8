// The launchers of the CUDA kernels. Pointers are device memory, aligned to 16 bytes; stream is a cudaStream_t. They return
// once the kernels are queued, and throw std::runtime_error where the launch fails.

#pragma once

#include "fastbert.h"

namespace fastbert::cuda {

// Where the kernels run: "cuda", or "cpu" where a C++ compiler made them for tests.
const char* device_type();

// hidden is a multiple of 8 up to this.
constexpr int64_t kMaxHidden = 4096;

// The workspace of a backward, partials, is (row_groups(rows, hidden), 3, hidden) float32.
int64_t row_groups(int64_t rows, int64_t hidden);

void add_layer_norm_forward(const AddLayerNormForwardParams& params, void* stream);
void add_layer_norm_backward(const AddLayerNormBackwardParams& params, void* stream);
void gelu_layer_norm_forward(const GeluLayerNormForwardParams& params, void* stream);
void gelu_layer_norm_backward(const GeluLayerNormBackwardParams& params, void* stream);

// head_dim is a multiple of 8 up to this, softmax_scale positive, dtype bfloat16 or float16.
constexpr int64_t kMaxHeadDim = 128;

// max_seqlen: the length of the longest sequence, or more. delta: a workspace of (num_heads, total).
void attention_forward(const AttentionForwardParams& params, int64_t max_seqlen, void* stream);
void attention_backward(const AttentionBackwardParams& params, float* delta, int64_t max_seqlen, void* stream);

}  // namespace fastbert::cuda
