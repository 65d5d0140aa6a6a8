"""``fastbert.explain(model)``: which path each part of a model takes, and the reason wherever it is not the fast one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from transformers.models.bert import modeling_bert as hf

from ..ops import backends
from .embeddings import embedding_notes
from .encoder import PackedEncoder, model_fallback_reasons
from .layer import FusedLayer, layer_notes
from .lm_heads import head_notes


@dataclass
class Explanation:
    """What runs where. ``str()`` gives a table, :meth:`to_dict` plain data.

    encoder: reasons why whole calls run transformers' forward pass (empty: they run packed). embeddings: notes on them. layers:
    notes per layer index (an empty list: fully fused). head: notes of the language-model head, None where the model has none.
    ops: the backend that ``"auto"`` picks for the device and dtype of the weights, with the reasons against the ones before it.
    """

    device: str
    dtype: str
    encoder: list[str]
    embeddings: list[str]
    layers: dict[int, list[str]]
    head: list[str] | None
    ops: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def fast(self) -> bool:
        """Whether nothing falls back."""
        fallbacks = [self.encoder, self.embeddings, *self.layers.values(), self.head or []]
        return not any(fallbacks) and not any(op["passed_over"] for op in self.ops.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fast": self.fast}

    def __str__(self) -> str:
        lines = [f"weights    {self.dtype} on {self.device}"]
        lines += _described("encoder", self.encoder, "packed: no work on padding")
        lines += _described("embeddings", self.embeddings, "fused")
        fused = [index for index, notes in self.layers.items() if not notes]
        if fused:
            lines.append(f"layers     {_ranges(fused)}: fused")
        for index, notes in self.layers.items():
            lines += [f"layer {index:<4} {note}" for note in notes]
        if self.head is not None:
            lines += _described("MLM head", self.head, "fused, on labelled rows only")
        for op, facts in self.ops.items():
            lines.append(f"{op:<20} {facts['backend']}")
            lines += [f"{'':<20} not {name}: {'; '.join(reasons)}" for name, reasons in facts["passed_over"].items()]
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Explains the path of ``model``'s next forward pass with padded inputs and a (batch, length) mask, in its present state.

    Raises TypeError for a model without a BERT encoder in it.
    """
    encoder = next((m for m in model.modules() if isinstance(m, hf.BertModel)), None)
    if encoder is None:
        raise TypeError(f"{type(model).__qualname__} contains no transformers or fastbert BertModel")
    weight = encoder.embeddings.LayerNorm.weight
    if isinstance(encoder, PackedEncoder):
        reasons, notes = model_fallback_reasons(encoder), embedding_notes(encoder)
    else:
        reasons = [f"it is {type(encoder).__module__}.{type(encoder).__qualname__}, not fastbert.BertModel"]
        notes = ["called as transformers' module by its forward pass"]
    layers = {
        index: layer_notes(layer) if isinstance(layer, FusedLayer) else [f"is {type(layer).__qualname__}, not fastbert's"]
        for index, layer in enumerate(encoder.encoder.layer)
    }
    head = next((m for m in model.modules() if isinstance(m, hf.BertLMPredictionHead)), None)
    head_dim = encoder.config.hidden_size // encoder.config.num_attention_heads
    return Explanation(
        device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        encoder=reasons,
        embeddings=notes,
        layers=layers,
        head=None if head is None else head_notes(head),
        ops={op: _op_facts(op, weight, head_dim) for op in backends.OPS},
    )


def _op_facts(op: str, weight: nn.Parameter, head_dim: int) -> dict[str, Any]:
    kind = (weight.device.type, weight.dtype, head_dim if op == "attention" else None)
    picked = backends.select(op, "auto", *kind)
    order = backends.AUTO_ORDER.get(weight.device.type, ("reference",))
    passed_over = order[: order.index(picked)]
    return {
        "backend": picked,
        "passed_over": {name: backends.not_supported_reasons(name, op, *kind) for name in passed_over},
    }


def _described(title: str, notes: list[str], otherwise: str) -> list[str]:
    return [f"{title:<10} {note}" for note in notes] or [f"{title:<10} {otherwise}"]


def _ranges(indices: list[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
