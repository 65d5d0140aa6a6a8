// y = LayerNorm(gelu(x + bias)) * weight + ln_bias with the exact erf-GELU, forward and backward.
//
// Bytes per element: forward reads x and writes y (4 in a 16-bit dtype), backward reads dy and x and writes dx (6); one
// pass.

#include "cuda/rows.cuh"

namespace fastbert::cuda {

namespace {

template <typename T, int kThreads>
__global__ void __launch_bounds__(Group<T, kThreads>::kBlock, Group<T, kThreads>::kForwardBlocks)
    forward_kernel(GeluLayerNormForwardParams p) {
  using G = Group<T, kThreads>;
  G group;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * G::kGroups + group.group;
  const int64_t offset = row * p.hidden, width = row < p.rows ? p.hidden : 0;

  float values[kElementsPerThread], other[kElementsPerThread];
  group.unpack(group.fetch(p.x, offset, width), values);
  group.load_parameter(p.bias, p.hidden, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) values[i] = gelu(values[i] + other[i]);
  const float2 moments = group.moments(values, p.hidden, p.eps);
  float weight[kElementsPerThread];
  group.load_parameter(p.weight, p.hidden, weight);
  group.load_parameter(p.ln_bias, p.hidden, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) values[i] = (values[i] - moments.x) * moments.y * weight[i] + other[i];
  group.store(p.y, offset, width, values);
  if (group.thread == 0 && width > 0) {
    p.mean[row] = moments.x;
    p.rstd[row] = moments.y;
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(Group<T, kThreads>::kBlock, Group<T, kThreads>::kResidentBlocks)
    backward_kernel(GeluLayerNormBackwardParams p) {
  using G = Group<T, kThreads>;
  G group;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * G::kGroups;
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);

  float dweight[kElementsPerThread] = {}, dln_bias[kElementsPerThread] = {}, dbias[kElementsPerThread] = {};
  typename G::Packed next_dy, next_x;
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto fetch = [&](int64_t row) {
    const bool inside = row < p.rows;
    next_dy = group.fetch(p.dy, row * p.hidden, inside ? p.hidden : 0);
    next_x = group.fetch(p.x, row * p.hidden, inside ? p.hidden : 0);
    next_mean = inside ? p.mean[row] : 0.0f;
    next_rstd = inside ? p.rstd[row] : 0.0f;
  };
  // Every group of a block takes as many turns: the sums over a row are barriers of the block.
  int64_t row = static_cast<int64_t>(blockIdx.x) * G::kGroups + group.group;
  fetch(row);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * G::kGroups; first < p.rows; first += groups, row += groups) {
    float gradient[kElementsPerThread], x_hat[kElementsPerThread], derivative[kElementsPerThread],
        parameter[kElementsPerThread];
    group.unpack(next_x, x_hat);
    group.unpack(next_dy, gradient);
    const float mean = next_mean, rstd = next_rstd;
    fetch(row + groups);
    group.load_parameter(p.bias, p.hidden, parameter);
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      const float u = x_hat[i] + parameter[i], cdf = normal_cdf(u);
      x_hat[i] = (u * cdf - mean) * rstd;
      derivative[i] = gelu_derivative(u, cdf);
    }
    group.load_parameter(p.weight, p.hidden, parameter);
    float products = 0.0f, sums = 0.0f;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      dweight[i] += gradient[i] * x_hat[i];
      dln_bias[i] += gradient[i];
      gradient[i] *= parameter[i];
      products += gradient[i] * x_hat[i];
      sums += gradient[i];
    }
    const float2 means = group.sum(products, sums);
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      gradient[i] = layer_norm_gradient(gradient[i], x_hat[i], rstd, means.x * inverse_hidden, means.y * inverse_hidden) *
                    derivative[i];
      dbias[i] += gradient[i];
    }
    group.store(p.dx, row * p.hidden, row < p.rows ? p.hidden : 0, gradient);
  }
  float* line = p.partials + static_cast<int64_t>(blockIdx.x) * 3 * p.hidden;
  group.store_block_sum(line, p.hidden, dweight);
  group.store_block_sum(line + p.hidden, p.hidden, dln_bias);
  group.store_block_sum(p.dbias == nullptr ? nullptr : line + 2 * p.hidden, p.hidden, dbias);
}

}  // namespace

void gelu_layer_norm_forward(const GeluLayerNormForwardParams& p, void* stream) {
  if (p.rows == 0) return;
  for_shape(p.dtype, p.hidden, [&]<typename T, int kThreads>() {
    using G = Group<T, kThreads>;
    launch("gelu_layer_norm forward", forward_kernel<T, kThreads>, forward_blocks<G>(p.rows), G::kBlock, 0, stream, p);
  });
}

void gelu_layer_norm_backward(const GeluLayerNormBackwardParams& p, void* stream) {
  const int64_t lines = row_lines(p.rows, p.hidden, p.dtype);
  for_shape(p.dtype, p.hidden, [&]<typename T, int kThreads>() {
    launch("gelu_layer_norm backward", backward_kernel<T, kThreads>, static_cast<unsigned>(lines),
           Group<T, kThreads>::kBlock, 0, stream, p);
  });
  sum_lines("gelu_layer_norm backward", {p.partials, lines, 3, p.hidden, {p.dweight, p.dln_bias, p.dbias}, p.dtype}, stream);
}

}  // namespace fastbert::cuda
