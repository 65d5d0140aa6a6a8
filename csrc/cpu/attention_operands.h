// What attention reads and writes: of the queries of all rows, with queries, keys and values side by side, or of some rows.

#pragma once

#include "cpu/attention_layout.h"
#include "cpu/attention_schedule.h"
#include "cpu/prefetch.h"
#include "fastbert.h"

namespace fastbert::cpu::FASTBERT_ISA {

// What both kinds of attention read. A matrix has the heads of a row side by side.
template <typename T>
struct Operands {
  Rows<T> q, k, v;
  Queries queries;
  int64_t total, num_heads, head_dim;
  float softmax_scale;
  const Dropout& dropout;

  int64_t row_of(int64_t query) const { return queries.are_of_all_rows ? query : queries.rows[query]; }
};

template <typename T, typename Params>
Operands<T> operands_of_all(const Params& p) {
  const int64_t hidden = p.num_heads * p.head_dim;
  const Rows<T> qkv{static_cast<const T*>(p.qkv), 3 * hidden};
  return {qkv,
          qkv.from(0, hidden),
          qkv.from(0, 2 * hidden),
          {p.total, true, nullptr},
          p.total,
          p.num_heads,
          p.head_dim,
          p.softmax_scale,
          p.dropout};
}

template <typename T, typename Params>
Operands<T> operands_of_rows(const Params& p) {
  const int64_t hidden = p.num_heads * p.head_dim;
  const Rows<T> kv{static_cast<const T*>(p.kv), 2 * hidden};
  return {{static_cast<const T*>(p.q), hidden},
          kv,
          kv.from(0, hidden),
          {p.queries, false, p.rows},
          p.total,
          p.num_heads,
          p.head_dim,
          p.softmax_scale,
          p.dropout};
}

// Rows that are written, `stride` elements apart.
template <typename T>
struct Written {
  T* data;
  int64_t stride;

  Written from(int64_t row, int64_t column = 0) const { return {data + row * stride + column, stride}; }
};

// What the backward pass reads and writes beside the operands. out, dout, dq: (queries, num_heads, head_dim); lse:
// (num_heads, queries); dk, dv: (total, num_heads, head_dim).
template <typename T>
struct Gradients {
  Rows<T> out, dout;
  const float* lse;
  Written<T> dq, dk, dv;
};

template <typename T>
void prefetch_head(const Operands<T>& p, const AttentionItem& item, int64_t head, Prefetcher& prefetcher) {
  const auto add = [&](Rows<T> rows, int64_t first) {
    prefetcher.add(rows.from(first, head * p.head_dim).data, p.head_dim * sizeof(T), rows.stride * sizeof(T));
  };
  if (p.queries.are_of_all_rows) add(p.q, item.first_query);  // a few of them are not worth it
  add(p.k, item.start);
  add(p.v, item.start);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
