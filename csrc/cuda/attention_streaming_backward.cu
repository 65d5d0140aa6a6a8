// Attention's backward for sequences of any length, in two kernels without atomics: the same bits in every run.
//
// The dQ kernel holds 64 queries and streams over the keys, the dK/dV kernel holds 64 keys and streams over the queries, and
// both make the probabilities again from the log-sum-exp (Dao et al., "FlashAttention", 2022). The first sums each row of
// dout * out, delta, before it begins and leaves it for the second. FLOPs per head and sequence: 14 * length^2 * head_dim
// (10 of them necessary), and two exponentials per score; bytes per hidden element and token: 16 where the second pass finds
// everything in the cache.
//
// The scale of what dropout keeps is taken out of the gradients of the scores, and delta is divided by it: one product per
// row in place of one per score.
//
// The dK/dV kernel computes transposed products, keys by queries: so what it multiplies with dout and q is in registers in
// the layout of a product's first operand.

#include "cuda/attention_tiles.cuh"

namespace fastbert::cuda {

namespace {

// Of a tile, by a warp: as many as registers allow.
constexpr int kKeysAtOnce = 32, kQueriesAtOnce = 16;

// A block's rows of (total, parts, num_heads, head_dim).
template <typename T>
__device__ __forceinline__ Rows<const T> rows_of(const void* tensor, int parts, const AttentionBackwardParams& p,
                                                 const Head& head) {
  const int head_dim = static_cast<int>(p.head_dim), stride = parts * static_cast<int>(p.num_heads) * head_dim;
  return {static_cast<const T*>(tensor) + head.start * stride + head.head * head_dim, stride, head.length, head_dim};
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 3 : 2)
    dq_kernel(AttentionBackwardParams p, float* all_delta, Grid grid) {
  using Tile = Tile<T, kWidth>;
  const Head head(p.cu_seqlens, p.num_heads, grid.head());
  const int first_query = grid.first_row();
  if (first_query >= head.length) return;
  const T* const qkv = static_cast<const T*>(p.qkv);
  const Rows<const T> q_rows = rows_of<T>(qkv, 3, p, head), dout_rows = rows_of<T>(p.dout, 1, p, head);
  const Rows<const T> k = q_rows.of(qkv, qkv, dout_rows.stride), v = q_rows.of(qkv, qkv, 2 * dout_rows.stride);

  unsigned char* const shared = aligned_shared_memory();
  const auto keys = [&](int buffer) { return Tile{shared + 2 * buffer * Tile::kBytes}; };
  const auto values = [&](int buffer) { return Tile{shared + (2 * buffer + 1) * Tile::kBytes}; };
  const auto copy_keys = [&](int first, int buffer) {
    keys(buffer).copy(k, first);
    values(buffer).copy(v, first);
    copy_async_commit();
  };

  // What stays comes through the second buffer.
  keys(1).copy(q_rows, first_query);
  values(1).copy(dout_rows, first_query);
  copy_keys(0, 0);
  copy_async_wait<0>();
  __syncthreads();
  Operand<T, kWidth, true> q(keys(1)), dout(values(1));

  const HeadDropout dropout(p.dropout, head.head);
  const float scale_log2 = p.softmax_scale * kLog2E;
  const Rows<const T> out = rows_of<T>(p.out, 1, p, head);
  const int64_t statistics = head.head * p.total + head.start;  // of the sequence's first row in lse and delta
  const float scale = kept_scale(p.dropout), dq_scale = p.softmax_scale * scale;
  const float delta_scale = scale == 0.0f ? 0.0f : 1.0f / scale;
  float shift[2], delta[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = first_query + 16 * warp() + quad() + 8 * r;
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * k + 8 * half + 2 * place();
        if (out.has(query, column)) {
          const float2 a = unpack<T>(dout.registers[k][r + 2 * half]);
          const float2 b = unpack<T>(*reinterpret_cast<const uint32_t*>(out.at(query, column)));
          delta[r] += a.x * b.x + a.y * b.y;
        }
      }
    }
    delta[r] = quad_sum(delta[r]) * delta_scale;
    const bool inside = query < head.length;
    if (inside && place() == 0) all_delta[statistics + query] = delta[r];
    shift[r] = inside ? -p.lse[statistics + query] * kLog2E : 0.0f;
  }

  const bool works = first_query + 16 * warp() < head.length;
  float dq[kWidth / 8][4] = {};
  int buffer = 0;
  for (int first_key = 0; first_key < head.length; first_key += kTileRows, buffer ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody is at the last one any more
    if (first_key + kTileRows < head.length) copy_keys(first_key + kTileRows, buffer ^ 1);

    const int keys_here = works ? head.length - first_key : 0;
    uint32_t kept = 0;
    if (dropout.drops() && works) {
      kept = dropout.kept(static_cast<uint32_t>(head.start + first_query + 16 * warp()), first_key);
    }
#pragma unroll 1
    for (int step = 0; step < kTileRows && step < keys_here; step += kKeysAtOnce) {
      float ds[kKeysAtOnce / 8][4], dp[kKeysAtOnce / 8][4];
      multiply_by_rows(ds, q, keys(buffer), step);
      multiply_by_rows(dp, dout, values(buffer), step);
      if (dropout.drops()) drop(dp, kept_from(kept, step / 8));
      // Where there is no key exp(-lse) may be infinite.
      if (step + kKeysAtOnce > keys_here) mask_columns(ds, keys_here - step);
#pragma unroll
      for (int j = 0; j < kKeysAtOnce / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ds[j][i] = exp2_approximate(fmaf(ds[j][i], scale_log2, shift[i / 2])) * (dp[j][i] - delta[i / 2]);
        }
      }
      add_weighted_rows(dq, ds, keys(buffer), step);
    }
  }
  keys(buffer).store(k.of(static_cast<T*>(p.dqkv), qkv, -k.stride / 3), first_query, dq, dq_scale, dq_scale);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 3 : 2)
    dkv_kernel(AttentionBackwardParams p, const float* all_delta, Grid grid) {
  using Tile = Tile<T, kWidth>;
  constexpr bool kInRegisters = kWidth == 64;
  const Head head(p.cu_seqlens, p.num_heads, grid.head());
  const int first_key = grid.first_row();
  if (first_key >= head.length) return;
  const T* const qkv = static_cast<const T*>(p.qkv);
  const Rows<const T> q = rows_of<T>(qkv, 3, p, head), dout = rows_of<T>(p.dout, 1, p, head);

  unsigned char* const shared = aligned_shared_memory();
  const auto queries = [&](int buffer) { return Tile{shared + 2 * buffer * Tile::kBytes}; };
  const auto douts = [&](int buffer) { return Tile{shared + (2 * buffer + 1) * Tile::kBytes}; };
  const auto copy_queries = [&](int first, int buffer) {
    queries(buffer).copy(q, first);
    douts(buffer).copy(dout, first);
    copy_async_commit();
  };
  // -lse * log2(e) and delta of a tile's queries; a thread reads one of them.
  __shared__ float statistics[2][2][kTileRows];
  const bool reads_lse = threadIdx.x < kTileRows;
  const float* const source = (reads_lse ? p.lse : all_delta) + head.head * p.total + head.start;
  const auto read_statistic = [&](int first) {
    const int query = first + threadIdx.x % kTileRows;
    // Queries that are not there have a probability of 1, times rows of dout and q that are 0.
    return query < head.length ? source[query] * (reads_lse ? -kLog2E : 1.0f) : 0.0f;
  };
  const auto write_statistic = [&](float value, int buffer) {
    statistics[buffer][reads_lse ? 0 : 1][threadIdx.x % kTileRows] = value;
  };

  // What stays comes through the second buffer where registers hold it.
  const Tile k_tile = kInRegisters ? queries(1) : queries(2), v_tile = kInRegisters ? douts(1) : douts(2);
  k_tile.copy(q.of(qkv, qkv, dout.stride), first_key);
  v_tile.copy(q.of(qkv, qkv, 2 * dout.stride), first_key);
  copy_queries(0, 0);
  write_statistic(read_statistic(0), 0);
  copy_async_wait<0>();
  __syncthreads();
  Operand<T, kWidth, kInRegisters> k(k_tile), v(v_tile);

  const HeadDropout dropout(p.dropout, head.head);
  const float scale_log2 = p.softmax_scale * kLog2E;
  const bool works = first_key + 16 * warp() < head.length;
  float dk[kWidth / 8][4] = {}, dv[kWidth / 8][4] = {};
  int buffer = 0;
  for (int first_query = 0; first_query < head.length; first_query += kTileRows, buffer ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody is at the last one any more
    const bool more = first_query + kTileRows < head.length;
    float statistic = 0.0f;
    if (more) {
      copy_queries(first_query + kTileRows, buffer ^ 1);
      statistic = read_statistic(first_query + kTileRows);
    }

    const int queries_here = works ? head.length - first_query : 0;
    uint32_t kept = 0;
    if (dropout.drops() && works) {
      kept = dropout.kept_transposed(first_key + 16 * warp(), static_cast<uint32_t>(head.start + first_query));
    }
#pragma unroll 1
    for (int step = 0; step < kTileRows && step < queries_here; step += kQueriesAtOnce) {
      float probability[kQueriesAtOnce / 8][4], ds[kQueriesAtOnce / 8][4];
      multiply_by_rows(probability, k, queries(buffer), step);
      multiply_by_rows(ds, v, douts(buffer), step);
      if (dropout.drops()) drop(ds, kept_from(kept, step / 8));
#pragma unroll
      for (int j = 0; j < kQueriesAtOnce / 8; ++j) {
        const int query = step + 8 * j + 2 * place();
        const float2 shift = *reinterpret_cast<const float2*>(&statistics[buffer][0][query]);
        const float2 delta = *reinterpret_cast<const float2*>(&statistics[buffer][1][query]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          probability[j][i] = exp2_approximate(fmaf(probability[j][i], scale_log2, i % 2 == 0 ? shift.x : shift.y));
          ds[j][i] = probability[j][i] * (ds[j][i] - (i % 2 == 0 ? delta.x : delta.y));
        }
      }
      if (dropout.drops()) drop(probability, kept_from(kept, step / 8));
      add_weighted_rows(dv, probability, douts(buffer), step);
      add_weighted_rows(dk, ds, queries(buffer), step);
    }
    if (more) write_statistic(statistic, buffer ^ 1);
  }
  const float scale = kept_scale(p.dropout), dk_scale = p.softmax_scale * scale;
  queries(buffer).store(q.of(static_cast<T*>(p.dqkv), qkv, dout.stride), first_key, dk, dk_scale, dk_scale);
  douts(buffer).store(q.of(static_cast<T*>(p.dqkv), qkv, 2 * dout.stride), first_key, dv, scale, scale);
}

}  // namespace

void attention_backward_streaming(const AttentionBackwardParams& p, float* delta, int64_t max_seqlen, void* stream) {
  for_head(p.dtype, p.head_dim, [&]<typename T, int kWidth>() {
    const Grid grid(max_seqlen);
    const unsigned blocks = grid.size(p.batch, p.num_heads);
    constexpr size_t kTile = Tile<T, kWidth>::kBytes;
    launch("attention backward, dQ", dq_kernel<T, kWidth>, blocks, kThreads, 4 * kTile + 1024, stream, p, delta, grid);
    launch("attention backward, dK and dV", dkv_kernel<T, kWidth>, blocks, kThreads, (kWidth == 64 ? 4 : 6) * kTile + 1024,
           stream, p, delta, grid);
  });
}

}  // namespace fastbert::cuda
