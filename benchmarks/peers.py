"""Who computes an encoder's hidden states in the inference benchmark: fastbert, and what else is installed.

A contender is made once from a :class:`Subject`, the model with its weights, and then called with padded batches. Peers' packages
are imported when they are needed; where one is not installed or cannot do a dtype here, :class:`NotAvailable` says why. Each is
run as its own documentation says it is fastest, on the threads that torch has.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import fastbert

from .workloads import SIZES

Batch = dict[str, Tensor]
Run = Callable[[Batch], Tensor]  # input_ids, attention_mask (batch, length) -> last_hidden_state (batch, length, hidden)


class NotAvailable(Exception):
    """Why a contender cannot take part."""


@dataclass(frozen=True)
class Peer:
    """make(subject, dtype): the contender, or NotAvailable; dtypes: what it computes in, by device; package: what it needs."""

    title: str
    make: Callable[[Subject, str], Run]
    dtypes: dict[str, tuple[str, ...]]
    package: str | None = None

    def why_not_installed(self) -> str | None:
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed (pip install 'fastbert[bench]')"


class Subject:
    """The model that all contenders compute: transformers' BertModel in float32, in evaluation mode, with the weights of the
    checkpoint ``weights`` or, where that is the name of a size, random ones.

    folder: where its copies in other formats go. Those that several contenders share are made once.
    """

    def __init__(self, config: transformers.BertConfig, device: str, folder: Path, weights: str) -> None:
        self.config, self.device, self.folder = config, device, folder
        model = transformers.BertModel(config)
        if weights not in SIZES:
            model = transformers.BertModel.from_pretrained(weights, config=config, dtype=torch.float32)
        self.model = model.eval().to(device)

    def with_attention(self, implementation: str, dtype: str) -> torch.nn.Module:
        """The same weights under another of transformers' attention implementations."""
        config = copy.deepcopy(self.config)
        config._attn_implementation = implementation
        model = transformers.BertModel(config).eval().to(self.device, getattr(torch, dtype))
        model.load_state_dict(self.model.state_dict())
        return model

    @functools.cached_property
    def half_model(self) -> torch.nn.Module:
        return copy.deepcopy(self.model).bfloat16()

    def of_dtype(self, dtype: str) -> torch.nn.Module:
        return self.model if dtype == "float32" else self.half_model

    @functools.cached_property
    def checkpoint(self) -> Path:
        """A folder as ``save_pretrained`` leaves it, with a vocabulary, which converters read, too."""
        folder = self.folder / "checkpoint"
        self.model.save_pretrained(folder)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(5, self.config.vocab_size))]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        return folder

    @functools.cached_property
    def onnx(self) -> Path:
        """With eager attention, whose pattern is the one that ONNX Runtime fuses."""
        config = copy.deepcopy(self.config)
        config._attn_implementation = "eager"
        model = transformers.BertModel(config, add_pooling_layer=False).eval()
        model.load_state_dict(self.model.state_dict(), strict=False)
        path, example = self.folder / "model.onnx", self.example
        axes = {0: "batch", 1: "length"}
        with torch.no_grad():
            torch.onnx.export(
                _HiddenStates(model).eval(),
                (example["input_ids"], example["attention_mask"]),
                str(path),
                input_names=list(example),
                output_names=["last_hidden_state"],
                dynamic_axes={name: axes for name in (*example, "last_hidden_state")},
                opset_version=17,
                dynamo=False,  # the other exporter needs one more package, and ONNX Runtime fuses less of what it makes
            )
        return path

    @property
    def example(self) -> Batch:
        """For tracing and calibration: 8 sequences of up to 64 tokens."""
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(self.config.vocab_size // 2, self.config.vocab_size, (8, 64), generator=generator)
        mask = (torch.arange(64) < torch.arange(8, 72, 8)[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask}


class _HiddenStates(torch.nn.Module):
    """Two tensors in, one out: what exporters want."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _fastbert(subject: Subject, dtype: str) -> Run:
    if dtype == "int8" and not hasattr(fastbert, "quantize"):
        raise NotAvailable("this fastbert has no quantize")
    model = fastbert.BertModel(subject.config, add_pooling_layer=False).eval().to(subject.device)
    model.load_state_dict({name: value for name, value in subject.model.state_dict().items() if not name.startswith("pooler.")})
    if dtype == "bfloat16":
        model.bfloat16()
    if dtype == "int8":
        model = fastbert.quantize(model)
    return lambda batch: model(**batch).last_hidden_state


def _transformers(subject: Subject, dtype: str) -> Run:
    model = subject.of_dtype(dtype)
    return lambda batch: model(**batch).last_hidden_state


def _transformers_eager(subject: Subject, dtype: str) -> Run:
    model = subject.with_attention("eager", dtype)
    return lambda batch: model(**batch).last_hidden_state


def _transformers_compiled(subject: Subject, dtype: str) -> Run:
    model = torch.compile(subject.of_dtype(dtype), dynamic=False)
    return lambda batch: model(**batch).last_hidden_state


# Tokens of a batch with its padding: the fastest of 128 to 2048 for sequences of MNLI's lengths, in inference and in training.
TOKEN_BUDGET = 256


def _transformers_sorted(subject: Subject, dtype: str) -> Run:
    """What a careful user of transformers does: similar lengths together in small batches, and oneDNN's matmul."""
    model = subject.of_dtype(dtype)

    def run(batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = ids.new_zeros((*ids.shape, subject.config.hidden_size), dtype=getattr(torch, dtype))
        lengths, order = mask.sum(1).sort()
        for group in token_budget_groups(lengths.tolist(), TOKEN_BUDGET):
            rows, longest = order[group], int(lengths[group][-1])
            part = model(input_ids=ids[rows, :longest], attention_mask=mask[rows, :longest])
            hidden[rows, :longest] = part.last_hidden_state
        return hidden

    def with_onednn(batch: Batch) -> Tensor:
        with onednn_float32_matmul():
            return run(batch)

    return with_onednn if subject.device == "cpu" else run


def token_budget_groups(ascending: list[int], budget: int) -> Iterator[slice]:
    """Cuts lengths in ascending order into runs of at most ``budget`` tokens when padded to their longest, at least one each."""
    start = 0
    for end in range(1, len(ascending) + 1):
        if end == len(ascending) or (end + 1 - start) * ascending[end] > budget:
            yield slice(start, end)
            start = end


@contextlib.contextmanager
def onednn_float32_matmul() -> Iterator[None]:
    """Float32 matmuls go to oneDNN instead of MKL; on CPUs with AMX it then multiplies in bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _onnxruntime(subject: Subject, dtype: str) -> Run:
    """With BERT's fused operators (embeddings, attention, skip + LayerNorm, bias + GELU); int8: dynamic, weights per channel."""
    import onnx
    import onnxruntime
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
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads would disturb who comes next
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {name: value.numpy() for name, value in batch.items()})[0])


def _openvino(subject: Subject, dtype: str) -> Run:
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
    return lambda batch: torch.from_numpy(compiled({name: value.numpy() for name, value in batch.items()})[0])


def _nncf_quantized(model: Any, subject: Subject) -> Any:
    if importlib.util.find_spec("nncf") is None:
        raise NotAvailable("nncf, which quantizes for OpenVINO, is not installed (pip install 'fastbert[bench]')")
    import nncf

    calibration = nncf.Dataset([{name: value.numpy() for name, value in subject.example.items()}])
    return nncf.quantize(model, calibration, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)


def _ctranslate2(subject: Subject, dtype: str) -> Run:
    """It takes lengths for a mask and computes no padding in its linear layers."""
    import ctranslate2
    import numpy
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


_FLOATS = ("float32", "bfloat16")
OURS = Peer("fastbert", _fastbert, {"cpu": (*_FLOATS, "int8"), "cuda": _FLOATS})
# Names are those of --peers. Those of torch first, the reference of all figures as the first of them.
PEERS = {
    "transformers": Peer("transformers", _transformers, {"cpu": _FLOATS, "cuda": _FLOATS}),
    "transformers-eager": Peer("transformers eager", _transformers_eager, {"cpu": _FLOATS, "cuda": _FLOATS}),
    # In bfloat16 it would take minutes more on a CPU.
    "transformers-compiled": Peer("transformers compiled", _transformers_compiled, {"cpu": ("float32",), "cuda": _FLOATS}),
    "transformers-sorted": Peer("transformers sorted, oneDNN", _transformers_sorted, {"cpu": _FLOATS}),
    "onnxruntime": Peer("ONNX Runtime", _onnxruntime, {"cpu": ("float32", "int8")}, "onnxruntime"),
    "openvino": Peer("OpenVINO", _openvino, {"cpu": (*_FLOATS, "int8")}, "openvino"),
    "ctranslate2": Peer("CTranslate2", _ctranslate2, {"cpu": ("float32", "int8")}, "ctranslate2"),
}
