// Attention of a packed batch: which of the kernels runs.

#include "cuda/attention.cuh"

namespace fastbert::cuda {

namespace {

bool is_for_hopper(int64_t head_dim, int64_t max_seqlen) {
  return kBuiltForHopper && capability() == 90 && head_dim == kHopperHeadDim && max_seqlen <= kHopperMaxSeqlen;
}

}  // namespace

int64_t attention_drawn_tiles(int64_t head_dim, int64_t max_seqlen) {
  return is_for_hopper(head_dim, max_seqlen) ? (max_seqlen + kHopperTileKeys - 1) / kHopperTileKeys : 0;
}

void attention_forward(const AttentionForwardParams& p, const DrawnBits& drawn, int64_t max_seqlen, void* stream) {
  if (p.total == 0) return;
  if (is_for_hopper(p.head_dim, max_seqlen)) {
    attention_forward_hopper(p, drawn, max_seqlen, stream);
  } else {
    attention_forward_streaming(p, max_seqlen, stream);
  }
}

void attention_backward(const AttentionBackwardParams& p, const DrawnBits& drawn, float* delta, int64_t max_seqlen,
                        void* stream) {
  if (p.total == 0) return;
  if (is_for_hopper(p.head_dim, max_seqlen)) {
    attention_backward_hopper(p, drawn, max_seqlen, stream);
  } else {
    attention_backward_streaming(p, delta, max_seqlen, stream);
  }
}

}  // namespace fastbert::cuda
