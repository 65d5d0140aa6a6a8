// z = dropout(x + bias) + residual; y = LayerNorm(z) * weight + ln_bias, forward and backward: one pass over memory each.

#include "cpu/layer_norm.h"
#include "cpu/philox.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

size_t scratch_floats(int64_t hidden) {
  return static_cast<size_t>(round_up(hidden, kWidth) + round_up(hidden, kDropoutColumns) / 2);
}

template <typename T, bool kDropout>
void forward(const AddLayerNormForwardParams& p, int num_threads) {
  for_rows(p.rows, p.hidden, num_threads, [&](int64_t row) {
    float* z_row = thread_scratch(scratch_floats(p.hidden));
    uint16_t* bits = reinterpret_cast<uint16_t*>(z_row + round_up(p.hidden, kWidth));
    if constexpr (kDropout) dropout_bits(bits, p.hidden, row, 0, p.dropout);

    const int64_t offset = row * p.hidden;
    const T* x = static_cast<const T*>(p.x) + offset;
    const T* residual = static_cast<const T*>(p.residual) + offset;
    T* z = static_cast<T*>(p.z) + offset;
    Vec sums{};
    for_columns(p.hidden, [&](int64_t column, auto extent) {
      Vec v = load(x + column, extent);
      if (p.bias != nullptr) v += load(float32(p.bias) + column, extent);
      if constexpr (kDropout) v = drop(v * p.dropout.scale, bits + column, p.dropout.threshold, extent);
      v += load(residual + column, extent);
      sums += v;
      store(z_row + column, v, extent);
      store(z + column, v, extent);
    });
    const Moments moments = row_moments(z_row, p.hidden, sums, p.eps);
    p.mean[row] = moments.mean;
    p.rstd[row] = moments.rstd;
    normalise_row(z_row, p.hidden, moments, float32(p.weight), float32(p.ln_bias), static_cast<T*>(p.y) + offset);
  });
}

template <typename T, bool kDropout>
void backward(const AddLayerNormBackwardParams& p, int num_threads) {
  for_row_chunks(p.rows, p.hidden, num_threads, [&](int64_t chunk, int64_t first, int64_t last) {
    uint16_t* bits = reinterpret_cast<uint16_t*>(thread_scratch(scratch_floats(p.hidden)));
    const ParameterSums sums(p.partials, chunk, p.hidden);
    for (int64_t row = first; row < last; ++row) {
      if constexpr (kDropout) dropout_bits(bits, p.hidden, row, 0, p.dropout);

      const int64_t offset = row * p.hidden;
      const T* dy = static_cast<const T*>(p.dy) + offset;
      const T* z = static_cast<const T*>(p.z) + offset;
      T* dresidual = static_cast<T*>(p.dresidual) + offset;
      T* dx = kDropout ? static_cast<T*>(p.dx) + offset : nullptr;
      const Moments moments{p.mean[row], p.rstd[row]};
      const RowMeans means = row_means(dy, z, moments, float32(p.weight), p.hidden);
      for_columns(p.hidden, [&](int64_t column, auto extent) {
        Vec gradient = layer_norm_gradient(dy, z, moments, means, float32(p.weight), sums, column, extent);
        store(dresidual + column, gradient, extent);
        if constexpr (kDropout) {
          gradient = drop(gradient * p.dropout.scale, bits + column, p.dropout.threshold, extent);
          store(dx + column, gradient, extent);
        }
        if (p.dbias != nullptr) store(sums.dbias + column, load(sums.dbias + column, extent) + gradient, extent);
      });
    }
  });
  sum_parameter_gradients(p.partials, p.rows, p.hidden, num_threads, float32(p.dweight), float32(p.dln_bias),
                          float32(p.dbias));
}

}  // namespace

void add_layer_norm_forward(const AddLayerNormForwardParams& p, int num_threads) {
  const bool dropout = p.dropout.threshold > 0;
  if (p.dtype == DType::float32) {
    dropout ? forward<float, true>(p, num_threads) : forward<float, false>(p, num_threads);
  } else {
    dropout ? forward<BFloat16, true>(p, num_threads) : forward<BFloat16, false>(p, num_threads);
  }
}

void add_layer_norm_backward(const AddLayerNormBackwardParams& p, int num_threads) {
  // dx is null and not written without dropout; a probability that rounds to 0 still has one to write.
  const bool dropout = p.dx != nullptr;
  if (p.dtype == DType::float32) {
    dropout ? backward<float, true>(p, num_threads) : backward<float, false>(p, num_threads);
  } else {
    dropout ? backward<BFloat16, true>(p, num_threads) : backward<BFloat16, false>(p, num_threads);
  }
}

}  // namespace fastbert::cpu::FASTBERT_ISA
