// z = dropout(x + bias) + residual; y = LayerNorm(z) * weight + ln_bias, forward and backward.
//
// Bytes per element: forward reads x and residual and writes y and z (8 in a 16-bit dtype), backward reads dy and z and
// writes dresidual and, with dropout, dx (6 or 8); each once, in one pass.

#include "cuda/rows.cuh"

namespace fastbert::cuda {

namespace {

template <typename T, int kThreads>
__global__ void __launch_bounds__(kBlock) forward_kernel(AddLayerNormForwardParams p) {
  using G = Group<T, kThreads>;
  const G group;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * G::kGroups + group.group;
  const bool inside = row < p.rows;  // groups past the end take part in the block's barriers, on the last row
  const int64_t offset = (inside ? row : p.rows - 1) * p.hidden;

  float z[kElementsPerThread], other[kElementsPerThread];
  group.load(static_cast<const T*>(p.x) + offset, p.hidden, z);
  group.load_parameter(p.bias, p.hidden, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) z[i] += other[i];
  if (p.dropout.threshold != 0) group.drop(z, row, p.dropout);
  group.load(static_cast<const T*>(p.residual) + offset, p.hidden, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) z[i] += other[i];

  const float2 moments = group.moments(z, p.hidden, p.eps);
  if (!inside) return;
  group.store(static_cast<T*>(p.z) + offset, p.hidden, z);
  float weight[kElementsPerThread];
  group.load_parameter(p.weight, p.hidden, weight);
  group.load_parameter(p.ln_bias, p.hidden, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) z[i] = (z[i] - moments.x) * moments.y * weight[i] + other[i];
  group.store(static_cast<T*>(p.y) + offset, p.hidden, z);
  if (group.thread == 0) {
    p.mean[row] = moments.x;
    p.rstd[row] = moments.y;
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kBlock, 1) backward_kernel(AddLayerNormBackwardParams p) {
  using G = Group<T, kThreads>;
  const G group;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * G::kGroups;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * G::kGroups + group.group;
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);

  float weight[kElementsPerThread], dweight[kElementsPerThread] = {}, dln_bias[kElementsPerThread] = {},
                                    dbias[kElementsPerThread] = {};
  group.load_parameter(p.weight, p.hidden, weight);
  // Every group of a block takes as many turns: the sums over a row are barriers of the block.
  for (int64_t first = 0; first < p.rows; first += groups) {
    const int64_t row = first + index;
    const bool inside = row < p.rows;
    const int64_t offset = (inside ? row : p.rows - 1) * p.hidden;
    const float mean = p.mean[inside ? row : p.rows - 1], rstd = p.rstd[inside ? row : p.rows - 1];
    float gradient[kElementsPerThread], x_hat[kElementsPerThread];
    group.load(static_cast<const T*>(p.dy) + offset, p.hidden, gradient);
    group.load(static_cast<const T*>(p.z) + offset, p.hidden, x_hat);
    float products = 0.0f, sums = 0.0f;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      x_hat[i] = group.holds(i, p.hidden) ? (x_hat[i] - mean) * rstd : 0.0f;
      if (inside) {
        dweight[i] += gradient[i] * x_hat[i];
        dln_bias[i] += gradient[i];
      }
      gradient[i] *= weight[i];
      products += gradient[i] * x_hat[i];
      sums += gradient[i];
    }
    const float2 means = group.sum(products, sums);
    if (!inside) continue;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      gradient[i] = layer_norm_gradient(gradient[i], x_hat[i], rstd, means.x * inverse_hidden, means.y * inverse_hidden);
    }
    group.store(static_cast<T*>(p.dresidual) + offset, p.hidden, gradient);
    if (p.dropout.threshold != 0) {
      group.drop(gradient, row, p.dropout);
      group.store(static_cast<T*>(p.dx) + offset, p.hidden, gradient);
    }
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) dbias[i] += gradient[i];
  }
  float* partials = p.partials + index * 3 * p.hidden;
  group.store_parameter(partials, p.hidden, dweight);
  group.store_parameter(partials + p.hidden, p.hidden, dln_bias);
  group.store_parameter(partials + 2 * p.hidden, p.hidden, dbias);
}

}  // namespace

void add_layer_norm_forward(const AddLayerNormForwardParams& p, void* stream) {
  if (p.rows == 0) return;
  for_shape(p.dtype, p.hidden, [&]<typename T, int kThreads>() {
    const int64_t per_block = Group<T, kThreads>::kGroups;
    const auto blocks = static_cast<unsigned>((p.rows + per_block - 1) / per_block);
    launch("add_layer_norm forward", forward_kernel<T, kThreads>, blocks, kBlock, 0, stream, p);
  });
}

void add_layer_norm_backward(const AddLayerNormBackwardParams& p, void* stream) {
  const int64_t groups = row_groups(p.rows, p.hidden);
  for_shape(p.dtype, p.hidden, [&]<typename T, int kThreads>() {
    const auto blocks = static_cast<unsigned>(groups / Group<T, kThreads>::kGroups);
    launch("add_layer_norm backward", backward_kernel<T, kThreads>, blocks, kBlock, 0, stream, p);
  });
  sum_groups("add_layer_norm backward", p.partials, groups, p.hidden, p.dweight, p.dln_bias, p.dbias, stream);
}

}  // namespace fastbert::cuda
