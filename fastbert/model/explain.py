"""``fastbert.explain(model)``: which path each part of a model takes, and the reason wherever it is not the fast one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import Pipeline

from ..ops import backends, measured_backends
from .accelerate import encoder_classes, module_of
from .attention_interface import NAME as ATTENTION
from .cache_name import CACHE
from .embeddings import embedding_notes
from .encoder import PackedEncoder
from .fallback import MASK_IN_COMPILED_CODE, hidden_states_wanted, model_fallback_reasons
from .heads import FirstRowsOnly
from .layer import FusedLayer, int8_parts, layer_fallback_reasons, layer_notes
from .lm_heads import LabelledRowsOnly
from .packed_layer import packing_reasons
from .plain import has_own_forward
from .row_selection import all_rows_reasons
from .trained_layer import op_by_op_reasons


@dataclass
class Explanation:
    """What runs where. ``str()`` gives a table, :meth:`to_dict` plain data.

    name: the encoder's path in the model. encoder: reasons why whole calls run transformers' forward pass (empty: they run packed).
    embeddings: notes on them. layers: notes per layer index (an empty list: fully fused). inference: on CPUs, per layer index, why
    calls without gradients take the layer's ops one by one (an empty list: one call on packed weights). training: per layer index,
    why its ops are nodes of their own in autograd's graph (an empty list: the layer is one). int8: per layer index the Linears that
    multiply int8, where there are any. head: notes of the language-model head, None where the model has none. last_layer: why the
    last layer computes all rows instead of those that somebody reads, of a model with a masked-LM head in a call with labels, of
    one whose head reads the pooler's output alone in every call; None for others. ops: the backend that ``"auto"`` picks for the
    device and dtype of the weights, with the reasons against the ones before it, and the sizes for which it was measured that
    another is faster, which it then picks. others: the model's other encoders.
    """

    name: str
    device: str
    dtype: str
    encoder: list[str]
    embeddings: list[str]
    layers: dict[int, list[str]]
    inference: dict[int, list[str]]
    training: dict[int, list[str]]
    int8: dict[int, list[str]]
    head: list[str] | None
    last_layer: list[str] | None
    ops: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: list[Explanation] = field(default_factory=list)

    @property
    def fast(self) -> bool:
        """Whether nothing falls back."""
        fallbacks = [self.encoder, self.embeddings, *self.layers.values(), self.head or []]
        ops = not any(op["passed_over"] for op in self.ops.values())
        return ops and not any(fallbacks) and all(other.fast for other in self.others)

    def to_dict(self) -> dict[str, Any]:
        others = [other.to_dict() for other in self.others]
        return {**asdict(self), "others": others, "fast": self.fast}

    def __str__(self) -> str:
        where = f" ({self.name})" if self.name else ""
        lines = [f"weights    {self.dtype} on {self.device}{where}"]
        lines += _described("encoder", self.encoder, "packed: no work on padding")
        lines += _described("embeddings", self.embeddings, "fused")
        fused = [index for index, notes in self.layers.items() if not notes]
        if fused:
            lines.append(f"layers     {_ranges(fused)}: fused")
        for index, notes in self.layers.items():
            lines += [f"layer {index:<4} {note}" for note in notes]
        for reasons in dict.fromkeys(map(tuple, self.inference.values())):
            indices = [index for index, others in self.inference.items() if tuple(others) == reasons]
            path = f"op by op, {'; '.join(reasons)}" if reasons else "one call per layer on packed weights"
            lines.append(f"inference  {_ranges(indices)}: {path}")
        for reasons in dict.fromkeys(tuple(reasons) for reasons in self.training.values() if reasons):
            indices = [index for index, others in self.training.items() if tuple(others) == reasons]
            lines.append(f"training   {_ranges(indices)}: op by op, {'; '.join(reasons)}")
        for names in dict.fromkeys(map(tuple, self.int8.values())):
            indices = [index for index, parts in self.int8.items() if tuple(parts) == names]
            lines.append(f"int8       {_ranges(indices)}: {', '.join(names)}")
        if self.head is not None:
            lines += _described("MLM head", self.head, "fused, on labelled rows only")
        if self.last_layer:
            lines.append(f"last layer all rows, read or not: {'; '.join(self.last_layer)}")
        elif self.last_layer is not None:
            read = "first tokens only" if self.head is None else "with labels, labelled rows and first tokens only"
            lines.append(f"last layer {read}")
        for op, facts in self.ops.items():
            lines.append(f"{op:<20} {facts['backend']}")
            lines += [f"{'':<20} not {name}: {'; '.join(reasons)}" for name, reasons in facts["passed_over"].items()]
            lines += [f"{'':<20} but {measured}" for measured in facts["measured"]]
        return "\n".join([*lines, *(str(other) for other in self.others)])


def explain(model: nn.Module | Pipeline, **inputs: Any) -> Explanation:
    """Explains the path of ``model``'s next forward pass in its present state.

    inputs: arguments of that call which decide about it (attention_mask, encoder_hidden_states, past_key_values, which
    transformers 5.24 calls cache, output_attentions, output_hidden_states); without them, one with padded inputs and a (batch,
    length) mask. Raises TypeError for a model without an encoder that fastbert knows.
    """
    module = module_of(model)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 3 and type(module).__name__.endswith("ForMultipleChoice"):
        inputs["attention_mask"] = mask.flatten(0, 1)  # as its forward does
    known = encoder_classes()
    encoders = {name: m for name, m in module.named_modules() if isinstance(m, known)}
    if not encoders:
        names = ", ".join(theirs.__name__ for theirs in known)
        raise TypeError(f"{type(module).__qualname__} contains no encoder that fastbert knows ({names})")
    head = next((m for m in module.modules() if _has_language_model_head(m)), None)
    compiled = {name: _is_compiled(module, name) for name in encoders}
    first, *others = (_explain_encoder(name, encoder, inputs, compiled[name]) for name, encoder in encoders.items())
    is_compiled = compiled[first.name]
    first.head, first.others = None if head is None else _head_notes(head), others
    if is_compiled and first.head is not None:
        first.head.append("loss of all rows: torch.compile cannot know how many have a label")
    reader = next((m for m in module.modules() if isinstance(m, LabelledRowsOnly | FirstRowsOnly)), None)  # not what wraps it
    if reader is not None:
        first.last_layer = ["it is compiled"] if is_compiled else _last_layer_reasons(reader, inputs)
    return first


def _is_compiled(module: nn.Module, name: str) -> bool:
    """Whether torch.compile was asked for the submodule ``name``, or for what it is in."""
    holders = [module]
    for part in filter(None, name.split(".")):
        holders.append(getattr(holders[-1], part))
    return any(map(_calls_compiled, holders))


def _calls_compiled(module: nn.Module) -> bool:
    forward = vars(module).get("forward")  # model.forward = torch.compile(model.forward)
    is_compiled = isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
    return is_compiled or hasattr(forward, "_torchdynamo_orig_callable")


def _explain_encoder(name: str, encoder: nn.Module, inputs: dict[str, Any], compiled: bool) -> Explanation:
    if isinstance(encoder, PackedEncoder):
        reasons, notes = _fallback_reasons(encoder, inputs), embedding_notes(encoder)
        has_mask = inputs.get("attention_mask", None if "cu_seq_lens_q" in inputs else True) is not None
        if compiled and has_mask and MASK_IN_COMPILED_CODE not in reasons:
            reasons.append(MASK_IN_COMPILED_CODE)
        if has_own_forward(encoder):
            reasons.append("its forward was replaced on the instance, perhaps by one that calls transformers'")
    else:
        kind = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
        only = ", only its attention runs on real tokens alone" if encoder.config._attn_implementation == ATTENTION else ""
        remedy = "see fastbert.accelerate"
        if type(encoder) not in encoder_classes():
            remedy += ", which knows transformers' own classes; derive yours from fastbert's"
        reasons = [f"it is {kind}: {remedy}{only}"]
        notes = ["called as transformers' module by its forward pass"]
    layers = {
        index: layer_notes(layer) if isinstance(layer, FusedLayer) else [f"is {type(layer).__qualname__}, not fastbert's"]
        for index, layer in enumerate(encoder.encoder.layer)
    }
    int8 = {index: names for index, layer in enumerate(encoder.encoder.layer) if (names := int8_parts(layer))}
    weight = next(encoder.parameters())
    in_graph = ["torch.compile has its ops in a graph"]
    graphs = [in_graph if compiled or _calls_compiled(layer) else [] for layer in encoder.encoder.layer]
    inference = {}
    if weight.device.type == "cpu" and not reasons:
        inference = {
            index: layer_fallback_reasons(layer) or packing_reasons(layer, weight.dtype) or graphs[index]
            for index, layer in enumerate(encoder.encoder.layer)
            if isinstance(layer, FusedLayer)
        }
    training = {}
    if not reasons:
        training = {
            index: layer_fallback_reasons(layer) or op_by_op_reasons(layer) or _dtype_reasons(layer) or graphs[index]
            for index, layer in enumerate(encoder.encoder.layer)
            if isinstance(layer, FusedLayer)
        }
    head_dim = encoder.config.hidden_size // encoder.config.num_attention_heads
    return Explanation(
        name=name,
        device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        encoder=reasons,
        embeddings=notes,
        layers=layers,
        inference=inference,
        training=training,
        int8=int8,
        head=None,
        last_layer=None,
        ops={op: _op_facts(op, weight, head_dim) for op in (*backends.OPS, *(backends.INFERENCE_OPS if int8 else ()))},
    )


def _dtype_reasons(layer: nn.Module) -> list[str]:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in layer.parameters()})
    return [f"its parameters are {' and '.join(dtypes)}"] if len(dtypes) > 1 else []


def _fallback_reasons(encoder: PackedEncoder, inputs: dict[str, Any]) -> list[str]:
    inputs = {"past_key_values" if key == CACHE else key: value for key, value in inputs.items()}
    return model_fallback_reasons(encoder, **{key: value for key, value in inputs.items() if key in _DECISIVE})


_DECISIVE = ("attention_mask", "encoder_hidden_states", "past_key_values", "output_attentions", "output_hidden_states", "is_causal")


def _has_language_model_head(module: nn.Module) -> bool:
    return hasattr(module, "language_model_head") or type(module).__name__.endswith(("ForMaskedLM", "LMHeadModel", "ForCausalLM"))


def _head_notes(model: nn.Module) -> list[str]:
    if hasattr(model, "language_model_head"):
        return model.language_model_head().notes()
    return [f"logits of all tokens: it is {type(model).__module__}.{type(model).__qualname__}"]


def _last_layer_reasons(model: LabelledRowsOnly | FirstRowsOnly, inputs: dict[str, Any]) -> list[str]:
    encoder = model.base_model
    if reasons := model.all_rows_reasons():
        return reasons
    if _fallback_reasons(encoder, inputs):
        return ["the encoder runs transformers' forward pass"]
    return all_rows_reasons(encoder, bool(hidden_states_wanted(encoder.config, inputs)))


def _op_facts(op: str, weight: nn.Parameter, head_dim: int) -> dict[str, Any]:
    kind = (weight.device.type, weight.dtype, head_dim if op == "attention" else None)
    picked = backends.select(op, "auto", *kind)
    order = backends.AUTO_ORDER.get(weight.device.type, ("reference",))
    passed_over = order[: order.index(picked)]
    return {
        "backend": picked,
        "passed_over": {name: backends.not_supported_reasons(name, op, *kind) for name in passed_over},
        "measured": [
            str(entry)
            for direction in measured_backends.DIRECTIONS
            for entry in measured_backends.entries_for(measured_backends.architecture(weight.device), op, direction, weight.dtype)
            if not backends.not_supported_reasons(entry.backend, op, *kind)
        ],
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
