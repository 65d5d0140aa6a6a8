// The instructions that CUDA C++ has no name for. tests/cuda_on_host has a twin of this header, and of launcher.cuh, for a
// C++ compiler; it spells out in code what the comments here say of the threads' shares of a matrix.
//
// Source: the PTX ISA. T is __nv_bfloat16 or __half. In what follows a lane's quad is lane / 4 and its place lane % 4.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/launcher.cuh"

// Whether the code that is being compiled may use Hopper's own instructions (sm_90a alone has them).
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTBERT_HOPPER 1
#else
#define FASTBERT_HOPPER 0
#endif

namespace fastbert::cuda {

template <typename T>
constexpr bool kIsBfloat16 = std::is_same_v<T, __nv_bfloat16>;

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The block's dynamic shared memory, at a multiple of 1,024 bytes: ask the launch for 1,024 bytes more than are used.
__device__ __forceinline__ unsigned char* aligned_shared_memory() {
  extern __shared__ unsigned char dynamic_shared[];
  return dynamic_shared + ((1024 - (shared_address(dynamic_shared) & 1023)) & 1023);
}

// 2^x with a relative error of 2^-22; denormal results are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The two numbers in one register, low half first.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (kIsBfloat16<T>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

// Byte i of the result is 0xFF where the byte of word that hexadecimal digit i of bytes names, 0 to 3, has its top bit set,
// else 0.
__device__ __forceinline__ uint32_t spread_top_bits(uint32_t word, uint32_t bytes) {
  uint32_t spread;
  asm("prmt.b32 %0, %1, %1, %2;" : "=r"(spread) : "r"(word), "r"(bytes | 0x8888));
  return spread;
}

// --- barriers of some of a block's warps ---------------------------------------------------------------------------------

// kName: 1 to 15 (0 is __syncthreads'), known to the compiler, or a block takes all sixteen; threads: all that arrive or
// wait, whole warps.
template <int kName>
__device__ __forceinline__ void barrier_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kName), "r"(threads) : "memory");
}
template <int kName>
__device__ __forceinline__ void barrier_arrive(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(kName), "r"(threads) : "memory");
}

// --- asynchronous copies of 16 bytes by one thread (sm_80) ---------------------------------------------------------------

// Both addresses are multiples of 16; where inside is false nothing is read and zeros are written.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last kGroups groups that this thread committed have arrived; other threads see them after a barrier.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// --- matrices of a warp (sm_80) ------------------------------------------------------------------------------------------

// Four matrices of 8 x 8 elements of 16 bits. Lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned).
// registers[m] becomes elements 2 * place and 2 * place + 1 of row quad of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
// Of the transposed matrices: registers[m] becomes elements quad of rows 2 * place and 2 * place + 1 of matrix m.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, a: 16 x 16, b: 16 x 8, d: 16 x 8 in float32. A lane holds, as pairs (low, high) of neighbours,
//   a[0]: row quad, columns 2 * place + (0, 1);  a[1]: row quad + 8;  a[2], a[3]: the same rows, columns + 8
//   b0: rows 2 * place + (0, 1), column quad;    b1: rows + 8
//   d[0], d[1]: row quad, columns 2 * place + (0, 1);  d[2], d[3]: row quad + 8
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kIsBfloat16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// --- bulk copies that complete on a barrier in shared memory (sm_90) -----------------------------------------------------

// One thread makes it, for so many arrivals in each phase; then fence_mbarriers(), then a barrier of the block.
__device__ __forceinline__ void mbarrier_init(uint64_t* mbarrier, int arrivals) {
#if FASTBERT_HOPPER
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(arrivals) : "memory");
#endif
}
// Makes mbarriers known to the unit that copies.
__device__ __forceinline__ void fence_mbarriers() {
#if FASTBERT_HOPPER
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* mbarrier) {
#if FASTBERT_HOPPER
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(mbarrier)) : "memory");
#endif
}
// Arrives, and has the phase wait for so many bytes of bulk copies, too.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t* mbarrier, uint32_t bytes) {
#if FASTBERT_HOPPER
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(bytes)
               : "memory");
#endif
}
// Until the phase of this parity is complete: 0 for the first, 1 for the second, 0 for the third.
__device__ __forceinline__ void mbarrier_wait(uint64_t* mbarrier, uint32_t parity) {
#if FASTBERT_HOPPER
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(mbarrier)),
      "r"(parity)
      : "memory");
#endif
}

// Copies the box of the map at (column, row) to shared memory, a multiple of 1,024 bytes, swizzled as the matrices below:
// the 16 bytes c of row r of a box of 128 bytes per row are at r * 128 + ((c ^ (r % 8)) * 16). What is outside of the tensor
// becomes 0. One thread calls it.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, uint64_t* mbarrier, int column, int row) {
#if FASTBERT_HOPPER
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(shared_address(mbarrier)), "r"(column), "r"(row)
      : "memory");
#endif
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
#if FASTBERT_HOPPER
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// Shared memory that threads wrote becomes visible to products and bulk copies; then a barrier of who wrote and who asks.
__device__ __forceinline__ void fence_async_shared() {
#if FASTBERT_HOPPER
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// --- registers that warps of one role give to those of another (sm_90) ---------------------------------------------------

// All warps of a warpgroup call it; kRegisters per thread, a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
#if FASTBERT_HOPPER
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if FASTBERT_HOPPER
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// --- matrices of a warpgroup, four warps (sm_90) -------------------------------------------------------------------------

// Matrices in shared memory are tiles of rows of 64 elements, 128 bytes, swizzled as copy_box does it, at a multiple of
// 1,024 bytes. Which of a product's two dimensions runs along the 64 elements:
enum class Along {
  depth,  // the one that is summed over: a is (64, depth), b is (columns, depth)
  width   // the other one: a is (depth, 64), b is (depth, columns)
};

// The matrix that begins at row 0 of the tile. Further on in it: along depth, 16 elements of depth are 32 bytes and 8 rows
// are 1,024; along width, 16 elements of depth, rows, are 2,048 bytes.
__device__ __forceinline__ uint64_t matrix(const void* tile) {
  const uint64_t address = (shared_address(tile) & 0x3FFFF) >> 4;
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return address | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}
__device__ __forceinline__ uint64_t matrix_at(uint64_t matrix, int bytes) {
  // In the low word alone, which is where an address is: the sum never carries.
  return (matrix & 0xFFFFFFFF00000000) | (static_cast<uint32_t>(matrix) + static_cast<uint32_t>(bytes >> 4));
}

// Before the first product of a group: what threads wrote to the registers that it reads or adds to is there.
__device__ __forceinline__ void products_fence() {
#if FASTBERT_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void products_commit() {
#if FASTBERT_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until all but the last kGroups groups are done. Registers of products that are under way may be neither read nor written.
template <int kGroups>
__device__ __forceinline__ void products_wait() {
#if FASTBERT_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}

// Keeps the compiler from moving uses of d across products_wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FASTBERT_D8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTBERT_OUTPUTS_32 FASTBERT_D8(d, 0), FASTBERT_D8(d, 8), FASTBERT_D8(d, 16), FASTBERT_D8(d, 24)
#define FASTBERT_OUTPUTS_64 \
  FASTBERT_OUTPUTS_32, FASTBERT_D8(d, 32), FASTBERT_D8(d, 40), FASTBERT_D8(d, 48), FASTBERT_D8(d, 56)
#define FASTBERT_NAMES_32                                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31"
#define FASTBERT_NAMES_64                                                                                            \
  FASTBERT_NAMES_32                                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// The product with a in shared memory; in asm the operands after d are a, b, whether to add, and both transpositions.
#define FASTBERT_PRODUCT_SS(shape, type, names, outputs, a_name, b_name, p_name, ta_name, tb_name)                       \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " p_name ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type \
               "." type " {" names "}, " a_name ", " b_name ", adds, 1, 1, " ta_name ", " tb_name ";\n}\n"               \
               : outputs                                                                                                 \
               : "l"(a), "l"(b), "r"(adds ? 1 : 0), "n"(kA == Along::width ? 1 : 0), "n"(kB == Along::width ? 1 : 0))
#define FASTBERT_PRODUCT_RS(shape, type, names, outputs, a_names, b_name, p_name, tb_name)                               \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " p_name ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type \
               "." type " {" names "}, {" a_names "}, " b_name ", adds, 1, 1, " tb_name ";\n}\n"                         \
               : outputs                                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds ? 1 : 0), "n"(kB == Along::width ? 1 : 0))

// d = a b, or d += a b where adds, with 16 elements of depth. d is (64, 2 * kCount) in float32, kCount 32 or 64: warp w of
// the warpgroup holds rows 16 w to 16 w + 15, and of them a lane, for each eight columns j, elements d[4 j], d[4 j + 1]: row
// quad, columns 8 j + 2 * place + (0, 1), and d[4 j + 2], d[4 j + 3]: row quad + 8. Done after products_wait.
template <typename T, Along kA, Along kB, int kCount>
__device__ __forceinline__ void product(float (&d)[kCount], uint64_t a, uint64_t b, bool adds) {
  static_assert(kCount == 32 || kCount == 64);
#if FASTBERT_HOPPER
  if constexpr (kCount == 32 && kIsBfloat16<T>) {
    FASTBERT_PRODUCT_SS("m64n64k16", "bf16", FASTBERT_NAMES_32, FASTBERT_OUTPUTS_32, "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (kCount == 32) {
    FASTBERT_PRODUCT_SS("m64n64k16", "f16", FASTBERT_NAMES_32, FASTBERT_OUTPUTS_32, "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (kIsBfloat16<T>) {
    FASTBERT_PRODUCT_SS("m64n128k16", "bf16", FASTBERT_NAMES_64, FASTBERT_OUTPUTS_64, "%64", "%65", "%66", "%67", "%68");
  } else {
    FASTBERT_PRODUCT_SS("m64n128k16", "f16", FASTBERT_NAMES_64, FASTBERT_OUTPUTS_64, "%64", "%65", "%66", "%67", "%68");
  }
#endif
}

// The same with a in registers, as multiply_add has it in each warp: rows 16 w to 16 w + 15, 16 elements of depth.
template <typename T, Along kB, int kCount>
__device__ __forceinline__ void product(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool adds) {
  static_assert(kCount == 32 || kCount == 64);
#if FASTBERT_HOPPER
  if constexpr (kCount == 32 && kIsBfloat16<T>) {
    FASTBERT_PRODUCT_RS("m64n64k16", "bf16", FASTBERT_NAMES_32, FASTBERT_OUTPUTS_32, "%32, %33, %34, %35", "%36", "%37",
                        "%38");
  } else if constexpr (kCount == 32) {
    FASTBERT_PRODUCT_RS("m64n64k16", "f16", FASTBERT_NAMES_32, FASTBERT_OUTPUTS_32, "%32, %33, %34, %35", "%36", "%37",
                        "%38");
  } else if constexpr (kIsBfloat16<T>) {
    FASTBERT_PRODUCT_RS("m64n128k16", "bf16", FASTBERT_NAMES_64, FASTBERT_OUTPUTS_64, "%64, %65, %66, %67", "%68", "%69",
                        "%70");
  } else {
    FASTBERT_PRODUCT_RS("m64n128k16", "f16", FASTBERT_NAMES_64, FASTBERT_OUTPUTS_64, "%64, %65, %66, %67", "%68", "%69",
                        "%70");
  }
#endif
}

#undef FASTBERT_PRODUCT_SS
#undef FASTBERT_PRODUCT_RS
#undef FASTBERT_NAMES_32
#undef FASTBERT_NAMES_64
#undef FASTBERT_OUTPUTS_32
#undef FASTBERT_OUTPUTS_64
#undef FASTBERT_D8

}  // namespace fastbert::cuda
