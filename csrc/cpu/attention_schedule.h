// How attention is divided among threads, compiled once for all instruction sets.

#pragma once

#include <cstdint>
#include <vector>

namespace fastbert::cpu {

// Some heads of one sequence, and some of its queries, which see all keys of the sequence.
struct AttentionItem {
  int64_t start, length;             // of the sequence, in rows of the packed batch
  int64_t first_head, last_head;     // last_head is not included
  int64_t first_query, num_queries;  // among the queries of all sequences
};

// The queries of a packed batch: one of every row, or of some rows, which are in rising order.
struct Queries {
  int64_t count;
  bool are_of_all_rows;
  const int64_t* rows;  // (count,) where they are of some
};

// The items of a packed batch, long sequences first, so that no thread ends with a long one when the others are done.
class AttentionSchedule {
 public:
  // A thread gets neighbouring heads where there is enough for all, and a few of a head's queries, at least min_queries,
  // where there are fewer heads than threads.
  AttentionSchedule(const int32_t* cu_seqlens, int64_t batch, const Queries& queries, int64_t num_heads, int num_threads,
                    int64_t min_queries);
  AttentionSchedule(const AttentionSchedule&) = delete;
  ~AttentionSchedule();

  int64_t num_items() const;
  int64_t max_length() const;
  const AttentionItem& item(int64_t index) const;

 private:
  std::vector<AttentionItem> items_;
};

}  // namespace fastbert::cpu
