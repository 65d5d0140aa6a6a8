// A linear layer on packed weights alone, of a model that is not trained: y = x W^T + b.

#include "cpu/packed_linear.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

template <typename Group, typename T>
void run(const PackedDenseParams& p, int num_threads) {
  using Element = typename Group::Element;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const int64_t width = p.linear.in_features, out_features = p.linear.out_features;
  // Neighbouring panels, each of which asks the memory for the next: few rows wait for nothing else.
  const int64_t panels = count_panels(p.linear.out_features), pieces = panels < 2 * num_threads ? panels : 2 * num_threads;
  parallel_for(pieces, num_threads, [&](int64_t piece) {
    const auto multiply = [&](int64_t first, int64_t rows, const void* from, int64_t row_bytes, float* sums) {
      packed_linear<Group>(rows, {from, row_bytes, nullptr}, p.linear, piece * panels / pieces,
                           (piece + 1) * panels / pieces, sums, store_rows(y + first * out_features, out_features));
    };
    constexpr int64_t sums_size = kSumVectors * kWidth;
    if constexpr (std::is_same_v<T, Element>) {
      multiply(0, p.rows, x, p.x_row_stride * static_cast<int64_t>(sizeof(T)), thread_scratch(sums_size));
    } else {
      for (int64_t first = 0; first < p.rows; first += kMaxBlockRows) {
        const int64_t rows = p.rows - first < kMaxBlockRows ? p.rows - first : kMaxBlockRows;
        float* sums = thread_scratch(static_cast<size_t>(sums_size + rows * width));
        for (int64_t row = 0; row < rows; ++row) {
          const T* from = x + (first + row) * p.x_row_stride;
          float* to = sums + sums_size + row * width;
          for_columns(width, [&](int64_t column, auto extent) { store(to + column, load(from + column, extent), extent); });
        }
        multiply(first, rows, sums + sums_size, width * static_cast<int64_t>(sizeof(Element)), sums);
      }
    }
  });
}

}  // namespace

void packed_dense(const PackedDenseParams& p, int num_threads) {
  p.dtype == DType::float32 ? run<FloatGroup, float>(p, num_threads) : run<BFloat16Group, BFloat16>(p, num_threads);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
