// y = LayerNorm(gelu(x + bias)) * weight + ln_bias with the exact erf-GELU, forward and backward.

#include "cpu/layer_norm.h"
#include "cpu/vec_math.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

template <typename T>
void forward(const GeluLayerNormForwardParams& p, int num_threads) {
  for_rows(p.rows, p.hidden, num_threads, [&](int64_t row) {
    float* activations = thread_scratch(static_cast<size_t>(p.hidden));
    const int64_t offset = row * p.hidden;
    const T* x = static_cast<const T*>(p.x) + offset;
    Vec sums{};
    for_columns(p.hidden, [&](int64_t column, auto extent) {
      Vec u = load(x + column, extent);
      if (p.bias != nullptr) u += load(float32(p.bias) + column, extent);
      const Vec activation = gelu(u, normal_distribution(u));
      sums += activation;
      store(activations + column, activation, extent);
    });
    const Moments moments = row_moments(activations, p.hidden, sums, p.eps);
    p.mean[row] = moments.mean;
    p.rstd[row] = moments.rstd;
    normalise_row(activations, p.hidden, moments, float32(p.weight), float32(p.ln_bias), static_cast<T*>(p.y) + offset);
  });
}

template <typename T>
void backward(const GeluLayerNormBackwardParams& p, int num_threads) {
  for_row_chunks(p.rows, p.hidden, num_threads, [&](int64_t chunk, int64_t first, int64_t last) {
    const int64_t padded = round_up(p.hidden, kWidth);
    float* activations = thread_scratch(static_cast<size_t>(2 * padded));
    float* derivatives = activations + padded;
    const ParameterSums sums(p.partials, chunk, p.hidden);
    for (int64_t row = first; row < last; ++row) {
      const int64_t offset = row * p.hidden;
      const T* dy = static_cast<const T*>(p.dy) + offset;
      const T* x = static_cast<const T*>(p.x) + offset;
      T* dx = static_cast<T*>(p.dx) + offset;
      for_columns(p.hidden, [&](int64_t column, auto extent) {
        Vec u = load(x + column, extent);
        if (p.bias != nullptr) u += load(float32(p.bias) + column, extent);
        const Normal normal = normal_distribution(u);
        store(activations + column, gelu(u, normal), extent);
        store(derivatives + column, gelu_derivative(u, normal), extent);
      });
      const Moments moments{p.mean[row], p.rstd[row]};
      const RowMeans means = row_means(dy, activations, moments, float32(p.weight), p.hidden);
      for_columns(p.hidden, [&](int64_t column, auto extent) {
        const Vec gradient = layer_norm_gradient(dy, activations, moments, means, float32(p.weight), sums, column, extent) *
                             load(derivatives + column, extent);
        store(dx + column, gradient, extent);
        if (p.dbias != nullptr) store(sums.dbias + column, load(sums.dbias + column, extent) + gradient, extent);
      });
    }
  });
  sum_parameter_gradients(p.partials, p.rows, p.hidden, num_threads, float32(p.dweight), float32(p.dln_bias),
                          float32(p.dbias));
}

}  // namespace

void gelu_layer_norm_forward(const GeluLayerNormForwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? forward<float>(p, num_threads) : forward<BFloat16>(p, num_threads);
}

void gelu_layer_norm_backward(const GeluLayerNormBackwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? backward<float>(p, num_threads) : backward<BFloat16>(p, num_threads);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
