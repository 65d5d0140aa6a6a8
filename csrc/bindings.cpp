// fastbert._cpu: Python integers become a Params struct and go to the launcher; fastbert/ops/native is the other side.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/dispatch.h"
#include "cpu/embed_tokens.h"
#include "cpu/encoder_plan.h"
#include "cpu/runtime.h"
#include "fastbert.h"
#include "unchanged.h"

namespace py = pybind11;
using namespace fastbert;

namespace {

using Address = uintptr_t;  // of a tensor's first element, 0 for None

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A class of its own, because pybind11 makes lists of vectors.
struct EncoderLayers {
  std::vector<EncoderLayerParams> layers;
};

Dropout make_dropout(uint32_t threshold, float scale, Address seed, uint32_t stream) {
  return {threshold, scale, pointer<const int64_t>(seed), stream};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU kernels of fastbert, on raw pointers. Use fastbert.ops.";

  py::class_<Dropout>(m, "Dropout", py::module_local()).def(py::init(&make_dropout));
  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::float32)
      .value("bfloat16", DType::bfloat16)
      .value("int8", DType::int8);
  py::enum_<MatmulEnd>(m, "MatmulEnd", py::module_local())
      .value("product", MatmulEnd::product)
      .value("gelu", MatmulEnd::gelu)
      .value("gelu_gradient", MatmulEnd::gelu_gradient);

  m.def("supported_instruction_sets", &cpu::supported_instruction_sets);
  m.def("instruction_set", &cpu::instruction_set);
  m.def("set_instruction_set", &cpu::set_instruction_set);
  m.def("set_openmp_parallel", &cpu::set_openmp_parallel);
  m.def("row_chunks", &cpu::row_chunks);

  using Release = py::call_guard<py::gil_scoped_release>;

  m.def(
      "embedding_layer_norm_forward",
      [](Address input_ids, Address token_type_ids, Address position_ids, Address word, Address position, Address token_type,
         Address weight, Address ln_bias, Address y, Address mean, Address rstd, int64_t rows, int64_t hidden, float eps,
         const Dropout& dropout, DType dtype, int num_threads) {
        cpu::embedding_layer_norm_forward(
            {pointer<const int64_t>(input_ids), pointer<const int64_t>(token_type_ids), pointer<const int64_t>(position_ids),
             pointer<const void>(word), pointer<const void>(position), pointer<const void>(token_type),
             pointer<const float>(weight), pointer<const float>(ln_bias), pointer<void>(y), pointer<float>(mean),
             pointer<float>(rstd), rows, hidden, eps, dropout, dtype},
            num_threads);
      },
      Release());

  m.def(
      "embedding_layer_norm_backward",
      [](Address dy, Address input_ids, Address token_type_ids, Address position_ids, Address word, Address position,
         Address token_type, Address mean, Address rstd, Address weight, Address dz, Address dweight, Address dln_bias,
         Address partials, int64_t rows, int64_t hidden, const Dropout& dropout, DType dtype, int num_threads) {
        cpu::embedding_layer_norm_backward(
            {pointer<const void>(dy), pointer<const int64_t>(input_ids), pointer<const int64_t>(token_type_ids),
             pointer<const int64_t>(position_ids), pointer<const void>(word), pointer<const void>(position),
             pointer<const void>(token_type), pointer<const float>(mean), pointer<const float>(rstd),
             pointer<const float>(weight), pointer<float>(dz), pointer<float>(dweight), pointer<float>(dln_bias),
             pointer<float>(partials), rows, hidden, dropout, dtype},
            num_threads);
      },
      Release());

  m.def(
      "table_gradient",
      [](Address dz, Address ids, Address order, Address starts, Address out, int64_t rows, int64_t num_ids, int64_t hidden,
         int64_t padding_idx, DType out_dtype, int num_threads) {
        cpu::table_gradient(
            {pointer<const void>(dz), pointer<const int64_t>(ids), pointer<int64_t>(order), pointer<int64_t>(starts),
             pointer<void>(out), nullptr, rows, num_ids, hidden, padding_idx, DType::float32, out_dtype},
            num_threads);
      },
      Release());

  m.def(
      "attention_forward",
      [](Address qkv, Address cu_seqlens, Address out, Address lse, int64_t total, int64_t batch, int64_t num_heads,
         int64_t head_dim, float softmax_scale, const Dropout& dropout, DType dtype, int num_threads) {
        cpu::attention_forward({pointer<const void>(qkv), pointer<const int32_t>(cu_seqlens), pointer<void>(out),
                                pointer<float>(lse), total, batch, num_heads, head_dim, softmax_scale, dropout, dtype},
                               num_threads);
      },
      Release());

  m.def(
      "attention_backward",
      [](Address dout, Address qkv, Address out, Address lse, Address cu_seqlens, Address dqkv, int64_t total, int64_t batch,
         int64_t num_heads, int64_t head_dim, float softmax_scale, const Dropout& dropout, DType dtype, int num_threads) {
        cpu::attention_backward({pointer<const void>(dout), pointer<const void>(qkv), pointer<const void>(out),
                                 pointer<const float>(lse), pointer<const int32_t>(cu_seqlens), pointer<void>(dqkv), total,
                                 batch, num_heads, head_dim, softmax_scale, dropout, dtype},
                                num_threads);
      },
      Release());

  m.def(
      "attention_of_rows_forward",
      [](Address q, Address kv, Address rows, Address cu_seqlens, Address out, Address lse, int64_t queries, int64_t total,
         int64_t batch, int64_t num_heads, int64_t head_dim, float softmax_scale, const Dropout& dropout, DType dtype,
         int num_threads) {
        cpu::attention_of_rows_forward({pointer<const void>(q), pointer<const void>(kv), pointer<const int64_t>(rows),
                                        pointer<const int32_t>(cu_seqlens), pointer<void>(out), pointer<float>(lse), queries,
                                        total, batch, num_heads, head_dim, softmax_scale, dropout, dtype},
                                       num_threads);
      },
      Release());

  m.def(
      "attention_of_rows_backward",
      [](Address dout, Address q, Address kv, Address rows, Address out, Address lse, Address cu_seqlens, Address dq,
         Address dkv, int64_t queries, int64_t total, int64_t batch, int64_t num_heads, int64_t head_dim,
         float softmax_scale, const Dropout& dropout, DType dtype, int num_threads) {
        cpu::attention_of_rows_backward(
            {pointer<const void>(dout), pointer<const void>(q), pointer<const void>(kv), pointer<const int64_t>(rows),
             pointer<const void>(out), pointer<const float>(lse), pointer<const int32_t>(cu_seqlens), pointer<void>(dq),
             pointer<void>(dkv), queries, total, batch, num_heads, head_dim, softmax_scale, dropout, dtype},
            num_threads);
      },
      Release());

  m.def(
      "add_layer_norm_forward",
      [](Address x, Address bias, Address residual, Address weight, Address ln_bias, Address y, Address z, Address mean,
         Address rstd, int64_t rows, int64_t hidden, float eps, const Dropout& dropout, DType dtype, int num_threads) {
        cpu::add_layer_norm_forward(
            {pointer<const void>(x), pointer<const float>(bias), pointer<const void>(residual), pointer<const float>(weight),
             pointer<const float>(ln_bias), pointer<void>(y), pointer<void>(z), pointer<float>(mean), pointer<float>(rstd),
             rows, hidden, eps, dropout, dtype},
            num_threads);
      },
      Release());

  m.def(
      "add_layer_norm_backward",
      [](Address dy, Address z, Address mean, Address rstd, Address weight, Address dx, Address dresidual, Address dweight,
         Address dln_bias, Address dbias, Address partials, int64_t rows, int64_t hidden, const Dropout& dropout,
         DType dtype, int num_threads) {
        cpu::add_layer_norm_backward(
            {pointer<const void>(dy), pointer<const void>(z), pointer<const float>(mean), pointer<const float>(rstd),
             pointer<const float>(weight), pointer<void>(dx), pointer<void>(dresidual), pointer<float>(dweight),
             pointer<float>(dln_bias), pointer<float>(dbias), pointer<float>(partials), rows, hidden, dropout, dtype},
            num_threads);
      },
      Release());

  m.def(
      "gelu_layer_norm_forward",
      [](Address x, Address bias, Address weight, Address ln_bias, Address y, Address mean, Address rstd, int64_t rows,
         int64_t hidden, float eps, DType dtype, int num_threads) {
        cpu::gelu_layer_norm_forward(
            {pointer<const void>(x), pointer<const float>(bias), pointer<const float>(weight), pointer<const float>(ln_bias),
             pointer<void>(y), pointer<float>(mean), pointer<float>(rstd), rows, hidden, eps, dtype},
            num_threads);
      },
      Release());

  m.def(
      "gelu_layer_norm_backward",
      [](Address dy, Address x, Address bias, Address weight, Address mean, Address rstd, Address dx, Address dweight,
         Address dln_bias, Address dbias, Address partials, int64_t rows, int64_t hidden, DType dtype, int num_threads) {
        cpu::gelu_layer_norm_backward(
            {pointer<const void>(dy), pointer<const void>(x), pointer<const float>(bias), pointer<const float>(weight),
             pointer<const float>(mean), pointer<const float>(rstd), pointer<void>(dx), pointer<float>(dweight),
             pointer<float>(dln_bias), pointer<float>(dbias), pointer<float>(partials), rows, hidden, dtype},
            num_threads);
      },
      Release());

  m.def(
      "bias_gelu_forward",
      [](Address u, Address bias, Address y, int64_t rows, int64_t columns, DType dtype, int num_threads) {
        cpu::bias_gelu_forward({pointer<const void>(u), pointer<const float>(bias), pointer<void>(y), rows, columns, dtype},
                               num_threads);
      },
      Release());

  m.def(
      "bias_gelu_backward",
      [](Address dy, Address u, Address bias, Address du, Address y, Address dbias, Address partials, int64_t rows,
         int64_t columns, DType dtype, int num_threads) {
        cpu::bias_gelu_backward(
            {pointer<const void>(dy), pointer<const void>(u), pointer<const float>(bias), pointer<void>(du),
             pointer<void>(y), pointer<float>(dbias), pointer<float>(partials), rows, columns, dtype},
            num_threads);
      },
      Release());

  m.def("matmul_workspace_bytes", &cpu::matmul_workspace_bytes);
  m.def(
      "matmul",
      [](Address a, Address b, Address bias, Address c, Address u, Address y, Address row_sums, Address packed_b,
         int64_t rows, int64_t depth, int64_t columns, int64_t a_row_stride, int64_t a_depth_stride, int64_t b_depth_stride,
         int64_t b_column_stride, int64_t c_row_stride, MatmulEnd end, DType dtype, DType c_dtype, int num_threads) {
        cpu::matmul(
            {pointer<const void>(a), pointer<const void>(b), pointer<const float>(bias), pointer<void>(c),
             pointer<const float>(u), pointer<float>(y), pointer<float>(row_sums), pointer<void>(packed_b), rows, depth,
             columns, a_row_stride, a_depth_stride, b_depth_stride, b_column_stride, c_row_stride, end, dtype, c_dtype},
            num_threads);
      },
      Release());

  m.def(
      "mlm_loss_forward",
      [](Address logits, Address bias, Address labels, Address row_max, Address row_sum, Address label_logit,
         Address logit_sum, int64_t rows, int64_t block, int64_t row_stride, int64_t first_class, DType dtype,
         int num_threads) {
        cpu::mlm_loss_forward({pointer<const void>(logits), pointer<const float>(bias), pointer<const int64_t>(labels),
                               pointer<float>(row_max), pointer<float>(row_sum), pointer<float>(label_logit),
                               pointer<float>(logit_sum), rows, block, row_stride, first_class, dtype},
                              num_threads);
      },
      Release());

  m.def(
      "mlm_loss_backward",
      [](Address logits, Address bias, Address labels, Address row_max, Address row_sum, Address dloss, Address dbias,
         Address partials, int64_t rows, int64_t block, int64_t row_stride, int64_t first_class, int64_t num_classes,
         float label_smoothing, DType dtype, int num_threads) {
        cpu::mlm_loss_backward({pointer<void>(logits), pointer<const float>(bias), pointer<const int64_t>(labels),
                                pointer<const float>(row_max), pointer<const float>(row_sum), pointer<const float>(dloss),
                                pointer<float>(dbias), pointer<float>(partials), rows, block, row_stride, first_class,
                                num_classes, label_smoothing, dtype},
                               num_threads);
      },
      Release());

  py::class_<Snapshot>(m, "Snapshot", py::module_local())
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&, const py::list&, const py::list&,
                    bool, const Memory&, const Memory&>());
  m.def("all_unchanged", &all_unchanged);
  m.def("multiplies", &cpu::multiplies);
  m.def("packed_weight_bytes", &cpu::packed_weight_bytes);

  m.def(
      "read_mask",
      [](Address mask, int64_t batch, int64_t length, Address cu_seqlens, Address indices) {
        int32_t* bounds = pointer<int32_t>(cu_seqlens);
        const int64_t longest =
            cpu::read_mask(pointer<const int64_t>(mask), batch, length, bounds, pointer<int64_t>(indices));
        return std::pair(static_cast<int64_t>(bounds[batch]), longest);
      },
      Release());

  py::class_<cpu::EmbeddingTables>(m, "EmbeddingTables", py::module_local())
      .def(py::init([](Address word, Address position, Address token_type, int64_t num_word_ids, int64_t num_positions,
                       int64_t num_token_type_ids, Address weight, Address ln_bias, int64_t hidden, float eps, DType dtype) {
        return cpu::EmbeddingTables{pointer<const void>(word),
                                    pointer<const void>(position),
                                    pointer<const void>(token_type),
                                    num_word_ids,
                                    num_positions,
                                    num_token_type_ids,
                                    pointer<const void>(weight),
                                    pointer<const void>(ln_bias),
                                    hidden,
                                    eps,
                                    dtype};
      }));

  m.def(
      "embed_tokens",
      [](const cpu::EmbeddingTables& tables, Address input_ids, Address token_type_ids, Address position_ids,
         Address indices, Address y, int64_t rows, int64_t length, int num_threads) {
        return cpu::embed_tokens(tables,
                                 {pointer<const int64_t>(input_ids), pointer<const int64_t>(token_type_ids),
                                  pointer<const int64_t>(position_ids), pointer<const int64_t>(indices), rows, length},
                                 pointer<void>(y), num_threads);
      },
      Release());

  m.def(
      "pack_weight",
      [](Address weight, Address packed, int64_t out_features, int64_t in_features, DType dtype, int num_threads) {
        cpu::pack_weight({pointer<const void>(weight), pointer<void>(packed), out_features, in_features, dtype},
                         num_threads);
      },
      Release());

  py::class_<PackedLinear>(m, "PackedLinear", py::module_local())
      .def(py::init([](Address weight, Address bias, Address scale, Address zero_point_sums, int64_t out_features,
                       int64_t in_features) {
        return PackedLinear{pointer<const void>(weight),
                            pointer<const float>(bias),
                            pointer<const float>(scale),
                            pointer<const int32_t>(zero_point_sums),
                            out_features,
                            in_features,
                            cpu::instruction_set()};
      }));

  m.def(
      "packed_dense",
      [](const PackedLinear& linear, Address x, Address y, int64_t rows, int64_t x_row_stride, DType dtype,
         int num_threads) {
        cpu::packed_dense({pointer<const void>(x), pointer<void>(y), linear, rows, x_row_stride, dtype}, num_threads);
      },
      Release());

  // What a layer is made of; x, cu_seqlens, y, the workspace and the counters come with each call.
  py::class_<EncoderLayerParams>(m, "EncoderLayer", py::module_local())
      .def(py::init([](const PackedLinear& qkv, const PackedLinear& attention_output, const PackedLinear& intermediate,
                       const PackedLinear& output, Address attention_norm_weight, Address attention_norm_bias,
                       Address output_norm_weight, Address output_norm_bias, float attention_norm_eps, float output_norm_eps,
                       int64_t num_heads, int64_t head_dim, float softmax_scale, DType dtype, DType weight_dtype) {
        return EncoderLayerParams{nullptr,
                                  nullptr,
                                  nullptr,
                                  nullptr,
                                  qkv,
                                  attention_output,
                                  intermediate,
                                  output,
                                  pointer<const float>(attention_norm_weight),
                                  pointer<const float>(attention_norm_bias),
                                  pointer<const float>(output_norm_weight),
                                  pointer<const float>(output_norm_bias),
                                  attention_norm_eps,
                                  output_norm_eps,
                                  0,
                                  0,
                                  num_heads,
                                  head_dim,
                                  softmax_scale,
                                  dtype,
                                  weight_dtype,
                                  nullptr};
      }));

  // The layers of an encoder one after the other: x -> y. All have the same hidden size and dtype of rows.
  py::class_<EncoderLayers>(m, "EncoderLayers", py::module_local())
      .def(py::init([](const std::vector<const EncoderLayerParams*>& layers) {
        EncoderLayers copies;
        for (const EncoderLayerParams* layer : layers) copies.layers.push_back(*layer);
        return copies;
      }))
      .def("workspace_bytes",
           [](const EncoderLayers& encoder, Address cu_seqlens, int64_t total, int64_t batch, int num_threads) {
             return cpu::encoder_layers_workspace_bytes(encoder.layers, pointer<const int32_t>(cu_seqlens), total, batch,
                                                        num_threads);
           })
      // snapshots: compared while the other threads begin, which nobody waits for then. False where one has changed.
      .def("forward",
           [](const EncoderLayers& encoder, Address x, Address cu_seqlens, Address y, Address workspace, int64_t total,
              int64_t batch, int num_threads, const std::vector<const Snapshot*>& snapshots, Address nanoseconds) {
             std::optional<py::gil_scoped_release> released;
             const auto wanted = [&] {
               if (!all_unchanged(snapshots)) return false;
               released.emplace();
               return true;
             };
             return cpu::encoder_layers(encoder.layers, pointer<const void>(x), pointer<const int32_t>(cu_seqlens),
                                        pointer<void>(y), pointer<void>(workspace), total, batch, num_threads, wanted,
                                        pointer<int64_t>(nanoseconds));
           });
}
