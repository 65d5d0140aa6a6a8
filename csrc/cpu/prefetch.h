// Fetching the next head's rows while this one is computed.
//
// The rows of one head are short pieces (256 bytes for 64 float32) in long strides, which no hardware prefetcher follows,
// and at BERT's sequence lengths waiting for them takes as long as the arithmetic.

#pragma once

#include "cpu/vec.h"

namespace fastbert::cpu::FASTBERT_ISA {

class Prefetcher {
 public:
  // rows: of each matrix; steps: how many calls of step() the work will make, give or take.
  Prefetcher(int64_t rows, int64_t steps) : rows_(rows), steps_(steps > 0 ? steps : 1) {}

  // A matrix of `rows` rows of row_bytes, stride_bytes apart.
  void add(const void* first, int64_t row_bytes, int64_t stride_bytes) {
    matrices_[count_++] = {static_cast<const char*>(first), row_bytes, stride_bytes};
  }

  // Fetches the next few rows of every matrix, so many that the last step fetches the last row.
  FASTBERT_INLINE void step() {
    for (credit_ += rows_; credit_ >= steps_ && next_row_ < rows_; credit_ -= steps_, ++next_row_) {
      for (int i = 0; i < count_; ++i) {
        const char* row = matrices_[i].first + next_row_ * matrices_[i].stride_bytes;
        for (int64_t byte = 0; byte < matrices_[i].row_bytes; byte += kCacheLine) __builtin_prefetch(row + byte, 0, 2);
      }
    }
  }

 private:
  static constexpr int64_t kCacheLine = 64;
  static constexpr int kMaxMatrices = 8;

  struct Matrix {
    const char* first;
    int64_t row_bytes, stride_bytes;
  };
  Matrix matrices_[kMaxMatrices];
  int count_ = 0;
  int64_t rows_, steps_, credit_ = 0, next_row_ = 0;
};

}  // namespace fastbert::cpu::FASTBERT_ISA
