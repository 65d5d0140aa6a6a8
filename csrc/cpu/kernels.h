// The kernels of one instruction set, behind one table; cpu/dispatch.cpp picks the table.

#pragma once

#include "cpu/runtime.h"
#include "fastbert.h"

#define FASTBERT_FOR_EACH_KERNEL(X)                                  \
  X(embedding_layer_norm_forward, EmbeddingLayerNormForwardParams)   \
  X(embedding_layer_norm_backward, EmbeddingLayerNormBackwardParams) \
  X(table_gradient, TableGradientParams)                             \
  X(attention_forward, AttentionForwardParams)                       \
  X(attention_backward, AttentionBackwardParams)                     \
  X(attention_of_rows_forward, AttentionOfRowsForwardParams)         \
  X(attention_of_rows_backward, AttentionOfRowsBackwardParams)       \
  X(add_layer_norm_forward, AddLayerNormForwardParams)               \
  X(add_layer_norm_backward, AddLayerNormBackwardParams)             \
  X(gelu_layer_norm_forward, GeluLayerNormForwardParams)             \
  X(gelu_layer_norm_backward, GeluLayerNormBackwardParams)           \
  X(bias_gelu_forward, BiasGeluForwardParams)                        \
  X(bias_gelu_backward, BiasGeluBackwardParams)                      \
  X(matmul, MatmulParams)                                            \
  X(mlm_loss_forward, MlmLossForwardParams)                          \
  X(mlm_loss_backward, MlmLossBackwardParams)                        \
  X(pack_weight, PackWeightParams)                                   \
  X(packed_dense, PackedDenseParams)                                 \
  X(encoder_layer, EncoderLayerParams)

// Those that multiply bfloat16 or int8.
#define FASTBERT_FOR_EACH_KERNEL_OF_TILES(X)                   \
  X(attention_forward, AttentionForwardParams)                 \
  X(attention_backward, AttentionBackwardParams)               \
  X(attention_of_rows_forward, AttentionOfRowsForwardParams)   \
  X(attention_of_rows_backward, AttentionOfRowsBackwardParams) \
  X(matmul, MatmulParams)                                      \
  X(pack_weight, PackWeightParams)                             \
  X(packed_dense, PackedDenseParams)                           \
  X(encoder_layer, EncoderLayerParams)

#define FASTBERT_DECLARE_KERNEL(name, Params) void name(const Params& params, int num_threads);

namespace fastbert::cpu {

namespace baseline {
FASTBERT_FOR_EACH_KERNEL(FASTBERT_DECLARE_KERNEL)
}
#if defined(__x86_64__)
namespace avx2 {
FASTBERT_FOR_EACH_KERNEL(FASTBERT_DECLARE_KERNEL)
}
namespace avx512 {
FASTBERT_FOR_EACH_KERNEL(FASTBERT_DECLARE_KERNEL)
}
// Those of a set with VNNI that differ from those of the set without.
#define FASTBERT_DECLARE_VNNI(set, base)                     \
  namespace set {                                            \
  using base::attention_forward;                             \
  FASTBERT_DECLARE_KERNEL(pack_weight, PackWeightParams)     \
  FASTBERT_DECLARE_KERNEL(encoder_layer, EncoderLayerParams) \
  }
FASTBERT_DECLARE_VNNI(avx2_vnni, avx2)
FASTBERT_DECLARE_VNNI(avx512_vnni, avx512)
namespace avx512_bf16 {
FASTBERT_FOR_EACH_KERNEL(FASTBERT_DECLARE_KERNEL)
}
namespace avx512_amx {
FASTBERT_FOR_EACH_KERNEL_OF_TILES(FASTBERT_DECLARE_KERNEL)
}  // namespace avx512_amx
#endif

}  // namespace fastbert::cpu

#if defined(FASTBERT_ISA)
namespace fastbert::cpu::FASTBERT_ISA {

// body(index) for every index below count: both see cpu/runtime.h.
template <typename Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
  cpu::parallel_for(
      count, num_threads, [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
      const_cast<Body*>(&body));
}

template <typename Body>
void parallel_shares(int64_t count, int num_threads, const Body& body) {
  cpu::parallel_shares(
      count, num_threads, [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
      const_cast<Body*>(&body));
}

// Work of fewer elements than this is done on the calling thread: waking the others takes longer.
constexpr int64_t kElementsWorthThreads = 16384;

}  // namespace fastbert::cpu::FASTBERT_ISA
#endif
