// What the attention kernels for Hopper share: tiles of 64 rows of one head, and this lane's part of such rows.
//
// A warpgroup works on 64 rows, each of its warps on 16. Tiles are 64 rows of 64 elements in shared memory, as copy_box and
// the products have them (ptx.cuh).

#pragma once

#include "cuda/attention.cuh"

namespace fastbert::cuda {

constexpr int kHeadDim = kHopperHeadDim, kTileRows = kHopperTileKeys, kTileBytes = kTileRows * kHeadDim * 2,
              kWarpgroup = 128;
constexpr int kMaxTiles = kHopperMaxSeqlen / kTileRows;  // of a sequence

__host__ __device__ constexpr int num_tiles(int64_t length) {
  return static_cast<int>((length + kTileRows - 1) / kTileRows);
}

// By a shuffle, which tells the compiler that a warp's lanes agree: products are not for branches that could divide them.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(0xFFFFFFFF, threadIdx.x / kWarpgroup, 0); }
__device__ __forceinline__ int thread_of_warpgroup() { return threadIdx.x % kWarpgroup; }
__device__ __forceinline__ int warp_of_warpgroup() { return thread_of_warpgroup() / 32; }
__device__ __forceinline__ int quad() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int place() { return threadIdx.x % 4; }

// Rows of one head in a (total, ..., 64) tensor, from the first of a sequence.
template <typename T>
struct HeadRows {
  T* data;
  int64_t stride;  // elements
  int length;

  __device__ __forceinline__ T* at(int row, int column) const { return data + row * stride + column; }
};

// The block's threads make the tile's rows from row on zero: a probability of 0 does not silence the NaN of another
// sequence, to which the rows behind a sequence's end belong. Before a product reads them there has to be a barrier.
__device__ __forceinline__ void zero_rows(unsigned char* tile, int row) {
  for (int at = row * 128 + threadIdx.x * 16; at < kTileBytes; at += blockDim.x * 16) {
    *reinterpret_cast<uint4*>(tile + at) = make_uint4(0, 0, 0, 0);
  }
  fence_async_shared();
}

// Rows first to first + 63 as a of the warpgroup's products over their 64 columns, straight from memory: each is read once,
// in pieces that the first-level cache puts together. What is behind the end is 0.
template <typename T>
__device__ __forceinline__ void load_rows(uint32_t (&a)[4][4], const HeadRows<const T>& rows, int first) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + 16 * warp_of_warpgroup() + quad() + 8 * r;
    const bool inside = row < rows.length;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      a[j / 2][j % 2 * 2 + r] = inside ? *reinterpret_cast<const uint32_t*>(rows.at(row, 8 * j + 2 * place())) : 0;
    }
  }
}

// A product d of 64 columns, rounded, as a of products over these columns.
template <typename T>
__device__ __forceinline__ void pack_rows(uint32_t (&a)[4][4], const float (&d)[32]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = pack<T>(d[2 * i], d[2 * i + 1]);
}

// The tile's rows become those of a warpgroup's a, and 0 from this row on. Before a product reads them there have to be
// fence_async_shared() and a barrier.
__device__ __forceinline__ void write_rows(unsigned char* tile, const uint32_t (&a)[4][4], int rows) {
  const int row = 16 * warp_of_warpgroup() + quad();
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int j = i / 2, r = i % 2;  // of eight columns, 16 bytes, and of rows
    *reinterpret_cast<uint32_t*>(tile + (row + 8 * r) * 128 + (j ^ quad()) * 16 + 4 * place()) =
        row + 8 * r < rows ? a[i / 4][i % 4] : 0;
  }
}

// words[i] of the lane at place p becomes words[p] of the lane at place i.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = place() & step;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & step) continue;
      uint32_t &first = words[low], &second = words[low + step];
      const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, upper ? first : second, step);
      first = upper ? other : first;
      second = upper ? second : other;
    }
  }
}

// Rows first to first + 63 become d times factors of rows quad and quad + 8, in stores of 16 bytes: the lanes that share a
// row exchange their pieces.
template <typename T>
__device__ __forceinline__ void store_rows(const HeadRows<T>& rows, int first, const float (&d)[32], float factor,
                                           float factor_8) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + 16 * warp_of_warpgroup() + quad() + 8 * r;
    const float f = r == 0 ? factor : factor_8;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int element = 4 * (4 * c + i) + 2 * r;
        words[i] = pack<T>(d[element] * f, d[element + 1] * f);
      }
      transpose_quad(words);
      if (row < rows.length) {
        *reinterpret_cast<uint4*>(rows.at(row, 8 * (4 * c + place()))) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// d = a b^T over 64 columns; a: this warpgroup's rows in registers, b: a tile.
template <typename T>
__device__ __forceinline__ void multiply_by_rows(float (&d)[32], const uint32_t (&a)[4][4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < 4; ++k) product<T, Along::depth>(d, a[k], matrix_at(b, 32 * k), k > 0);
}

// d += a b; a: this warpgroup's rows in registers, over the tile's 64 rows.
template <typename T>
__device__ __forceinline__ void add_weighted_rows(float (&d)[32], const uint32_t (&a)[4][4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < 4; ++k) product<T, Along::width>(d, a[k], matrix_at(b, 2048 * k), true);
}

// The maximum of the rows rises to that of these scores, if that is larger, and what was summed up until now is scaled to
// it.
__device__ __forceinline__ void raise_maximum(const float (&scores)[32], float scale_log2, float (&maximum)[2],
                                              float (&sum)[2], float (&out)[32]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = scores[2 * r];
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
    largest = fmaxf(maximum[r], quad_max(largest) * scale_log2);
    const float correction = exp2_approximate(maximum[r] - largest);
    maximum[r] = largest;
    sum[r] *= correction;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      out[4 * j + 2 * r] *= correction;
      out[4 * j + 2 * r + 1] *= correction;
    }
  }
}

}  // namespace fastbert::cuda
