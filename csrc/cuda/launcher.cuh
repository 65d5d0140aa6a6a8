// Launching a kernel. tests/cuda_on_host has a twin of this header, and of ptx.cuh, for a C++ compiler: nothing else in this
// folder is written in more than plain CUDA C++, so the kernels' numbers are tested on machines without a GPU.

#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastbert::cuda {

inline constexpr const char* kDeviceType = "cuda";

inline void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check("cudaGetDevice", cudaGetDevice(&device));
  check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Of the current GPU: its compute capability, 90 for 9.0.
inline int capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

inline int num_processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Queues kernel(arguments...) on stream, a cudaStream_t; shared_bytes: of dynamic shared memory, up to what the GPU has.
// Throws std::runtime_error that begins with name where that fails.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(name, cudaGetLastError());
}

}  // namespace fastbert::cuda
