// The gradient of a table that rows were gathered from: row i is the sum of the rows of dz whose id is i.
//
// Whoever calls has sorted the ids, so that the rows of an id are a run of places. Most runs are short: a warp sums one up.
// Those of [MASK], of positions and of token types are long; they are cut where the places are multiples of kPiece. A block
// sums a piece, as everything between two cuts belongs to at most two long runs, one that ends there and one that begins; a
// block of the third kernel sums the pieces of one run. Sums are float32 in an order that depends on the ids alone, without
// atomics, and every row of the table is written exactly once.
//
// Bytes: dz once (hidden elements a row), the table once, and hidden / 8 bytes a row of pieces where all runs are long.

#include "cuda/rows.cuh"

namespace fastbert::cuda {

namespace {

constexpr int kPiece = 64;
constexpr int kWarps = 8;
constexpr int kRowsOfWarp = kPiece / kWarps;

struct Run {
  int64_t first, end;  // places

  __device__ __forceinline__ Run(const TableGradientParams& p, int64_t id) : first(p.starts[id]), end(p.starts[id + 1]) {}
  __device__ __forceinline__ bool is_long() const { return end - first > kPiece; }
};

// Sums of dz[order[place]] for up to kCount places from first on, step apart and below end, in the thread's columns.
template <typename T, int kCount>
__device__ __forceinline__ void add_rows(const TableGradientParams& p, int64_t first, int64_t end, int step, int64_t column,
                                         float (&totals)[kWidthOf<T>]) {
  uint4 packed[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t place = first + i * step;
    packed[i] = make_uint4(0, 0, 0, 0);
    if (place < end && column < p.hidden) {
      packed[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.dz) + p.order[place] * p.hidden + column);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float values[kWidthOf<T>];
    unpack_vector<T>(packed[i], values);
#pragma unroll
    for (int j = 0; j < kWidthOf<T>; ++j) totals[j] += values[j];
  }
}

// pieces[2 * cut] is the part of a long run that goes on or ends behind the cut, pieces[2 * cut + 1] that of one that
// begins.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarps) sum_pieces_kernel(TableGradientParams p) {
  constexpr int kTile = kWarp * kWidthOf<T>;
  __shared__ float warp_sums[kWarps][kTile];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * kTile, cut = static_cast<int64_t>(blockIdx.x) * kPiece;
  const int64_t next_cut = cut + kPiece < p.rows ? cut + kPiece : p.rows;
  const int64_t first_id = p.ids[p.order[cut]], last_id = p.ids[p.order[next_cut - 1]];
  for (int slot = 0; slot < (first_id == last_id ? 1 : 2); ++slot) {
    const Run run(p, slot == 0 ? first_id : last_id);
    if (!run.is_long()) continue;
    const int64_t first = run.first > cut ? run.first : cut, end = run.end < next_cut ? run.end : next_cut;
    float totals[kWidthOf<T>] = {};
    add_rows<T, kRowsOfWarp>(p, first + warp, end, kWarps, tile + lane * kWidthOf<T>, totals);
#pragma unroll
    for (int i = 0; i < kWidthOf<T>; ++i) warp_sums[warp][lane * kWidthOf<T> + i] = totals[i];
    __syncthreads();
    const int column = threadIdx.x;
    if (column < kTile && tile + column < p.hidden) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) total += warp_sums[i][column];
      p.pieces[(2 * static_cast<int64_t>(blockIdx.x) + slot) * p.hidden + tile + column] = total;
    }
    __syncthreads();
  }
}

// The rows of the table whose runs are short or empty, one for each warp.
template <typename T, typename Out>
__global__ void __launch_bounds__(kWarp* kWarps) sum_short_runs_kernel(TableGradientParams p) {
  constexpr int kTile = kWarp * kWidthOf<T>, kAtOnce = 4;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kTile + threadIdx.x % kWarp * kWidthOf<T>;
  if (id >= p.num_ids || column >= p.hidden) return;
  const Run run(p, id);
  if (run.is_long()) return;
  float totals[kWidthOf<T>] = {};
  for (int64_t place = run.first; place < run.end && id != p.padding_idx; place += kAtOnce) {
    add_rows<T, kAtOnce>(p, place, run.end, 1, column, totals);
  }
  uint4* const out = reinterpret_cast<uint4*>(static_cast<Out*>(p.out) + id * p.hidden + column);
#pragma unroll
  for (int i = 0; i < kWidthOf<T> / kWidthOf<Out>; ++i) out[i] = pack_vector<Out>(totals + i * kWidthOf<Out>);
}

// The row of the table whose long run begins behind this block's cut, where one does.
template <typename Out>
__global__ void __launch_bounds__(kWarp* kLanes) sum_long_runs_kernel(TableGradientParams p) {
  const int64_t piece = blockIdx.x, cut = piece * kPiece, next_cut = cut + kPiece < p.rows ? cut + kPiece : p.rows;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kWarp + threadIdx.x;
  const int64_t id = p.ids[p.order[next_cut - 1]];
  const Run run(p, id);
  if (!run.is_long() || run.first < cut) return;
  const int64_t count = (run.end - 1) / kPiece - piece + 1;
  const float* pieces = p.pieces + 2 * piece * p.hidden + column;
  const int64_t begins_later = run.first > cut ? p.hidden : 0;  // its first piece has the second slot
  const float total = sum_in_lanes(column < p.hidden && id != p.padding_idx ? count : 0,
                                   [&](int64_t i) { return pieces[2 * i * p.hidden + (i == 0 ? begins_later : 0)]; });
  if (threadIdx.y == 0 && column < p.hidden) static_cast<Out*>(p.out)[id * p.hidden + column] = from_float<Out>(total);
}

dim3 grid(int64_t x, int64_t columns, int64_t tile) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>((columns + tile - 1) / tile));
}

}  // namespace

int64_t table_gradient_pieces(int64_t rows) { return (rows + kPiece - 1) / kPiece * 2; }

void table_gradient(const TableGradientParams& p, void* stream) {
  constexpr const char* kName = "table_gradient";
  const int64_t cuts = table_gradient_pieces(p.rows) / 2;
  for_dtype(p.dtype, [&]<typename T>() {
    constexpr int kTile = kWarp * kWidthOf<T>;
    const dim3 tables = grid((p.num_ids + kWarps - 1) / kWarps, p.hidden, kTile);
    const auto kernel = p.out_dtype == p.dtype ? sum_short_runs_kernel<T, T> : sum_short_runs_kernel<T, float>;
    launch(kName, kernel, tables, kWarp * kWarps, 0, stream, p);
    if (cuts > 0) launch(kName, sum_pieces_kernel<T>, grid(cuts, p.hidden, kTile), kWarp * kWarps, 0, stream, p);
  });
  if (cuts == 0) return;
  for_dtype(p.out_dtype, [&]<typename Out>() {
    launch(kName, sum_long_runs_kernel<Out>, grid(cuts, p.hidden, kWarp), dim3(kWarp, kLanes), 0, stream, p);
  });
}

}  // namespace fastbert::cuda
