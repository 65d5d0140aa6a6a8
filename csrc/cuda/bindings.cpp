// fastbert._cuda: Python integers become a Params struct and go to the launcher; fastbert/ops/cuda is the other side.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.h"

namespace py = pybind11;
using namespace fastbert;

namespace {

using Address = uintptr_t;  // of a tensor's first element in device memory, 0 for None

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Dropout make_dropout(uint32_t threshold, float scale, Address seed, uint32_t stream) {
  return {threshold, scale, pointer<const int64_t>(seed), stream};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of fastbert, on raw pointers. Use fastbert.ops.";

  py::class_<Dropout>(m, "Dropout", py::module_local()).def(py::init(&make_dropout));
  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::float32)
      .value("bfloat16", DType::bfloat16)
      .value("float16", DType::float16);

  m.attr("DEVICE_TYPE") = cuda::device_type();
  m.attr("RUNTIME_VERSION") = cuda::runtime_version();
  m.def("driver_version", &cuda::driver_version);
  m.attr("MAX_HIDDEN") = cuda::kMaxHidden;
  m.def("row_lines", &cuda::row_lines);

  using Release = py::call_guard<py::gil_scoped_release>;

  m.def(
      "add_layer_norm_forward",
      [](Address x, Address bias, Address residual, Address weight, Address ln_bias, Address y, Address z, Address mean,
         Address rstd, int64_t rows, int64_t hidden, float eps, const Dropout& dropout, DType dtype, Address stream) {
        cuda::add_layer_norm_forward(
            {pointer<const void>(x), pointer<const void>(bias), pointer<const void>(residual), pointer<const void>(weight),
             pointer<const void>(ln_bias), pointer<void>(y), pointer<void>(z), pointer<float>(mean), pointer<float>(rstd),
             rows, hidden, eps, dropout, dtype},
            pointer<void>(stream));
      },
      Release());

  m.def(
      "add_layer_norm_backward",
      [](Address dy, Address z, Address mean, Address rstd, Address weight, Address dx, Address dresidual, Address dweight,
         Address dln_bias, Address dbias, Address partials, int64_t rows, int64_t hidden, const Dropout& dropout,
         DType dtype, Address stream) {
        cuda::add_layer_norm_backward(
            {pointer<const void>(dy), pointer<const void>(z), pointer<const float>(mean), pointer<const float>(rstd),
             pointer<const void>(weight), pointer<void>(dx), pointer<void>(dresidual), pointer<void>(dweight),
             pointer<void>(dln_bias), pointer<void>(dbias), pointer<float>(partials), rows, hidden, dropout, dtype},
            pointer<void>(stream));
      },
      Release());

  m.def(
      "gelu_layer_norm_forward",
      [](Address x, Address bias, Address weight, Address ln_bias, Address y, Address mean, Address rstd, int64_t rows,
         int64_t hidden, float eps, DType dtype, Address stream) {
        cuda::gelu_layer_norm_forward(
            {pointer<const void>(x), pointer<const void>(bias), pointer<const void>(weight), pointer<const void>(ln_bias),
             pointer<void>(y), pointer<float>(mean), pointer<float>(rstd), rows, hidden, eps, dtype},
            pointer<void>(stream));
      },
      Release());

  m.def(
      "gelu_layer_norm_backward",
      [](Address dy, Address x, Address bias, Address weight, Address mean, Address rstd, Address dx, Address dweight,
         Address dln_bias, Address dbias, Address partials, int64_t rows, int64_t hidden, DType dtype, Address stream) {
        cuda::gelu_layer_norm_backward(
            {pointer<const void>(dy), pointer<const void>(x), pointer<const void>(bias), pointer<const void>(weight),
             pointer<const float>(mean), pointer<const float>(rstd), pointer<void>(dx), pointer<void>(dweight),
             pointer<void>(dln_bias), pointer<void>(dbias), pointer<float>(partials), rows, hidden, dtype},
            pointer<void>(stream));
      },
      Release());

  m.def(
      "embedding_layer_norm_forward",
      [](Address input_ids, Address token_type_ids, Address position_ids, Address word, Address position, Address token_type,
         Address weight, Address ln_bias, Address y, Address mean, Address rstd, int64_t rows, int64_t hidden, int64_t words,
         int64_t positions, int64_t token_types, float eps, const Dropout& dropout, DType dtype, Address stream) {
        cuda::embedding_layer_norm_forward(
            {pointer<const int64_t>(input_ids), pointer<const int64_t>(token_type_ids), pointer<const int64_t>(position_ids),
             pointer<const void>(word), pointer<const void>(position), pointer<const void>(token_type),
             pointer<const void>(weight), pointer<const void>(ln_bias), pointer<void>(y), pointer<float>(mean),
             pointer<float>(rstd), rows, hidden, eps, dropout, dtype},
            {words, positions, token_types}, pointer<void>(stream));
      },
      Release());

  m.def(
      "embedding_layer_norm_backward",
      [](Address dy, Address input_ids, Address token_type_ids, Address position_ids, Address word, Address position,
         Address token_type, Address mean, Address rstd, Address weight, Address dz, Address dweight, Address dln_bias,
         Address partials, int64_t rows, int64_t hidden, const Dropout& dropout, DType dtype, Address stream) {
        cuda::embedding_layer_norm_backward(
            {pointer<const void>(dy), pointer<const int64_t>(input_ids), pointer<const int64_t>(token_type_ids),
             pointer<const int64_t>(position_ids), pointer<const void>(word), pointer<const void>(position),
             pointer<const void>(token_type), pointer<const float>(mean), pointer<const float>(rstd),
             pointer<const void>(weight), pointer<void>(dz), pointer<void>(dweight), pointer<void>(dln_bias),
             pointer<float>(partials), rows, hidden, dropout, dtype},
            pointer<void>(stream));
      },
      Release());

  m.def("table_gradient_pieces", &cuda::table_gradient_pieces);
  m.def(
      "table_gradient",
      [](Address dz, Address ids, Address order, Address starts, Address out, Address pieces, int64_t rows, int64_t num_ids,
         int64_t hidden, int64_t padding_idx, DType dtype, DType out_dtype, Address stream) {
        cuda::table_gradient(
            {pointer<const void>(dz), pointer<const int64_t>(ids), pointer<int64_t>(order), pointer<int64_t>(starts),
             pointer<void>(out), pointer<float>(pieces), rows, num_ids, hidden, padding_idx, dtype, out_dtype},
            pointer<void>(stream));
      },
      Release());

  m.def(
      "mlm_loss_forward",
      [](Address logits, Address bias, Address labels, Address row_max, Address row_sum, Address label_logit,
         Address logit_sum, int64_t rows, int64_t block, int64_t row_stride, int64_t first_class, DType dtype,
         Address stream) {
        cuda::mlm_loss_forward({pointer<const void>(logits), pointer<const void>(bias), pointer<const int64_t>(labels),
                                pointer<float>(row_max), pointer<float>(row_sum), pointer<float>(label_logit),
                                pointer<float>(logit_sum), rows, block, row_stride, first_class, dtype},
                               pointer<void>(stream));
      },
      Release());

  m.def("mlm_loss_lines", &cuda::mlm_loss_lines);
  m.def(
      "mlm_loss_backward",
      [](Address logits, Address bias, Address labels, Address row_max, Address row_sum, Address dloss, Address dbias,
         Address partials, int64_t rows, int64_t block, int64_t row_stride, int64_t first_class, int64_t num_classes,
         float label_smoothing, DType dtype, Address stream) {
        cuda::mlm_loss_backward(
            {pointer<void>(logits), pointer<const void>(bias), pointer<const int64_t>(labels), pointer<const float>(row_max),
             pointer<const float>(row_sum), pointer<const float>(dloss), pointer<void>(dbias), pointer<float>(partials),
             rows, block, row_stride, first_class, num_classes, label_smoothing, dtype},
            pointer<void>(stream));
      },
      Release());

  m.def("attention_drawn_tiles", &cuda::attention_drawn_tiles);
  m.def(
      "attention_forward",
      [](Address qkv, Address cu_seqlens, Address out, Address lse, Address drawn, int64_t drawn_tiles, int64_t total,
         int64_t batch, int64_t num_heads, int64_t head_dim, int64_t max_seqlen, float softmax_scale, const Dropout& dropout,
         DType dtype, Address stream) {
        cuda::attention_forward({pointer<const void>(qkv), pointer<const int32_t>(cu_seqlens), pointer<void>(out),
                                 pointer<float>(lse), total, batch, num_heads, head_dim, softmax_scale, dropout, dtype},
                                {pointer<uint32_t>(drawn), drawn_tiles}, max_seqlen, pointer<void>(stream));
      },
      Release());

  m.def(
      "attention_backward",
      [](Address dout, Address qkv, Address out, Address lse, Address cu_seqlens, Address dqkv, Address delta, Address drawn,
         int64_t drawn_tiles, int64_t total, int64_t batch, int64_t num_heads, int64_t head_dim, int64_t max_seqlen,
         float softmax_scale, const Dropout& dropout, DType dtype, Address stream) {
        cuda::attention_backward({pointer<const void>(dout), pointer<const void>(qkv), pointer<const void>(out),
                                  pointer<const float>(lse), pointer<const int32_t>(cu_seqlens), pointer<void>(dqkv), total,
                                  batch, num_heads, head_dim, softmax_scale, dropout, dtype},
                                 {pointer<uint32_t>(drawn), drawn_tiles}, pointer<float>(delta), max_seqlen,
                                 pointer<void>(stream));
      },
      Release());

  py::class_<OptimizerGroup>(m, "OptimizerGroup", py::module_local())
      .def(py::init([](Address device_rate, double rate, double beta1, double beta2, double eps, double weight_decay,
                       bool trust_ratio) {
        return OptimizerGroup{pointer<const float>(device_rate), rate, beta1, beta2, eps, weight_decay, trust_ratio};
      }));
  py::class_<OptimizerParams>(m, "OptimizerParams", py::module_local())
      .def(py::init([](Address tensors, Address gradients, Address chunk_tensors, Address coefficients, Address partials,
                       Address clip, Address found_inf, int64_t num_tensors, int64_t num_chunks) {
        return OptimizerParams{pointer<const OptimizerTensor>(tensors),
                               pointer<const float* const>(gradients),
                               pointer<const int32_t>(chunk_tensors),
                               pointer<OptimizerCoefficients>(coefficients),
                               pointer<double>(partials),
                               pointer<const float>(clip),
                               pointer<const float>(found_inf),
                               num_tensors,
                               num_chunks};
      }));
  m.attr("MAX_OPTIMIZER_GROUPS") = kMaxOptimizerGroups;
  m.attr("OPTIMIZER_CHUNK") = kOptimizerChunk;
  m.attr("OPTIMIZER_COEFFICIENTS") = sizeof(OptimizerCoefficients) / sizeof(float);

  m.def("write_words", [](Address target, const std::vector<uint64_t>& words, Address stream) {
    cuda::write_words(pointer<uint64_t>(target), words.data(), static_cast<int64_t>(words.size()), pointer<void>(stream));
  });
  m.def("assign_chunks", [](Address tensors, int64_t num_tensors, Address chunk_tensors, Address stream) {
    cuda::assign_chunks(pointer<const OptimizerTensor>(tensors), num_tensors, pointer<int32_t>(chunk_tensors),
                        pointer<void>(stream));
  });
  m.def(
      "gradient_norm",
      [](const OptimizerParams& params, float max_norm, Address norm, Address clip, Address stream) {
        cuda::gradient_norm(params, max_norm, pointer<float>(norm), pointer<float>(clip), pointer<void>(stream));
      },
      Release());
  m.def(
      "adamw",
      [](const OptimizerParams& params, const std::vector<OptimizerGroup>& groups, Address stream) {
        cuda::adamw(params, groups.data(), static_cast<int64_t>(groups.size()), pointer<void>(stream));
      },
      Release());
  m.def(
      "lamb",
      [](const OptimizerParams& params, const std::vector<OptimizerGroup>& groups, Address stream) {
        cuda::lamb(params, groups.data(), static_cast<int64_t>(groups.size()), pointer<void>(stream));
      },
      Release());
}
