// What the attention kernels share: which head of which sequence a block works on, reductions over the rows of a warp's
// product, and dropout of it.
//
// mma.sync and wgmma give a warp 16 rows of a product in the same way (ptx.cuh): a lane holds rows quad and quad + 8, and of
// each eight columns j columns 8 j + 2 * place + (0, 1), as elements i = 0, 1 and 2, 3; quad is lane / 4, place lane % 4.

#pragma once

#include "cuda/arithmetic.h"
#include "cuda/launch.h"
#include "cuda/launcher.cuh"
#include "cuda/ptx.cuh"

namespace fastbert::cuda {

// The kernels of attention.cu's launchers: for a GPU of compute capability 9.0, this head_dim and at most so many tokens,
// and for everything else. delta: a workspace of (num_heads, total).
constexpr int kHopperHeadDim = 64, kHopperMaxSeqlen = 512, kHopperTileKeys = 64;
void attention_forward_hopper(const AttentionForwardParams& params, const DrawnBits& drawn, int64_t max_seqlen,
                              void* stream);
void attention_backward_hopper(const AttentionBackwardParams& params, const DrawnBits& drawn, int64_t max_seqlen,
                               void* stream);
void attention_forward_streaming(const AttentionForwardParams& params, int64_t max_seqlen, void* stream);
void attention_backward_streaming(const AttentionBackwardParams& params, float* delta, int64_t max_seqlen, void* stream);

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// One head of one sequence, which is rows start to start + length of the packed batch. Rows past its end belong to the next
// sequence: they are neither read nor written.
struct Head {
  int64_t start;
  int length, head;

  // index counts heads within sequences.
  __device__ __forceinline__ Head(const int32_t* cu_seqlens, int64_t num_heads, int index)
      : head(index % static_cast<int>(num_heads)) {
    const int sequence = index / static_cast<int>(num_heads);
    start = cu_seqlens[sequence];
    length = cu_seqlens[sequence + 1] - cu_seqlens[sequence];
  }
};

// The two numbers in one register.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t both) {
  if constexpr (kIsBfloat16<T>) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
  }
}

// Over the four lanes that hold a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

// --- dropout ------------------------------------------------------------------------------------------------------------

// A Philox call draws eight keys of one query, of which a lane holds one or two: so the lanes that share calls draw
// different ones, keep one bit of each element, and exchange these. The mask of a warp's 16 x 64 elements, 32 of them per
// lane, costs four calls per lane and two or three shuffles.

// Of all lanes' words, what is at bit kShift of the index of a bit and what is at bit kLanes of the lane's number change
// places. kLow: the bits whose index has no kShift.
template <int kLanes, int kShift, uint32_t kLow>
__device__ __forceinline__ uint32_t transpose_bits(uint32_t word) {
  const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, word, kLanes);
  const bool upper = threadIdx.x & kLanes;
  const uint32_t stays = upper ? ~kLow : kLow, turn = upper ? 32 - kShift : kShift;
  return (word & stays) | ((other << turn | other >> (32 - turn)) & ~stays);
}

// Of what is kept.
__device__ __forceinline__ float kept_scale(const Dropout& dropout) { return dropout.threshold == 0 ? 1.0f : dropout.scale; }

// Dropout of one head's probabilities. Blocks are of one dimension, whole warps.
struct HeadDropout {
  uint64_t seed;
  uint32_t threshold, head, stream;

  __device__ __forceinline__ HeadDropout(const Dropout& dropout, int head)
      : seed(dropout.threshold == 0 ? 0 : static_cast<uint64_t>(*dropout.seed)),
        threshold(dropout.threshold),
        head(static_cast<uint32_t>(head)),
        stream(dropout.stream) {}

  __device__ __forceinline__ bool drops() const { return threshold != 0; }

  // What is_kept tells of each element. Rows are 16 queries from this one of the batch, columns 64 keys from this one of the
  // sequence, a multiple of 8.
  __device__ __forceinline__ uint32_t kept(uint32_t query, uint32_t key) const { return exchanged(drawn(query, key)); }

  // What a lane of it draws, of query drawn_query() and of every other eight keys from the drawn_half()-th on.
  __device__ __forceinline__ uint32_t drawn(uint32_t query, uint32_t key) const {
    uint32_t bits = 0;
#pragma unroll
    for (uint32_t c = 0; c < 4; ++c) add(bits, query + drawn_query(), key / 8 + 2 * c + drawn_half());
    return bits;
  }
  __device__ __forceinline__ static uint32_t drawn_query() { return threadIdx.x % 32 / 4 + 8 * (threadIdx.x & 1); }
  __device__ __forceinline__ static uint32_t drawn_half() { return threadIdx.x % 4 / 2; }

  // kept() of what the lanes drew.
  __device__ __forceinline__ static uint32_t exchanged(uint32_t bits) {
    bits = transpose_bits<1, 1, 0x55555555>(bits);
    return transpose_bits<2, 2, 0x33333333>(bits);
  }

  // The same as kept() of a transposed product: rows are 16 keys, columns 64 queries.
  __device__ __forceinline__ uint32_t kept_transposed(uint32_t key, uint32_t query) const {
    uint32_t bits = 0;
#pragma unroll
    for (uint32_t c = 0; c < 4; ++c) add(bits, query + transposed_query(c), key / 8 + transposed_half());
    return exchanged_transposed(bits);
  }
  __device__ __forceinline__ static uint32_t transposed_query(uint32_t c) {
    const uint32_t quad = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
    return 8 * (2 * c + (quad >> 2)) + 2 * place + (quad & 1);
  }
  __device__ __forceinline__ static uint32_t transposed_half() { return threadIdx.x % 32 / 8 & 1; }
  __device__ __forceinline__ static uint32_t exchanged_transposed(uint32_t bits) {
    bits = transpose_bits<4, 16, 0x0000FFFF>(bits);
    bits = transpose_bits<8, 1, 0x55555555>(bits);
    return transpose_bits<16, 2, 0x33333333>(bits);
  }

 private:
  // Of the c-th call, word w's columns become bits 4 c + w and 16 + 4 c + w: those of earlier calls move down as new ones
  // come.
  __device__ __forceinline__ void add(uint32_t& bits, uint32_t query, uint32_t eight_keys) const {
    const Words words = philox(eight_keys, query, head, stream, seed);
#pragma unroll
    for (int w = 0; w < 4; ++w) bits = (bits >> 1 & 0x7FFF7FFF) | kept_halves(words.w[w], threshold);
  }
};

// Of one head of one sequence, DrawnBits: for each tile of 64 keys the words of all queries, two of each,
// HeadDropout::drawn() of both halves. In place of four Philox calls of a lane the backward pass reads four words.
struct DrawnWords {
  uint32_t* first;  // of the first tile of keys and the first query; null where nothing is kept
  int64_t tile_stride;

  __device__ __forceinline__ DrawnWords(const DrawnBits& bits, int64_t total, const Head& head)
      : first(bits.words == nullptr ? nullptr : bits.words + 2 * (head.head * bits.tiles * total + head.start)),
        tile_stride(2 * total) {}

  __device__ __forceinline__ bool are_there() const { return first != nullptr; }
  __device__ __forceinline__ uint32_t* at(int tile, int query, int half) const {
    return first + tile * tile_stride + 2 * query + half;
  }
};

// HeadDropout::kept_transposed from memory in two steps, between which the words arrive: of a tile of keys, whose 16 of this
// warp are the w-th, and the 64 queries from this one of the sequence.
__device__ __forceinline__ void load_drawn(uint32_t (&words)[4], const DrawnWords& drawn, int tile, int query, int length) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int row = query + HeadDropout::transposed_query(c);
    words[c] = row < length ? *drawn.at(tile, row, HeadDropout::transposed_half()) : 0;
  }
}
__device__ __forceinline__ uint32_t kept_transposed_of(const uint32_t (&words)[4], int w) {
  uint32_t bits = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) bits |= (words[c] >> 4 * w & 0x000F000F) << 4 * c;
  return HeadDropout::exchanged_transposed(bits);
}

// Of what HeadDropout drew: bit 16 h + 2 j + r is set where element i = 2 r + h of columns j is kept.
__device__ __forceinline__ bool is_kept(uint32_t kept, int columns, int element) {
  return kept >> (16 * (element % 2) + 2 * columns + element / 2) & 1;
}

// What is_kept tells of the columns from these on.
__device__ __forceinline__ uint32_t kept_from(uint32_t kept, int columns) { return kept >> 2 * columns; }

// Of elements 2 * r and 2 * r + 1 of columns j, packed into a register: all bits of those that are kept.
__device__ __forceinline__ uint32_t kept_pair(uint32_t kept, int columns, int r) {
  const int bit = 2 * columns + r;
  return spread_top_bits(kept << (7 - bit % 8), bit < 8 ? 0x2200 : 0x3311);
}

}  // namespace fastbert::cuda
