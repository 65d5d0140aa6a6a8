// The embeddings of a batch's real tokens in one call, from the tensors that a model's caller passes.

#pragma once

#include <cstdint>

#include "fastbert.h"

namespace fastbert::cpu {

// The tables of a model and its LayerNorm, for inference.
struct EmbeddingTables {
  const void *word, *position, *token_type;  // (ids, hidden) each
  int64_t num_word_ids, num_positions, num_token_type_ids;
  const void *weight, *ln_bias;  // (hidden,) float32
  int64_t hidden;
  float eps;
  DType dtype;  // of the tables
};

struct TokenBatch {
  const int64_t* input_ids;       // (batch, length)
  const int64_t* token_type_ids;  // (batch, length), or null where all are 0
  const int64_t* position_ids;    // (batch, length), or null where they are the columns
  const int64_t* indices;         // (rows,), the flat positions of the real tokens, or null where all are real
  int64_t rows, length;
};

// What a mask (batch, length) leaves of a batch: cu_seqlens (batch + 1,) is the running sum of the sequences' lengths, the
// first cu_seqlens[batch] of indices (batch * length,) are the flat positions of its tokens. Returns the longest length.
int64_t read_mask(const int64_t* mask, int64_t batch, int64_t length, int32_t* cu_seqlens, int64_t* indices);

// y: (rows, hidden). Returns whether every id is in its table; y is not written otherwise.
bool embed_tokens(const EmbeddingTables& tables, const TokenBatch& tokens, void* y, int num_threads);

}  // namespace fastbert::cpu
