// The twin of csrc/cuda/launcher.cuh.

#pragma once

#include <cuda_runtime.h>

namespace fastbert::cuda {

inline constexpr const char* kDeviceType = "cpu";

inline int capability() { return simt::capability(); }
inline int num_processors() { return 2; }

template <typename... Parameters, typename... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
            const Arguments&... arguments) {
  simt::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace fastbert::cuda
