// z = dropout(x + bias) + residual; y = LayerNorm(z) * weight + ln_bias, forward and backward: one pass over memory each.
//
// In one dtype, or as autocast has it: x, z, dx and a second y in bfloat16 beside a float32 residual and y.

#include <type_traits>

#include "cpu/layer_norm.h"
#include "cpu/philox.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

size_t scratch_floats(int64_t hidden) {
  return static_cast<size_t>(round_up(hidden, kWidth) + round_up(hidden, kDropoutColumns) / 2);
}

// T: of x and z; R: of the residual and y.
template <typename T, typename R, bool kDropout, typename Params>
void forward(const Params& p, int num_threads) {
  for_rows(p.rows, p.hidden, num_threads, [&](int64_t row) {
    float* z_row = thread_scratch(scratch_floats(p.hidden));
    uint16_t* bits = reinterpret_cast<uint16_t*>(z_row + round_up(p.hidden, kWidth));
    if constexpr (kDropout) dropout_bits(bits, p.hidden, row, 0, p.dropout);

    const int64_t offset = row * p.hidden;
    const T* x = static_cast<const T*>(p.x) + offset;
    const R* residual = static_cast<const R*>(p.residual) + offset;
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
    R* y = static_cast<R*>(p.y) + offset;
    normalise_row(z_row, p.hidden, moments, float32(p.weight), float32(p.ln_bias), y,
                  [&](Vec v, int64_t column, auto extent) {
                    if constexpr (!std::is_same_v<T, R>) store(static_cast<T*>(p.y_half) + offset + column, v, extent);
                    return v;
                  });
  });
}

// The sum of a row's gradients of both y, either of which may be null.
void add_gradients(const float* dy, const BFloat16* dy_half, int64_t hidden, float* sum) {
  for_columns(hidden, [&](int64_t column, auto extent) {
    Vec gradient{};
    if (dy != nullptr) gradient += load(dy + column, extent);
    if (dy_half != nullptr) gradient += load(dy_half + column, extent);
    store(sum + column, gradient, extent);
  });
}

template <typename T, typename R, bool kDropout, typename Params>
void backward(const Params& p, int num_threads) {
  constexpr bool kMixed = !std::is_same_v<T, R>;
  for_row_chunks(p.rows, p.hidden, num_threads, [&](int64_t chunk, int64_t first, int64_t last) {
    float* dy_row = thread_scratch(scratch_floats(p.hidden));
    uint16_t* bits = reinterpret_cast<uint16_t*>(dy_row + round_up(p.hidden, kWidth));
    const ParameterSums sums(p.partials, chunk, p.hidden);
    for (int64_t row = first; row < last; ++row) {
      if constexpr (kDropout) dropout_bits(bits, p.hidden, row, 0, p.dropout);

      const int64_t offset = row * p.hidden;
      const auto row_of = [&](auto* matrix) { return matrix == nullptr ? nullptr : matrix + offset; };
      const R* dy = row_of(static_cast<const R*>(p.dy));
      if constexpr (kMixed) {
        add_gradients(dy, row_of(static_cast<const T*>(p.dy_half)), p.hidden, dy_row);
        dy = dy_row;
      }
      const T* z = static_cast<const T*>(p.z) + offset;
      R* dresidual = static_cast<R*>(p.dresidual) + offset;
      T* dx = row_of(static_cast<T*>(p.dx));
      const Moments moments{p.mean[row], p.rstd[row]};
      const RowMeans means = row_means(dy, z, moments, float32(p.weight), p.hidden);
      for_columns(p.hidden, [&](int64_t column, auto extent) {
        Vec gradient = layer_norm_gradient(dy, z, moments, means, float32(p.weight), sums, column, extent);
        store(dresidual + column, gradient, extent);
        if constexpr (kDropout) gradient = drop(gradient * p.dropout.scale, bits + column, p.dropout.threshold, extent);
        if constexpr (kDropout || kMixed) store(dx + column, gradient, extent);
        if (p.dbias != nullptr) store(sums.dbias + column, load(sums.dbias + column, extent) + gradient, extent);
      });
    }
  });
  sum_parameter_gradients(p.partials, p.rows, p.hidden, num_threads, float32(p.dweight), float32(p.dln_bias),
                          float32(p.dbias));
}

template <typename T, typename R, typename Params>
void forward_in(const Params& p, int num_threads) {
  p.dropout.threshold > 0 ? forward<T, R, true>(p, num_threads) : forward<T, R, false>(p, num_threads);
}

template <typename T, typename R, typename Params>
void backward_in(const Params& p, int num_threads) {
  // In one dtype dx is null and not written without dropout; a probability that rounds to 0 still has one to write.
  const bool dropout = std::is_same_v<T, R> ? p.dx != nullptr : p.dropout.threshold > 0;
  dropout ? backward<T, R, true>(p, num_threads) : backward<T, R, false>(p, num_threads);
}

}  // namespace

void add_layer_norm_forward(const AddLayerNormForwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? forward_in<float, float>(p, num_threads) : forward_in<BFloat16, BFloat16>(p, num_threads);
}

void add_layer_norm_backward(const AddLayerNormBackwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? backward_in<float, float>(p, num_threads) : backward_in<BFloat16, BFloat16>(p, num_threads);
}

void add_layer_norm_mixed_forward(const AddLayerNormMixedForwardParams& p, int num_threads) {
  forward_in<BFloat16, float>(p, num_threads);
}

void add_layer_norm_mixed_backward(const AddLayerNormMixedBackwardParams& p, int num_threads) {
  backward_in<BFloat16, float>(p, num_threads);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
