// The softmax statistics of a block of logits (Milakov and Gimelshein, 2018), and its gradient in place.

#include "cpu/layer_norm.h"
#include "cpu/vec_math.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

template <typename T, typename Extent>
FASTBERT_INLINE Vec load_scores(const T* logits, const float* bias, int64_t column, Extent extent) {
  const Vec scores = load(logits + column, extent);
  return bias == nullptr ? scores : scores + load(bias + column, extent);
}

template <typename T>
void forward(const MlmLossForwardParams& p, int num_threads) {
  for_rows(p.rows, p.block, num_threads, [&](int64_t row) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.row_stride;
    Vec maxima[kSlots], logit_sums[kSlots]{};
    for (Vec& slot : maxima) slot = splat(-__builtin_inff());
    for_columns_in_slots(p.block, [&](int64_t column, auto extent, int slot) {
      const Vec scores = load_scores(logits, float32(p.bias), column, extent);
      maxima[slot] = maximum(within(scores, -__builtin_inff(), extent), maxima[slot]);
      logit_sums[slot] += scores;
    });
    const float block_max = max_slots(maxima);
    const float max = p.row_max[row] > block_max ? p.row_max[row] : block_max;
    const float base = max == -__builtin_inff() ? 0.0f : max;  // all classes so far may be ruled out
    Vec sums[kSlots]{};
    for_columns_in_slots(p.block, [&](int64_t column, auto extent, int slot) {
      sums[slot] += within(exp(load_scores(logits, float32(p.bias), column, extent) - base), 0.0f, extent);
    });
    const float rescale = exp(splat(p.row_max[row] - base))[0];
    p.row_sum[row] = p.row_sum[row] * rescale + sum_slots(sums);
    p.row_max[row] = max;
    if (p.logit_sum != nullptr) p.logit_sum[row] += sum_slots(logit_sums);
    const int64_t column = p.labels[row] - p.first_class;
    if (column >= 0 && column < p.block) {
      p.label_logit[row] = to_float(logits[column]) + (p.bias == nullptr ? 0.0f : float32(p.bias)[column]);
    }
  });
}

// Adds the row's gradient to sums (block,) where there are any.
template <typename T>
void backward_row(const MlmLossBackwardParams& p, int64_t row, float* sums) {
  T* logits = static_cast<T*>(p.logits) + row * p.row_stride;
  const float dloss = p.dloss[row], max = p.row_max[row], normalizer = 1.0f / p.row_sum[row];
  if (dloss == 0.0f) {
    std::memset(logits, 0, p.block * sizeof(T));
    return;
  }
  const float smoothing = p.label_smoothing / static_cast<float>(p.num_classes);
  const int64_t label = p.labels[row] - p.first_class;
  for_columns(p.block, [&](int64_t column, auto extent) {
    Vec gradient = exp(load_scores(logits, float32(p.bias), column, extent) - max) * normalizer - smoothing;
    if (label >= column && label < column + extent.count) gradient[label - column] -= 1.0f - p.label_smoothing;
    gradient *= dloss;
    store(logits + column, gradient, extent);
    if (sums != nullptr) store(sums + column, load(sums + column, extent) + gradient, extent);
  });
}

template <typename T>
void backward(const MlmLossBackwardParams& p, int num_threads) {
  if (p.dbias == nullptr) {
    for_rows(p.rows, p.block, num_threads, [&](int64_t row) { backward_row<T>(p, row, nullptr); });
    return;
  }
  for_row_chunks(p.rows, p.block, num_threads, [&](int64_t chunk, int64_t first, int64_t last) {
    float* sums = p.partials + chunk * p.block;
    std::memset(sums, 0, p.block * sizeof(float));
    for (int64_t row = first; row < last; ++row) backward_row<T>(p, row, sums);
  });
  sum_chunks(p.partials, row_chunks(p.rows), p.block, p.block, num_threads, float32(p.dbias));
}

}  // namespace

void mlm_loss_forward(const MlmLossForwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? forward<float>(p, num_threads) : forward<BFloat16>(p, num_threads);
}

void mlm_loss_backward(const MlmLossBackwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? backward<float>(p, num_threads) : backward<BFloat16>(p, num_threads);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
