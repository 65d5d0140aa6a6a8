// Attention within each sequence of a packed batch, forward and backward.
//
// The keys and values of one head of one sequence are packed once, then blocks of queries pass by. The whole rows of scores
// of a block stay in the second-level cache, so that the softmax needs no online rescaling: BERT's sequences are short.
// bfloat16 is multiplied as it is where the instruction set can (probabilities are rounded to it before they meet the
// values; scores, softmax and sums are float32), otherwise as float32. The backward pass recomputes the probabilities from
// the saved log-sum-exp (Dao et al., 2022, algorithm 4); one thread owns all of a head's dK and dV, so there are no atomics
// and the result is deterministic.

#include "cpu/attention_layout.h"
#include "cpu/attention_schedule.h"
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
        values(arena.floats(shape.length * shape.padded_head_dim)),
        queries(arena.floats(shape.query_block * shape.padded_head_dim)),
        scores(arena.floats(shape.query_block * shape.score_leading)),
        out(arena.floats(shape.query_block * shape.padded_head_dim)),
        rows{arena.floats(round_up(shape.query_block, kWidth) * kWidth), arena.floats(round_up(shape.query_block, kWidth)),
             arena.floats(round_up(shape.query_block, kWidth))},
        bits(reinterpret_cast<uint16_t*>(arena.floats(round_up(shape.length, kDropoutColumns) / 2))) {}
};

struct BackwardScratch {
  float *keys_transposed, *values_transposed, *keys, *queries, *douts, *probabilities, *dscores, *dqueries, *dkeys, *dvalues;
  uint16_t* bits;

  BackwardScratch(Arena& arena, const Shape& shape)
      : keys_transposed(arena.floats(shape.padded_length * shape.head_dim)),
        values_transposed(arena.floats(shape.padded_length * shape.head_dim)),
        keys(arena.floats(shape.length * shape.padded_head_dim)),
        queries(arena.floats(shape.query_block * shape.padded_head_dim)),
        douts(arena.floats(shape.query_block * shape.padded_head_dim)),
        probabilities(arena.floats(shape.query_block * shape.score_leading)),
        dscores(arena.floats(shape.query_block * shape.score_leading)),
        dqueries(arena.floats(shape.query_block * shape.padded_head_dim)),
        dkeys(arena.floats(shape.length * shape.padded_head_dim)),
        dvalues(arena.floats(shape.length * shape.padded_head_dim)),
        bits(reinterpret_cast<uint16_t*>(arena.floats(round_up(shape.length, kDropoutColumns) / 2))) {}
};

template <typename Scratch>
size_t scratch_floats(const Shape& shape) {
  Arena arena(nullptr);
  Scratch measured(arena, shape);
  return static_cast<size_t>(arena.used());
}

// Overwrites the scores of a block of queries with unnormalised probabilities, A of the product with V, and sets lse (may be
// null) and rows.out_scale. first_row: of the block, in the packed batch.
template <typename Dot, bool kDropout>
void softmax_block(const AttentionForwardParams& p, int64_t first_row, int64_t head, int64_t num_rows, const Shape& shape,
                   const ForwardScratch& scratch) {
  const SoftmaxRows& rows = scratch.rows;
  for (int64_t row = 0; row < num_rows; row += kWidth) {
    store(rows.max + row, combine_lanes(rows.lanes + row * kWidth, maximum));
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    float* scores = scratch.scores + row * shape.score_leading;
    if constexpr (kDropout) dropout_bits(scratch.bits, shape.length, first_row + row, head, p.dropout);
    // Probabilities are not wider than scores: they never overwrite what is still to be read.
    const Vec sums = exponentiate_row<kDropout>(
        scores, shape.length, rows.max[row], scratch.bits, p.dropout.threshold,
        [&](int64_t column, Vec probability) { store_elements<Dot>(scores, column, probability); });
    store(rows.lanes + row * kWidth, sums);
  }
  const float numerator = kDropout ? p.dropout.scale : 1.0f;
  float* lse = p.lse == nullptr ? nullptr : p.lse + head * p.total + first_row;
  for_columns(num_rows, [&](int64_t row, auto extent) {
    const Vec sum = combine_lanes(rows.lanes + row * kWidth, [](Vec a, Vec b) { return a + b; });
    store(rows.out_scale + row, numerator / sum);
    if (lse != nullptr) store(lse + row, (load(rows.max + row) + log2(sum)) * kLn2, extent);
  });
}

template <typename T>
void forward_head(const AttentionForwardParams& p, const AttentionItem& item, int64_t head, const Shape& shape,
                  const ForwardScratch& scratch) {
  using Dot = typename DotFor<T>::Type;
  const int64_t hidden = p.num_heads * p.head_dim;
  const T* qkv = static_cast<const T*>(p.qkv) + item.start * 3 * hidden + head * p.head_dim;
  const Rows<T> queries{qkv, 3 * hidden}, keys{qkv + hidden, 3 * hidden}, values{qkv + 2 * hidden, 3 * hidden};
  T* out = static_cast<T*>(p.out) + item.start * hidden + head * p.head_dim;
  const int64_t head_groups = groups<Dot>(p.head_dim), key_groups = groups<Dot>(shape.length);
  Prefetcher prefetcher(shape.length, count_tiles(item.num_queries, shape.length, head_groups) +
                                          count_tiles(item.num_queries, p.head_dim, key_groups));
  const int64_t bytes = p.head_dim * sizeof(T), stride = hidden * sizeof(T);
  prefetcher.add(out, bytes, stride);
  if (head + 1 < item.last_head) {
    for (int i = 0; i < 3; ++i) prefetcher.add(qkv + p.head_dim + i * hidden, bytes, 3 * stride);
  }
  const RightMatrix packed_keys = pack_transposed<Dot>(keys, shape, scratch.keys);
  const RightMatrix packed_values = pack_right<Dot>(values, shape.length, shape, scratch.values);

  const int64_t end = item.first_query + item.num_queries;
  for (int64_t first = item.first_query; first < end; first += shape.query_block) {
    const int64_t rows = end - first < shape.query_block ? end - first : shape.query_block;
    const LeftMatrix block = as_left<Dot>(queries.from(first), rows, shape, scratch.queries);
    const Partial scores{scratch.scores, shape.score_leading};
    multiply<Dot>(rows, shape.padded_length, head_groups, block, packed_keys, scores,
                  StoreScores{scores.data, scores.leading, scratch.rows.lanes, shape.length, p.softmax_scale * kLog2E},
                  prefetcher);
    if (p.dropout.threshold > 0) {
      softmax_block<Dot, true>(p, item.start + first, head, rows, shape, scratch);
    } else {
      softmax_block<Dot, false>(p, item.start + first, head, rows, shape, scratch);
    }
    multiply<Dot>(rows, shape.padded_head_dim, key_groups, {scores.data, scores.leading, 1}, packed_values,
                  {scratch.out, shape.padded_head_dim},
                  StoreScaled<T>{out + first * hidden, hidden, p.head_dim, scratch.rows.out_scale, 1}, prefetcher);
  }
}

// The sum of dout * out over one query's head: the derivative of the softmax's normalisation (delta in Dao et al.).
template <typename T>
float inner_product(const T* a, const T* b, int64_t n) {
  Vec sums{};
  for_columns(n, [&](int64_t d, auto extent) { sums += load(a + d, extent) * load(b + d, extent); });
  return sum_lanes(sums);
}

// Overwrites a row of scores with the dropped probabilities, and a row of their gradients with those of the scores. scale
// and lse are in powers of two.
template <bool kDropout>
FASTBERT_INLINE void differentiate_row(float* scores, float* gradients, const Shape& shape, float scale, float lse,
                                       float delta, const uint16_t* bits, const Dropout& dropout) {
  for (int64_t column = 0; column < shape.padded_length; column += kWidth) {
    const Vec probability = exp2(load(scores + column) * scale - lse);
    Vec gradient = load(gradients + column);
    Vec dropped = probability;
    if constexpr (kDropout) {
      const Vec factor = drop(splat(dropout.scale), bits + column, dropout.threshold);
      dropped = probability * factor;
      gradient = gradient * factor;
    }
    store(scores + column, dropped);
    store(gradients + column, probability * (gradient - delta));
  }
}

template <typename T>
void backward_head(const AttentionBackwardParams& p, const AttentionItem& item, int64_t head, const Shape& shape,
                   const BackwardScratch& scratch) {
  using Dot = FloatDot;
  const int64_t hidden = p.num_heads * p.head_dim;
  const int64_t qkv_offset = item.start * 3 * hidden + head * p.head_dim;
  const int64_t out_offset = item.start * hidden + head * p.head_dim;
  const T* qkv = static_cast<const T*>(p.qkv) + qkv_offset;
  const Rows<T> queries{qkv, 3 * hidden}, keys{qkv + hidden, 3 * hidden}, values{qkv + 2 * hidden, 3 * hidden};
  const Rows<T> out{static_cast<const T*>(p.out) + out_offset, hidden},
      dout{static_cast<const T*>(p.dout) + out_offset, hidden};
  T* dqkv = static_cast<T*>(p.dqkv) + qkv_offset;
  const float* lse = p.lse + head * p.total + item.start;
  Prefetcher prefetcher(shape.length, 2 * count_tiles(shape.length, shape.length, p.head_dim) +
                                          3 * count_tiles(shape.length, p.head_dim, shape.length));
  const int64_t bytes = p.head_dim * sizeof(T), stride = hidden * sizeof(T);
  for (int i = 0; i < 3; ++i) prefetcher.add(dqkv + i * hidden, bytes, 3 * stride);
  if (head + 1 < item.last_head) {
    for (int i = 0; i < 3; ++i) prefetcher.add(qkv + p.head_dim + i * hidden, bytes, 3 * stride);
    prefetcher.add(dout[0] + p.head_dim, bytes, stride);
    prefetcher.add(out[0] + p.head_dim, bytes, stride);
  }
  const RightMatrix keys_transposed = pack_transposed<Dot>(keys, shape, scratch.keys_transposed);
  const RightMatrix values_transposed = pack_transposed<Dot>(values, shape, scratch.values_transposed);
  const RightMatrix packed_keys = pack_right<Dot>(keys, shape.length, shape, scratch.keys);
  const float one = 1.0f;

  for (int64_t first = 0; first < shape.length; first += shape.query_block) {
    const int64_t rows = shape.length - first < shape.query_block ? shape.length - first : shape.query_block;
    const RightMatrix query_block = pack_right<Dot>(queries.from(first), rows, shape, scratch.queries);
    const RightMatrix dout_block = pack_right<Dot>(dout.from(first), rows, shape, scratch.douts);
    const Partial scores{scratch.probabilities, shape.score_leading}, dscores{scratch.dscores, shape.score_leading};
    multiply<Dot>(rows, shape.padded_length, p.head_dim, {query_block.data, query_block.leading, 1}, keys_transposed, scores,
                  StoreRows{scores.data, scores.leading}, prefetcher);
    multiply<Dot>(rows, shape.padded_length, p.head_dim, {dout_block.data, dout_block.leading, 1}, values_transposed,
                  dscores, StoreRows{dscores.data, dscores.leading}, prefetcher);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t query = first + row;
      const float delta = inner_product(dout[query], out[query], shape.head_dim);
      float* probabilities = scores.data + row * scores.leading;
      float* gradients = dscores.data + row * dscores.leading;
      const float scale2 = p.softmax_scale * kLog2E, lse2 = lse[query] * kLog2E;
      if (p.dropout.threshold > 0) {
        dropout_bits(scratch.bits, shape.length, item.start + query, head, p.dropout);
        differentiate_row<true>(probabilities, gradients, shape, scale2, lse2, delta, scratch.bits, p.dropout);
      } else {
        differentiate_row<false>(probabilities, gradients, shape, scale2, lse2, delta, nullptr, p.dropout);
      }
    }
    multiply<Dot>(rows, shape.padded_head_dim, shape.length, {dscores.data, dscores.leading, 1}, packed_keys,
                  {scratch.dqueries, shape.padded_head_dim},
                  StoreScaled<T>{dqkv + first * 3 * hidden, 3 * hidden, p.head_dim, &p.softmax_scale, 0}, prefetcher);
    const auto add_block = [&](const Partial& a, RightMatrix b, float* sums, T* to, const float* scale) {
      const Partial partial{sums, shape.padded_head_dim, first > 0};
      const LeftMatrix transposed{a.data, 1, a.leading};
      if (first + rows < shape.length) {
        multiply<Dot>(shape.length, shape.padded_head_dim, rows, transposed, b, partial,
                      StoreRows{sums, shape.padded_head_dim}, prefetcher);
      } else {
        multiply<Dot>(shape.length, shape.padded_head_dim, rows, transposed, b, partial,
                      StoreScaled<T>{to, 3 * hidden, p.head_dim, scale, 0}, prefetcher);
      }
    };
    add_block(dscores, query_block, scratch.dkeys, dqkv + hidden, &p.softmax_scale);
    add_block(scores, dout_block, scratch.dvalues, dqkv + 2 * hidden, &one);
  }
}

// Runs head(item, head, shape, scratch) for every head of the batch.
template <typename Scratch, typename Head>
void for_heads(const AttentionSchedule& schedule, int64_t total, int64_t num_heads, int64_t head_dim, int num_threads,
               const Head& head) {
  const int64_t elements = total * schedule.max_length() * num_heads;
  parallel_for(schedule.num_items(), elements < kElementsWorthThreads ? 1 : num_threads, [&](int64_t index) {
    const AttentionItem& item = schedule.item(index);
    const Shape shape(item.length, head_dim);
    Arena arena(thread_scratch(scratch_floats<Scratch>(shape)));
    const Scratch scratch(arena, shape);
    for (int64_t h = item.first_head; h < item.last_head; ++h) head(item, h, shape, scratch);
  });
}

}  // namespace

void attention_forward(const AttentionForwardParams& p, int num_threads) {
  const AttentionSchedule schedule(p.cu_seqlens, p.batch, p.num_heads, num_threads, kMinQueryBlock);
  for_heads<ForwardScratch>(schedule, p.total, p.num_heads, p.head_dim, num_threads, [&](auto&... head) {
    p.dtype == DType::float32 ? forward_head<float>(p, head...) : forward_head<BFloat16>(p, head...);
  });
}

void attention_backward(const AttentionBackwardParams& p, int num_threads) {
  constexpr int64_t whole_sequences = INT64_MAX;
  const AttentionSchedule schedule(p.cu_seqlens, p.batch, p.num_heads, num_threads, whole_sequences);
  for_heads<BackwardScratch>(schedule, p.total, p.num_heads, p.head_dim, num_threads, [&](auto&... head) {
    p.dtype == DType::float32 ? backward_head<float>(p, head...) : backward_head<BFloat16>(p, head...);
  });
}

}  // namespace fastbert::cpu::FASTBERT_ISA
