// Attention within each sequence of a packed batch, forward and backward.
//
// The keys and values of one head of one sequence are packed once into float32, then blocks of queries pass by. The whole
// rows of scores of a block stay in the second-level cache, so that the softmax needs no online rescaling: BERT's sequences
// are short. The backward pass recomputes the probabilities from the saved log-sum-exp (Dao et al., 2022, algorithm 4); one
// thread owns all of a head's dK and dV, so there are no atomics and the result is deterministic.

#include "cpu/attention_schedule.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/philox.h"
#include "cpu/vec_math.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

constexpr int64_t kMaxQueryBlock = 96, kMinQueryBlock = 24;
constexpr int64_t kScoreFloats = 48 * 1024;  // of a block of queries: 192 KB of the second-level cache

// What an item needs to know of a head's size, and the leading dimensions of the packed copies.
struct Shape {
  int64_t length, head_dim;
  int64_t padded_length, padded_head_dim;  // whole vectors
  int64_t score_leading;  // an odd number of cache lines: walking down a column touches all sets of the cache
  int64_t query_block;

  Shape(int64_t length, int64_t head_dim)
      : length(length),
        head_dim(head_dim),
        padded_length(round_up(length, kWidth)),
        padded_head_dim(round_up(head_dim, kWidth)),
        score_leading((round_up(length, 16) / 16 | 1) * 16) {
    const int64_t fitting = kScoreFloats / score_leading / kTileRows * kTileRows;
    query_block = fitting < kMinQueryBlock ? kMinQueryBlock : fitting > kMaxQueryBlock ? kMaxQueryBlock : fitting;
  }
};

// Cuts a thread's scratch memory into arrays that start on a cache line; on a null base it only measures.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* floats(int64_t count) {
    float* start = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count, 16);
    return start;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

struct ForwardScratch {
  float *keys, *values, *queries, *scores, *out;
  uint16_t* bits;

  ForwardScratch(Arena& arena, const Shape& shape)
      : keys(arena.floats(shape.padded_length * shape.head_dim)),
        values(arena.floats(shape.length * shape.padded_head_dim)),
        queries(arena.floats(shape.query_block * shape.padded_head_dim)),
        scores(arena.floats(shape.query_block * shape.score_leading)),
        out(arena.floats(shape.query_block * shape.padded_head_dim)),
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

// to (rows, padded_head_dim) = scale * from (rows, head_dim), rows from_stride elements apart; the padding is 0.
template <typename T>
void pack_rows(const T* from, int64_t from_stride, int64_t rows, const Shape& shape, float scale, float* to) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += shape.padded_head_dim) {
    for_columns(shape.head_dim, [&](int64_t d, auto extent) { store(to + d, load(from + d, extent) * scale); });
  }
}

// Transposes from (length, head_dim) into the panels of a RightMatrix (head_dim, padded_length); the padding is 0.
template <typename T>
void pack_transposed(const T* from, int64_t from_stride, const Shape& shape, float* to) {
  for (int64_t panel = 0; panel < shape.padded_length; panel += kPanelColumns) {
    const int64_t left = shape.padded_length - panel, width = left < kPanelColumns ? left : kPanelColumns;
    float* panel_to = to + panel * shape.head_dim;
    for (int64_t column = 0; column < width; column += kWidth) {
      const int64_t first = panel + column;
      const int64_t rows = shape.length - first < kWidth ? shape.length - first : kWidth;
      for_columns(shape.head_dim, [&](int64_t d, auto extent) {
        Vec square[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) square[i] = i < rows ? load(from + (first + i) * from_stride + d, extent) : Vec{};
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          if (i < extent.count) store(panel_to + (d + i) * width + column, square[i]);
        }
      });
    }
  }
}

// to (rows, head_dim), rows to_stride elements apart, = scale * from (rows, padded_head_dim).
template <typename T>
void unpack_rows(const float* from, int64_t rows, const Shape& shape, float scale, T* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row, from += shape.padded_head_dim, to += to_stride) {
    for_columns(shape.head_dim, [&](int64_t d, auto extent) { store(to + d, load(from + d) * scale, extent); });
  }
}

struct Softmax {
  float max, sum;
};

// Overwrites a row of scores with exp(score - max), and the padding with 0.
FASTBERT_INLINE Softmax exponentiate_row(float* scores, const Shape& shape) {
  Vec maxima[kSlots], sums{};
  for (Vec& slot : maxima) slot = splat(-__builtin_inff());
  for_columns_in_slots(shape.length, [&](int64_t column, auto extent, int slot) {
    maxima[slot] = maximum(within(load(scores + column), -__builtin_inff(), extent), maxima[slot]);
  });
  const float max = max_slots(maxima);
  for_columns(shape.length, [&](int64_t column, auto extent) {
    const Vec e = within(exp(load(scores + column) - max), 0.0f, extent);
    sums += e;
    store(scores + column, e);
  });
  return {max, sum_lanes(sums)};
}

void drop_row(float* scores, const uint16_t* bits, int64_t length, uint32_t threshold) {
  for_columns(length,
              [&](int64_t column, auto) { store(scores + column, drop(load(scores + column), bits + column, threshold)); });
}

template <typename T>
void forward_head(const AttentionForwardParams& p, const AttentionItem& item, int64_t head, const Shape& shape,
                  const ForwardScratch& scratch) {
  const int64_t hidden = p.num_heads * p.head_dim;
  const T* queries = static_cast<const T*>(p.qkv) + item.start * 3 * hidden + head * p.head_dim;
  T* out = static_cast<T*>(p.out) + item.start * hidden + head * p.head_dim;
  float* lse = p.lse == nullptr ? nullptr : p.lse + head * p.total + item.start;
  Prefetcher prefetcher(shape.length, count_tiles(item.num_queries, shape.length, p.head_dim) +
                                          count_tiles(item.num_queries, p.head_dim, shape.length));
  const int64_t bytes = p.head_dim * sizeof(T), stride = hidden * sizeof(T);
  prefetcher.add(out, bytes, stride);
  if (head + 1 < item.last_head) {
    for (int i = 0; i < 3; ++i) prefetcher.add(queries + p.head_dim + i * hidden, bytes, 3 * stride);
  }
  pack_transposed(queries + hidden, 3 * hidden, shape, scratch.keys);
  pack_rows(queries + 2 * hidden, 3 * hidden, shape.length, shape, 1.0f, scratch.values);

  const int64_t end = item.first_query + item.num_queries;
  for (int64_t first = item.first_query; first < end; first += shape.query_block) {
    const int64_t rows = end - first < shape.query_block ? end - first : shape.query_block;
    pack_rows(queries + first * 3 * hidden, 3 * hidden, rows, shape, p.softmax_scale, scratch.queries);
    multiply(rows, shape.padded_length, shape.head_dim, {scratch.queries, shape.padded_head_dim, 1}, {scratch.keys, 0},
             scratch.scores, shape.score_leading, false, prefetcher);
    float scales[kMaxQueryBlock];
    for (int64_t row = 0; row < rows; ++row) {
      float* scores = scratch.scores + row * shape.score_leading;
      const Softmax softmax = exponentiate_row(scores, shape);
      if (lse != nullptr) lse[first + row] = softmax.max + __builtin_logf(softmax.sum);
      scales[row] = 1.0f / softmax.sum;
      if (p.dropout.threshold > 0) {
        dropout_bits(scratch.bits, shape.length, item.start + first + row, head, p.dropout);
        drop_row(scores, scratch.bits, shape.length, p.dropout.threshold);
        scales[row] *= p.dropout.scale;
      }
    }
    multiply(rows, shape.padded_head_dim, shape.length, {scratch.scores, shape.score_leading, 1},
             {scratch.values, shape.padded_head_dim}, scratch.out, shape.padded_head_dim, false, prefetcher);
    for (int64_t row = 0; row < rows; ++row) {
      unpack_rows(scratch.out + row * shape.padded_head_dim, 1, shape, scales[row], out + (first + row) * hidden, hidden);
    }
  }
}

// The sum of dout * out over one query's head: the derivative of the softmax's normalisation (delta in Dao et al.).
template <typename T>
float inner_product(const T* a, const T* b, int64_t n) {
  Vec sums{};
  for_columns(n, [&](int64_t d, auto extent) { sums += load(a + d, extent) * load(b + d, extent); });
  return sum_lanes(sums);
}

// Overwrites a row of scores with the dropped probabilities, and a row of their gradients with those of the scores.
template <bool kDropout>
FASTBERT_INLINE void differentiate_row(float* scores, float* gradients, const Shape& shape, float lse, float delta,
                                       const uint16_t* bits, const Dropout& dropout) {
  for (int64_t column = 0; column < shape.padded_length; column += kWidth) {
    const Vec probability = exp(load(scores + column) - lse);
    Vec gradient = load(gradients + column);
    Vec dropped = probability;
    if constexpr (kDropout) {
      const Vec scale = drop(splat(dropout.scale), bits + column, dropout.threshold);
      dropped = probability * scale;
      gradient = gradient * scale;
    }
    store(scores + column, dropped);
    store(gradients + column, probability * (gradient - delta));
  }
}

template <typename T>
void backward_head(const AttentionBackwardParams& p, const AttentionItem& item, int64_t head, const Shape& shape,
                   const BackwardScratch& scratch) {
  const int64_t hidden = p.num_heads * p.head_dim;
  const int64_t qkv_offset = item.start * 3 * hidden + head * p.head_dim;
  const int64_t out_offset = item.start * hidden + head * p.head_dim;
  const T* queries = static_cast<const T*>(p.qkv) + qkv_offset;
  const T* out = static_cast<const T*>(p.out) + out_offset;
  const T* dout = static_cast<const T*>(p.dout) + out_offset;
  T* dqueries = static_cast<T*>(p.dqkv) + qkv_offset;
  const float* lse = p.lse + head * p.total + item.start;
  Prefetcher prefetcher(shape.length, 2 * count_tiles(shape.length, shape.length, p.head_dim) +
                                          3 * count_tiles(shape.length, p.head_dim, shape.length));
  const int64_t bytes = p.head_dim * sizeof(T), stride = hidden * sizeof(T);
  for (int i = 0; i < 3; ++i) prefetcher.add(dqueries + i * hidden, bytes, 3 * stride);
  if (head + 1 < item.last_head) {
    for (int i = 0; i < 3; ++i) prefetcher.add(queries + p.head_dim + i * hidden, bytes, 3 * stride);
    prefetcher.add(dout + p.head_dim, bytes, stride);
    prefetcher.add(out + p.head_dim, bytes, stride);
  }
  pack_transposed(queries + hidden, 3 * hidden, shape, scratch.keys_transposed);
  pack_transposed(queries + 2 * hidden, 3 * hidden, shape, scratch.values_transposed);
  pack_rows(queries + hidden, 3 * hidden, shape.length, shape, 1.0f, scratch.keys);

  for (int64_t first = 0; first < shape.length; first += shape.query_block) {
    const int64_t rows = shape.length - first < shape.query_block ? shape.length - first : shape.query_block;
    pack_rows(queries + first * 3 * hidden, 3 * hidden, rows, shape, p.softmax_scale, scratch.queries);
    pack_rows(dout + first * hidden, hidden, rows, shape, 1.0f, scratch.douts);
    multiply(rows, shape.padded_length, shape.head_dim, {scratch.queries, shape.padded_head_dim, 1},
             {scratch.keys_transposed, 0}, scratch.probabilities, shape.score_leading, false, prefetcher);
    multiply(rows, shape.padded_length, shape.head_dim, {scratch.douts, shape.padded_head_dim, 1},
             {scratch.values_transposed, 0}, scratch.dscores, shape.score_leading, false, prefetcher);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t query = first + row;
      const float delta = inner_product(dout + query * hidden, out + query * hidden, shape.head_dim);
      float* scores = scratch.probabilities + row * shape.score_leading;
      float* gradients = scratch.dscores + row * shape.score_leading;
      if (p.dropout.threshold > 0) {
        dropout_bits(scratch.bits, shape.length, item.start + query, head, p.dropout);
        differentiate_row<true>(scores, gradients, shape, lse[query], delta, scratch.bits, p.dropout);
      } else {
        differentiate_row<false>(scores, gradients, shape, lse[query], delta, nullptr, p.dropout);
      }
    }
    multiply(rows, shape.padded_head_dim, shape.length, {scratch.dscores, shape.score_leading, 1},
             {scratch.keys, shape.padded_head_dim}, scratch.dqueries, shape.padded_head_dim, false, prefetcher);
    unpack_rows(scratch.dqueries, rows, shape, p.softmax_scale, dqueries + first * 3 * hidden, 3 * hidden);
    // The packed queries carry the softmax scale already, and with it dK.
    multiply(shape.length, shape.padded_head_dim, rows, {scratch.dscores, 1, shape.score_leading},
             {scratch.queries, shape.padded_head_dim}, scratch.dkeys, shape.padded_head_dim, first > 0, prefetcher);
    multiply(shape.length, shape.padded_head_dim, rows, {scratch.probabilities, 1, shape.score_leading},
             {scratch.douts, shape.padded_head_dim}, scratch.dvalues, shape.padded_head_dim, first > 0, prefetcher);
  }
  unpack_rows(scratch.dkeys, shape.length, shape, 1.0f, dqueries + hidden, 3 * hidden);
  unpack_rows(scratch.dvalues, shape.length, shape, 1.0f, dqueries + 2 * hidden, 3 * hidden);
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
