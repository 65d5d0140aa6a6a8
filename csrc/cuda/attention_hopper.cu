// Attention's forward on Hopper, head_dim 64 and at most 512 tokens: out = softmax(q k^T * softmax_scale) v of each head of
// each sequence, by wgmma, with all of the head's keys and values in shared memory from one round of bulk copies.
//
// A warpgroup has 64 queries in registers and goes over the tiles of 64 keys; scores and probabilities stay in registers,
// too. The maximum of a row is that of the first tile: it rises only where later scores would make sums exceed kLargestSum,
// so that most tiles need neither a maximum nor a correction.
//
// FLOPs per head and sequence: 4 * length^2 * 64, and an exponential per score. Bytes per head and token: 516, each once.
// Shared memory: 16 KB per 64 keys; registers are for four warpgroups on a multiprocessor, whatever the length, in one block
// or up to four: while one waits for products or loads, others are at their exponentials.
//
// Bounds of a tile on each quarter of a multiprocessor, from the instructions compiled for sm_90a, in cycles: products 256,
// exponentials 272, instructions issued 200, with dropout 540 and 70 more for multiplications that take two. At 132 times
// 1.75 GHz that is 890 and 400 TFLOP/s with nothing lost to latency; of bytes, at 4.3 TB/s, 1,090 for 512 tokens and 270 for
// 128. An H200 reached 379 and 209 for 512 tokens, 203 and 160 for 128: the four warps of a scheduler have an instruction
// ready in 43% of the cycles.

#include "cuda/attention_hopper.cuh"

namespace fastbert::cuda {

namespace {

constexpr int kMaxWarpgroups = 4;

template <typename T, bool kDropout>
__global__ void __launch_bounds__(kMaxWarpgroups* kWarpgroup, 1)
    forward_kernel(AttentionForwardParams p, DrawnBits drawn_bits, const __grid_constant__ TensorMap qkv, int fewest_tiles,
                   int most_tiles) {
#if FASTBERT_HOPPER
  // Of a lane's 16 probabilities of a row, where 1 is the largest one of the first tile: beyond it the maximum is raised.
  constexpr float kLargestSum = 4096.0f;
  const Head head(p.cu_seqlens, p.num_heads, static_cast<int>(blockIdx.x));
  const int tiles = num_tiles(head.length), warpgroups = blockDim.x / kWarpgroup;
  const int first_block = blockIdx.y * warpgroups;  // of 64 queries
  if (tiles < fewest_tiles || tiles > most_tiles || first_block >= tiles) return;

  // Keys and values stay for as long as the block lives. The last tile is loaded and used first: the rows behind its end are
  // dealt with while the others are on their way.
  unsigned char* const shared = aligned_shared_memory();
  __shared__ uint64_t arrived[kMaxTiles];
  const uint64_t keys = matrix(shared), values = matrix_at(keys, kTileBytes);  // of the first slot
  const auto first_key = [&](int slot) { return (slot == 0 ? tiles - 1 : slot - 1) * kTileRows; };
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < tiles; ++slot) mbarrier_init(&arrived[slot], 1);
    fence_mbarriers();
    const int hidden = static_cast<int>(p.num_heads) * kHeadDim, column = head.head * kHeadDim;
    for (int slot = 0; slot < tiles; ++slot) {
      const int row = static_cast<int>(head.start) + first_key(slot);
      mbarrier_arrive_expecting(&arrived[slot], 2 * kTileBytes);
      copy_box(shared + 2 * slot * kTileBytes, qkv, &arrived[slot], column + hidden, row);
      copy_box(shared + (2 * slot + 1) * kTileBytes, qkv, &arrived[slot], column + 2 * hidden, row);
    }
  }
  const HeadDropout dropout(p.dropout, head.head);
  const DrawnWords drawn_words(drawn_bits, p.total, head);
  __syncthreads();  // the mbarriers are there
  const int last_rows = head.length - first_key(0);
  if (last_rows < kTileRows) {
    mbarrier_wait(&arrived[0], 0);
    zero_rows(shared + kTileBytes, last_rows);
    __syncthreads();
  }

  const int64_t hidden = p.num_heads * kHeadDim;
  const HeadRows<const T> queries{static_cast<const T*>(p.qkv) + head.start * 3 * hidden + head.head * kHeadDim, 3 * hidden,
                                  head.length};
  const HeadRows<T> results{static_cast<T*>(p.out) + head.start * hidden + head.head * kHeadDim, hidden, head.length};
  const float scale_log2 = p.softmax_scale * kLog2E;
  const int my_first_block = first_block + warpgroup(), step = gridDim.y * warpgroups;
  uint32_t q[4][4];
  load_rows(q, queries, my_first_block * kTileRows);
  for (int block = my_first_block; block < tiles; block += step) {
    const int first_query = block * kTileRows, warp_query = first_query + 16 * warp_of_warpgroup();
    float out[32] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // of rows quad and quad + 8; in powers of 2, and of this lane
    for (int slot = 0; slot < tiles; ++slot) {
      mbarrier_wait(&arrived[slot], 0);
      float scores[32];
      products_fence();
      multiply_by_rows<T>(scores, q, matrix_at(keys, 2 * slot * kTileBytes));
      products_commit();
      [[maybe_unused]] uint32_t kept;
      if constexpr (kDropout) {
        const uint32_t drawn = dropout.drawn(static_cast<uint32_t>(head.start + warp_query), first_key(slot));
        const int query = warp_query + HeadDropout::drawn_query();
        if (drawn_words.are_there() && query < head.length) {
          *drawn_words.at(first_key(slot) / kTileRows, query, HeadDropout::drawn_half()) = drawn;
        }
        kept = HeadDropout::exchanged(drawn);
      }
      products_wait<0>();  // for the last tile's values, too
      pin(scores);
      pin(out);
      if (slot == tiles - 1) load_rows(q, queries, (block + step) * kTileRows);  // the next ones are on their way

      uint32_t probabilities[4][4];
      float tile_sum[2];
      for (bool raise = slot == 0;; raise = true) {
        if (slot == 0 && last_rows < kTileRows) {
#pragma unroll
          for (int i = 0; i < 32; ++i) {
            if (8 * (i / 4) + 2 * place() + i % 2 >= last_rows) scores[i] = -INFINITY;
          }
        }
        if (raise) raise_maximum(scores, scale_log2, maximum, sum, out);
        tile_sum[0] = tile_sum[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i += 2) {
          float pair[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            pair[h] = exp2_approximate(fmaf(scores[i + h], scale_log2, -maximum[i / 2 % 2]));
            tile_sum[i / 2 % 2] += pair[h];
          }
          probabilities[i / 8][i / 2 % 4] = pack<T>(pair[0], pair[1]);
        }
        if (raise || !__any_sync(0xFFFFFFFF, fmaxf(tile_sum[0], tile_sum[1]) > kLargestSum)) break;
      }
      sum[0] += tile_sum[0];
      sum[1] += tile_sum[1];
      if constexpr (kDropout) {
#pragma unroll
        for (int i = 0; i < 16; ++i) probabilities[i / 4][i % 4] &= kept_pair(kept, i / 2, i % 2);
      }
      products_fence();
      add_weighted_rows<T>(out, probabilities, matrix_at(values, 2 * slot * kTileBytes));
      products_commit();
    }
    products_wait<0>();
    pin(out);

    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(sum[r]);
      factor[r] = __fdividef(kDropout ? p.dropout.scale : 1.0f, total);
      const int query = warp_query + quad() + 8 * r;
      if (p.lse != nullptr && place() == 0 && query < head.length) {
        p.lse[head.head * p.total + head.start + query] = maximum[r] * kLn2 + logf(total);
      }
    }
    store_rows(results, first_query, out, factor[0], factor[1]);
  }
#endif
}

}  // namespace

void attention_forward_hopper(const AttentionForwardParams& p, const DrawnBits& drawn, int64_t max_seqlen, void* stream) {
  const bool is_bfloat16 = p.dtype == DType::bfloat16;
  const TensorMap qkv =
      make_tensor_map(p.qkv, is_bfloat16, p.total, 3 * p.num_heads * kHeadDim, 3 * p.num_heads * kHeadDim * 2, kTileRows);
  // A multiprocessor holds four warpgroups. Of small sequences each has a block of its own; the larger ones' keys and values
  // leave room for two blocks, or one. A launch for each kind, unless all sequences have the same length.
  const int most_tiles = num_tiles(max_seqlen);
  const bool all_equal = p.total == p.batch * max_seqlen;
  const auto launch_kind = [&](int fewest, int most, int warpgroups) {
    if (most_tiles < fewest || (all_equal && most_tiles > most)) return;
    const int tiles = min(most, most_tiles);
    const int64_t heads = p.batch * p.num_heads, places = int64_t{num_processors()} * kMaxWarpgroups / warpgroups;
    const int64_t shares = min((places + heads - 1) / heads, int64_t{tiles + warpgroups - 1} / warpgroups);
    const auto run = [&](auto kernel) {
      launch("attention forward", kernel, dim3(static_cast<unsigned>(heads), static_cast<unsigned>(shares)),
             warpgroups * kWarpgroup, tiles * 2 * kTileBytes + 1024, stream, p, drawn, qkv, fewest, tiles);
    };
    if (is_bfloat16) {
      p.dropout.threshold != 0 ? run(forward_kernel<__nv_bfloat16, true>) : run(forward_kernel<__nv_bfloat16, false>);
    } else {
      p.dropout.threshold != 0 ? run(forward_kernel<__half, true>) : run(forward_kernel<__half, false>);
    }
  };
  launch_kind(7, kMaxTiles, kMaxWarpgroups);  // the longest first: the others fill the end
  launch_kind(4, 6, 2);
  launch_kind(1, 3, 1);
}

}  // namespace fastbert::cuda
