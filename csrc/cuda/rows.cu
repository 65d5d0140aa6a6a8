// The pieces of the row kernels that are not templates of a row's width.

#include "cuda/rows.cuh"

namespace fastbert::cuda {

namespace {

// A group walks over at least so many rows: fewer, and the second stage reads more than the first.
constexpr int64_t kMinRowsPerGroup = 4;

template <typename T>
__global__ void __launch_bounds__(kWarp* kLanes) sum_lines_kernel(LineSums p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  T* const sums = static_cast<T*>(blockIdx.y == 0 ? p.sums[0] : blockIdx.y == 1 ? p.sums[1] : p.sums[2]);
  if (sums == nullptr) return;
  const float* partials = p.partials + blockIdx.y * p.width + column;
  const float total =
      sum_in_lanes(column < p.width ? p.lines : 0, [&](int64_t line) { return partials[line * p.num_sums * p.width]; });
  if (threadIdx.y == 0 && column < p.width) sums[column] = from_float<T>(total);
}

}  // namespace

const char* device_type() { return kDeviceType; }
int runtime_version() { return kRuntimeVersion; }
int driver_version() { return version_of_driver(); }

int64_t row_lines(int64_t rows, int64_t hidden, DType dtype) {
  int64_t lines = 1;
  for_shape(dtype, hidden, [&]<typename T, int kThreads>() {
    using G = Group<T, kThreads>;
    const int64_t rows_of_block = kMinRowsPerGroup * G::kGroups, blocks = (rows + rows_of_block - 1) / rows_of_block;
    const int64_t resident = static_cast<int64_t>(num_processors()) * G::kResidentBlocks;
    lines = blocks < 1 ? 1 : blocks < resident ? blocks : resident;
  });
  return lines;
}

void sum_lines(const char* op, const LineSums& p, void* stream) {
  for_dtype(p.dtype, [&]<typename T>() {
    const dim3 grid(static_cast<unsigned>((p.width + kWarp - 1) / kWarp), static_cast<unsigned>(p.num_sums));
    launch(op, sum_lines_kernel<T>, grid, dim3(kWarp, kLanes), 0, stream, p);
  });
}

}  // namespace fastbert::cuda
