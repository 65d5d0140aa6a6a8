#include "cpu/embed_tokens.h"

#include <algorithm>
#include <vector>

namespace fastbert::cpu {

int64_t read_mask(const int64_t* mask, int64_t batch, int64_t length, int32_t* cu_seqlens, int64_t* indices) {
  int64_t total = 0, longest = 0;
  cu_seqlens[0] = 0;
  for (int64_t sequence = 0; sequence < batch; ++sequence) {
    for (int64_t token = sequence * length; token < (sequence + 1) * length; ++token) {
      indices[total] = token;
      total += mask[token] != 0;
    }
    cu_seqlens[sequence + 1] = static_cast<int32_t>(total);
    longest = std::max<int64_t>(longest, cu_seqlens[sequence + 1] - cu_seqlens[sequence]);
  }
  return longest;
}

bool embed_tokens(const EmbeddingTables& tables, const TokenBatch& tokens, void* y, int num_threads) {
  const int64_t rows = tokens.rows;
  std::vector<int64_t> ids(3 * rows);
  std::vector<float> moments(2 * rows);
  int64_t *word = ids.data(), *token_type = word + rows, *position = token_type + rows;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = tokens.indices == nullptr ? row : tokens.indices[row];
    word[row] = tokens.input_ids[token];
    token_type[row] = tokens.token_type_ids == nullptr ? 0 : tokens.token_type_ids[token];
    position[row] = tokens.position_ids == nullptr ? token % tokens.length : tokens.position_ids[token];
    const bool is_known = 0 <= word[row] && word[row] < tables.num_word_ids &&                    //
                          0 <= token_type[row] && token_type[row] < tables.num_token_type_ids &&  //
                          0 <= position[row] && position[row] < tables.num_positions;
    if (!is_known) return false;
  }
  embedding_layer_norm_forward(
      {word, token_type, position, tables.word, tables.position, tables.token_type, tables.weight, tables.ln_bias, y,
       moments.data(), moments.data() + rows, rows, tables.hidden, tables.eps, Dropout{}, tables.dtype},
      num_threads);
  return true;
}

}  // namespace fastbert::cpu
