// The launchers of the CUDA kernels. Pointers are device memory, aligned to 16 bytes; stream is a cudaStream_t. They return
// once the kernels are queued, and throw std::runtime_error where the launch fails.

#pragma once

#include "fastbert.h"

namespace fastbert::cuda {

// Where the kernels run: "cuda", or "cpu" where a C++ compiler made them for tests.
const char* device_type();

// hidden is a multiple of 8 up to this.
constexpr int64_t kMaxHidden = 4096;

// The workspace of a LayerNorm's backward, partials, is (row_lines(rows, hidden), 3, hidden) float32.
int64_t row_lines(int64_t rows, int64_t hidden);

void add_layer_norm_forward(const AddLayerNormForwardParams& params, void* stream);
void add_layer_norm_backward(const AddLayerNormBackwardParams& params, void* stream);
void gelu_layer_norm_forward(const GeluLayerNormForwardParams& params, void* stream);
void gelu_layer_norm_backward(const GeluLayerNormBackwardParams& params, void* stream);

}  // namespace fastbert::cuda
