// What the streaming attention kernels share: tiles of 64 rows in shared memory, and a warp's products with them.
//
// A block is four warps. Each has 16 rows of what stays, in registers, and all walk through what passes by, tile after tile,
// in two buffers: while one is worked on the next tile arrives in the other.

#pragma once

#include "cuda/attention.cuh"

namespace fastbert::cuda {

constexpr int kTileRows = 64, kWarps = 4, kThreads = 32 * kWarps;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }
__device__ __forceinline__ int quad() { return lane() / 4; }
__device__ __forceinline__ int place() { return lane() % 4; }

// Rows of one head of a (total, ..., head_dim) tensor, from the first of a sequence.
template <typename T>
struct Rows {
  T* data;
  int stride, length, head_dim;  // stride: elements from row to row

  __device__ __forceinline__ T* at(int row, int column) const { return data + static_cast<int64_t>(row) * stride + column; }
  __device__ __forceinline__ bool has(int row, int column) const { return row < length && column < head_dim; }

  // Of these rows of `from`, the same of `to`, which has its shape, columns further on. A kernel that works out its results'
  // address at its end in this way keeps no register for it.
  template <typename U>
  __device__ __forceinline__ Rows<U> of(U* to, const T* from, int columns) const {
    return {to + (data - from) + columns, stride, length, head_dim};
  }
};

// kTileRows rows of kWidth elements, head_dim of them and zeros. Of 16 bytes each, chunk c of row r is at c ^ (r % 8), so
// that eight rows' chunks c are in different banks.
template <typename T, int kWidth>
struct Tile {
  static constexpr int kChunks = kWidth / 8, kRowBytes = kWidth * 2, kBytes = kTileRows * kRowBytes;

  unsigned char* bytes;

  __device__ __forceinline__ unsigned char* at(int row, int chunk) const {
    return bytes + row * kRowBytes + (chunk ^ (row % 8)) * 16;
  }

  // All threads of the block begin to copy rows from first on; what is not there becomes 0: another sequence's NaN would
  // survive its probability of 0.
  __device__ __forceinline__ void copy(const Rows<const T>& rows, int first) const {
    constexpr int kStep = kThreads / kChunks;  // rows that are copied at once
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const T* from = rows.at(first + row, 8 * chunk);
#pragma unroll
    for (int r = 0; r < kTileRows; r += kStep, from += kStep * rows.stride) {
      copy_async(at(row + r, chunk), from, rows.has(first + row + r, 8 * chunk));
    }
  }

  // The 16 rows from row on, a multiple of 16, of the 16 columns k: as a of a product over columns. As b, m[0] and m[2] are
  // the first eight rows, m[1] and m[3] the others.
  __device__ __forceinline__ void load(uint32_t (&m)[4], int row, int k) const { load_matrices(m, address(row, k)); }

  // The same 16 x 16 as b of a product over rows: m[0] and m[1] are the first eight columns, m[2] and m[3] the others.
  __device__ __forceinline__ void load_transposed(uint32_t (&m)[4], int row, int k) const {
    load_matrices_transposed(m, address(row, k));
  }

  // This warp writes its 16 rows, times factors of rows quad and quad + 8: through its rows of this tile, which nobody else
  // may be using, for stores of 16 bytes.
  __device__ __forceinline__ void store(const Rows<T>& rows, int first, const float (&d)[kChunks][4], float factor,
                                        float factor_8) const {
    const int row = 16 * warp() + quad();
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      *reinterpret_cast<uint32_t*>(at(row, j) + 4 * place()) = pack<T>(d[j][0] * factor, d[j][1] * factor);
      *reinterpret_cast<uint32_t*>(at(row + 8, j) + 4 * place()) = pack<T>(d[j][2] * factor_8, d[j][3] * factor_8);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * kChunks / 32; ++i) {
      const int index = i * 32 + lane(), from = 16 * warp() + index / kChunks, chunk = index % kChunks;
      if (rows.has(first + from, 8 * chunk)) {
        *reinterpret_cast<uint4*>(rows.at(first + from, 8 * chunk)) = *reinterpret_cast<const uint4*>(at(from, chunk));
      }
    }
  }

 private:
  // That this lane gives to load_matrices.
  __device__ __forceinline__ unsigned char* address(int row, int k) const {
    return at(row + lane() % 16, 2 * k + lane() / 16);
  }
};

// This warp's 16 rows of a tile, as a of products over columns: in registers, or read again for each product.
template <typename T, int kWidth, bool kInRegisters>
struct Operand {
  uint32_t registers[kInRegisters ? kWidth / 16 : 1][4];
  Tile<T, kWidth> tile;

  __device__ __forceinline__ explicit Operand(const Tile<T, kWidth>& tile) : tile(tile) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) tile.load(registers[k], 16 * warp(), k);
    }
  }
  __device__ __forceinline__ const uint32_t (&get(int k))[4] {
    if constexpr (kInRegisters) return registers[k];
    tile.load(registers[0], 16 * warp(), k);
    return registers[0];
  }
};

// d = a b^T, b: kCount * 8 rows of the tile, from row on.
template <typename T, int kWidth, bool kInRegisters, int kCount>
__device__ __forceinline__ void multiply_by_rows(float (&d)[kCount][4], Operand<T, kWidth, kInRegisters>& a,
                                                 const Tile<T, kWidth>& b, int row) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0.0f;
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    const uint32_t (&a_k)[4] = a.get(k);
#pragma unroll
    for (int j = 0; j < kCount; j += 2) {
      uint32_t m[4];
      b.load(m, row + 8 * j, k);
      multiply_add<T>(d[j], a_k, m[0], m[2]);
      multiply_add<T>(d[j + 1], a_k, m[1], m[3]);
    }
  }
}

// d += a b, a: this warp's 16 rows of a product, rounded to T, b: as many rows of the tile as a has columns, from row on.
template <typename T, int kWidth, int kCount>
__device__ __forceinline__ void add_weighted_rows(float (&d)[kWidth / 8][4], const float (&a)[kCount][4],
                                                  const Tile<T, kWidth>& b, int row) {
#pragma unroll
  for (int j = 0; j < kCount; j += 2) {
    const uint32_t a_j[4] = {pack<T>(a[j][0], a[j][1]), pack<T>(a[j][2], a[j][3]), pack<T>(a[j + 1][0], a[j + 1][1]),
                             pack<T>(a[j + 1][2], a[j + 1][3])};
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
      uint32_t m[4];
      b.load_transposed(m, row + 8 * j, k);
      multiply_add<T>(d[2 * k], a_j, m[0], m[1]);
      multiply_add<T>(d[2 * k + 1], a_j, m[2], m[3]);
    }
  }
}

// Columns past these become minus infinity, the logarithm of a probability of 0.
template <int kCount>
__device__ __forceinline__ void mask_columns(float (&d)[kCount][4], int columns) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * j + 2 * place() + i % 2 >= columns) d[j][i] = -INFINITY;
    }
  }
}

// What HeadDropout does not keep becomes 0.
template <int kCount>
__device__ __forceinline__ void drop(float (&d)[kCount][4], uint32_t kept) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[j][i] = is_kept(kept, j, i) ? d[j][i] : 0.0f;
  }
}

// Blocks of kTileRows rows for each head, those of a head next to each other: they share what they read.
struct Grid {
  int blocks;  // per head

  explicit Grid(int64_t max_seqlen) : blocks(static_cast<int>((max_seqlen + kTileRows - 1) / kTileRows)) {}
  unsigned size(int64_t batch, int64_t num_heads) const { return static_cast<unsigned>(batch * num_heads * blocks); }

  __device__ __forceinline__ int head() const { return static_cast<int>(blockIdx.x) / blocks; }
  __device__ __forceinline__ int first_row() const { return static_cast<int>(blockIdx.x) % blocks * kTileRows; }
};

// Calls body.template operator()<T, kWidth>() for the dtype and the narrowest tile that holds head_dim.
template <typename Body>
void for_head(DType dtype, int64_t head_dim, const Body& body) {
  const auto with_width = [&](auto element) {
    using T = decltype(element);
    if (head_dim <= 64) {
      body.template operator()<T, 64>();
    } else {
      body.template operator()<T, 128>();
    }
  };
  if (dtype == DType::bfloat16) {
    with_width(__nv_bfloat16{});
  } else {
    with_width(__half{});
  }
}

}  // namespace fastbert::cuda
