"""Contenders of the inference benchmark that are engines of their own: ONNX Runtime, OpenVINO, CTranslate2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor

from .peer import NotAvailable, Package
from .subject import Batch, Run, Subject

NNCF = Package("nncf")


def onnxruntime(subject: Subject, dtype: str) -> Run:
    """With BERT's fused operators (embeddings, attention, skip + LayerNorm, bias + GELU); int8: dynamic, weights per channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    fused = subject.folder / "onnxruntime-fused.onnx"
    if not fused.exists():
        heads, hidden = subject.config.num_attention_heads, subject.config.hidden_size
        optimized = optimizer.optimize_model(str(subject.onnx), "bert", num_heads=heads, hidden_size=hidden, opt_level=0)
        optimized.save_model_to_file(str(fused))
    path = fused
    if dtype == "int8":
        path = subject.folder / "onnxruntime-int8.onnx"
        types = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # it does not know those of fused operators' results
        quantize_dynamic(str(fused), str(path), per_channel=True, weight_type=QuantType.QInt8, extra_options=types)
    return _onnxruntime_on_cuda(path, subject) if subject.device == "cuda" else _onnxruntime_on_cpu(path)


def _onnxruntime_on_cpu(path: Path) -> Run:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads would disturb who comes next
    session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {name: value.numpy() for name, value in batch.items()})[0])


def _onnxruntime_on_cuda(path: Path, subject: Subject) -> Run:
    """Inputs and outputs stay on the GPU: it reads and writes torch's memory. Without TF32, as torch."""
    import onnxruntime

    provider, advice = "CUDAExecutionProvider", "pip install onnxruntime-gpu in place of onnxruntime"
    if provider not in onnxruntime.get_available_providers():
        raise NotAvailable(f"this onnxruntime has no {provider} ({advice})")
    session = onnxruntime.InferenceSession(str(path), providers=[(provider, {"use_tf32": "0"})])
    if session.get_providers()[0] != provider:  # it falls back to the CPU where it does not find CUDA's or cuDNN's libraries
        raise NotAvailable(f"onnxruntime does not find the libraries of its {provider}: it would compute on the CPU")

    def run(batch: Batch) -> Tensor:
        binding = session.io_binding()
        hidden = torch.empty((*batch["input_ids"].shape, subject.config.hidden_size), device="cuda")
        for name, value in batch.items():
            binding.bind_input(name, "cuda", 0, numpy.int64, tuple(value.shape), value.data_ptr())
        binding.bind_output("last_hidden_state", "cuda", 0, numpy.float32, tuple(hidden.shape), hidden.data_ptr())
        torch.cuda.current_stream().synchronize()  # it has a stream of its own
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return hidden

    return run


def openvino(subject: Subject, dtype: str) -> Run:
    """int8: weights and activations by its own tool, NNCF, with its settings for transformers."""
    import openvino

    core = openvino.Core()
    model = core.read_model(subject.onnx)
    if dtype == "int8":
        model = _nncf_quantized(model, subject)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
    }
    compiled = core.compile_model(model, "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if dtype == "bfloat16" and used != "bf16":
        raise NotAvailable(f"OpenVINO computes in {used} on this CPU")

    def run(batch: Batch) -> Tensor:
        return torch.from_numpy(compiled({name: value.numpy() for name, value in batch.items()})[0])

    # It packs weights on its first call, where the other engines do when they are made: on two tokens, so that they are all that
    # it has kept when the memory of its calls is measured.
    run({name: value[:1, :2] for name, value in subject.example.items()})
    return run


def _nncf_quantized(model: Any, subject: Subject) -> Any:
    NNCF.require("which quantizes for OpenVINO")
    import nncf

    calibration = nncf.Dataset([{name: value.numpy() for name, value in subject.example.items()}])
    return nncf.quantize(model, calibration, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)


def ctranslate2(subject: Subject, dtype: str) -> Run:
    """It takes lengths for a mask and computes no padding in its linear layers."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    folder = subject.folder / "ctranslate2"
    if not folder.exists():
        config = transformers.BertConfig.from_pretrained(subject.checkpoint)
        config.position_embedding_type = "absolute"  # which its converter asks for and transformers no longer has
        config.save_pretrained(subject.checkpoint)
        TransformersConverter(str(subject.checkpoint)).convert(str(folder))
    threads = torch.get_num_threads()
    encoder = ctranslate2.Encoder(str(folder), device="cpu", intra_threads=threads, compute_type=dtype)

    def run(batch: Batch) -> Tensor:
        ids = ctranslate2.StorageView.from_array(batch["input_ids"].int().numpy())
        lengths = ctranslate2.StorageView.from_array(batch["attention_mask"].sum(1).int().numpy())
        return torch.from_numpy(numpy.array(encoder.forward_batch(ids, lengths).last_hidden_state))

    return run
