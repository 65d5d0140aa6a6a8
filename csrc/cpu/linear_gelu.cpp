// What follows the matmul of linear_gelu: y = gelu(u + bias) with the exact erf-GELU, forward and backward.

#include "cpu/layer_norm.h"
#include "cpu/vec_math.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

template <typename T>
void forward(const BiasGeluForwardParams& p, int num_threads) {
  for_rows(p.rows, p.columns, num_threads, [&](int64_t row) {
    const T* u = static_cast<const T*>(p.u) + row * p.columns;
    T* y = static_cast<T*>(p.y) + row * p.columns;
    for_columns(p.columns, [&](int64_t column, auto extent) {
      Vec x = load(u + column, extent);
      if (p.bias != nullptr) x += load(p.bias + column, extent);
      store(y + column, gelu(x, normal_distribution(x)), extent);
    });
  });
}

template <typename T>
void backward(const BiasGeluBackwardParams& p, int num_threads) {
  for_row_chunks(p.rows, p.columns, num_threads, [&](int64_t chunk, int64_t first, int64_t last) {
    float* sums = p.partials + chunk * p.columns;
    std::memset(sums, 0, p.columns * sizeof(float));
    for (int64_t row = first; row < last; ++row) {
      const int64_t offset = row * p.columns;
      const T* dy = static_cast<const T*>(p.dy) + offset;
      const T* u = static_cast<const T*>(p.u) + offset;
      T* du = static_cast<T*>(p.du) + offset;
      T* y = p.y == nullptr ? nullptr : static_cast<T*>(p.y) + offset;
      for_columns(p.columns, [&](int64_t column, auto extent) {
        Vec x = load(u + column, extent);
        if (p.bias != nullptr) x += load(p.bias + column, extent);
        const Normal normal = normal_distribution(x);
        const Vec gradient = load(dy + column, extent) * gelu_derivative(x, normal);
        store(du + column, gradient, extent);
        if (y != nullptr) store(y + column, gelu(x, normal), extent);
        store(sums + column, load(sums + column, extent) + gradient, extent);
      });
    }
  });
  sum_chunks(p.partials, row_chunks(p.rows), p.columns, p.columns, num_threads, p.dbias);
}

}  // namespace

void bias_gelu_forward(const BiasGeluForwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? forward<float>(p, num_threads) : forward<BFloat16>(p, num_threads);
}

void bias_gelu_backward(const BiasGeluBackwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? backward<float>(p, num_threads) : backward<BFloat16>(p, num_threads);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
