// Launching a kernel. tests/cuda_on_host has a twin of this header, and of ptx.cuh, for a C++ compiler: nothing else in this
// folder is written in more than plain CUDA C++, so the kernels' numbers are tested on machines without a GPU.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>

namespace fastbert::cuda {

inline constexpr const char* kDeviceType = "cuda";

inline void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch, which asks for it, would report this error as its own
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check("cudaGetDevice", cudaGetDevice(&device));
  return device;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, attribute, current_device()));
  return value;
}

// Of the current GPU: its compute capability, 90 for 9.0.
inline int capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// Whether a Hopper GPU gets code that was compiled with FASTBERT_HOPPER (ptx.cuh); setup.py knows the architectures.
#if defined(FASTBERT_BUILT_FOR_HOPPER)
inline constexpr bool kBuiltForHopper = true;
#else
inline constexpr bool kBuiltForHopper = false;
#endif

// CUDA's version as the driver has it, 13000 for 13.0. Asking makes no context on a GPU.
inline int version_of_driver() {
  int version = 0;
  check("cudaDriverGetVersion", cudaDriverGetVersion(&version));
  return version;
}
inline constexpr int kRuntimeVersion = CUDART_VERSION;

inline int num_processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Has the kernel's limit of dynamic shared memory be at least so many bytes. It only rises: it is one for all threads and
// all recorded graphs, which may be about to launch the kernel with more.
template <typename... Parameters>
void allow_shared_memory(const char* name, void (*kernel)(Parameters...), size_t bytes) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaFuncAttributes attributes;
  check(name, cudaFuncGetAttributes(&attributes, kernel));
  if (static_cast<size_t>(attributes.maxDynamicSharedSizeBytes) >= bytes) return;
  check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// Queues kernel(arguments...) on stream, a cudaStream_t; shared_bytes: of dynamic shared memory, up to what the GPU has.
// Throws std::runtime_error that begins with name where that fails.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) allow_shared_memory(name, kernel, shared_bytes);
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(name, cudaGetLastError());
}

// A matrix in device memory and the box of it that one bulk copy moves (ptx.cuh); a kernel takes it as
// `const __grid_constant__ TensorMap`.
using TensorMap = CUtensorMap;

// data: (rows, columns) of 16-bit elements, a multiple of 16 bytes, as are its rows of row_bytes. The box is 64 columns,
// 128 bytes, times box_rows, at most 256.
inline TensorMap make_tensor_map(const void* data, bool is_bfloat16, int64_t rows, int64_t columns, int64_t row_bytes,
                                 int box_rows) {
  // The driver's function through the runtime: a module that is linked with libcuda could not be imported without a GPU.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    check(kName, cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &found));
#else
    check(kName, cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  // A thread that has launched nothing yet, as autograd's at the start of a backward pass, has a current device but no
  // current context, which the driver asks for.
  check("cudaSetDevice", cudaSetDevice(current_device()));
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace fastbert::cuda
