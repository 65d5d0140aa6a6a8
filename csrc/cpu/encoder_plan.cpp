#include "cpu/encoder_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/runtime.h"

namespace fastbert::cpu {

namespace {

// Of an element that enters a linear layer.
int64_t left_bytes(DType weight_dtype) {
  if (weight_dtype == DType::int8) return multiplies(DType::int8) ? 1 : 2;
  return weight_dtype == DType::bfloat16 && multiplies(DType::bfloat16) ? 2 : 4;
}

int64_t inner_bytes(const EncoderLayerParams& p) {
  return left_bytes(p.weight_dtype == DType::int8 ? DType::bfloat16 : p.weight_dtype);
}

int64_t hidden_bytes(const EncoderLayerParams& p) { return p.dtype == DType::float32 ? 4 : 2; }

// Where one layer's rows wait for the next.
int64_t bytes_between(const std::vector<EncoderLayerParams>& layers, int64_t total) {
  if (layers.size() < 2) return 0;
  const EncoderLayerParams& p = layers.front();
  Memory measure(nullptr);
  measure.take(total * p.qkv.in_features * hidden_bytes(p));
  return measure.used();
}

// The kernels trust the bounds: wrong ones would have them read and write foreign memory.
void check_bounds(const int32_t* cu_seqlens, int64_t batch, int64_t total) {
  if (cu_seqlens[0] != 0 || cu_seqlens[batch] != total || !std::is_sorted(cu_seqlens, cu_seqlens + batch + 1)) {
    throw std::invalid_argument("cu_seqlens goes from " + std::to_string(cu_seqlens[0]) + " to " +
                                std::to_string(cu_seqlens[batch]) +
                                ", expected steps that never fall from 0 to total = " + std::to_string(total));
  }
}

// Thrown, because that is what stops the other threads of a region.
struct NotWanted {};

}  // namespace

EncoderChunks::EncoderChunks(const EncoderLayerParams& p, int num_threads) {
  constexpr int64_t least = 1024, rows_of_thread = 512;
  const int64_t most = std::max(least, rows_of_thread * num_threads), chunks = (p.total + most - 1) / most;
  int64_t first = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t until = (chunk + 1) * p.total / chunks;
    int64_t last = first;
    while (last < p.batch && (last == first || p.cu_seqlens[last + 1] <= until)) ++last;
    if (chunk + 1 == chunks) last = p.batch;
    if (last == first) continue;
    first_sequences_.push_back(first);
    longest_ = std::max<int64_t>(longest_, p.cu_seqlens[last] - p.cu_seqlens[first]);
    first = last;
  }
  first_sequences_.push_back(first);
}

EncoderChunks::~EncoderChunks() = default;

int64_t EncoderChunks::size() const { return static_cast<int64_t>(first_sequences_.size()) - 1; }

int64_t EncoderChunks::first_sequence(int64_t chunk) const { return first_sequences_[chunk]; }

int64_t EncoderChunks::longest() const { return longest_; }

int64_t count_row_blocks(int64_t rows, int num_threads) {
  const int64_t blocks = (rows + kMaxBlockRows - 1) / kMaxBlockRows;
  if (num_threads > 1 && blocks < 2 * num_threads) return 0;
  return (blocks + num_threads - 1) / num_threads * num_threads;
}

void* Memory::take(int64_t bytes) {
  void* start = base_ == nullptr ? nullptr : base_ + used_;
  used_ += (bytes + 63) / 64 * 64;
  return start;
}

EncoderBuffers::EncoderBuffers(Memory& memory, const EncoderLayerParams& p, int64_t rows) {
  const int64_t hidden = p.qkv.in_features, wide = p.output.in_features;
  const bool quantizes = p.weight_dtype == DType::int8;
  const int64_t left = left_bytes(p.weight_dtype);
  const int64_t converted_bytes = quantizes ? std::max(hidden, wide) * left : left != hidden_bytes(p) ? hidden * left : 0;
  z = static_cast<float*>(memory.take(rows * hidden * 4));
  h = memory.take(rows * hidden * hidden_bytes(p));
  inner = memory.take(rows * wide * inner_bytes(p));
  converted = memory.take(rows * converted_bytes);
  scales = static_cast<float*>(memory.take(quantizes ? rows * 4 : 0));
}

EncoderWorkspace::EncoderWorkspace(Memory& memory, const EncoderLayerParams& p, int64_t longest_chunk, int num_threads)
    : qkv(memory.take(longest_chunk * 3 * p.qkv.in_features * inner_bytes(p))),
      context(memory.take(longest_chunk * p.qkv.in_features * inner_bytes(p))),
      // A chunk of more rows is divided by rows.
      buffers(memory, p, std::min(longest_chunk, 2 * num_threads * kMaxBlockRows)) {}

int64_t encoder_layers_workspace_bytes(const std::vector<EncoderLayerParams>& layers, const int32_t* cu_seqlens,
                                       int64_t total, int64_t batch, int num_threads) {
  check_bounds(cu_seqlens, batch, total);
  int64_t bytes = 0;
  for (EncoderLayerParams layer : layers) {
    layer.cu_seqlens = cu_seqlens;
    layer.total = total;
    layer.batch = batch;
    Memory measure(nullptr);
    EncoderWorkspace(measure, layer, EncoderChunks(layer, num_threads).longest(), num_threads);
    bytes = std::max(bytes, measure.used());
  }
  return bytes + bytes_between(layers, total);
}

bool encoder_layers(const std::vector<EncoderLayerParams>& layers, const void* x, const int32_t* cu_seqlens, void* y,
                    void* workspace, int64_t total, int64_t batch, int num_threads, const std::function<bool()>& wanted,
                    int64_t* nanoseconds) {
  const std::thread::id caller = std::this_thread::get_id();
  void* between = workspace;
  workspace = static_cast<char*>(workspace) + bytes_between(layers, total);
  const auto run_layers = [&] {
    if (std::this_thread::get_id() == caller && !wanted()) throw NotWanted();
    const void* from = x;
    for (size_t i = 0; i < layers.size(); ++i) {
      EncoderLayerParams layer = layers[i];
      void* to = (layers.size() - i) % 2 == 1 ? y : between;  // the last one writes y
      layer.x = from;
      layer.cu_seqlens = cu_seqlens;
      layer.y = to;
      layer.workspace = workspace;
      layer.total = total;
      layer.batch = batch;
      layer.nanoseconds = nanoseconds;
      encoder_layer(layer, num_threads);
      from = to;
    }
  };
  try {
    together(num_threads, run_layers);
  } catch (const NotWanted&) {
    return false;
  }
  return true;
}

}  // namespace fastbert::cpu
