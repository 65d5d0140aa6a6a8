// A linear layer on packed weights alone, of a model that is not trained: y = x W^T + b.

#include "cpu/packed_linear.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

template <typename Group, typename T>
void run(const PackedDenseParams& p, int num_threads) {
  const LeftMatrixRows x{p.x, p.x_row_stride * static_cast<int64_t>(sizeof(T)), nullptr};
  T* y = static_cast<T*>(p.y);
  // Neighbouring panels, each of which asks the memory for the next: few rows wait for nothing else.
  const int64_t panels = count_panels(p.linear.out_features), pieces = panels < 2 * num_threads ? panels : 2 * num_threads;
  parallel_for(pieces, num_threads, [&](int64_t piece) {
    packed_linear<Group>(p.rows, x, p.linear, piece * panels / pieces, (piece + 1) * panels / pieces,
                         thread_scratch(kSumVectors * kWidth), store_rows(y, p.linear.out_features));
  });
}

}  // namespace

void packed_dense(const PackedDenseParams& p, int num_threads) {
  // dispatch.cpp lets pass what the instruction set can do.
  if (p.dtype == DType::float32) return run<FloatGroup, float>(p, num_threads);
#if defined(__AVX512BF16__)
  run<BFloat16Group, BFloat16>(p, num_threads);
#endif
}

}  // namespace fastbert::cpu::FASTBERT_ISA
