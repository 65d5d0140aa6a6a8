// Attention's backward for sequences of any length, in two kernels without atomics: the same bits in every run.
//
// The dQ kernel holds 64 queries and streams over the keys, the dK/dV kernel holds 64 keys and streams over the queries, and
// both make the probabilities again from the log-sum-exp (Dao et al., "FlashAttention", 2022). The first sums each row of
// dout * out, delta, before it begins and leaves it for the second. FLOPs per head and sequence: 14 * length^2 * head_dim
// (10 of them necessary), and two exponentials per score; bytes per hidden element and token: 16 where the second pass finds
// everything in the cache.
//
// The dK/dV kernel computes transposed products, keys by queries: so what it multiplies with dout and q is in registers in
// the layout of a product's first operand.

#include "cuda/attention_tiles.cuh"

namespace fastbert::cuda {

namespace {

// Queries or keys of a tile that a warp works on at once.
template <int kWidth>
constexpr int kStep = kWidth == 64 ? 32 : 16;

// What both kernels are given, as rows of the block's head.
template <typename T>
struct Tensors {
  Rows<const T> q, k, v, out, dout;
  Rows<T> dq, dk, dv;
  int64_t statistics;  // of the sequence's first row in lse and delta

  __device__ __forceinline__ Tensors(const AttentionBackwardParams& p, const Head& head) {
    const int head_dim = static_cast<int>(p.head_dim);
    const int64_t hidden = p.num_heads * p.head_dim, row = head.start * hidden + head.head * head_dim,
                  qkv_row = 3 * head.start * hidden + head.head * head_dim;
    const auto part = [&]<typename U>(U* data, int index) {
      return Rows<U>{data + qkv_row + index * hidden, 3 * hidden, head.length, head_dim};
    };
    q = part(static_cast<const T*>(p.qkv), 0), k = part(static_cast<const T*>(p.qkv), 1);
    v = part(static_cast<const T*>(p.qkv), 2);
    dq = part(static_cast<T*>(p.dqkv), 0), dk = part(static_cast<T*>(p.dqkv), 1), dv = part(static_cast<T*>(p.dqkv), 2);
    out = {static_cast<const T*>(p.out) + row, hidden, head.length, head_dim};
    dout = {static_cast<const T*>(p.dout) + row, hidden, head.length, head_dim};
    statistics = head.head * p.total + head.start;
  }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 3 : 2)
    dq_kernel(AttentionBackwardParams p, float* all_delta, Grid grid) {
  using Tile = Tile<T, kWidth>;
  const Head head(p.cu_seqlens, p.num_heads, grid.head());
  const int first_query = grid.first_row();
  if (first_query >= head.length) return;
  const Tensors<T> tensors(p, head);

  unsigned char* const shared = aligned_shared_memory();
  const auto keys = [&](int buffer) { return Tile{shared + 2 * buffer * Tile::kBytes}; };
  const auto values = [&](int buffer) { return Tile{shared + (2 * buffer + 1) * Tile::kBytes}; };
  const auto copy_keys = [&](int first, int buffer) {
    keys(buffer).copy(tensors.k, first);
    values(buffer).copy(tensors.v, first);
    copy_async_commit();
  };

  // What stays comes through the second buffer.
  keys(1).copy(tensors.q, first_query);
  values(1).copy(tensors.dout, first_query);
  copy_keys(0, 0);
  copy_async_wait<0>();
  __syncthreads();
  Operand<T, kWidth, true> q(keys(1)), dout(values(1));

  const HeadDropout dropout(p.dropout, head.head);
  const float scale_log2 = p.softmax_scale * kLog2E;
  float shift[2], delta[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = first_query + 16 * warp() + quad() + 8 * r;
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * k + 8 * half + 2 * place();
        if (tensors.out.has(query, column)) {
          const float2 a = unpack<T>(dout.registers[k][r + 2 * half]);
          const float2 b = unpack<T>(*reinterpret_cast<const uint32_t*>(tensors.out.at(query, column)));
          delta[r] += a.x * b.x + a.y * b.y;
        }
      }
    }
    delta[r] = quad_sum(delta[r]);
    const bool inside = query < head.length;
    if (inside && place() == 0) all_delta[tensors.statistics + query] = delta[r];
    shift[r] = inside ? -p.lse[tensors.statistics + query] * kLog2E : 0.0f;
  }

  float dq[kWidth / 8][4] = {};
  int buffer = 0;
  for (int first_key = 0; first_key < head.length; first_key += kTileRows, buffer ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody is at the last one any more
    if (first_key + kTileRows < head.length) copy_keys(first_key + kTileRows, buffer ^ 1);

    uint32_t kept = 0;
    if (dropout.drops()) {
      kept = dropout.kept(static_cast<uint32_t>(head.start + first_query + 16 * warp()), first_key);
    }
#pragma unroll
    for (int step = 0; step < kTileRows; step += kStep<kWidth>) {
      float ds[kStep<kWidth> / 8][4], dp[kStep<kWidth> / 8][4];
      multiply_by_rows(ds, q, keys(buffer), step);
      multiply_by_rows(dp, dout, values(buffer), step);
#pragma unroll
      for (int j = 0; j < kStep<kWidth> / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (dropout.drops()) dp[j][i] = is_kept(kept, step / 8 + j, i) ? dp[j][i] * p.dropout.scale : 0.0f;
          // Where there is no key exp(-lse) may be infinite.
          const bool inside = first_key + step + 8 * j + 2 * place() + i % 2 < head.length;
          const float probability = exp2_approximate(inside ? fmaf(ds[j][i], scale_log2, shift[i / 2]) : -INFINITY);
          ds[j][i] = probability * (dp[j][i] - delta[i / 2]);
        }
      }
      add_weighted_rows(dq, ds, keys(buffer), step);
    }
  }
  keys(buffer).store(tensors.dq, first_query, dq, p.softmax_scale, p.softmax_scale);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 3 : 2)
    dkv_kernel(AttentionBackwardParams p, const float* all_delta, Grid grid) {
  using Tile = Tile<T, kWidth>;
  constexpr bool kInRegisters = kWidth == 64;
  const Head head(p.cu_seqlens, p.num_heads, grid.head());
  const int first_key = grid.first_row();
  if (first_key >= head.length) return;
  const Tensors<T> tensors(p, head);

  unsigned char* const shared = aligned_shared_memory();
  const auto queries = [&](int buffer) { return Tile{shared + 2 * buffer * Tile::kBytes}; };
  const auto douts = [&](int buffer) { return Tile{shared + (2 * buffer + 1) * Tile::kBytes}; };
  const auto copy_queries = [&](int first, int buffer) {
    queries(buffer).copy(tensors.q, first);
    douts(buffer).copy(tensors.dout, first);
    copy_async_commit();
  };
  // lse * log2(e) and delta of a tile's queries; a thread reads one of them.
  __shared__ float statistics[2][2][kTileRows];
  const bool reads_lse = threadIdx.x < kTileRows;
  const float* const source = (reads_lse ? p.lse : all_delta) + tensors.statistics;
  const auto read_statistic = [&](int first) {
    const int query = first + threadIdx.x % kTileRows;
    // An infinite log-sum-exp makes the probabilities of queries that are not there 0.
    if (query >= head.length) return reads_lse ? INFINITY : 0.0f;
    return source[query] * (reads_lse ? kLog2E : 1.0f);
  };
  const auto write_statistic = [&](float value, int buffer) {
    statistics[buffer][reads_lse ? 0 : 1][threadIdx.x % kTileRows] = value;
  };

  // What stays comes through the second buffer where registers hold it.
  const Tile k_tile = kInRegisters ? queries(1) : queries(2), v_tile = kInRegisters ? douts(1) : douts(2);
  k_tile.copy(tensors.k, first_key);
  v_tile.copy(tensors.v, first_key);
  copy_queries(0, 0);
  write_statistic(read_statistic(0), 0);
  copy_async_wait<0>();
  __syncthreads();
  Operand<T, kWidth, kInRegisters> k(k_tile), v(v_tile);

  const HeadDropout dropout(p.dropout, head.head);
  const float scale_log2 = p.softmax_scale * kLog2E;
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

    uint32_t kept = 0;
    if (dropout.drops()) {
      kept = dropout.kept_transposed(first_key + 16 * warp(), static_cast<uint32_t>(head.start + first_query));
    }
#pragma unroll
    for (int step = 0; step < kTileRows; step += kStep<kWidth>) {
      float probability[kStep<kWidth> / 8][4], ds[kStep<kWidth> / 8][4];
      multiply_by_rows(probability, k, queries(buffer), step);
      multiply_by_rows(ds, v, douts(buffer), step);
#pragma unroll
      for (int j = 0; j < kStep<kWidth> / 8; ++j) {
        const int query = step + 8 * j + 2 * place();
        const float2 lse = *reinterpret_cast<const float2*>(&statistics[buffer][0][query]);
        const float2 delta = *reinterpret_cast<const float2*>(&statistics[buffer][1][query]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float e = exp2_approximate(fmaf(probability[j][i], scale_log2, i % 2 == 0 ? -lse.x : -lse.y));
          const bool keeps = !dropout.drops() || is_kept(kept, step / 8 + j, i);
          const float dp = keeps ? ds[j][i] * (dropout.drops() ? p.dropout.scale : 1.0f) : 0.0f;
          probability[j][i] = keeps ? e : 0.0f;
          ds[j][i] = e * (dp - (i % 2 == 0 ? delta.x : delta.y));
        }
      }
      add_weighted_rows(dv, probability, douts(buffer), step);
      add_weighted_rows(dk, ds, queries(buffer), step);
    }
    if (more) write_statistic(statistic, buffer ^ 1);
  }
  const float kept_scale = dropout.drops() ? p.dropout.scale : 1.0f;
  queries(buffer).store(tensors.dk, first_key, dk, p.softmax_scale, p.softmax_scale);
  douts(buffer).store(tensors.dv, first_key, dv, kept_scale, kept_scale);
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
