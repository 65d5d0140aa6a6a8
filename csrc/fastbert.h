// The interface between Python and the kernels: one Params struct per op and direction, and the launchers that take them.
//
// Nothing here knows torch: Python allocates every output and workspace, checks shapes, dtypes and contiguity, and hands
// over raw pointers. fastbert/ops/reference is the specification of each op. All tensors are row-major and contiguous
// except where a row stride is given; all statistics are float32, whatever the dtype of the activations. Parameters of the
// model and their gradients, where they are void*, are float32 on the CPU and of the activations' dtype on a GPU: there it
// would take a launch for each to convert them, which costs as much as the op itself on a few thousand rows.

#pragma once

#include <cstdint>

namespace fastbert {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3 };

// Counter-based dropout: the element (row, column) is dropped where its 16 bits of
// Philox4x32-10(counter = (column / 8, row, plane, stream), key = *seed) are below the threshold.
struct Dropout {
  uint32_t threshold;   // the probability in 1/65536; 0: no dropout, and the rest is not read
  float scale;          // of the elements that are kept
  const int64_t* seed;  // in the memory that the kernel runs on
  uint32_t stream;
};

// Attention of a packed batch.
struct AttentionForwardParams {
  const void* qkv;            // (total, 3, num_heads, head_dim)
  const int32_t* cu_seqlens;  // (batch + 1,), from 0 to total
  void* out;                  // (total, num_heads, head_dim)
  float* lse;                 // (num_heads, total), or null where no backward pass follows
  int64_t total, batch, num_heads, head_dim;
  float softmax_scale;
  Dropout dropout;
  DType dtype;  // of qkv and out
};

struct AttentionBackwardParams {
  const void* dout;           // (total, num_heads, head_dim)
  const void* qkv;            // (total, 3, num_heads, head_dim)
  const void* out;            // (total, num_heads, head_dim)
  const float* lse;           // (num_heads, total)
  const int32_t* cu_seqlens;  // (batch + 1,)
  void* dqkv;                 // (total, 3, num_heads, head_dim)
  int64_t total, batch, num_heads, head_dim;
  float softmax_scale;
  Dropout dropout;
  DType dtype;  // of dout, qkv, out and dqkv
};

// Attention of the queries of some rows of a packed batch, to all keys of their sequences.
struct AttentionOfRowsForwardParams {
  const void* q;              // (queries, num_heads, head_dim)
  const void* kv;             // (total, 2, num_heads, head_dim)
  const int64_t* rows;        // (queries,) the row of each in the packed batch, in rising order; one may be there twice
  const int32_t* cu_seqlens;  // (batch + 1,), from 0 to total
  void* out;                  // (queries, num_heads, head_dim)
  float* lse;                 // (num_heads, queries)
  int64_t queries, total, batch, num_heads, head_dim;
  float softmax_scale;
  Dropout dropout;  // by the row in the packed batch: the masks of attention of all rows
  DType dtype;      // of q, kv and out
};

struct AttentionOfRowsBackwardParams {
  const void* dout;           // (queries, num_heads, head_dim)
  const void* q;              // (queries, num_heads, head_dim)
  const void* kv;             // (total, 2, num_heads, head_dim)
  const int64_t* rows;        // (queries,)
  const void* out;            // (queries, num_heads, head_dim)
  const float* lse;           // (num_heads, queries)
  const int32_t* cu_seqlens;  // (batch + 1,)
  void* dq;                   // (queries, num_heads, head_dim)
  void* dkv;                  // (total, 2, num_heads, head_dim)
  int64_t queries, total, batch, num_heads, head_dim;
  float softmax_scale;
  Dropout dropout;
  DType dtype;  // of dout, q, kv, out, dq and dkv
};

// z = word[input_ids] + token_type[token_type_ids] + position[position_ids]; y = dropout(LayerNorm(z) * weight + ln_bias)
// The caller has checked that every id is a row of its table.
struct EmbeddingLayerNormForwardParams {
  const int64_t* input_ids;       // (rows,)
  const int64_t* token_type_ids;  // (rows,)
  const int64_t* position_ids;    // (rows,)
  const void* word;               // (ids, hidden)
  const void* position;           // (ids, hidden)
  const void* token_type;         // (ids, hidden)
  const void* weight;             // (hidden,)
  const void* ln_bias;            // (hidden,)
  void* y;                        // (rows, hidden)
  float* mean;                    // (rows,)
  float* rstd;                    // (rows,)
  int64_t rows, hidden;
  float eps;
  Dropout dropout;
  DType dtype;  // of the tables and y
};

struct EmbeddingLayerNormBackwardParams {
  const void* dy;                 // (rows, hidden)
  const int64_t* input_ids;       // (rows,)
  const int64_t* token_type_ids;  // (rows,)
  const int64_t* position_ids;    // (rows,)
  const void* word;               // (ids, hidden)
  const void* position;           // (ids, hidden)
  const void* token_type;         // (ids, hidden)
  const float* mean;              // (rows,)
  const float* rstd;              // (rows,)
  const void* weight;             // (hidden,)
  void* dz;                       // (rows, hidden), null where no table's gradient is wanted; of the parameters' dtype
  void* dweight;                  // (hidden,)
  void* dln_bias;                 // (hidden,)
  float* partials;                // (row_chunks(rows), 3, hidden): sums over a chunk of rows, the third unused
  int64_t rows, hidden;
  Dropout dropout;
  DType dtype;  // of dy and the tables
};

// The gradient of one of the embeddings' tables: row i is the sum of the rows of dz whose id is i, 0 where there is none.
struct TableGradientParams {
  const void* dz;      // (rows, hidden)
  const int64_t* ids;  // (rows,), from 0 to num_ids - 1
  int64_t* order;   // (rows,) the rows in the order of their ids, those of one id in their own; the CPU's kernel writes it
  int64_t* starts;  // (num_ids + 1,) where in order an id's rows start; rows at the end; the CPU's kernel writes it
  void* out;        // (num_ids, hidden)
  float* pieces;    // on GPUs table_gradient_pieces(rows) x hidden: the sums of pieces of long runs
  int64_t rows, num_ids, hidden;
  int64_t padding_idx;  // the row of out that is 0 whatever dz says, or -1
  DType dtype;          // of dz: float32 on CPUs
  DType out_dtype;      // on GPUs dtype or float32
};

// z = dropout(x + bias) + residual; y = LayerNorm(z) * weight + ln_bias
struct AddLayerNormForwardParams {
  const void* x;         // (rows, hidden)
  const void* bias;      // (hidden,) or null
  const void* residual;  // (rows, hidden)
  const void* weight;    // (hidden,)
  const void* ln_bias;   // (hidden,)
  void* y;               // (rows, hidden)
  void* z;               // (rows, hidden)
  float* mean;           // (rows,)
  float* rstd;           // (rows,)
  int64_t rows, hidden;
  float eps;
  Dropout dropout;
  DType dtype;  // of x, residual, y and z
};

struct AddLayerNormBackwardParams {
  const void* dy;      // (rows, hidden)
  const void* z;       // (rows, hidden)
  const float* mean;   // (rows,)
  const float* rstd;   // (rows,)
  const void* weight;  // (hidden,)
  void* dx;            // (rows, hidden), null without dropout: it equals dresidual
  void* dresidual;     // (rows, hidden)
  void* dweight;       // (hidden,)
  void* dln_bias;      // (hidden,)
  void* dbias;         // (hidden,) or null
  float* partials;     // (row_chunks(rows), 3, hidden): sums over a chunk of rows, for dweight, dln_bias and dbias
  int64_t rows, hidden;
  Dropout dropout;
  DType dtype;  // of dy, z, dx and dresidual
};

// y = LayerNorm(gelu(x + bias)) * weight + ln_bias
struct GeluLayerNormForwardParams {
  const void* x;        // (rows, hidden)
  const void* bias;     // (hidden,) or null
  const void* weight;   // (hidden,)
  const void* ln_bias;  // (hidden,)
  void* y;              // (rows, hidden)
  float* mean;          // (rows,)
  float* rstd;          // (rows,)
  int64_t rows, hidden;
  float eps;
  DType dtype;  // of x and y
};

struct GeluLayerNormBackwardParams {
  const void* dy;      // (rows, hidden)
  const void* x;       // (rows, hidden)
  const void* bias;    // (hidden,) or null
  const void* weight;  // (hidden,)
  const float* mean;   // (rows,)
  const float* rstd;   // (rows,)
  void* dx;            // (rows, hidden)
  void* dweight;       // (hidden,)
  void* dln_bias;      // (hidden,)
  void* dbias;         // (hidden,) or null
  float* partials;     // (row_chunks(rows), 3, hidden): sums over a chunk of rows, for dweight, dln_bias and dbias
  int64_t rows, hidden;
  DType dtype;  // of dy, x and dx
};

// y = gelu(u + bias), after the matmul of linear_gelu.
struct BiasGeluForwardParams {
  const void* u;      // (rows, columns)
  const float* bias;  // (columns,) or null
  void* y;            // (rows, columns)
  int64_t rows, columns;
  DType dtype;  // of u and y
};

struct BiasGeluBackwardParams {
  const void* dy;     // (rows, columns)
  const void* u;      // (rows, columns)
  const float* bias;  // (columns,) or null
  void* du;           // (rows, columns), may be dy
  void* y;            // (rows, columns) gelu(u + bias), or null where nobody wants it again
  float* dbias;       // (columns,)
  float* partials;    // (row_chunks(rows), columns): sums over a chunk of rows
  int64_t rows, columns;
  DType dtype;  // of dy, u, du and y
};

// Columns of B are packed in panels of at most so many.
constexpr int64_t kMatmulPanelColumns = 64;

// What a matmul makes of A B, with gelu the exact erf-GELU; in bfloat16 a product alone.
enum class MatmulEnd : int {
  product = 0,       // c = A B + bias
  gelu = 1,          // c = A B; y = gelu(c + bias)
  gelu_gradient = 2  // A B is the gradient of y = gelu(u + bias): c = A B gelu'(u + bias), and y again
};

// See MatmulEnd for c and y; one stride of A and one of B is 1. bfloat16 is read in pairs: where the stride of a depth is 1,
// the depth is even, and so is B's other stride. It needs an instruction set with its dot product.
struct MatmulParams {
  const void* a;      // element (row, k) is a[row * a_row_stride + k * a_depth_stride]
  const void* b;      // element (k, column) is b[k * b_depth_stride + column * b_column_stride]
  const float* bias;  // (columns,) or null
  void* c;            // (rows, columns), rows c_row_stride apart
  const float* u;     // as c; gelu_gradient alone reads it
  float* y;           // as c; null where gelu_gradient is not to write it
  float* row_sums;    // (rows,), A's sums over the depth, or null; they need an a_row_stride of 1
  void* packed_b;     // workspace of matmul_workspace_bytes
  int64_t rows, depth, columns;
  int64_t a_row_stride, a_depth_stride, b_depth_stride, b_column_stride, c_row_stride;
  MatmulEnd end;
  DType dtype;    // of a and b
  DType c_dtype;  // dtype or float32
};

// Folds a block of logits into each row's running softmax statistics.
struct MlmLossForwardParams {
  const void* logits;     // (rows, block), rows row_stride elements apart
  const void* bias;       // (block,) or null
  const int64_t* labels;  // (rows,)
  float* row_max;         // (rows,)
  float* row_sum;         // (rows,)
  float* label_logit;     // (rows,)
  float* logit_sum;       // (rows,) or null
  int64_t rows, block, row_stride, first_class;
  DType dtype;  // of logits
};

// Overwrites a block of logits with its gradient.
struct MlmLossBackwardParams {
  void* logits;           // (rows, block), rows row_stride elements apart
  const void* bias;       // (block,) or null
  const int64_t* labels;  // (rows,)
  const float* row_max;   // (rows,), final
  const float* row_sum;   // (rows,), final
  const float* dloss;     // (rows,), 0 on ignored rows
  void* dbias;            // (block,) or null
  float* partials;        // (row_chunks(rows), block): sums over a chunk of rows, or null without dbias
  int64_t rows, block, row_stride, first_class, num_classes;
  float label_smoothing;
  DType dtype;  // of logits
};

// A linear layer of a model that is not trained, its weight in the order that one instruction set's kernels read.
struct PackedLinear {
  const void* weight;              // what pack_weight wrote
  const float* bias;               // (out_features,) or null
  const float* scale;              // (out_features,) of an int8 weight's rows; null for other dtypes
  const int32_t* zero_point_sums;  // (out_features,) 128 times the sums of an int8 weight's rows; null for other dtypes
  int64_t out_features, in_features;
  const char* instruction_set;  // that pack_weight has written it for: each has an order of its own
};

struct PackWeightParams {
  const void* weight;  // (out_features, in_features), rows of whole groups of 4 bytes
  void* packed;        // packed_weight_bytes()
  int64_t out_features, in_features;
  DType dtype;
};

// y = x W^T + b without the rest of a layer.
struct PackedDenseParams {
  const void* x;  // (rows, in_features)
  void* y;        // (rows, out_features)
  PackedLinear linear;
  int64_t rows, x_row_stride;
  DType dtype;  // of x, y and the weight: float32 or bfloat16
};

// A whole encoder layer without dropout: y = LN(h + W2 gelu(W1 h)), h = LN(x + Wo attention(x Wqkv)).
struct EncoderLayerParams {
  const void* x;              // (total, hidden)
  const int32_t* cu_seqlens;  // (batch + 1,), from 0 to total
  void* y;                    // (total, hidden)
  void* workspace;            // encoder_layers_workspace_bytes()
  PackedLinear qkv;           // hidden -> 3 hidden
  PackedLinear attention_output, intermediate, output;
  const float *attention_norm_weight, *attention_norm_bias;  // (hidden,)
  const float *output_norm_weight, *output_norm_bias;        // (hidden,)
  float attention_norm_eps, output_norm_eps;
  int64_t total, batch, num_heads, head_dim;
  float softmax_scale;
  DType dtype;           // of x and y
  DType weight_dtype;    // of all four weights: dtype, or a narrower one that rows are converted to
  int64_t* nanoseconds;  // (3,): what threads spend in linear layers, attention and the rest is added; null: not counted
};

// A parameter that has a gradient, with its optimizer's state: float32 at any address, numel of each, and one step count.
// Python writes the table of them; every member is a word of 8 bytes.
struct OptimizerTensor {
  float* parameter;
  float* average;  // of the gradients
  float* square;   // the average of the gradients' squares
  float* step;     // the steps so far
  int64_t numel;
  int64_t first_chunk;  // the chunks of all tensors are numbered one after the other
  int64_t group;
};

// What a group of parameters has in common; of the rates, the one on the device counts where there is one.
struct OptimizerGroup {
  const float* device_rate;
  double rate, beta1, beta2, eps, weight_decay;
  bool trust_ratio;
};

constexpr int64_t kMaxOptimizerGroups = 64;  // they are a kernel's parameter

// What a tensor's elements need to know of its group and its step.
struct OptimizerCoefficients {
  float beta1, new1, beta2, new2;  // the averages' shares that stay, and those of what is new
  float first, second;             // the corrections of the average, and of the square's root
  float eps, weight_decay, rate;
  float trust_ratio;  // 1 or 0
};

// All tensors of an optimizer's step. A chunk has kOptimizerChunk elements of one tensor, the last one of a tensor perhaps
// fewer.
struct OptimizerParams {
  const OptimizerTensor* tensors;       // (num_tensors,)
  const float* const* gradients;        // (num_tensors,)
  const int32_t* chunk_tensors;         // (num_chunks,): which tensor a chunk is of
  OptimizerCoefficients* coefficients;  // (num_tensors,), workspace
  double* partials;                     // (2, num_chunks), workspace: sums over a chunk
  const float* clip;                    // a factor for all gradients, or null
  const float* found_inf;               // not 0 where the step is left out, or null
  int64_t num_tensors, num_chunks;
};

constexpr int64_t kOptimizerChunk = 16384;

namespace cpu {

// Whether the instruction set in use has an instruction that multiplies this dtype and adds the products. The encoder layer
// has kernels without one; matmul has none, and none for int8 at all.
bool multiplies(DType dtype);

// What pack_weight writes: a multiple of 64.
int64_t packed_weight_bytes(int64_t out_features, int64_t in_features, DType dtype);

// Sums over all rows (gradients of weights and biases) are made of the sums of this many chunks of rows, in order: it
// depends on the shape alone, so results do not depend on the number of threads.
int64_t row_chunks(int64_t rows);

// Each launcher returns when the work is done, on at most num_threads threads. They throw std::invalid_argument for a dtype
// other than float32 and bfloat16.
void embedding_layer_norm_forward(const EmbeddingLayerNormForwardParams& params, int num_threads);
void embedding_layer_norm_backward(const EmbeddingLayerNormBackwardParams& params, int num_threads);
void table_gradient(const TableGradientParams& params, int num_threads);
void attention_forward(const AttentionForwardParams& params, int num_threads);
void attention_backward(const AttentionBackwardParams& params, int num_threads);
void attention_of_rows_forward(const AttentionOfRowsForwardParams& params, int num_threads);
void attention_of_rows_backward(const AttentionOfRowsBackwardParams& params, int num_threads);
void add_layer_norm_forward(const AddLayerNormForwardParams& params, int num_threads);
void add_layer_norm_backward(const AddLayerNormBackwardParams& params, int num_threads);
void gelu_layer_norm_forward(const GeluLayerNormForwardParams& params, int num_threads);
void gelu_layer_norm_backward(const GeluLayerNormBackwardParams& params, int num_threads);
void bias_gelu_forward(const BiasGeluForwardParams& params, int num_threads);
void bias_gelu_backward(const BiasGeluBackwardParams& params, int num_threads);
void matmul(const MatmulParams& params, int num_threads);
// Columns of B that are packed at a time, whole panels, and the bytes that they take.
int64_t matmul_chunk_columns(int64_t depth, int64_t columns, DType dtype);
int64_t matmul_workspace_bytes(int64_t depth, int64_t columns, DType dtype);
void mlm_loss_forward(const MlmLossForwardParams& params, int num_threads);
void mlm_loss_backward(const MlmLossBackwardParams& params, int num_threads);
void pack_weight(const PackWeightParams& params, int num_threads);
void packed_dense(const PackedDenseParams& params, int num_threads);
void encoder_layer(const EncoderLayerParams& params, int num_threads);

}  // namespace cpu
}  // namespace fastbert
