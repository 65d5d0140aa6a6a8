// The launchers of the CUDA kernels. Pointers are device memory, aligned to 16 bytes; stream is a cudaStream_t. They return
// once the kernels are queued, and throw std::runtime_error where the launch fails.

#pragma once

#include "fastbert.h"

namespace fastbert::cuda {

// Where the kernels run: "cuda", or "cpu" where a C++ compiler made them for tests.
const char* device_type();

// CUDA's version that this was built with, and the highest that the driver takes: 13000 for 13.0.
int runtime_version();
int driver_version();

// hidden is a multiple of 8 up to this.
constexpr int64_t kMaxHidden = 4096;

// The workspace of a LayerNorm's backward, partials, is (row_lines(rows, hidden, dtype), sums, hidden) float32: 3 sums,
// those of embedding_layer_norm 2.
int64_t row_lines(int64_t rows, int64_t hidden, DType dtype);

void add_layer_norm_forward(const AddLayerNormForwardParams& params, void* stream);
void add_layer_norm_backward(const AddLayerNormBackwardParams& params, void* stream);
void gelu_layer_norm_forward(const GeluLayerNormForwardParams& params, void* stream);
void gelu_layer_norm_backward(const GeluLayerNormBackwardParams& params, void* stream);

// An id outside of its table ends the kernel in an assertion.
struct TableSizes {
  int64_t words, positions, token_types;
};
void embedding_layer_norm_forward(const EmbeddingLayerNormForwardParams& params, const TableSizes& sizes, void* stream);
void embedding_layer_norm_backward(const EmbeddingLayerNormBackwardParams& params, void* stream);

// How many rows of hidden float32 the workspace of a table's gradient has.
int64_t table_gradient_pieces(int64_t rows);
void table_gradient(const TableGradientParams& params, void* stream);

// The workspace of mlm_loss_backward, partials, is (mlm_loss_lines(rows, block, dtype), block) float32. Logits and biases
// may start anywhere; where all rows start at multiples of 16 bytes, they are read and written 16 bytes at a time.
int64_t mlm_loss_lines(int64_t rows, int64_t block, DType dtype);
void mlm_loss_forward(const MlmLossForwardParams& params, void* stream);
void mlm_loss_backward(const MlmLossBackwardParams& params, void* stream);

// The optimizers' tables, written by kernels: as a kernel's parameters they are part of a recorded CUDA graph, and nothing
// of them has to stay in the host's memory.
void write_words(uint64_t* target, const uint64_t* words, int64_t count, void* stream);
void assign_chunks(const OptimizerTensor* tensors, int64_t num_tensors, int32_t* chunk_tensors, void* stream);

// The norm of all gradients together, and the factor that clips it to max_norm as torch.nn.utils.clip_grad_norm_ does.
void gradient_norm(const OptimizerParams& params, float max_norm, float* norm, float* clip, void* stream);

// A step of AdamW, or of LAMB; groups are in the host's memory, kMaxOptimizerGroups at most.
void adamw(const OptimizerParams& params, const OptimizerGroup* groups, int64_t num_groups, void* stream);
void lamb(const OptimizerParams& params, const OptimizerGroup* groups, int64_t num_groups, void* stream);
// head_dim is a multiple of 8 up to 128, softmax_scale positive, dtype bfloat16 or float16.

// max_seqlen: the length of the longest sequence, or more. delta: a workspace of (num_heads, total).
// What dropout drew in a forward pass, for its backward pass, which would have to draw it again: a bit for each probability,
// (num_heads, tiles, total, 2) as attention.cuh has it. words: null where nothing is kept; tiles: attention_drawn_tiles(),
// of keys; 0 where the kernels draw again.
struct DrawnBits {
  uint32_t* words;
  int64_t tiles;
};
int64_t attention_drawn_tiles(int64_t head_dim, int64_t max_seqlen);
void attention_forward(const AttentionForwardParams& params, const DrawnBits& drawn, int64_t max_seqlen, void* stream);
void attention_backward(const AttentionBackwardParams& params, const DrawnBits& drawn, float* delta, int64_t max_seqlen,
                        void* stream);

}  // namespace fastbert::cuda
