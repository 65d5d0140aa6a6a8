// Attention within each sequence of a packed batch, forward and backward, of all rows' queries or of some.
//
// The keys and values of one head of one sequence are packed once, then blocks of queries pass by. The whole rows of scores
// of a block stay in the second-level cache, so that the softmax needs no online rescaling: BERT's sequences are short. In
// bfloat16 inference it mostly needs no maxima either, nor scores in memory (bounded_softmax.h).
// bfloat16 is multiplied as it is where the instruction set can (probabilities are rounded to it before they meet the
// values; scores, softmax and sums are float32), otherwise as float32. The backward pass recomputes the probabilities from
// the saved log-sum-exp (Dao et al., 2022, algorithm 4); one thread owns all of a head's dK and dV, so there are no atomics
// and the result is deterministic.

#include "cpu/attention_layout.h"
#include "cpu/attention_operands.h"
#include "cpu/attention_schedule.h"
#include "cpu/bounded_softmax.h"
#include "cpu/kernels.h"
#include "cpu/softmax.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

struct ForwardScratch {
  float *keys, *values, *queries, *scores, *out;
  SoftmaxRows rows;
  uint16_t* bits;

  ForwardScratch(Arena& arena, const Shape& shape)
      : keys(arena.floats(shape.padded_length * shape.head_dim)),
        values(arena.floats(shape.depth_length * shape.padded_head_dim)),
        queries(arena.floats(shape.query_block * shape.padded_head_dim)),
        scores(arena.floats(shape.query_block * shape.score_leading)),
        out(arena.floats(shape.query_block * shape.padded_head_dim)),
        rows{arena.floats(round_up(shape.query_block, kWidth) * kWidth), arena.floats(round_up(shape.query_block, kWidth)),
             arena.floats(round_up(shape.query_block, kWidth))},
        bits(reinterpret_cast<uint16_t*>(arena.floats(round_up(shape.length, kDropoutColumns) / 2))) {}
};

struct BackwardScratch {
  float *keys_transposed, *values_transposed, *keys, *left, *queries, *douts, *scores, *dscores, *turned, *dqueries, *dkeys,
      *dvalues;
  float *lanes, *lse, *delta;  // of a block's queries, as SoftmaxRows
  uint16_t* bits[2];

  BackwardScratch(Arena& arena, const Shape& shape)
      : keys_transposed(arena.floats(shape.padded_length * shape.head_dim)),
        values_transposed(arena.floats(shape.padded_length * shape.head_dim)),
        keys(arena.floats(shape.depth_length * shape.padded_head_dim)),
        left(arena.floats(shape.query_block * shape.padded_head_dim)),
        queries(arena.floats(round_up(shape.query_block, kRowMultiple) * shape.padded_head_dim)),
        douts(arena.floats(round_up(shape.query_block, kRowMultiple) * shape.padded_head_dim)),
        scores(arena.floats(shape.query_block * shape.score_leading)),
        dscores(arena.floats(shape.query_block * shape.score_leading)),
        turned(arena.floats(kRowMultiple == 1 ? 0 : shape.padded_length * odd_lines(shape.query_block / 2))),
        dqueries(arena.floats(shape.query_block * shape.padded_head_dim)),
        dkeys(arena.floats(shape.length * shape.padded_head_dim)),
        dvalues(arena.floats(shape.length * shape.padded_head_dim)),
        lanes(arena.floats(round_up(shape.query_block, kWidth) * kWidth)),
        lse(arena.floats(round_up(shape.query_block, kWidth))),
        delta(arena.floats(round_up(shape.query_block, kWidth))) {
    for (uint16_t*& row_bits : bits) {
      row_bits = reinterpret_cast<uint16_t*>(arena.floats(round_up(shape.length, kDropoutColumns) / 2));
    }
  }
};

template <typename Scratch>
size_t scratch_floats(const Shape& shape) {
  Arena arena(nullptr);
  Scratch measured(arena, shape);
  return static_cast<size_t>(arena.used());
}

// Overwrites the scores of a block of queries with unnormalised probabilities, A of the product with V, and the lanes of
// rows with their sums.
template <typename Dot, bool kDropout, typename T>
void exponentiate_block(const Operands<T>& p, int64_t first_query, int64_t head, int64_t num_rows, const Shape& shape,
                        const ForwardScratch& scratch) {
  const SoftmaxRows& rows = scratch.rows;
  for (int64_t row = 0; row < num_rows; row += kWidth) {
    store(rows.max + row, combine_lanes(rows.lanes + row * kWidth, maximum));
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    float* scores = scratch.scores + row * shape.score_leading;
    if constexpr (kDropout) dropout_bits(scratch.bits, shape.length, p.row_of(first_query + row), head, p.dropout);
    // Probabilities are not wider than scores: they never overwrite what is still to be read.
    const Vec sums = exponentiate_row<kDropout>(
        scores, shape.length, rows.max[row], scratch.bits, p.dropout.threshold,
        [&](int64_t column, Vec probability) { store_elements<Dot>(scores, column, probability); });
    store(rows.lanes + row * kWidth, sums);
  }
}

// scratch.scores = the unnormalised probabilities of a block of queries, A of the product with V; their normalisation is in
// scratch.rows. lse: of the block's queries, or null. bound: of the scores, infinity where it is not known.
template <typename Dot, typename T>
void softmax_block(const Operands<T>& p, float* lse, int64_t first_query, int64_t head, int64_t num_rows, LeftMatrix queries,
                   RightMatrix keys, float bound, const Shape& shape, const ForwardScratch& scratch,
                   Prefetcher& prefetcher) {
  const SoftmaxRows& rows = scratch.rows;
  const float scale = p.softmax_scale * kLog2E;
  const auto multiply_keys = [&](const auto& finish) {
    multiply<Dot>(num_rows, shape.padded_length, groups<Dot>(p.head_dim), queries, keys,
                  {scratch.scores, shape.score_leading}, finish, prefetcher);
  };
  bool bounded = false;
  if constexpr (Dot::kElements == 2) {
    bounded = bound <= kLargestBound;
    if (bounded) {
      multiply_keys(StoreProbabilities{scratch.scores, shape.score_leading, rows.lanes, shape.length, scale, bound});
    }
  }
  if (!bounded) {
    multiply_keys(StoreScores{scratch.scores, shape.score_leading, rows.lanes, shape.length, scale});
    p.dropout.threshold > 0 ? exponentiate_block<Dot, true>(p, first_query, head, num_rows, shape, scratch)
                            : exponentiate_block<Dot, false>(p, first_query, head, num_rows, shape, scratch);
  }
  const float numerator = p.dropout.threshold > 0 ? p.dropout.scale : 1.0f;
  for_columns(num_rows, [&](int64_t row, auto extent) {
    const Vec sum = combine_lanes(rows.lanes + row * kWidth, [](Vec a, Vec b) { return a + b; });
    store(rows.out_scale + row, numerator / sum);
    if (lse != nullptr) store(lse + row, (load(rows.max + row) + log2(sum)) * kLn2, extent);
  });
}

// out: (queries, num_heads, head_dim); lse: (num_heads, queries) or null.
template <typename T>
void forward_head(const Operands<T>& p, T* out, float* lse, const AttentionItem& item, int64_t head, const Shape& shape,
                  const ForwardScratch& scratch) {
  using Dot = typename DotFor<T>::Type;
  if (item.num_queries == 0) return;
  const int64_t hidden = p.num_heads * p.head_dim, column = head * p.head_dim;
  const Rows<T> keys = p.k.from(item.start, column), values = p.v.from(item.start, column);
  const Rows<T> queries = p.q.from(item.first_query, column);
  out += item.first_query * hidden + column;
  if (lse != nullptr) lse += head * p.queries.count + item.first_query;
  const int64_t head_groups = groups<Dot>(p.head_dim), key_groups = depth_of<Dot>(shape.length);
  Prefetcher prefetcher(shape.length, count_tiles(item.num_queries, shape.length, head_groups) +
                                          count_tiles(item.num_queries, p.head_dim, key_groups));
  const int64_t bytes = p.head_dim * sizeof(T), stride = hidden * sizeof(T);
  if (p.queries.are_of_all_rows) prefetcher.add(out, bytes, stride);
  if (head + 1 < item.last_head) prefetch_head(p, item, head + 1, prefetcher);
  const RightMatrix packed_keys = pack_transposed<Dot>(keys, shape, scratch.keys);
  const RightMatrix packed_values = pack_right<Dot>(values, shape.length, shape, scratch.values);
  float bound = __builtin_inff();
  if constexpr (Dot::kElements == 2) {
    // lse is float32's: what is good enough for probabilities in bfloat16 is not for their sums.
    if (p.queries.are_of_all_rows && lse == nullptr && p.dropout.threshold == 0) {
      const Rows<T> all = p.q.from(item.start, column);
      bound = bound_scores<Dot>(all, packed_keys, shape, p.softmax_scale * kLog2E, scratch.rows.lanes);
    }
  }

  for (int64_t first = 0; first < item.num_queries; first += shape.query_block) {
    const int64_t left = item.num_queries - first, rows = left < shape.query_block ? left : shape.query_block;
    const LeftMatrix block = as_left<Dot>(queries.from(first), rows, shape, scratch.queries);
    softmax_block<Dot>(p, lse == nullptr ? nullptr : lse + first, item.first_query + first, head, rows, block, packed_keys,
                       bound, shape, scratch, prefetcher);
    fill_depth<Dot>(scratch.scores, rows, shape);
    multiply<Dot>(rows, shape.padded_head_dim, key_groups, {scratch.scores, shape.score_leading, 1}, packed_values,
                  {scratch.out, shape.padded_head_dim},
                  StoreScaled<T>{out + first * hidden, hidden, p.head_dim, scratch.rows.out_scale, 1}, prefetcher);
  }
}

struct Differentiated {
  Vec probability;  // after dropout
  Vec dscore;
};

// scale and lse are in powers of two; delta: the sum of dout * out over the query's head, the derivative of the softmax's
// normalisation (Dao et al., 2022).
template <bool kDropout>
FASTBERT_INLINE Differentiated differentiate(Vec score, Vec dprobability, float scale, float lse, float delta,
                                             const uint16_t* bits, const Dropout& dropout) {
  const Vec probability = exp2(score * scale - lse);
  if constexpr (kDropout) {
    const Vec factor = drop(splat(dropout.scale), bits, dropout.threshold);
    return {probability * factor, probability * (dprobability * factor - delta)};
  }
  return {probability, probability * (dprobability - delta)};
}

// What the last three products of the backward pass read, all of it in the scratch memory of scores and dscores.
struct BlockGradients {
  LeftMatrix dscores;                                       // (queries, keys)
  LeftMatrix dscores_transposed, probabilities_transposed;  // (keys, queries), the latter after dropout
};

// From the products Q K^T in scratch.scores and dO V^T in scratch.dscores.
template <typename Dot, bool kDropout, typename T>
BlockGradients differentiate_block(const Operands<T>& p, int64_t first_query, int64_t head, int64_t num_rows,
                                   const Shape& shape, const BackwardScratch& scratch) {
  const float scale = p.softmax_scale * kLog2E;
  const int64_t leading = shape.score_leading;
  const auto draw_bits = [&](int64_t row, int i) {
    if constexpr (kDropout) dropout_bits(scratch.bits[i], shape.length, p.row_of(first_query + row), head, p.dropout);
  };
  if constexpr (Dot::kElements == 1) {
    for (int64_t row = 0; row < num_rows; ++row) {
      float *scores = scratch.scores + row * leading, *dscores = scratch.dscores + row * leading;
      draw_bits(row, 0);
      for_columns(shape.length, [&](int64_t column, auto) {
        const Differentiated d =
            differentiate<kDropout>(load(scores + column), load(dscores + column), scale, scratch.lse[row],
                                    scratch.delta[row], scratch.bits[0] + column, p.dropout);
        store(scores + column, d.probability);
        store(dscores + column, d.dscore);
      });
    }
    return {{scratch.dscores, leading, 1}, {scratch.dscores, 1, leading}, {scratch.scores, 1, leading}};
  } else {
    // Two queries at a time. dscores (queries, keys) take the place of scores; of the gradients' rows the even ones become
    // pairs of probabilities, the odd ones pairs of dscores.
    for (int64_t row = 0; row < num_rows; row += 2) {
      float* scores[2] = {scratch.scores + row * leading, scratch.scores + (row + 1) * leading};
      float* dscores[2] = {scratch.dscores + row * leading, scratch.dscores + (row + 1) * leading};
      const bool pair = row + 1 < num_rows;
      draw_bits(row, 0);
      if (pair) draw_bits(row + 1, 1);
      for_columns(shape.length, [&](int64_t column, auto extent) {
        Differentiated d[2] = {};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          if (i == 1 && !pair) break;
          d[i] = differentiate<kDropout>(load(scores[i] + column), load(dscores[i] + column), scale, scratch.lse[row + i],
                                         scratch.delta[row + i], scratch.bits[i] + column, p.dropout);
        }
        // A key that is not there would count in the last pair of an odd number.
        const Vec even = within(d[0].dscore, 0.0f, extent), odd = within(d[1].dscore, 0.0f, extent);
        store_elements<Dot>(scores[0], column, even);
        store_elements<Dot>(scores[1], column, odd);
        store(dscores[0] + column, make_groups<Dot>(d[0].probability, d[1].probability));
        store(dscores[1] + column, make_groups<Dot>(even, odd));
      });
    }
    return {{scratch.scores, leading, 1}, {scratch.dscores + leading, 1, 2 * leading}, {scratch.dscores, 1, 2 * leading}};
  }
}

// The gradients of keys and values that no query has seen.
template <typename T>
void fill_zeros(Written<T> dk, Written<T> dv, const Shape& shape) {
  for (int64_t row = 0; row < shape.length; ++row) {
    std::memset(dk.from(row).data, 0, shape.head_dim * sizeof(T));
    std::memset(dv.from(row).data, 0, shape.head_dim * sizeof(T));
  }
}

template <typename T>
void backward_head(const Operands<T>& p, const Gradients<T>& gradients, const AttentionItem& item, int64_t head,
                   const Shape& shape, const BackwardScratch& scratch) {
  using Dot = typename DotFor<T>::Type;
  const int64_t column = head * p.head_dim;
  const Rows<T> keys = p.k.from(item.start, column), values = p.v.from(item.start, column);
  const Rows<T> queries = p.q.from(item.first_query, column);
  const Rows<T> out = gradients.out.from(item.first_query, column), dout = gradients.dout.from(item.first_query, column);
  const Written<T> dq = gradients.dq.from(item.first_query, column);
  const Written<T> dk = gradients.dk.from(item.start, column), dv = gradients.dv.from(item.start, column);
  if (item.num_queries == 0) return fill_zeros(dk, dv, shape);
  const float* lse = gradients.lse + head * p.queries.count + item.first_query;
  const int64_t head_groups = groups<Dot>(p.head_dim), row_groups = depth_of<Dot>(shape.length);
  Prefetcher prefetcher(shape.length, 2 * count_tiles(item.num_queries, shape.length, head_groups) +
                                          3 * count_tiles(item.num_queries, p.head_dim, row_groups));
  const int64_t bytes = p.head_dim * sizeof(T);
  for (const Written<T>& gradient : {dk, dv}) prefetcher.add(gradient.data, bytes, gradient.stride * sizeof(T));
  if (p.queries.are_of_all_rows) prefetcher.add(dq.data, bytes, dq.stride * sizeof(T));
  if (head + 1 < item.last_head) {
    prefetch_head(p, item, head + 1, prefetcher);
    if (p.queries.are_of_all_rows) {
      for (const Rows<T>& rows : {dout, out}) prefetcher.add(rows[0] + p.head_dim, bytes, rows.stride * sizeof(T));
    }
  }
  const RightMatrix keys_transposed = pack_transposed<Dot>(keys, shape, scratch.keys_transposed);
  const RightMatrix values_transposed = pack_transposed<Dot>(values, shape, scratch.values_transposed);
  const RightMatrix packed_keys = pack_right<Dot>(keys, shape.length, shape, scratch.keys);

  for (int64_t first = 0; first < item.num_queries; first += shape.query_block) {
    const int64_t left = item.num_queries - first, rows = left < shape.query_block ? left : shape.query_block;
    const RightMatrix query_block = pack_right<Dot>(queries.from(first), rows, shape, scratch.queries);
    const RightMatrix dout_block = pack_right<Dot>(dout.from(first), rows, shape, scratch.douts);
    const auto multiply_head_dim = [&](Rows<T> from, RightMatrix packed, RightMatrix b, float* to) {
      // One element a group: B's layout is A's.
      const LeftMatrix a = Dot::kElements == 1 ? LeftMatrix{packed.data, packed.leading, 1}
                                               : as_left<Dot>(from.from(first), rows, shape, scratch.left);
      multiply<Dot>(rows, shape.padded_length, head_groups, a, b, {to, shape.score_leading},
                    StoreRows{to, shape.score_leading}, prefetcher);
    };
    multiply_head_dim(queries, query_block, keys_transposed, scratch.scores);
    multiply_head_dim(dout, dout_block, values_transposed, scratch.dscores);

    for (int64_t row = 0; row < rows; ++row) {
      Vec sums{};
      for_columns(p.head_dim, [&](int64_t d, auto extent) {
        sums += load(dout[first + row] + d, extent) * load(out[first + row] + d, extent);
      });
      store(scratch.lanes + row * kWidth, sums);
      scratch.lse[row] = lse[first + row] * kLog2E;
    }
    for (int64_t row = 0; row < rows; row += kWidth) {
      store(scratch.delta + row, combine_lanes(scratch.lanes + row * kWidth, [](Vec a, Vec b) { return a + b; }));
    }
    const int64_t first_query = item.first_query + first;
    const BlockGradients block = p.dropout.threshold > 0
                                     ? differentiate_block<Dot, true>(p, first_query, head, rows, shape, scratch)
                                     : differentiate_block<Dot, false>(p, first_query, head, rows, shape, scratch);

    fill_depth<Dot>(scratch.scores, rows, shape);  // what block.dscores reads in place of float32's
    multiply<Dot>(rows, shape.padded_head_dim, row_groups, block.dscores, packed_keys,
                  {scratch.dqueries, shape.padded_head_dim},
                  StoreScaled<T>{dq.from(first).data, dq.stride, p.head_dim, &p.softmax_scale, 0}, prefetcher);
    const auto add_block = [&](LeftMatrix a, RightMatrix b, float* sums, Written<T> to, float scale) {
      const Partial partial{sums, shape.padded_head_dim, first > 0};
      const LeftMatrix left_rows = turned<Dot>(a, shape.length, groups<Dot>(rows), scratch.turned);
      if (rows < left) {
        multiply<Dot>(shape.length, shape.padded_head_dim, depth_of<Dot>(rows), left_rows, b, partial,
                      StoreRows{sums, shape.padded_head_dim}, prefetcher);
      } else {
        multiply<Dot>(shape.length, shape.padded_head_dim, depth_of<Dot>(rows), left_rows, b, partial,
                      StoreScaled<T>{to.data, to.stride, p.head_dim, &scale, 0}, prefetcher);
      }
    };
    add_block(block.dscores_transposed, query_block, scratch.dkeys, dk, p.softmax_scale);
    add_block(block.probabilities_transposed, dout_block, scratch.dvalues, dv, 1.0f);
  }
}

// Runs head(item, head, shape, scratch) for every head of the batch.
template <typename Scratch, typename T, typename Head>
void for_heads(const AttentionSchedule& schedule, const Operands<T>& p, int num_threads, const Head& head) {
  const int64_t elements = (p.queries.count * schedule.max_length() + p.total) * p.num_heads;
  parallel_for(schedule.num_items(), elements < kElementsWorthThreads ? 1 : num_threads, [&](int64_t index) {
    const AttentionItem& item = schedule.item(index);
    const Shape shape(item.length, p.head_dim, item.num_queries);
    Arena arena(thread_scratch(scratch_floats<Scratch>(shape)));
    const Scratch scratch(arena, shape);
    for (int64_t h = item.first_head; h < item.last_head; ++h) head(item, h, shape, scratch);
  });
}

template <typename T, typename Params>
void forward(const Operands<T>& operands, const Params& p, int num_threads) {
  const AttentionSchedule schedule(p.cu_seqlens, p.batch, operands.queries, p.num_heads, num_threads, kMinQueryBlock);
  for_heads<ForwardScratch>(schedule, operands, num_threads,
                            [&](const auto&... head) { forward_head(operands, static_cast<T*>(p.out), p.lse, head...); });
}

template <typename T, typename Params>
void backward(const Operands<T>& operands, Written<T> dq, Written<T> dk, Written<T> dv, const Params& p, int num_threads) {
  constexpr int64_t whole_sequences = INT64_MAX;
  const AttentionSchedule schedule(p.cu_seqlens, p.batch, operands.queries, p.num_heads, num_threads, whole_sequences);
  const int64_t hidden = p.num_heads * p.head_dim;
  const Gradients<T> gradients{
      {static_cast<const T*>(p.out), hidden}, {static_cast<const T*>(p.dout), hidden}, p.lse, dq, dk, dv};
  for_heads<BackwardScratch>(schedule, operands, num_threads,
                             [&](const auto&... head) { backward_head(operands, gradients, head...); });
}

template <typename T>
void backward_of_all(const AttentionBackwardParams& p, int num_threads) {
  const int64_t hidden = p.num_heads * p.head_dim;
  const Written<T> dqkv{static_cast<T*>(p.dqkv), 3 * hidden};
  backward(operands_of_all<T>(p), dqkv, dqkv.from(0, hidden), dqkv.from(0, 2 * hidden), p, num_threads);
}

template <typename T>
void backward_of_rows(const AttentionOfRowsBackwardParams& p, int num_threads) {
  const int64_t hidden = p.num_heads * p.head_dim;
  const Written<T> dkv{static_cast<T*>(p.dkv), 2 * hidden};
  backward(operands_of_rows<T>(p), {static_cast<T*>(p.dq), hidden}, dkv, dkv.from(0, hidden), p, num_threads);
}

}  // namespace

void attention_forward(const AttentionForwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? forward(operands_of_all<float>(p), p, num_threads)
                            : forward(operands_of_all<BFloat16>(p), p, num_threads);
}

void attention_backward(const AttentionBackwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? backward_of_all<float>(p, num_threads) : backward_of_all<BFloat16>(p, num_threads);
}

void attention_of_rows_forward(const AttentionOfRowsForwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? forward(operands_of_rows<float>(p), p, num_threads)
                            : forward(operands_of_rows<BFloat16>(p), p, num_threads);
}

void attention_of_rows_backward(const AttentionOfRowsBackwardParams& p, int num_threads) {
  p.dtype == DType::float32 ? backward_of_rows<float>(p, num_threads) : backward_of_rows<BFloat16>(p, num_threads);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
