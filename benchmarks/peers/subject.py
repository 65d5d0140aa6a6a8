"""The model that all contenders of the inference benchmark compute, and its copies in other engines' formats."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from ..harness import quiet
from ..workloads import SIZES

Batch = dict[str, Tensor]
Run = Callable[[Batch], Tensor]  # input_ids, attention_mask (batch, length) -> last_hidden_state (batch, length, hidden)


class Subject:
    """transformers' BertModel in float32 without a pooler, in evaluation mode, with the weights of the checkpoint ``weights`` or,
    where that is the name of a size, random ones.

    folder: where its copies in other formats go. Those that several contenders share are made once.
    """

    def __init__(self, config: transformers.BertConfig, device: str, folder: Path, weights: str) -> None:
        self.config, self.device, self.folder = config, device, folder
        if weights in SIZES:
            model = transformers.BertModel(config, add_pooling_layer=False)
        else:
            options = {"config": config, "dtype": torch.float32, "add_pooling_layer": False}
            with quiet():  # its report of the pooler that it leaves out
                model = transformers.BertModel.from_pretrained(weights, **options)
        self.model = model.eval().to(device)

    def with_attention(self, implementation: str, dtype: str) -> torch.nn.Module:
        """The same weights under another of transformers' attention implementations."""
        config = copy.deepcopy(self.config)
        config._attn_implementation = implementation
        model = transformers.BertModel(config, add_pooling_layer=False).eval().to(self.device, getattr(torch, dtype))
        model.load_state_dict(self.model.state_dict())
        return model

    @functools.cached_property
    def half_model(self) -> torch.nn.Module:
        return copy.deepcopy(self.model).bfloat16()

    def of_dtype(self, dtype: str) -> torch.nn.Module:
        return self.model if dtype == "float32" else self.half_model

    @functools.cached_property
    def checkpoint(self) -> Path:
        """A folder as ``save_pretrained`` leaves it, with a vocabulary and a pooler, which converters read, too."""
        folder = self.folder / "checkpoint"
        model = transformers.BertModel(self.config)
        model.load_state_dict(self.model.state_dict(), strict=False)
        model.save_pretrained(folder)
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
        model.load_state_dict(self.model.state_dict())
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
        """For tracing and calibration: 8 sequences of up to 64 tokens, on the CPU."""
        longest = min(64, self.config.max_position_embeddings)
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(self.config.vocab_size // 2, self.config.vocab_size, (8, longest), generator=generator)
        mask = (torch.arange(longest) < torch.linspace(longest / 8, longest, 8)[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask}


class _HiddenStates(torch.nn.Module):
    """Two tensors in, one out: what exporters want."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
