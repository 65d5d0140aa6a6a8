// The pieces of the row kernels that are not templates.

#include "cuda/rows.cuh"

namespace fastbert::cuda {

namespace {

// Enough groups to fill the largest GPU several times over; more only lengthen the second stage.
constexpr int64_t kMaxBlocks = 512;

int64_t groups_per_block(int64_t hidden) {
  if (hidden <= 32 * kElementsPerThread) return kBlock / 32;
  return hidden <= 128 * kElementsPerThread ? kBlock / 128 : 1;
}

__global__ void sum_groups_kernel(const float* partials, int64_t groups, int64_t hidden, float* first, float* second,
                                  float* third) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  float* const sums = blockIdx.y == 0 ? first : blockIdx.y == 1 ? second : third;
  if (column >= hidden || sums == nullptr) return;
  float total = 0.0f;
  for (int64_t group = 0; group < groups; ++group) total += partials[(group * 3 + blockIdx.y) * hidden + column];
  sums[column] = total;
}

}  // namespace

const char* device_type() { return kDeviceType; }

int64_t row_groups(int64_t rows, int64_t hidden) {
  const int64_t per_block = groups_per_block(hidden), blocks = (rows + per_block - 1) / per_block;
  return (blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks) * per_block;
}

void sum_groups(const char* op, const float* partials, int64_t groups, int64_t hidden, float* first, float* second,
                float* third, void* stream) {
  const dim3 grid(static_cast<unsigned>((hidden + 127) / 128), 3);
  launch(op, sum_groups_kernel, grid, 128, 0, stream, partials, groups, hidden, first, second, third);
}

}  // namespace fastbert::cuda
