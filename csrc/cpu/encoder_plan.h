// How the encoder layer divides a batch and its memory, and how several layers follow each other, compiled once for all
// instruction sets.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "fastbert.h"

namespace fastbert::cpu {

// Rows that a thread works on at a time: the sums of one panel of a weight for them stay in its second-level cache. Also the
// distance of the depths in what matmul copies of a transposed A.
constexpr int64_t kMaxBlockRows = 96;

// The chunks of a batch: whole sequences, nearly equal numbers of tokens.
class EncoderChunks {
 public:
  EncoderChunks(const EncoderLayerParams& p, int num_threads);
  EncoderChunks(const EncoderChunks&) = delete;
  ~EncoderChunks();

  int64_t size() const;
  int64_t first_sequence(int64_t chunk) const;  // of chunk size() too, where the batch ends
  int64_t longest() const;                      // rows

 private:
  std::vector<int64_t> first_sequences_;
  int64_t longest_ = 0;
};

// Blocks of rows for the threads, or 0 where a chunk has too few and its columns are divided.
int64_t count_row_blocks(int64_t rows, int num_threads);

// Cuts memory into arrays that start on a cache line; on a null base it only measures.
class Memory {
 public:
  explicit Memory(void* base) : base_(static_cast<char*>(base)) {}
  void* take(int64_t bytes);
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// What the steps after attention keep of some rows; and the rows that enter a linear layer where that reads another dtype:
// integers, or bfloat16 under float32 rows, or, of an instruction set that does not multiply bfloat16, the other way round.
struct EncoderBuffers {
  float* z;         // (rows, hidden), the input of a LayerNorm without its residual
  void* h;          // (rows, hidden), the output of the first LayerNorm
  void* inner;      // (rows, intermediate), activations
  void* converted;  // (rows, the widest input)
  float* scales;    // (rows,) of int8

  EncoderBuffers(Memory& memory, const EncoderLayerParams& p, int64_t rows);
};

// What a chunk keeps between the parts of the layer. Inside it is bfloat16 where the weights are not float32 and the
// instruction set multiplies bfloat16, otherwise float32.
struct EncoderWorkspace {
  void* qkv;               // (rows, 3, num_heads, head_dim)
  void* context;           // (rows, hidden)
  EncoderBuffers buffers;  // of a chunk that is divided by columns

  EncoderWorkspace(Memory& memory, const EncoderLayerParams& p, int64_t longest_chunk, int num_threads);
};

// What the most demanding of some layers needs, and the rows between two of them. Throws std::invalid_argument where
// cu_seqlens do not rise from 0 to total.
int64_t encoder_layers_workspace_bytes(const std::vector<EncoderLayerParams>& layers, const int32_t* cu_seqlens,
                                       int64_t total, int64_t batch, int num_threads);

// Layers of the same hidden size and dtype of rows, one after the other: x -> y.
// The calling thread asks wanted() before it takes part, while the others begin. Where that is false, they stop, y holds
// nothing, and so is what this returns. nanoseconds: as in EncoderLayerParams.
bool encoder_layers(const std::vector<EncoderLayerParams>& layers, const void* x, const int32_t* cu_seqlens, void* y,
                    void* workspace, int64_t total, int64_t batch, int num_threads, const std::function<bool()>& wanted,
                    int64_t* nanoseconds);

}  // namespace fastbert::cpu
