// z = word[input_ids] + token_type[token_type_ids] + position[position_ids]; y = dropout(LayerNorm(z) * weight + ln_bias),
// forward and backward up to dz; table_gradient.cu sums dz into the tables.
//
// Bytes per element: forward reads a row of word and writes y (4 in a 16-bit dtype), as positions and token types are in the
// caches; backward reads dy and the row of word again and writes dz (6). dz has the activations' dtype: the sums over its
// rows are float32, the table's gradient is rounded to that dtype in any case, and float32 would add 6 bytes to the 10 that
// dz and the sums of words and positions read and write.

#include <cassert>

#include "cuda/rows.cuh"

namespace fastbert::cuda {

namespace {

template <typename T, int kThreads>
__global__ void __launch_bounds__(Group<T, kThreads>::kBlock, Group<T, kThreads>::kForwardBlocks)
    forward_kernel(EmbeddingLayerNormForwardParams p, TableSizes sizes) {
  using G = Group<T, kThreads>;
  G group;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * G::kGroups + group.group;
  const int64_t width = row < p.rows ? p.hidden : 0, place = row < p.rows ? row : 0;
  const int64_t word = p.input_ids[place], token_type = p.token_type_ids[place], position = p.position_ids[place];
  assert(word >= 0 && word < sizes.words && "input_ids hold a number that is no row of word");
  assert(token_type >= 0 && token_type < sizes.token_types && "token_type_ids hold no row of token_type");
  assert(position >= 0 && position < sizes.positions && "position_ids hold a number that is no row of position");

  const typename G::Packed words = group.fetch(p.word, word * p.hidden, width);
  const typename G::Packed types = group.fetch(p.token_type, token_type * p.hidden, width);
  const typename G::Packed positions = group.fetch(p.position, position * p.hidden, width);
  float z[kElementsPerThread], other[kElementsPerThread];
  group.unpack(words, z);
  group.unpack(types, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) z[i] += other[i];
  group.unpack(positions, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) z[i] += other[i];

  const float2 moments = group.moments(z, p.hidden, p.eps);
  float weight[kElementsPerThread];
  group.load_parameter(p.weight, p.hidden, weight);
  group.load_parameter(p.ln_bias, p.hidden, other);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) z[i] = (z[i] - moments.x) * moments.y * weight[i] + other[i];
  if (p.dropout.threshold != 0) group.drop(z, row, p.hidden, p.dropout);
  group.store(p.y, row * p.hidden, width, z);
  if (group.thread == 0 && width > 0) {
    p.mean[row] = moments.x;
    p.rstd[row] = moments.y;
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(Group<T, kThreads>::kBlock, Group<T, kThreads>::kResidentBlocks)
    backward_kernel(EmbeddingLayerNormBackwardParams p) {
  using G = Group<T, kThreads>;
  G group;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * G::kGroups;
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);

  float weight[kElementsPerThread], dweight[kElementsPerThread] = {}, dln_bias[kElementsPerThread] = {};
  group.load_parameter(p.weight, p.hidden, weight);

  // The row of word that comes next is on its way, and the id of the one after that.
  const auto word_of = [&](int64_t row) { return row < p.rows ? p.input_ids[row] : 0; };
  typename G::Packed next_dy, next_words;
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto fetch = [&](int64_t row, int64_t word) {
    const bool inside = row < p.rows;
    next_dy = group.fetch(p.dy, row * p.hidden, inside ? p.hidden : 0);
    next_words = group.fetch(p.word, word * p.hidden, inside ? p.hidden : 0);
    next_mean = inside ? p.mean[row] : 0.0f;
    next_rstd = inside ? p.rstd[row] : 0.0f;
  };
  // Every group of a block takes as many turns: the sums over a row are barriers of the block.
  int64_t row = static_cast<int64_t>(blockIdx.x) * G::kGroups + group.group;
  fetch(row, word_of(row));
  int64_t next_word = word_of(row + groups);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * G::kGroups; first < p.rows; first += groups, row += groups) {
    const int64_t width = row < p.rows ? p.hidden : 0, place = row < p.rows ? row : 0;
    float gradient[kElementsPerThread], x_hat[kElementsPerThread], other[kElementsPerThread];
    const typename G::Packed types = group.fetch(p.token_type, p.token_type_ids[place] * p.hidden, width);
    const typename G::Packed positions = group.fetch(p.position, p.position_ids[place] * p.hidden, width);
    group.unpack(next_dy, gradient);
    group.unpack(next_words, x_hat);
    const float mean = next_mean, rstd = next_rstd;
    fetch(row + groups, next_word);
    next_word = word_of(row + 2 * groups);
    group.unpack(types, other);
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) x_hat[i] += other[i];
    group.unpack(positions, other);
    if (p.dropout.threshold != 0) group.drop(gradient, row, p.hidden, p.dropout);
    float products = 0.0f, sums = 0.0f;
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      x_hat[i] = (x_hat[i] + other[i] - mean) * rstd;
      dweight[i] += gradient[i] * x_hat[i];
      dln_bias[i] += gradient[i];
      gradient[i] *= weight[i];
      products += gradient[i] * x_hat[i];
      sums += gradient[i];
    }
    if (p.dz == nullptr) continue;
    const float2 means = group.sum(products, sums);
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      gradient[i] = layer_norm_gradient(gradient[i], x_hat[i], rstd, means.x * inverse_hidden, means.y * inverse_hidden);
    }
    group.store(p.dz, row * p.hidden, width, gradient);
  }
  float* line = p.partials + static_cast<int64_t>(blockIdx.x) * 2 * p.hidden;
  group.store_block_sum(line, p.hidden, dweight);
  group.store_block_sum(line + p.hidden, p.hidden, dln_bias);
}

}  // namespace

void embedding_layer_norm_forward(const EmbeddingLayerNormForwardParams& p, const TableSizes& sizes, void* stream) {
  if (p.rows == 0) return;
  for_shape(p.dtype, p.hidden, [&]<typename T, int kThreads>() {
    using G = Group<T, kThreads>;
    launch("embedding_layer_norm forward", forward_kernel<T, kThreads>, forward_blocks<G>(p.rows), G::kBlock, 0, stream, p,
           sizes);
  });
}

void embedding_layer_norm_backward(const EmbeddingLayerNormBackwardParams& p, void* stream) {
  const int64_t lines = row_lines(p.rows, p.hidden, p.dtype);
  for_shape(p.dtype, p.hidden, [&]<typename T, int kThreads>() {
    launch("embedding_layer_norm backward", backward_kernel<T, kThreads>, static_cast<unsigned>(lines),
           Group<T, kThreads>::kBlock, 0, stream, p);
  });
  sum_lines("embedding_layer_norm backward", {p.partials, lines, 2, p.hidden, {p.dweight, p.dln_bias}, p.dtype}, stream);
}

}  // namespace fastbert::cuda
