// Attention's forward for sequences of any length: out = softmax(q k^T * softmax_scale) v of each head of each sequence.
//
// Scores and probabilities never reach memory: a block holds 64 queries and streams over the keys with the running maximum
// and sum of Milakov and Gimelshein ("Online normalizer calculation for softmax", 2018). FLOPs per head and sequence:
// 4 * length^2 * head_dim, and one exponential per score; bytes per hidden element and token: 8, q, k and v read once
// (by the first block, by the others from the cache) and out written.

#include "cuda/attention_tiles.cuh"

namespace fastbert::cuda {

namespace {

// Of a tile, by a warp.
constexpr int kKeysAtOnce = 32;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 4 : 2) forward_kernel(AttentionForwardParams p, Grid grid) {
  using Tile = Tile<T, kWidth>;
  const Head head(p.cu_seqlens, p.num_heads, grid.head());
  const int first_query = grid.first_row();
  if (first_query >= head.length) return;

  const int head_dim = static_cast<int>(p.head_dim), hidden = static_cast<int>(p.num_heads) * head_dim;
  const T* const qkv = static_cast<const T*>(p.qkv) + 3 * head.start * hidden + head.head * head_dim;
  const Rows<const T> q{qkv, 3 * hidden, head.length, head_dim}, k{qkv + hidden, 3 * hidden, head.length, head_dim},
      v{qkv + 2 * hidden, 3 * hidden, head.length, head_dim};

  unsigned char* const shared = aligned_shared_memory();
  const auto keys = [&](int buffer) { return Tile{shared + 2 * buffer * Tile::kBytes}; };
  const auto values = [&](int buffer) { return Tile{shared + (2 * buffer + 1) * Tile::kBytes}; };
  const auto copy_keys = [&](int first, int buffer) {
    keys(buffer).copy(k, first);
    values(buffer).copy(v, first);
    copy_async_commit();
  };

  // The queries come through the second buffer.
  keys(1).copy(q, first_query);
  copy_keys(0, 0);
  copy_async_wait<0>();
  __syncthreads();
  Operand<T, kWidth, true> queries(keys(1));

  const HeadDropout dropout(p.dropout, head.head);
  const float scale_log2 = p.softmax_scale * kLog2E;
  const bool works = first_query + 16 * warp() < head.length;
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};  // of rows quad and quad + 8; sums of this lane's columns
  float out[kWidth / 8][4] = {};
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
      float probability[kKeysAtOnce / 8][4];
      multiply_by_rows(probability, queries, keys(buffer), step);
      if (step + kKeysAtOnce > keys_here) mask_columns(probability, keys_here - step);
      float largest[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // There is a key at least, so the maximum is finite and no row becomes NaN.
        largest[r] = row_max[r];
#pragma unroll
        for (int j = 0; j < kKeysAtOnce / 8; ++j) {
          largest[r] = fmaxf(largest[r], fmaxf(probability[j][2 * r], probability[j][2 * r + 1]));
        }
        largest[r] = quad_max(largest[r]);
      }
      // Most maxima are among the first keys.
      if (__any_sync(0xFFFFFFFF, largest[0] != row_max[0] || largest[1] != row_max[1])) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float correction = exp2_approximate((row_max[r] - largest[r]) * scale_log2);
          row_max[r] = largest[r];
          row_sum[r] *= correction;
#pragma unroll
          for (int j = 0; j < kWidth / 8; ++j) {
            out[j][2 * r] *= correction;
            out[j][2 * r + 1] *= correction;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kKeysAtOnce / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          probability[j][i] = exp2_approximate(fmaf(probability[j][i], scale_log2, -row_max[i / 2] * scale_log2));
          row_sum[i / 2] += probability[j][i];
        }
      }
      if (dropout.drops()) drop(probability, kept_from(kept, step / 8));
      add_weighted_rows(out, probability, values(buffer), step);
    }
  }

  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(row_sum[r]);
    factor[r] = kept_scale(p.dropout) / sum;
    const int query = first_query + 16 * warp() + quad() + 8 * r;
    if (p.lse != nullptr && place() == 0 && query < head.length) {
      p.lse[head.head * p.total + head.start + query] = fmaf(row_max[r], p.softmax_scale, logf(sum));
    }
  }
  const Rows<T> result{static_cast<T*>(p.out) + head.start * hidden + head.head * head_dim, hidden, head.length, head_dim};
  keys(buffer).store(result, first_query, out, factor[0], factor[1]);
}

}  // namespace

void attention_forward_streaming(const AttentionForwardParams& p, int64_t max_seqlen, void* stream) {
  for_head(p.dtype, p.head_dim, [&]<typename T, int kWidth>() {
    const Grid grid(max_seqlen);
    launch("attention forward", forward_kernel<T, kWidth>, grid.size(p.batch, p.num_heads), kThreads,
           4 * Tile<T, kWidth>::kBytes + 1024, stream, p, grid);
  });
}

}  // namespace fastbert::cuda
