// The twin of csrc/cuda/launcher.cuh.

#pragma once

#include <cuda_runtime.h>

namespace fastbert::cuda {

inline constexpr const char* kDeviceType = "cpu";

inline int capability() { return simt::capability(); }
inline constexpr bool kBuiltForHopper = true;
inline int version_of_driver() { return 0; }
inline constexpr int kRuntimeVersion = 0;
inline int num_processors() { return 2; }

// Refuses what a GPU of this compute capability refuses: more dynamic shared memory than there is for one block, no blocks
// or threads, and too many.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
            const Arguments&... arguments) {
  const size_t most = (simt::capability() < 90 ? 163 : 227) * 1024;
  if (shared_bytes > most) throw std::runtime_error(std::string(name) + ": invalid argument");
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7FFFFFFF || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535) {
    throw std::runtime_error(std::string(name) + ": invalid configuration argument");
  }
  simt::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

struct TensorMap {
  const unsigned char* data;
  int64_t rows, columns, row_bytes;
  int box_rows;
};

inline TensorMap make_tensor_map(const void* data, bool, int64_t rows, int64_t columns, int64_t row_bytes, int box_rows) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  if (address % 16 != 0 || row_bytes % 16 != 0 || row_bytes < columns * 2 || box_rows < 1 || box_rows > 256 || rows < 1 ||
      columns < 1) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error 1");
  }
  return {static_cast<const unsigned char*>(data), rows, columns, row_bytes, box_rows};
}

}  // namespace fastbert::cuda
