// z = word[input_ids] + token_type[token_type_ids] + position[position_ids]; y = dropout(LayerNorm(z) * weight + ln_bias),
// forward, and backward as far as dz: the sum of the embeddings is gathered again instead of being kept.

#include "cpu/layer_norm.h"
#include "cpu/philox.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

// The three table rows that make one row of z.
template <typename T>
struct TableRows {
  const T *word, *token_type, *position;

  template <typename Params>
  TableRows(const Params& p, int64_t row)
      : word(static_cast<const T*>(p.word) + p.input_ids[row] * p.hidden),
        token_type(static_cast<const T*>(p.token_type) + p.token_type_ids[row] * p.hidden),
        position(static_cast<const T*>(p.position) + p.position_ids[row] * p.hidden) {}

  template <typename Extent>
  FASTBERT_INLINE Vec sum(int64_t column, Extent extent) const {
    return load(word + column, extent) + load(token_type + column, extent) + load(position + column, extent);
  }
};

// A row of z, a row of dy (in the backward) and the random bits of a row.
struct Scratch {
  float *z, *dy;
  uint16_t* bits;

  explicit Scratch(int64_t hidden) {
    const int64_t padded = round_up(hidden, kWidth);
    z = thread_scratch(static_cast<size_t>(2 * padded + round_up(hidden, kDropoutColumns) / 2));
    dy = z + padded;
    bits = reinterpret_cast<uint16_t*>(dy + padded);
  }
};

template <typename T, bool kDropout>
void forward(const EmbeddingLayerNormForwardParams& p, int num_threads) {
  for_rows(p.rows, p.hidden, num_threads, [&](int64_t row) {
    const Scratch scratch(p.hidden);
    const TableRows<T> rows(p, row);
    Vec sums{};
    for_columns(p.hidden, [&](int64_t column, auto extent) {
      const Vec z = rows.sum(column, extent);
      sums += z;
      store(scratch.z + column, z, extent);
    });
    const Moments moments = row_moments(scratch.z, p.hidden, sums, p.eps);
    p.mean[row] = moments.mean;
    p.rstd[row] = moments.rstd;
    T* y = static_cast<T*>(p.y) + row * p.hidden;
    if constexpr (kDropout) {
      dropout_bits(scratch.bits, p.hidden, row, 0, p.dropout);
      normalise_row(scratch.z, p.hidden, moments, float32(p.weight), float32(p.ln_bias), y,
                    [&](Vec v, int64_t column, auto extent) {
                      return drop(v * p.dropout.scale, scratch.bits + column, p.dropout.threshold, extent);
                    });
    } else {
      normalise_row(scratch.z, p.hidden, moments, float32(p.weight), float32(p.ln_bias), y);
    }
  });
}

template <typename T, bool kDropout>
void backward(const EmbeddingLayerNormBackwardParams& p, int num_threads) {
  for_row_chunks(p.rows, p.hidden, num_threads, [&](int64_t chunk, int64_t first, int64_t last) {
    const Scratch scratch(p.hidden);
    const ParameterSums sums(p.partials, chunk, p.hidden);
    for (int64_t row = first; row < last; ++row) {
      if constexpr (kDropout) dropout_bits(scratch.bits, p.hidden, row, 0, p.dropout);
      const TableRows<T> rows(p, row);
      const T* dy = static_cast<const T*>(p.dy) + row * p.hidden;
      for_columns(p.hidden, [&](int64_t column, auto extent) {
        Vec gradient = load(dy + column, extent);
        if constexpr (kDropout) {
          gradient = drop(gradient * p.dropout.scale, scratch.bits + column, p.dropout.threshold, extent);
        }
        store(scratch.dy + column, gradient, extent);
        store(scratch.z + column, rows.sum(column, extent), extent);
      });
      const Moments moments{p.mean[row], p.rstd[row]};
      RowMeans means{};
      if (p.dz != nullptr) means = row_means(scratch.dy, scratch.z, moments, float32(p.weight), p.hidden);
      for_columns(p.hidden, [&](int64_t column, auto extent) {
        const Vec gradient =
            layer_norm_gradient(scratch.dy, scratch.z, moments, means, float32(p.weight), sums, column, extent);
        if (p.dz != nullptr) store(float32(p.dz) + row * p.hidden + column, gradient, extent);
      });
    }
  });
  sum_parameter_gradients(p.partials, p.rows, p.hidden, num_threads, float32(p.dweight), float32(p.dln_bias), nullptr);
}

}  // namespace

void embedding_layer_norm_forward(const EmbeddingLayerNormForwardParams& p, int num_threads) {
  const bool dropout = p.dropout.threshold > 0;
  if (p.dtype == DType::float32) {
    dropout ? forward<float, true>(p, num_threads) : forward<float, false>(p, num_threads);
  } else {
    dropout ? forward<BFloat16, true>(p, num_threads) : forward<BFloat16, false>(p, num_threads);
  }
}

void embedding_layer_norm_backward(const EmbeddingLayerNormBackwardParams& p, int num_threads) {
  const bool dropout = p.dropout.threshold > 0;
  if (p.dtype == DType::float32) {
    dropout ? backward<float, true>(p, num_threads) : backward<float, false>(p, num_threads);
  } else {
    dropout ? backward<BFloat16, true>(p, num_threads) : backward<BFloat16, false>(p, num_threads);
  }
}

}  // namespace fastbert::cpu::FASTBERT_ISA
