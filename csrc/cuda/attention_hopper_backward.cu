// Attention's backward on Hopper, head_dim 64 and at most 512 tokens: one block for all of a head, by wgmma.
//
// A warpgroup has 64 keys with their dK and dV in registers; queries and dout pass by in tiles of 64, by bulk copies into
// two stages. Scores are transposed, so that probabilities and dS go from the products' registers straight into dV and dK;
// dS goes through shared memory, too, for dQ, which one warpgroup sums over the keys of all while all are at the next tile.
// What a tile's dQ gets from blocks of keys is summed in shared memory, by the same threads in the same order: no atomics,
// no workspace in memory, the same bits in every run. Up to 128 tokens a block is one warpgroup, two blocks on a
// multiprocessor; beyond, one block of two warpgroups.
//
// FLOPs per head and sequence: 10 * length^2 * 64, and an exponential per score. Bytes per head and token: 1,028, once from
// memory; queries and dout again from L2 for each block of keys. Shared memory: 60 KB, 92 KB for two tiles with one
// warpgroup, 212 KB for eight with two, of which 16 KB per tile are sums of dQ. dV's operand, the values, is in registers.
//
// Bounds of a tile and a warpgroup on each quarter of a multiprocessor, from the instructions compiled for sm_90a, in
// cycles: products 640, exponentials 264, instructions issued 640, with dropout 1,050 and 70 more for multiplications that
// take two. At 132 times 1.75 GHz that is 950 and 540 TFLOP/s with nothing lost to latency; of bytes, at 4.3 TB/s, 1,370 for
// 512 tokens and 340 for 128. An H200 reached 272 and 218 for 512 tokens, 120 and 111 for 128: its two warps per scheduler
// wait for each other at every step.

#include "cuda/attention_hopper.cuh"

namespace fastbert::cuda {

namespace {

constexpr int kStages = 2;

// Where a block has what, in shared memory.
template <int kWarpgroups>
struct Layout {
  static constexpr int kStageBytes = 2 * kTileBytes;  // q, then dout
  static constexpr int kKeys = kStages * kStageBytes, kDs = kKeys + kWarpgroups * kTileBytes;
  static constexpr int kDsBytes = kWarpgroups * kTileBytes;                                   // of one of two
  static constexpr int kLse = kDs + 2 * kDsBytes, kDelta = kLse + kMaxTiles * kTileRows * 4;  // float32 of each query
  static constexpr int kSums = kDelta + kMaxTiles * kTileRows * 4;                            // float32, of dQ
  static constexpr int kSumBytes = kTileRows * kHeadDim * 4;                                  // of a tile

  // The sums of dQ are there where there is more than one block of keys.
  static int bytes(int tiles) { return kSums + (tiles > kWarpgroups ? tiles * kSumBytes : 0); }
};

template <typename T>
__device__ __forceinline__ float product_of_pairs(uint32_t a, uint32_t b) {
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return fmaf(x.x, y.x, x.y * y.y);
}

// Of all queries of a sequence, lse in powers of 2 and delta = sum(dout * out) * delta_scale. Queries past its end get an
// infinite lse, hence probabilities of 0. Eight lanes have a row, and each has several, whose loads are all on their way
// before the first is waited for: nothing else of a block can begin until all are there.
template <typename T>
__device__ __forceinline__ void find_statistics(float* lse_log2, float* deltas, const HeadRows<const T>& dout, const T* out,
                                                const float* lse, float delta_scale) {
  constexpr int kRows = 8;
  const int rows = num_tiles(dout.length) * kTileRows, chunk = threadIdx.x % 8, step = blockDim.x / 8;
  for (int first = threadIdx.x / 8; first < rows; first += kRows * step) {
    uint4 a[kRows], b[kRows];
    float row_lse[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = min(first + i * step, dout.length - 1);
      a[i] = *reinterpret_cast<const uint4*>(dout.at(row, 8 * chunk));
      b[i] = *reinterpret_cast<const uint4*>(out + row * dout.stride + 8 * chunk);
      row_lse[i] = lse[row];
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * step;
      float delta = product_of_pairs<T>(a[i].x, b[i].x) + product_of_pairs<T>(a[i].y, b[i].y) +
                    (product_of_pairs<T>(a[i].z, b[i].z) + product_of_pairs<T>(a[i].w, b[i].w));
#pragma unroll
      for (int lanes = 1; lanes < 8; lanes *= 2) delta += __shfl_xor_sync(0xFFFFFFFF, delta, lanes);
      if (chunk == 0 && row < rows) {
        lse_log2[row] = row < dout.length ? row_lse[i] * kLog2E : INFINITY;
        deltas[row] = row < dout.length ? delta * delta_scale : 0.0f;
      }
    }
  }
}

template <typename T, int kWarpgroups, bool kDropout>
__global__ void __launch_bounds__(kWarpgroups* kWarpgroup, 1)
    backward_kernel(AttentionBackwardParams p, DrawnBits drawn_bits, const __grid_constant__ TensorMap qkv_map,
                    const __grid_constant__ TensorMap dout_map, int fewest_tiles, int most_tiles) {
#if FASTBERT_HOPPER
  using Layout = Layout<kWarpgroups>;
  const Head head(p.cu_seqlens, p.num_heads, static_cast<int>(blockIdx.x));
  const int tiles = num_tiles(head.length), key_blocks = (tiles + kWarpgroups - 1) / kWarpgroups;
  if (tiles < fewest_tiles || tiles > most_tiles) return;
  const int64_t hidden = p.num_heads * kHeadDim;
  const int64_t qkv_offset = head.start * 3 * hidden + head.head * kHeadDim,
                out_offset = head.start * hidden + head.head * kHeadDim;
  const int last_rows = head.length - (tiles - 1) * kTileRows;  // of the last tile

  unsigned char* const shared = aligned_shared_memory();
  __shared__ uint64_t stage_arrived[kStages], keys_arrived;
  const auto copy_keys = [&](int key_block) {
    const int first_tile = key_block * kWarpgroups, count = min(kWarpgroups, tiles - first_tile);
    mbarrier_arrive_expecting(&keys_arrived, count * kTileBytes);
    for (int i = 0; i < count; ++i) {
      copy_box(shared + Layout::kKeys + i * kTileBytes, qkv_map, &keys_arrived,
               static_cast<int>(hidden) + head.head * kHeadDim, static_cast<int>(head.start) + (first_tile + i) * kTileRows);
    }
  };
  // A step is a tile of queries against a block of keys.
  const int steps = key_blocks * tiles;
  const auto copy_queries = [&](int step) {
    uint64_t* const arrived = &stage_arrived[step % kStages];
    unsigned char* const stage = shared + step % kStages * Layout::kStageBytes;
    const int row = static_cast<int>(head.start) + step % tiles * kTileRows;
    mbarrier_arrive_expecting(arrived, Layout::kStageBytes);
    copy_box(stage, qkv_map, arrived, head.head * kHeadDim, row);
    copy_box(stage + kTileBytes, dout_map, arrived, head.head * kHeadDim, row);
  };
  if (threadIdx.x == 0) {
    mbarrier_init(&keys_arrived, 1);
    for (int stage = 0; stage < kStages; ++stage) mbarrier_init(&stage_arrived[stage], 1);
    fence_mbarriers();
    copy_keys(0);
    for (int step = 0; step < min(kStages, steps); ++step) copy_queries(step);
  }
  // All come from the last step with its dS written and its other products done: what they read makes room.
  const auto next_step = [&](int step) {
    __syncthreads();
    if (threadIdx.x == 0 && step + 1 < steps) copy_queries(step + 1);
  };
  const HeadDropout dropout(p.dropout, head.head);
  const DrawnWords drawn_words(drawn_bits, p.total, head);
  // What dropout scales by is left out of dS, and put into what is made of it.
  const float dropout_scale = kDropout ? p.dropout.scale : 1.0f;
  const float kept_share = kDropout ? 1.0f - static_cast<float>(p.dropout.threshold) / 65536.0f : 1.0f;
  const HeadRows<const T> dout{static_cast<const T*>(p.dout) + out_offset, hidden, head.length};
  float* const lse_log2 = reinterpret_cast<float*>(shared + Layout::kLse);
  float* const deltas = reinterpret_cast<float*>(shared + Layout::kDelta);
  find_statistics(lse_log2, deltas, dout, static_cast<const T*>(p.out) + out_offset,
                  p.lse + head.head * p.total + head.start, kept_share);
  __syncthreads();

  const HeadRows<const T> values{static_cast<const T*>(p.qkv) + qkv_offset + 2 * hidden, 3 * hidden, head.length};
  const HeadRows<T> dq_rows{static_cast<T*>(p.dqkv) + qkv_offset, 3 * hidden, head.length};
  const HeadRows<T> dk_rows{dq_rows.data + hidden, 3 * hidden, head.length};
  const HeadRows<T> dv_rows{dk_rows.data + hidden, 3 * hidden, head.length};
  const float scale_log2 = p.softmax_scale * kLog2E, ds_scale = p.softmax_scale * dropout_scale;
  const int my_warpgroup = warpgroup();
  const uint64_t keys = matrix(shared + Layout::kKeys), my_keys = matrix_at(keys, my_warpgroup * kTileBytes);

  // dQ of a tile of queries is the work of one warpgroup, in turns, from the dS of all; its threads' sums are nobody else's.
  float dq[32];
  const auto has_dq = [&](int tile) { return tile % kWarpgroups == my_warpgroup; };
  const auto begin_dq = [&](int step, int key_tiles) {
    const uint64_t ds = matrix(shared + Layout::kDs + step % 2 * Layout::kDsBytes);
    const auto add_tiles = [&](auto count) {
      products_fence();
#pragma unroll
      for (int i = 0; i < 4 * decltype(count)::value; ++i) {
        const int at = 2048 * i;
        product<T, Along::width, Along::width>(dq, matrix_at(ds, at), matrix_at(keys, at), i > 0);
      }
      products_commit();
    };
    // Each branch commits its own products: a branch between products and their commit makes two groups of one.
    if (kWarpgroups == 1 || key_tiles == kWarpgroups) {
      add_tiles(std::integral_constant<int, kWarpgroups>());
    } else {
      add_tiles(std::integral_constant<int, 1>());
    }
  };
  const auto finish_dq = [&](int tile, int key_block) {
    float4* const sums =
        reinterpret_cast<float4*>(shared + Layout::kSums + tile * Layout::kSumBytes) + thread_of_warpgroup();
    float totals[32];  // not into dq: nothing that products add to may be written while others are under way
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 sum = key_block > 0 ? sums[i * kWarpgroup] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      totals[4 * i] = dq[4 * i] + sum.x;
      totals[4 * i + 1] = dq[4 * i + 1] + sum.y;
      totals[4 * i + 2] = dq[4 * i + 2] + sum.z;
      totals[4 * i + 3] = dq[4 * i + 3] + sum.w;
      if (key_block < key_blocks - 1) {
        sums[i * kWarpgroup] = make_float4(totals[4 * i], totals[4 * i + 1], totals[4 * i + 2], totals[4 * i + 3]);
      }
    }
    if (key_block == key_blocks - 1) store_rows(dq_rows, tile * kTileRows, totals, ds_scale, ds_scale);
  };

  uint32_t v[4][4];
  load_rows(v, values, my_warpgroup * kTileRows);
  for (int key_block = 0, step = 0; key_block < key_blocks; ++key_block) {
    const int first_tile = key_block * kWarpgroups, key_tiles = min(kWarpgroups, tiles - first_tile);
    const int first_key = (first_tile + my_warpgroup) * kTileRows, warp_key = first_key + 16 * warp_of_warpgroup();
    if (key_block > 0) {
      __syncthreads();  // nobody reads the last block's keys any more
      if (threadIdx.x == 0) copy_keys(key_block);
    }
    float dk[32] = {}, dv[32] = {};
    mbarrier_wait(&keys_arrived, key_block % 2);
    if (key_block == key_blocks - 1 && last_rows < kTileRows) {
      // For dQ, which comes after next_step's barrier. Scores of keys that are not there may be anything.
      zero_rows(shared + Layout::kKeys + (key_tiles - 1) * kTileBytes, last_rows);
    }

    for (int tile = 0; tile < tiles; ++tile, ++step) {
      unsigned char* const stage = shared + step % kStages * Layout::kStageBytes;
      mbarrier_wait(&stage_arrived[step % kStages], step / kStages % 2);
      if (tile == tiles - 1 && last_rows < kTileRows) {
        zero_rows(stage, last_rows);
        zero_rows(stage + kTileBytes, last_rows);
        __syncthreads();
      }
      const uint64_t q = matrix(stage), dout_tile = matrix(stage + kTileBytes);
      // Transposed: rows are keys, columns queries. So probabilities and dS are, as they are, operands of dV and dK.
      float scores[32], dp[32];
      products_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        product<T, Along::depth, Along::depth>(scores, matrix_at(my_keys, 32 * k), matrix_at(q, 32 * k), k > 0);
      }
      products_commit();
      multiply_by_rows<T>(dp, v, dout_tile);
      products_commit();
      [[maybe_unused]] uint32_t drawn[4];
      if constexpr (kDropout) {
        if (drawn_words.are_there()) {
          const int key_tile = min(first_tile + my_warpgroup, tiles - 1);  // of keys past the end anything will do
          load_drawn(drawn, drawn_words, key_tile, tile * kTileRows, head.length);
        }
      }
      // The last tile's dQ, while all wait for these products: its dS has been there for a while.
      const bool has_last_dq = tile > 0 && has_dq(tile - 1);
      products_wait<2>();
      if (tile > 0) next_step(step);
      if (has_last_dq) {
        begin_dq(step - 1, key_tiles);
      } else {
        products_commit();
      }
      [[maybe_unused]] uint32_t kept;
      if constexpr (kDropout) {
        kept = drawn_words.are_there() ? kept_transposed_of(drawn, warp_of_warpgroup())
                                       : dropout.kept_transposed(static_cast<uint32_t>(warp_key),
                                                                 static_cast<uint32_t>(head.start + tile * kTileRows));
      }
      products_wait<2>();
      pin(scores);
      // Of the queries of this lane's columns.
      const float2* const tile_lse = reinterpret_cast<const float2*>(lse_log2 + tile * kTileRows) + place();
      const float2* const tile_deltas = reinterpret_cast<const float2*>(deltas + tile * kTileRows) + place();
      uint32_t probabilities[4][4];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 lse = tile_lse[4 * j];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float &first = scores[4 * j + 2 * r], &second = scores[4 * j + 2 * r + 1];
          first = exp2_approximate(fmaf(first, scale_log2, -lse.x));
          second = exp2_approximate(fmaf(second, scale_log2, -lse.y));
          uint32_t& packed = probabilities[j / 2][j % 2 * 2 + r];
          packed = pack<T>(first, second);
          if constexpr (kDropout) packed &= kept_pair(kept, j, r);
        }
      }
      products_fence();
      add_weighted_rows<T>(dv, probabilities, dout_tile);
      products_commit();
      products_wait<1>();
      pin(dp);
      if (tile == tiles - 1) load_rows(v, values, first_key + kWarpgroups * kTileRows);  // the next ones are on their way
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 delta = tile_deltas[4 * j];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = dp[4 * j + i];
          if constexpr (kDropout) x = is_kept(kept, j, i) ? x : 0.0f;
          x = scores[4 * j + i] * (x - (i % 2 == 0 ? delta.x : delta.y));
        }
      }
      uint32_t ds[4][4];
      pack_rows<T>(ds, dp);
      // Before the products of dK: what they read may not be read by others while they are under way. A key past the end is
      // 0 and so is its part of dQ, but not where its probability, exp(-lse), has become infinite.
      write_rows(shared + Layout::kDs + step % 2 * Layout::kDsBytes + my_warpgroup * kTileBytes, ds,
                 head.length - first_key);
      products_fence();
      add_weighted_rows<T>(dk, ds, q);
      products_commit();
      fence_async_shared();
      if (has_last_dq) {
        pin(dq);
        finish_dq(tile - 1, key_block);
      }
    }
    products_wait<0>();
    pin(dk);
    pin(dv);
    next_step(step);
    const bool has_last_dq = has_dq(tiles - 1);
    if (has_last_dq) begin_dq(step - 1, key_tiles);
    store_rows(dk_rows, first_key, dk, ds_scale, ds_scale);
    store_rows(dv_rows, first_key, dv, dropout_scale, dropout_scale);
    products_wait<0>();
    if (has_last_dq) {
      pin(dq);
      finish_dq(tiles - 1, key_block);
    }
  }
#endif
}

// Of the sequences of so many tiles.
template <int kWarpgroups>
void launch_backward(const AttentionBackwardParams& p, const DrawnBits& drawn, int fewest_tiles, int most_tiles,
                     void* stream) {
  const bool is_bfloat16 = p.dtype == DType::bfloat16;
  const int64_t hidden = p.num_heads * kHeadDim;
  const TensorMap qkv = make_tensor_map(p.qkv, is_bfloat16, p.total, 3 * hidden, 3 * hidden * 2, kTileRows);
  const TensorMap dout = make_tensor_map(p.dout, is_bfloat16, p.total, hidden, hidden * 2, kTileRows);
  const auto run = [&](auto kernel) {
    launch("attention backward", kernel, static_cast<unsigned>(p.batch * p.num_heads), kWarpgroups * kWarpgroup,
           Layout<kWarpgroups>::bytes(most_tiles) + 1024, stream, p, drawn, qkv, dout, fewest_tiles, most_tiles);
  };
  if (is_bfloat16) {
    p.dropout.threshold != 0 ? run(backward_kernel<__nv_bfloat16, kWarpgroups, true>)
                             : run(backward_kernel<__nv_bfloat16, kWarpgroups, false>);
  } else {
    p.dropout.threshold != 0 ? run(backward_kernel<__half, kWarpgroups, true>)
                             : run(backward_kernel<__half, kWarpgroups, false>);
  }
}

}  // namespace

void attention_backward_hopper(const AttentionBackwardParams& p, const DrawnBits& drawn, int64_t max_seqlen, void* stream) {
  constexpr int kFewTiles = 2;  // of one warpgroup's blocks
  const int most_tiles = num_tiles(max_seqlen);
  const bool all_equal = p.total == p.batch * max_seqlen;
  if (most_tiles > kFewTiles) launch_backward<2>(p, drawn, kFewTiles + 1, most_tiles, stream);
  if (most_tiles <= kFewTiles || !all_equal) launch_backward<1>(p, drawn, 1, min(most_tiles, kFewTiles), stream);
}

}  // namespace fastbert::cuda
