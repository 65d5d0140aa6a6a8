// The gradient of a table that rows were gathered from: row i is the sum of the rows of dz whose id is i.
//
// Every row of the table is written once, absent ones with zeros: torch sets the whole gradient to zero first and then adds
// to some of its rows on one thread. Rows of dz are sorted by their ids, stably, so sums have one order whatever the number
// of threads. Bytes: rows * hidden * 4 read, num_ids * hidden written.

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

constexpr int64_t kFewIds = 64;           // their runs are long: threads share a run's columns
constexpr int64_t kColumnsOfFewIds = 64;  // a cache line or more of every dtype
constexpr int64_t kElementsPerItem = 1 << 14;

// starts[i] .. starts[i + 1] are the places in order of the rows with id i.
void sort_rows(const TableGradientParams& p) {
  std::memset(p.starts, 0, (p.num_ids + 1) * sizeof(int64_t));
  for (int64_t row = 0; row < p.rows; ++row) ++p.starts[p.ids[row]];
  int64_t place = 0;
  for (int64_t id = 0; id <= p.num_ids; ++id) {
    const int64_t count = p.starts[id];
    p.starts[id] = place;
    place += count;
  }
  for (int64_t row = 0; row < p.rows; ++row) p.order[p.starts[p.ids[row]]++] = row;
  // Every start has moved to its end, which is the next one's start.
  std::memmove(p.starts + 1, p.starts, p.num_ids * sizeof(int64_t));
  p.starts[0] = 0;
}

// Columns first to last of the row of the table whose rows of dz are order[0 .. count - 1].
template <typename T>
void sum_run(const TableGradientParams& p, const int64_t* order, int64_t count, T* to, int64_t first, int64_t last) {
  for_columns(last - first, [&](int64_t column, auto extent) {
    const float* const dz = static_cast<const float*>(p.dz) + first + column;
    Vec total = load(dz + order[0] * p.hidden, extent);
    for (int64_t i = 1; i < count; ++i) total += load(dz + order[i] * p.hidden, extent);
    store(to + first + column, total, extent);
  });
}

template <typename T>
void gradient(const TableGradientParams& p, int num_threads) {
  sort_rows(p);
  T* const table = static_cast<T*>(p.out);
  const int64_t width = p.num_ids < kFewIds ? kColumnsOfFewIds : p.hidden;
  const int64_t parts = width < p.hidden ? (p.hidden + width - 1) / width : 1;
  const int64_t ids_per_item = parts > 1 || p.hidden >= kElementsPerItem ? 1 : kElementsPerItem / p.hidden;
  const int64_t items_of_ids = (p.num_ids + ids_per_item - 1) / ids_per_item;
  const bool is_small = (p.rows + p.num_ids) * p.hidden < kElementsWorthThreads;
  parallel_for(items_of_ids * parts, is_small ? 1 : num_threads, [&](int64_t item) {
    const int64_t first = item % parts * width, last = first + width < p.hidden ? first + width : p.hidden;
    const int64_t first_id = item / parts * ids_per_item;
    const int64_t last_id = first_id + ids_per_item < p.num_ids ? first_id + ids_per_item : p.num_ids;
    for (int64_t id = first_id; id < last_id; ++id) {
      T* const to = table + id * p.hidden;
      const int64_t count = id == p.padding_idx ? 0 : p.starts[id + 1] - p.starts[id];
      if (count == 0) {
        std::memset(static_cast<void*>(to + first), 0, (last - first) * sizeof(T));
      } else {
        sum_run(p, p.order + p.starts[id], count, to, first, last);
      }
    }
  });
}

}  // namespace

void table_gradient(const TableGradientParams& p, int num_threads) {
  if (p.hidden == 0) return;
  p.out_dtype == DType::float32 ? gradient<float>(p, num_threads) : gradient<BFloat16>(p, num_threads);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
