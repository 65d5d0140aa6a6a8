// The linear layers of the encoder's inference: packing of weights, and x W^T + b on a block of rows.

#pragma once

#include <type_traits>

#include "cpu/encoder_plan.h"
#include "cpu/kernels.h"
#include "cpu/packed_gemm.h"

namespace fastbert::cpu::FASTBERT_ISA {

inline int64_t count_panels(int64_t out_features) { return (out_features + kPanelColumns - 1) / kPanelColumns; }

// A matrix on the left of a linear layer, of Group's elements; scale: of each row's where they are integers, otherwise null.
struct LeftMatrixRows {
  const void* data;
  int64_t row_bytes;
  const float* scale;
};

template <typename Group>
constexpr bool kQuantizes = std::is_integral_v<typename Group::Element>;

// Calls finish(row, column, value, extent) for the elements of x W^T + b in the rows [0, rows) of x and some panels of W.
template <typename Group, typename Finish>
void packed_linear(int64_t rows, LeftMatrixRows x, const PackedLinear& linear, int64_t first_panel, int64_t last_panel,
                   void* sum_scratch, const Finish& finish) {
  using Sum = typename Group::Sum;
  const int64_t groups = linear.in_features / Group::kElements;
  const uint32_t* packed = static_cast<const uint32_t*>(linear.weight);
  const auto panel_at = [&](int64_t panel) { return packed + panel * groups * kPanelColumns; };
  for (int64_t first = 0; first < rows; first += kMaxBlockRows) {
    const int64_t block = rows - first < kMaxBlockRows ? rows - first : kMaxBlockRows;
    const LeftRows<Group> left{static_cast<const char*>(x.data) + first * x.row_bytes, x.row_bytes};
    multiply_packed_panels<Group>(
        block, groups, left, first_panel, last_panel, linear.out_features, panel_at, static_cast<Sum*>(sum_scratch),
        [=](int64_t row, int64_t column, Sum sum, auto extent) {
          // No branch between the product and the sum: the compiler makes one rounding of both only where there is none, and
          // this is compiled for sums that wait and for others.
          const Vec bias = linear.bias == nullptr ? Vec{} : load(linear.bias + column, extent);
          Vec value;
          if constexpr (kQuantizes<Group>) {
            if constexpr (Group::kZeroPoint != 0) sum -= load_int(linear.zero_point_sums + column, extent);
            value = __builtin_convertvector(sum, Vec) * (load(linear.scale + column, extent) * x.scale[first + row]) + bias;
          } else {
            value = sum + bias;
          }
          finish(first + row, column, value, extent);
        });
  }
}

// The simplest end of a linear layer: its elements are stored in rows that are `stride` apart.
template <typename T>
auto store_rows(T* to, int64_t stride) {
  return [=](int64_t row, int64_t column, Vec v, auto extent) { store(to + row * stride + column, v, extent); };
}

// Packs a weight (out_features, in_features) of T into panels; what pads the last one is 0. in_features are whole groups.
template <typename Group, typename T>
void pack_panels(const T* weight, int64_t out_features, int64_t in_features, uint32_t* packed, int num_threads) {
  const int64_t groups = in_features / Group::kElements;
  parallel_for(count_panels(out_features), num_threads, [&](int64_t panel) {
    const int64_t first = panel * kPanelColumns, left = out_features - first;
    const T* rows = weight + first * in_features;
    const float* from = reinterpret_cast<const float*>(rows);
    if constexpr (sizeof(T) * Group::kElements < 4) {
      const int64_t elements = (left < kPanelColumns ? left : kPanelColumns) * in_features;
      float* scratch = thread_scratch(static_cast<size_t>(kPanelColumns * groups));
      int16_t* wider = reinterpret_cast<int16_t*>(scratch);
      for (int64_t i = 0; i < elements; ++i) wider[i] = rows[i];
      from = scratch;
    }
    pack_panel_of_rows(from, groups, left, groups, packed + panel * groups * kPanelColumns);
  });
}

}  // namespace fastbert::cpu::FASTBERT_ISA
