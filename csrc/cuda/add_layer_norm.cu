// z = dropout(x + bias) + residual; y = LayerNorm(z) * weight + ln_bias, forward and backward.
//
// Bytes per element: forward reads x and residual and writes y and z (8 in a 16-bit dtype), backward reads dy and z and
// writes dresidual and, with dropout, dx (6 or 8); each once, in one pass.

#include "cuda/rows.cuh"

namespace fastbert::cuda {

namespace {

template <typename T, int kThreads>
__global__ void __launch_bounds__(Group<T, kThreads>::kBlock, Group<T, kThreads>::kForwardBlocks)
    forward_kernel(AddLayerNormForwardParams p) {
  using G = Group<T, kThreads>;
  G group;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * G::kGroups + group.group;
  const int64_t offset = row * p.hidden, width = row < p.rows ? p.hidden : 0;

  const typename G::Packed x = group.fetch(p.x, offset, width), residual = group.fetch(p.residual, offset, width);
  float z[kElementsPerThread], other[kElementsPerThread];
  group.unpack(x, z);
  group.load_parameter(p.bias, p.hidden, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) z[i] += other[i];
  if (p.dropout.threshold != 0) group.drop(z, row, p.hidden, p.dropout);
  group.unpack(residual, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) z[i] += other[i];
  group.store(p.z, offset, width, z);

  const float2 moments = group.moments(z, p.hidden, p.eps);
  float weight[kElementsPerThread];
  group.load_parameter(p.weight, p.hidden, weight);
  group.load_parameter(p.ln_bias, p.hidden, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) z[i] = (z[i] - moments.x) * moments.y * weight[i] + other[i];
  group.store(p.y, offset, width, z);
  if (group.thread == 0 && width > 0) {
    p.mean[row] = moments.x;
    p.rstd[row] = moments.y;
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(Group<T, kThreads>::kBlock, Group<T, kThreads>::kResidentBlocks)
    backward_kernel(AddLayerNormBackwardParams p) {
  using G = Group<T, kThreads>;
  G group;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * G::kGroups;
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);

  float weight[kElementsPerThread], dweight[kElementsPerThread] = {}, dln_bias[kElementsPerThread] = {},
                                    dbias[kElementsPerThread] = {};
  group.load_parameter(p.weight, p.hidden, weight);

  typename G::Packed next_dy, next_z;
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto fetch = [&](int64_t row) {
    const bool inside = row < p.rows;
    next_dy = group.fetch(p.dy, row * p.hidden, inside ? p.hidden : 0);
    next_z = group.fetch(p.z, row * p.hidden, inside ? p.hidden : 0);
    next_mean = inside ? p.mean[row] : 0.0f;
    next_rstd = inside ? p.rstd[row] : 0.0f;
  };
  // Every group of a block takes as many turns: the sums over a row are barriers of the block.
  int64_t row = static_cast<int64_t>(blockIdx.x) * G::kGroups + group.group;
  fetch(row);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * G::kGroups; first < p.rows; first += groups, row += groups) {
    float gradient[kElementsPerThread], x_hat[kElementsPerThread];
    group.unpack(next_dy, gradient);
    group.unpack(next_z, x_hat);
    const float mean = next_mean, rstd = next_rstd;
    fetch(row + groups);
    float products = 0.0f, sums = 0.0f;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      x_hat[i] = (x_hat[i] - mean) * rstd;
      dweight[i] += gradient[i] * x_hat[i];
      dln_bias[i] += gradient[i];
      gradient[i] *= weight[i];
      products += gradient[i] * x_hat[i];
      sums += gradient[i];
    }
    const float2 means = group.sum(products, sums);
    const int64_t width = row < p.rows ? p.hidden : 0;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      gradient[i] = layer_norm_gradient(gradient[i], x_hat[i], rstd, means.x * inverse_hidden, means.y * inverse_hidden);
    }
    group.store(p.dresidual, row * p.hidden, width, gradient);
    if (p.dropout.threshold != 0) group.drop(gradient, row, p.hidden, p.dropout);
    // Also where a probability is so small that nothing is dropped.
    if (p.dx != nullptr) group.store(p.dx, row * p.hidden, width, gradient);
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) dbias[i] += gradient[i];
  }
  float* line = p.partials + static_cast<int64_t>(blockIdx.x) * 3 * p.hidden;
  group.store_block_sum(line, p.hidden, dweight);
  group.store_block_sum(line + p.hidden, p.hidden, dln_bias);
  group.store_block_sum(p.dbias == nullptr ? nullptr : line + 2 * p.hidden, p.hidden, dbias);
}

}  // namespace

void add_layer_norm_forward(const AddLayerNormForwardParams& p, void* stream) {
  if (p.rows == 0) return;
  for_shape(p.dtype, p.hidden, [&]<typename T, int kThreads>() {
    using G = Group<T, kThreads>;
    launch("add_layer_norm forward", forward_kernel<T, kThreads>, forward_blocks<G>(p.rows), G::kBlock, 0, stream, p);
  });
}

void add_layer_norm_backward(const AddLayerNormBackwardParams& p, void* stream) {
  const int64_t lines = row_lines(p.rows, p.hidden, p.dtype);
  for_shape(p.dtype, p.hidden, [&]<typename T, int kThreads>() {
    launch("add_layer_norm backward", backward_kernel<T, kThreads>, static_cast<unsigned>(lines), Group<T, kThreads>::kBlock,
           0, stream, p);
  });
  sum_lines("add_layer_norm backward", {p.partials, lines, 3, p.hidden, {p.dweight, p.dln_bias, p.dbias}, p.dtype}, stream);
}

}  // namespace fastbert::cuda
