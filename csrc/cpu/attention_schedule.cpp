#include "cpu/attention_schedule.h"

#include <algorithm>

namespace fastbert::cpu {

AttentionSchedule::AttentionSchedule(const int32_t* cu_seqlens, int64_t batch, const Queries& queries, int64_t num_heads,
                                     int num_threads, int64_t min_queries) {
  struct Sequence {
    int64_t start, length, first_query, num_queries;
  };
  std::vector<Sequence> sequences;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t start = cu_seqlens[i], length = cu_seqlens[i + 1] - start;
    if (length == 0) continue;
    const auto count_before = [&](int64_t row) {
      return queries.are_of_all_rows ? row
                                     : std::lower_bound(queries.rows, queries.rows + queries.count, row) - queries.rows;
    };
    const int64_t first = count_before(start), last = count_before(start + length);
    sequences.push_back({start, length, first, last - first});
  }
  std::stable_sort(sequences.begin(), sequences.end(), [](auto& a, auto& b) { return a.length > b.length; });

  // So many items per thread that the last ones to finish do not keep the others waiting for long.
  constexpr int64_t items_per_thread = 8, pieces_per_thread = 3;
  const int64_t heads_total = std::max<int64_t>(static_cast<int64_t>(sequences.size()) * num_heads, 1);
  const int64_t heads_per_item =
      num_threads == 1 ? num_heads : std::clamp<int64_t>(heads_total / (items_per_thread * num_threads), 1, num_heads);
  const int64_t wanted_pieces = num_threads == 1 ? 1 : (pieces_per_thread * num_threads + heads_total - 1) / heads_total;
  for (const Sequence& sequence : sequences) {
    const int64_t pieces = std::clamp<int64_t>(sequence.num_queries / min_queries, 1, wanted_pieces);
    for (int64_t head = 0; head < num_heads; head += heads_per_item) {
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = piece * sequence.num_queries / pieces, last = (piece + 1) * sequence.num_queries / pieces;
        const int64_t last_head = std::min(head + heads_per_item, num_heads);
        items_.push_back({sequence.start, sequence.length, head, last_head, sequence.first_query + first, last - first});
      }
    }
  }
}

AttentionSchedule::~AttentionSchedule() = default;

int64_t AttentionSchedule::num_items() const { return static_cast<int64_t>(items_.size()); }

int64_t AttentionSchedule::max_length() const { return items_.empty() ? 0 : items_.front().length; }

const AttentionItem& AttentionSchedule::item(int64_t index) const { return items_[index]; }

}  // namespace fastbert::cpu
