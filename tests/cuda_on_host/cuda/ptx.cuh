// The twin of csrc/cuda/ptx.cuh: what each instruction does, spelled out after the PTX ISA.
//
// Copies happen when they are waited for, products of a warpgroup, too, and then with what shared memory holds by then.
// What it cannot show: a missing fence (products_fence, fence_async_shared, fence_mbarriers), and pin.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstdint>
#include <type_traits>

#include "cuda/launcher.cuh"

#define FASTBERT_HOPPER 1

namespace fastbert::cuda {

using simt::Location;

template <typename T>
constexpr bool kIsBfloat16 = std::is_same_v<T, __nv_bfloat16>;

inline unsigned char* aligned_shared_memory() { return simt::dynamic_shared_memory(); }

// As coarse as the instruction may be, so that kernels that need more digits show it; 2^0 is exact.
inline float exp2_approximate(float x) {
  if (x == 0.0f) return 1.0f;
  const float y = std::exp2(x) * (1.0f + 0x1p-22f);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float unpack(bool is_bfloat16, uint32_t bits) {
  if (is_bfloat16) return __bfloat162float({static_cast<uint16_t>(bits)});
  const auto half = static_cast<uint16_t>(bits);
  __half value;
  std::memcpy(&value, &half, sizeof half);
  return __half2float(value);
}

template <typename T>
uint32_t pack(float low, float high) {
  T both[2];
  if constexpr (kIsBfloat16<T>) {
    both[0] = __float2bfloat16_rn(low);
    both[1] = __float2bfloat16_rn(high);
  } else {
    both[0] = __float2half_rn(low);
    both[1] = __float2half_rn(high);
  }
  uint32_t bits;
  std::memcpy(&bits, both, sizeof bits);
  return bits;
}

inline uint32_t spread_top_bits(uint32_t word, uint32_t bytes) {
  uint32_t spread = 0;
  for (int i = 0; i < 4; ++i) {
    if (word >> (8 * (bytes >> 4 * i & 3)) & 0x80) spread |= 0xFFu << 8 * i;
  }
  return spread;
}

template <int kName>
inline void barrier_sync(int threads, Location where = Location::current()) {
  simt::sync(kName, threads, where);
}
template <int kName>
inline void barrier_arrive(int threads) {
  simt::arrive(kName, threads);
}

inline void must_be_aligned(const void* address, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    throw std::logic_error(std::string(what) + ": the address is no multiple of " + std::to_string(bytes));
  }
}

// --- asynchronous copies -------------------------------------------------------------------------------------------------

inline void copy_async(void* shared, const void* global, bool inside) {
  must_be_aligned(shared, 16, "copy_async");
  must_be_aligned(global, 16, "copy_async");
  simt::defer(simt::Queue::copies, [=] {
    if (inside) {
      std::memcpy(shared, global, 16);
    } else {
      std::memset(shared, 0, 16);
    }
  });
}
inline void copy_async_commit() { simt::commit(simt::Queue::copies); }
template <int kGroups>
void copy_async_wait() {
  simt::wait_for_all_but(simt::Queue::copies, kGroups);
}

// --- matrices of a warp --------------------------------------------------------------------------------------------------

inline void load_matrices(uint32_t (&registers)[4], const void* row, Location where = Location::current()) {
  must_be_aligned(row, 16, "load_matrices");
  const void* const* rows = simt::exchange(row, "load_matrices", where);
  const int quad = simt::lane() / 4, place = simt::lane() % 4;
  for (int m = 0; m < 4; ++m) {
    registers[m] = static_cast<const uint32_t*>(rows[8 * m + quad])[place];
  }
  simt::exchange(0, "load_matrices' end", where);  // nobody writes there before all have read
}

inline void load_matrices_transposed(uint32_t (&registers)[4], const void* row, Location where = Location::current()) {
  must_be_aligned(row, 16, "load_matrices_transposed");
  const void* const* rows = simt::exchange(row, "load_matrices_transposed", where);
  const int quad = simt::lane() / 4, place = simt::lane() % 4;
  for (int m = 0; m < 4; ++m) {
    const uint32_t low = static_cast<const uint16_t*>(rows[8 * m + 2 * place])[quad];
    const uint32_t high = static_cast<const uint16_t*>(rows[8 * m + 2 * place + 1])[quad];
    registers[m] = low | high << 16;
  }
  simt::exchange(0, "load_matrices_transposed's end", where);
}

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Location where = Location::current()) {
  struct Share {
    float a[8], b[4];
  };
  Share mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = unpack(kIsBfloat16<T>, a[i / 2] >> (16 * (i % 2)));
  for (int i = 0; i < 4; ++i) mine.b[i] = unpack(kIsBfloat16<T>, (i < 2 ? b0 : b1) >> (16 * (i % 2)));
  const Share* shares = simt::exchange(mine, "multiply_add", where);
  const auto element_of_a = [&](int row, int k) {
    return shares[row % 8 * 4 + k % 8 / 2].a[2 * (row / 8 + 2 * (k / 8)) + k % 2];
  };
  const auto element_of_b = [&](int k, int column) { return shares[column * 4 + k % 8 / 2].b[2 * (k / 8) + k % 2]; };
  const int quad = simt::lane() / 4, place = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      sum += static_cast<double>(element_of_a(quad + 8 * (i / 2), k)) * element_of_b(k, 2 * place + i % 2);
    }
    d[i] = static_cast<float>(sum);
  }
}

// --- mbarriers and bulk copies -------------------------------------------------------------------------------------------

struct Mbarrier {
  int16_t arrivals, pending;
  int32_t bytes : 31;  // that the phase still waits for
  uint32_t parity : 1;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

inline Mbarrier& state_of(uint64_t* mbarrier) { return *reinterpret_cast<Mbarrier*>(mbarrier); }

inline void end_phase_if_complete(Mbarrier& state) {
  if (state.pending != 0 || state.bytes != 0) return;
  state.pending = state.arrivals;
  state.parity = state.parity ^ 1;
  simt::happened();
}

inline void mbarrier_init(uint64_t* mbarrier, int arrivals) {
  must_be_aligned(mbarrier, 8, "mbarrier_init");
  state_of(mbarrier) = {static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0, 0};
}
inline void fence_mbarriers() {}
inline void mbarrier_arrive_expecting(uint64_t* mbarrier, uint32_t bytes) {
  Mbarrier& state = state_of(mbarrier);
  if (state.pending <= 0) throw std::logic_error("an mbarrier has more arrivals than it was made for");
  state.bytes = state.bytes + static_cast<int>(bytes);
  --state.pending;
  simt::happened();
  end_phase_if_complete(state);
}
inline void mbarrier_arrive(uint64_t* mbarrier) { mbarrier_arrive_expecting(mbarrier, 0); }

inline void mbarrier_wait(uint64_t* mbarrier, uint32_t parity, Location where = Location::current()) {
  simt::wait_until(
      [=] {
        simt::run_deferred(mbarrier);
        return state_of(mbarrier).parity != (parity & 1);
      },
      "an mbarrier", where);
}

inline void copy_box(void* shared, const TensorMap& map, uint64_t* mbarrier, int column, int row) {
  must_be_aligned(shared, 1024, "copy_box");
  simt::defer_to_barrier(mbarrier, [=] {
    auto* const bytes = static_cast<unsigned char*>(shared);
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < 64; ++c) {
        const int64_t from_row = int64_t{row} + r, from_column = int64_t{column} + c;
        const bool inside = from_row >= 0 && from_row < map.rows && from_column >= 0 && from_column < map.columns;
        uint16_t element = 0;
        if (inside) std::memcpy(&element, map.data + from_row * map.row_bytes + from_column * 2, 2);
        std::memcpy(bytes + r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2, &element, 2);
      }
    }
    Mbarrier& state = state_of(mbarrier);
    state.bytes = state.bytes - map.box_rows * 128;
    end_phase_if_complete(state);
  });
}
inline void prefetch_map(const TensorMap&) {}
inline void fence_async_shared() {}

template <int kRegisters>
void release_registers() {}
template <int kRegisters>
void take_registers() {}

// --- matrices of a warpgroup ---------------------------------------------------------------------------------------------

enum class Along { depth, width };

inline uint64_t matrix(const void* tile) {
  must_be_aligned(tile, 1024, "matrix");
  const auto* const first = simt::dynamic_shared_memory();
  const auto offset = static_cast<const unsigned char*>(tile) - first;
  if (offset < 0 || offset >= static_cast<int64_t>(simt::dynamic_shared_bytes())) {
    throw std::logic_error("matrix: the tile is not in dynamic shared memory");
  }
  return static_cast<uint64_t>(offset) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
inline uint64_t matrix_at(uint64_t matrix, int bytes) { return matrix + (bytes >> 4); }

// Element (width, depth) of a matrix: the layout of the PTX ISA for a swizzle of 128 bytes, whose pattern is one of address
// bits. Bits 4 to 6 of an address are combined with bits 7 to 9.
inline float matrix_element(uint64_t matrix, Along along, int width, int depth, bool is_bfloat16) {
  const uint64_t start = (matrix & 0x3FFF) << 4, leading = (matrix >> 16 & 0x3FFF) << 4,
                 stride = (matrix >> 32 & 0x3FFF) << 4;
  uint64_t address;
  if (along == Along::depth) {
    address = start + width / 8 * stride + width % 8 * 128 + depth * 2;  // leading is not used
  } else {
    address = start + width / 64 * leading + width % 64 * 2 + depth / 8 * stride + depth % 8 * 128;
  }
  address ^= (address >> 7 & 7) << 4;
  if (address + 2 > simt::dynamic_shared_bytes()) throw std::logic_error("a product reads behind shared memory");
  uint16_t bits;
  std::memcpy(&bits, simt::dynamic_shared_memory() + address, 2);
  return unpack(is_bfloat16, bits);
}

inline void products_fence() {}
inline void products_commit() { simt::commit(simt::Queue::products); }
template <int kGroups>
void products_wait(Location where = Location::current()) {
  simt::wait_for_all_but(simt::Queue::products, kGroups);
  __syncwarp(0xFFFFFFFF, where);  // the warp's lanes waited together
}
template <int kCount>
void pin(float (&)[kCount]) {}

// d of this lane; element(row of the warpgroup's 64, depth) is a's.
template <int kCount, typename ElementOfA>
void multiply(float (&d)[kCount], ElementOfA element_of_a, uint64_t b, Along along, bool adds, bool is_bfloat16) {
  const int lane = simt::lane(), first_row = simt::flat_thread() / 32 % 4 * 16 + lane / 4;
  double a[2][16];
  for (int k = 0; k < 16; ++k) {
    a[0][k] = element_of_a(first_row, k);
    a[1][k] = element_of_a(first_row + 8, k);
  }
  for (int i = 0; i < kCount; i += 2) {
    for (int c = 0; c < 2; ++c) {
      const int column = 8 * (i / 4) + 2 * (lane % 4) + c;
      double sum = adds ? d[i + c] : 0.0;
      for (int k = 0; k < 16; ++k) sum += a[i / 2 % 2][k] * matrix_element(b, along, column, k, is_bfloat16);
      d[i + c] = static_cast<float>(sum);
    }
  }
}

template <typename T, Along kA, Along kB, int kCount>
void product(float (&d)[kCount], uint64_t a, uint64_t b, bool adds, Location where = Location::current()) {
  static_assert(kCount == 32 || kCount == 64);
  simt::exchange(0, "product", where);
  simt::defer(simt::Queue::products, [&d, a, b, adds] {
    const auto element = [=](int row, int k) { return matrix_element(a, kA, row, k, kIsBfloat16<T>); };
    multiply(d, element, b, kB, adds, kIsBfloat16<T>);
  });
}

template <typename T, Along kB, int kCount>
void product(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool adds, Location where = Location::current()) {
  static_assert(kCount == 32 || kCount == 64);
  struct Share {
    uint32_t a[4];
  };
  const Share* shares = simt::exchange(Share{{a[0], a[1], a[2], a[3]}}, "product", where);
  std::array<Share, 4> quad;  // of the lanes that hold this lane's rows
  std::copy_n(shares + simt::lane() / 4 * 4, 4, quad.begin());
  simt::defer(simt::Queue::products, [&d, quad, b, adds] {
    const auto element = [&quad](int row, int k) {
      return unpack(kIsBfloat16<T>, quad[k % 8 / 2].a[row % 16 / 8 + 2 * (k / 8)] >> (16 * (k % 2)));
    };
    multiply(d, element, b, kB, adds, kIsBfloat16<T>);
  });
}

}  // namespace fastbert::cuda
