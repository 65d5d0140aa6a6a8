// What the ops with a LayerNorm share: rows of float32 that stay in the first-level cache between their passes.

#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastbert::cpu::FASTBERT_ISA {

// Parameters of the model and their gradients.
inline const float* float32(const void* parameter) { return static_cast<const float*>(parameter); }
inline float* float32(void* parameter) { return static_cast<float*>(parameter); }

struct Moments {
  float mean, rstd;
};

// Mean and 1 / sqrt(variance + eps) of a row; sums: its sum, in lanes. The variance takes a pass of its own, because the
// difference of the mean square and the squared mean loses its digits where the mean is large.
inline Moments row_moments(const float* row, int64_t hidden, Vec sums, float eps) {
  const float mean = sum_lanes(sums) / static_cast<float>(hidden);
  Vec squares[kSlots]{};
  for_columns_in_slots(hidden, [&](int64_t column, auto extent, int slot) {
    const Vec centred = load(row + column, extent) - mean;
    squares[slot] += within(centred * centred, 0.0f, extent);
  });
  const float variance = sum_slots(squares) / static_cast<float>(hidden);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

// y = finish(the LayerNorm of row, column, extent).
template <typename T, typename Finish>
void normalise_row(const float* row, int64_t hidden, Moments moments, const float* weight, const float* ln_bias, T* y,
                   const Finish& finish) {
  for_columns(hidden, [&](int64_t column, auto extent) {
    const Vec normalised = (load(row + column, extent) - moments.mean) * moments.rstd;
    const Vec v = normalised * load(weight + column, extent) + load(ln_bias + column, extent);
    store(y + column, finish(v, column, extent), extent);
  });
}

template <typename T>
void normalise_row(const float* row, int64_t hidden, Moments moments, const float* weight, const float* ln_bias, T* y) {
  normalise_row(row, hidden, moments, weight, ln_bias, y, [](Vec v, int64_t, auto) { return v; });
}

// A piece of the work on rows that is large enough to be worth a thread's attention and small enough to share out.
inline int64_t rows_per_item(int64_t hidden) {
  constexpr int64_t elements = 8192;
  return hidden > 0 && hidden < elements ? elements / hidden : 1;
}

// body(row) for every row.
template <typename Body>
void for_rows(int64_t rows, int64_t hidden, int num_threads, const Body& body) {
  const int64_t per_item = rows_per_item(hidden), items = (rows + per_item - 1) / per_item;
  parallel_for(items, rows * hidden < kElementsWorthThreads ? 1 : num_threads, [&](int64_t item) {
    const int64_t last = (item + 1) * per_item < rows ? (item + 1) * per_item : rows;
    for (int64_t row = item * per_item; row < last; ++row) body(row);
  });
}

// body(chunk, first_row, last_row) for each of row_chunks(rows) chunks of rows.
template <typename Body>
void for_row_chunks(int64_t rows, int64_t hidden, int num_threads, const Body& body) {
  const int64_t chunks = row_chunks(rows);
  parallel_for(chunks, rows * hidden < kElementsWorthThreads ? 1 : num_threads,
               [&](int64_t chunk) { body(chunk, chunk * rows / chunks, (chunk + 1) * rows / chunks); });
}

// sum (columns,) = the sum of the chunks' partials, chunk_stride elements apart, in order.
inline void sum_chunks(const float* partials, int64_t chunks, int64_t chunk_stride, int64_t columns, int num_threads,
                       float* sum) {
  constexpr int64_t columns_per_item = 256;
  const int64_t items = (columns + columns_per_item - 1) / columns_per_item;
  parallel_for(items, chunks * columns < kElementsWorthThreads ? 1 : num_threads, [&](int64_t item) {
    const int64_t first = item * columns_per_item;
    const int64_t count = columns - first < columns_per_item ? columns - first : columns_per_item;
    for_columns(count, [&](int64_t column, auto extent) {
      Vec total{};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        total += load(partials + chunk * chunk_stride + first + column, extent);
      }
      store(sum + first + column, total, extent);
    });
  });
}

// The gradients of the parameters of bias + LayerNorm, summed over a chunk of rows.
struct ParameterSums {
  float *dweight, *dln_bias, *dbias;

  // The chunk's part of partials (chunks, 3, hidden), set to 0.
  ParameterSums(float* partials, int64_t chunk, int64_t hidden)
      : dweight(partials + chunk * 3 * hidden), dln_bias(dweight + hidden), dbias(dln_bias + hidden) {
    std::memset(dweight, 0, 3 * hidden * sizeof(float));
  }
};

inline void sum_parameter_gradients(const float* partials, int64_t rows, int64_t hidden, int num_threads, float* dweight,
                                    float* dln_bias, float* dbias) {
  float* const sums[] = {dweight, dln_bias, dbias};
  for (int i = 0; i < 3; ++i) {
    if (sums[i] != nullptr) sum_chunks(partials + i * hidden, row_chunks(rows), 3 * hidden, hidden, num_threads, sums[i]);
  }
}

// What the gradient of a LayerNorm's input needs of the whole row: dz = (dx_hat - x_hat * c1 - c2) * rstd.
struct RowMeans {
  float c1;  // of dx_hat * x_hat
  float c2;  // of dx_hat = dy * weight
};

// z: the LayerNorm's input, float32 or the dtype of dy.
template <typename T, typename Z>
RowMeans row_means(const T* dy, const Z* z, Moments moments, const float* weight, int64_t hidden) {
  Vec products[kSlots]{}, gradients[kSlots]{};
  for_columns_in_slots(hidden, [&](int64_t column, auto extent, int slot) {
    const Vec dx_hat = load(dy + column, extent) * load(weight + column, extent);
    const Vec x_hat = (load(z + column, extent) - moments.mean) * moments.rstd;
    products[slot] += dx_hat * x_hat;
    gradients[slot] += dx_hat;
  });
  return {sum_slots(products) / static_cast<float>(hidden), sum_slots(gradients) / static_cast<float>(hidden)};
}

// The gradient of the LayerNorm's input in these columns; adds to the sums of dweight and dln_bias.
template <typename T, typename Z, typename Extent>
FASTBERT_INLINE Vec layer_norm_gradient(const T* dy, const Z* z, Moments moments, RowMeans means, const float* weight,
                                        const ParameterSums& sums, int64_t column, Extent extent) {
  const Vec gradient = load(dy + column, extent);
  const Vec x_hat = (load(z + column, extent) - moments.mean) * moments.rstd;
  store(sums.dweight + column, load(sums.dweight + column, extent) + gradient * x_hat, extent);
  store(sums.dln_bias + column, load(sums.dln_bias + column, extent) + gradient, extent);
  return (gradient * load(weight + column, extent) - x_hat * means.c1 - means.c2) * moments.rstd;
}

}  // namespace fastbert::cpu::FASTBERT_ISA
