"""The encoder layer on packed rows: two GEMMs and one fused op for each half, nothing on padding.

    qkv = x [Wq Wk Wv]          attention (dropout inside)      add_layer_norm(. Wo + bo, x)
    gelu(x W1 + b1)                                             add_layer_norm(. W2 + b2, x)

Same submodules and parameters as transformers' layer; where :func:`fastbert.quantize` put an ``Int8Linear``, the GEMM is int8.
A submodule that is something else (a LoRA or torchao Linear, one with hooks) is called as a module, so that what it adds
takes part; what cannot be honoured inside the fused layer sends the whole layer to transformers' own forward.
:func:`layer_notes` names both, per layer. Without gradients a CPU runs the layer in one call on packed weights (``packed_layer``).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert import modeling_bert as hf

from ..ops import add_layer_norm, attention, int8_linear, linear_gelu
from ..ops.add_layer_norm import add_layer_norm_mixed
from ..ops.attention_of_rows import attention_of_rows
from ..ops.feed_forward import feed_forward
from ..ops.linear import linear, linear_dx, linear_forward, linear_parameter_gradients
from ..ops.native.encoder_layer import run_layers
from ..ops.registration import contiguous_grad, refuse_batched_gradients, under_autocast
from .adjacent import are_adjacent, cat_of_any, joined
from .cache_name import CACHE
from .int8 import Int8Linear, join
from .packed_layer import drop_if_trained, forget, packed_again, packed_layer
from .packing import Packing
from .plain import (
    base_was_changed,
    class_was_changed,
    has_hooks,
    has_own_forward,
    has_plain_parameters,
    is_exact_gelu,
    is_int8_linear,
    is_plain_linear,
)
from .swap import replaces
from .trained_layer import is_last_layer, trained_layer

# Streams of the dropout generator: one for each op of each layer, and after them one for the embeddings.
STREAMS_PER_LAYER = 3


@dataclass(frozen=True)
class Part:
    """A submodule of a fused layer: where it is, and the class it must have (None: any, it is called where it is not usual)."""

    path: str
    parent: int  # index of the parent's Part; -1 for the layer itself
    name: str
    expected: type | None


def expected_parts(modeling: ModuleType, prefix: str) -> tuple[Part, ...]:
    """The parts of the encoder layer in transformers' module ``modeling`` of a model family; ``prefix`` begins its classes' names.

    Parents come before their children, for :func:`layer_fallback_reasons`, which every call of a layer asks.
    """
    classes = {
        "attention": getattr(modeling, f"{prefix}Attention"),
        "attention.self": getattr(modeling, f"{prefix}SelfAttention"),
        "attention.self.query": None,
        "attention.self.key": None,
        "attention.self.value": None,
        "attention.self.dropout": nn.Dropout,
        "attention.output": getattr(modeling, f"{prefix}SelfOutput"),
        "attention.output.dense": None,
        "attention.output.dropout": nn.Dropout,
        "attention.output.LayerNorm": nn.LayerNorm,
        "intermediate": getattr(modeling, f"{prefix}Intermediate"),
        "intermediate.dense": None,
        "intermediate.intermediate_act_fn": None,
        "output": getattr(modeling, f"{prefix}Output"),
        "output.dense": None,
        "output.dropout": nn.Dropout,
        "output.LayerNorm": nn.LayerNorm,
    }
    paths = list(classes)
    parts = []
    for path, expected in classes.items():
        parent, _, name = path.rpartition(".")
        parts.append(Part(path, paths.index(parent) if parent else -1, name, expected))
    return tuple(parts)


class FusedLayer:
    """Mixin in front of transformers' layer class; given a :class:`Packing` for a mask it does the work of packed rows fused."""

    expected_parts: tuple[Part, ...]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | Packing | None = None, *args, read: Tensor | None = None, **kwargs
    ) -> Tensor:
        """``read``: see :meth:`op_by_op`; of a layer that has no :func:`layer_notes`, on packed rows."""
        if not isinstance(attention_mask, Packing):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        packing = attention_mask
        if hidden_states.dim() == 3:
            return packing.to_sequences(self._fused(packing.from_sequences(hidden_states), packing))
        return self._fused(hidden_states, packing, read)

    def on_packed_rows(self, rows: Tensor, packing: Packing) -> Tensor:
        """A call of this layer on (total, hidden); who watches it sees padded (batch, length, hidden), as in transformers."""
        if has_own_forward(self) or (has_hooks(self) and _hooks_see_arguments(self)):
            # They know the arguments that transformers gives a layer; whoever replaced forward may have kept transformers' own.
            mask = _padding_mask(self, rows, packing)
            padded = self(packing.to_sequences(rows), mask, None, encoder_attention_mask=None, **{CACHE: None})
            return packing.from_sequences(padded)
        if has_hooks(self):
            return packing.from_sequences(self(packing.to_sequences(rows), packing))
        return self(rows, packing)

    def _fused(self, hidden_states: Tensor, packing: Packing, read: Tensor | None = None) -> Tensor:
        if read is not None:
            drop_if_trained(self, hidden_states)
            return self.op_by_op(hidden_states, packing, read)
        packed = packed_again(self, hidden_states)
        if packed is None:
            if layer_fallback_reasons(self):
                if not torch.compiler.is_compiling():
                    forget(self)
                mask = _padding_mask(self, hidden_states, packing)
                return packing.from_sequences(super().forward(packing.to_sequences(hidden_states), mask))
            packed = packed_layer(self, hidden_states)
        if packed is not None:
            return run_layers(packed, hidden_states, packing.cu_seqlens)
        return self.op_by_op(hidden_states, packing)

    def op_by_op(self, hidden_states: Tensor, packing: Packing, read: Tensor | None = None) -> Tensor:
        """The fused layer on (total, hidden), with derivatives and dropout.

        read: (n,) int64, the rows that somebody reads; the result is theirs, (n, hidden), of a layer that has no
        :func:`layer_notes`. On a CPU they alone have queries; elsewhere attention computes all rows, and what comes behind it
        these. Behind attention their dropout masks go by their position in ``read``.
        """
        index = (self.attention.self.layer_idx or 0) if packing.layer_index is None else packing.layer_index
        first_stream = index * STREAMS_PER_LAYER
        if read is None and (done := self._as_one_node(hidden_states, packing, first_stream)) is not None:
            return done
        if read is None:
            context = _self_attention(self.attention.self, hidden_states, packing, first_stream)
        else:
            context, hidden_states = _self_attention_of(self.attention.self, hidden_states, packing, read, first_stream)
        hidden_states = _output(self.attention.output, context, hidden_states, packing, first_stream + 1)
        in_half = not is_last_layer(self)
        return _feed_forward(self.intermediate, self.output, hidden_states, packing, first_stream + 2, in_half)

    def _as_one_node(self, hidden_states: Tensor, packing: Packing, first_stream: int) -> Tensor | None:
        """The whole layer as ``trained_layer`` has it, None where that does not take it."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        ends = self.attention.output.dropout, self.output.dropout
        rates = active_attention_dropout_p(self.attention.self), *map(active_dropout_p, ends)
        dropouts = [packing.dropout_of(p, first_stream + i) for i, p in enumerate(rates)]
        arguments = tuple((dropout["dropout_p"], dropout["seed"], dropout["stream"]) for dropout in dropouts)
        done = trained_layer(self, hidden_states, take_half, packing, arguments)
        return None if done is None else with_half(*done) if done[1] is not None else done[0]


@replaces(hf.BertLayer)
class BertLayer(FusedLayer, hf.BertLayer):
    """transformers' BertLayer; see :class:`FusedLayer`."""

    expected_parts = expected_parts(hf, "Bert")


def _hooks_see_arguments(layer: nn.Module) -> bool:
    """Whether hooks may change what a layer is called with, look at its keyword arguments, or get a gradient for each argument."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks_with_kwargs or layer._backward_hooks)


def _padding_mask(layer: nn.Module, rows: Tensor, packing: Packing) -> Tensor | None:
    """The mask that transformers' attention takes, in the form that the configured attention implementation wants."""
    embeds = rows.new_empty(1).expand(*packing.padded_shape, rows.shape[-1])
    return create_bidirectional_mask(layer.attention.self.config, inputs_embeds=embeds, attention_mask=packing.padding_mask)


def _self_attention(module: nn.Module, hidden_states: Tensor, packing: Packing, stream: int) -> Tensor:
    qkv = _project_qkv(module, hidden_states).view(-1, 3, module.num_attention_heads, module.attention_head_size)
    dropout = packing.dropout_of(active_attention_dropout_p(module), stream)
    return attention(qkv, packing.cu_seqlens, packing.max_seqlen, softmax_scale=module.scaling, **dropout).flatten(1)


def _self_attention_of(
    module: nn.Module, hidden_states: Tensor, packing: Packing, read: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """The context of the rows ``read``, and these rows."""
    if read.device.type != "cpu":
        context = _self_attention(module, hidden_states, packing, stream)
        return context.index_select(0, read), hidden_states.index_select(0, read)
    heads = module.num_attention_heads, module.attention_head_size
    linears = (module.query, module.key, module.value)
    sorted_rows, order = read.long().sort()
    rows = hidden_states.index_select(0, sorted_rows)
    q = linear(rows, module.query.weight, module.query.bias).view(-1, *heads)
    kv = _project_plain(linears, hidden_states, 1).view(-1, 2, *heads)
    dropout = packing.dropout_of(active_attention_dropout_p(module), stream)
    context = attention_of_rows(
        q, kv, sorted_rows, packing.cu_seqlens, packing.max_seqlen, softmax_scale=module.scaling, **dropout
    ).flatten(1)
    places = order.argsort()
    return context.index_select(0, places), rows.index_select(0, places)


def _output(module: nn.Module, x: Tensor, residual: Tensor, packing: Packing, stream: int, in_half: bool = True) -> Tensor:
    """BertSelfOutput and BertOutput: Linear, dropout, residual and LayerNorm."""
    dense = module.dense
    if is_plain_linear(dense):
        return _add_layer_norm(module, linear(x, dense.weight, None), dense.bias, residual, packing, stream, in_half)
    return _add_layer_norm(module, dense(x), None, residual, packing, stream, in_half)


def _feed_forward(intermediate: nn.Module, output: nn.Module, x: Tensor, packing: Packing, stream: int, in_half: bool) -> Tensor:
    """BertIntermediate and BertOutput."""
    first, activation, second = intermediate.dense, intermediate.intermediate_act_fn, output.dense
    if is_plain_linear(first) and is_exact_gelu(activation) and is_plain_linear(second):
        y = feed_forward(_for_matmul(x), first.weight, first.bias, second.weight)
        return _add_layer_norm(output, y, second.bias, x, packing, stream, in_half)
    return _output(output, _intermediate(intermediate, x), x, packing, stream, in_half)


def _add_layer_norm(
    module: nn.Module, x: Tensor, bias: Tensor | None, residual: Tensor, packing: Packing, stream: int, in_half: bool
) -> Tensor:
    """The end of BertSelfOutput and BertOutput, behind the Linear; in_half: see ``trained_layer.is_last_layer``."""
    norm, dropout = module.LayerNorm, packing.dropout_of(active_dropout_p(module.dropout), stream)
    parameters = bias, residual, norm.weight, norm.bias, norm.eps
    # Under autocast Linears give half precision, and transformers adds that to hidden states which stay float32 through all layers.
    if in_half and residual.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16):
        half, y = add_layer_norm_mixed(x, *parameters, **dropout)
        return with_half(y, half)
    return add_layer_norm(x.to(torch.promote_types(x.dtype, residual.dtype)), *parameters, **dropout)


def with_half(y: Tensor, half: Tensor) -> Tensor:
    """``y`` itself, of which :func:`take_half` then knows what it is in half precision."""
    if not (torch.compiler.is_compiling() or y.is_inference()):  # a tensor of inference mode does not tell when it is changed
        y._fastbert_half = half, y._version, y.grad_fn
    return y


def take_half(x: Tensor) -> Tensor | None:
    """``x`` in half precision as the op that made it wrote that, too, once: it is forgotten then, as is memory for it.

    None where there is none, or where it is not what ``x`` is any more: somebody has changed ``x`` since, taken it out of
    autograd's graph, or, as checkpointing does it, put it there.
    """
    if torch.compiler.is_compiling() or "_fastbert_half" not in x.__dict__:
        return None
    half, version, grad_fn = x.__dict__.pop("_fastbert_half")
    if version != x._version or grad_fn is not x.grad_fn or not under_autocast(x):
        return None
    return half if half.dtype == torch.get_autocast_dtype(x.device.type) else None


def _for_matmul(x: Tensor) -> Tensor:
    """For a Linear that is read instead of called; a module of somebody else gets what transformers gives it."""
    half = take_half(x)
    return x if half is None else half


def _intermediate(module: nn.Module, x: Tensor) -> Tensor:
    """BertIntermediate: Linear and activation."""
    dense, activation = module.dense, module.intermediate_act_fn
    if is_plain_linear(dense) and is_exact_gelu(activation):
        return linear_gelu(x, dense.weight, dense.bias)
    if is_int8_linear(dense) and is_exact_gelu(activation):
        return int8_linear(x, dense.matrix, dense.weight_scale, dense.bias, activation="gelu")
    return activation(dense(x))


def active_dropout_p(dropout: nn.Dropout) -> float:
    """The probability that this module drops with in its present mode."""
    return dropout.p if dropout.training else 0.0


def active_attention_dropout_p(self_attention: nn.Module) -> float:
    """The probability that attention drops with: its own mode decides, as in transformers, not that of its nn.Dropout."""
    return self_attention.dropout.p if self_attention.training else 0.0


# --- what may be fused ---------------------------------------------------------------------------------------------------


def layer_fallback_reasons(layer: nn.Module) -> list[str]:
    """Why this layer has to run transformers' own forward, on padded rows; empty where it runs fused."""
    reasons = []
    if base_was_changed(type(layer)):
        reasons.append("the forward of transformers' class was replaced")
    if layer.chunk_size_feed_forward:
        reasons.append(f"chunk_size_feed_forward is {layer.chunk_size_feed_forward}")
    modules = []
    for part in layer.expected_parts:
        parent = layer if part.parent < 0 else modules[part.parent]
        module = parent._modules.get(part.name)
        modules.append(module)
        expected = part.expected
        if module is None or (expected is not None and type(module) is not expected):
            reasons.append(f"{part.path} is {type(module).__module__}.{type(module).__qualname__}")
            return reasons  # what it is made of is not known
        if has_hooks(module) or (expected is None and module._modules and any(map(has_hooks, module.modules()))):
            reasons.append(f"{part.path} has hooks")
        elif expected is not None and has_own_forward(module):
            reasons.append(f"{part.path} has another forward than its class")
        elif expected is not None and class_was_changed(module):
            reasons.append(f"{part.path} has a class whose forward was replaced, {expected.__module__}.{expected.__qualname__}")
        elif expected is nn.LayerNorm and not has_plain_parameters(module):
            reasons.append(f"{part.path} has no weight or no bias, or they are more than parameters")
    return reasons


def layer_notes(layer: nn.Module) -> list[str]:
    """What runs slower than it could in this layer, and why; empty for a fully fused one."""
    if has_own_forward(layer):
        return ["its forward was replaced on the instance: called on padded rows"]
    reasons = layer_fallback_reasons(layer)
    if reasons:
        return [f"the whole layer runs transformers' forward on padded rows: {'; '.join(reasons)}"]
    notes = []
    if has_hooks(layer):
        if _hooks_see_arguments(layer):
            return ["has hooks that see its arguments: transformers' forward on padded rows"]
        notes.append("has hooks, which are shown padded rows")
    attention_module = layer.attention.self
    projections = {name: getattr(attention_module, name) for name in ("query", "key", "value")}
    changed = [_what_is(name, module) for name, module in projections.items() if not is_plain_linear(module)]
    if changed and not all(map(is_int8_linear, projections.values())):
        notes.append(f"query, key and value are called one by one: {', '.join(changed)}")
    dense, activation = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
    if not (is_plain_linear(dense) or is_int8_linear(dense)):
        notes.append(f"intermediate's Linear and activation run one by one: {_what_is('dense', dense)}")
    elif not is_exact_gelu(activation):
        notes.append(f"intermediate's Linear and activation run one by one: {_what_is('the activation', activation)}, no erf-GELU")
    for name, module in (("attention.output", layer.attention.output), ("output", layer.output)):
        if not (is_plain_linear(module.dense) or is_int8_linear(module.dense)):
            notes.append(f"{name}.dense is called as a module, its bias is not fused: {_what_is('it', module.dense)}")
    return notes


def int8_parts(layer: nn.Module) -> list[str]:
    """The layer's Linears that multiply int8."""
    return [name for name, module in layer.named_modules() if isinstance(module, Int8Linear)]


def _what_is(name: str, module: nn.Module) -> str:
    if has_own_forward(module):
        return f"{name} has another forward than its class"
    if type(module) is nn.Linear:
        if class_was_changed(module):
            return f"{name} is a torch.nn.Linear, whose forward was replaced"
        return f"{name} has a weight of type {type(module.weight).__module__}.{type(module.weight).__qualname__}"
    return f"{name} is {type(module).__module__}.{type(module).__qualname__}"


# --- query, key and value in one GEMM ------------------------------------------------------------------------------------


def _project_qkv(module: nn.Module, x: Tensor) -> Tensor:
    """(total, 3 * hidden): queries, keys and values side by side."""
    linears = (module.query, module.key, module.value)
    if all(is_int8_linear(linear) for linear in linears):
        return int8_linear(x, *_joined_int8(linears))
    if not all(is_plain_linear(linear) for linear in linears):
        return torch.cat([linear(x) for linear in linears], dim=-1)
    return _project_plain(linears, x, 0)


def _project_plain(linears: tuple[nn.Linear, nn.Linear, nn.Linear], x: Tensor, first: int) -> Tensor:
    """(total, n * hidden): what the last n of queries, keys and values are, from index ``first`` on, of plain Linears."""
    x = _for_matmul(x)
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    views_help = not torch.compiler.is_compiling() and (under_autocast(x) or x.dtype == weights[0].dtype)
    if views_help and are_adjacent(weights, biases):
        return _QKVLinear.apply(first, x, *weights, *biases)
    weights, biases = weights[first:], biases[first:]
    if all(bias is None for bias in biases):
        return linear(x, cat_of_any(weights), None)
    zeros = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return linear(x, cat_of_any(weights), cat_of_any(zeros))


def _joined_int8(linears: tuple[Int8Linear, Int8Linear, Int8Linear]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(matrix, weight_scale, bias) of queries, keys and values side by side, without a copy where they are neighbours."""
    groups = [[linear._buffers[name] for linear in linears] for name in ("weight", "weight_scale", "bias")]
    if torch.compiler.is_compiling() or not are_adjacent(*groups, kind=Tensor):
        return join(linears)
    weight, weight_scale, bias = map(joined, groups)
    return weight.squeeze(-1), weight_scale, bias


class _QKVLinear(torch.autograd.Function):
    """x [Wq; Wk; Wv]^T + [bq; bk; bv], without the first few of the three, for parameters that are adjacent parts of one buffer:
    one GEMM in each direction."""

    @staticmethod
    def forward(ctx, first, x, query, key, value, query_bias, key_bias, value_bias):
        weight, bias = joined((query, key, value)), joined((query_bias, key_bias, value_bias))
        ctx.first, hidden = first, query.shape[0]
        weight, bias = weight[first * hidden :], bias[first * hidden :]
        if under_autocast(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
            ctx.save_for_backward(x, weight)
        else:
            ctx.save_for_backward(x, query, key, value)
        with torch.autocast(x.device.type, enabled=False):
            return linear_forward(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        refuse_batched_gradients(dy)
        dy = contiguous_grad(dy)
        x, *weights = ctx.saved_tensors
        count = 3 - ctx.first
        needs_x, needs_weights, needs_biases = ctx.needs_input_grad[1], ctx.needs_input_grad[2:5], ctx.needs_input_grad[5:]
        weight = weights[0] if len(weights) == 1 else joined(weights)[ctx.first * len(weights[0]) :]
        # Autograd converts gradients to the dtype of what they belong to.
        dx = linear_dx(dy, weight) if needs_x else None
        needed = (any(needs[ctx.first :]) for needs in (needs_weights, needs_biases))
        gradients = linear_parameter_gradients(dy, x, *needed)
        parts = ((None,) * count if gradient is None else gradient.chunk(count) for gradient in gradients)
        left_out = (None,) * ctx.first
        return None, dx, *(part for group in parts for part in (*left_out, *group))
