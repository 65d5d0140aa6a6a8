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

// The optimizers' tables, written by kernels: as a kernel's parameters they are part of a recorded CUDA graph, and nothing
// of them has to stay in the host's memory.
void write_words(uint64_t* target, const uint64_t* words, int64_t count, void* stream);
void assign_chunks(const OptimizerTensor* tensors, int64_t num_tensors, int32_t* chunk_tensors, void* stream);

// The norm of all gradients together, and the factor that clips it to max_norm as torch.nn.utils.clip_grad_norm_ does.
void gradient_norm(const OptimizerParams& params, float max_norm, float* norm, float* clip, void* stream);

// A step of AdamW, or of LAMB; groups are in the host's memory, kMaxOptimizerGroups at most.
void adamw(const OptimizerParams& params, const OptimizerGroup* groups, int64_t num_groups, void* stream);
void lamb(const OptimizerParams& params, const OptimizerGroup* groups, int64_t num_groups, void* stream);

}  // namespace fastbert::cuda
