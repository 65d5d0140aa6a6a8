// Attention of a packed batch: which of the kernels runs.

#include "cuda/attention.cuh"

namespace fastbert::cuda {

void attention_forward(const AttentionForwardParams& p, int64_t max_seqlen, void* stream) {
  if (p.total == 0) return;
  attention_forward_streaming(p, max_seqlen, stream);
}

void attention_backward(const AttentionBackwardParams& p, float* delta, int64_t max_seqlen, void* stream) {
  if (p.total == 0) return;
  attention_backward_streaming(p, delta, max_seqlen, stream);
}

}  // namespace fastbert::cuda
