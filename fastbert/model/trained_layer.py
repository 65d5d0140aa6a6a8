"""The encoder layer in training as one node of autograd's graph: its ops' kernels, forward and backward, one after the other.

Op by op (``FusedLayer.op_by_op``) a layer is eight operators, each with its node, its way through the dispatcher and its checks,
which on few rows, and on a fast GPU on many, take longer than the work. Here are the same kernels in the same order, which give the
same bits, with one node for all; :func:`trained_layer` says None where something in the layer or in the call is not plain, and that
goes op by op.

    qkv = x [Wq Wk Wv]          attention (dropout inside)      y1 = add_layer_norm(. Wo + bo, x)
    gelu(y1 W1 + b1)                                            y2 = add_layer_norm(. W2 + b2, y1)

Under autocast matmuls have half precision and hidden states are float32 from layer to layer, as in transformers. The layer then
takes and gives both (``take_half``), because the kernels that end its halves write both.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import backends, cuda
from ..ops.add_layer_norm import has_mixed_kernel
from ..ops.attention import check_sequences
from ..ops.backends import implementation_for
from ..ops.linear import linear_dweight, linear_dx, linear_forward, linear_parameter_gradients
from ..ops.registration import (
    contiguous_grad,
    dispatch_mode_is_on,
    once_only,
    refuse_batched_gradients,
    transform_reasons,
    under_autocast,
)
from .adjacent import are_adjacent, joined
from .packing import Packing
from .plain import has_plain_parameters, is_exact_gelu, is_plain_linear

_HALVES = (torch.bfloat16, torch.float16)
# dropout_p, seed and stream, as the kernels take them: one seed for all, or None without dropout.
Dropout = tuple[float, Tensor | None, int]


class Call(NamedTuple):
    """What a layer's kernels need beside tensors with gradients. dtype: that of matmuls under autocast, else None; is_last: of the
    encoder's layers."""

    max_seqlen: int
    num_heads: int
    softmax_scale: float
    eps: tuple[float, float]
    dropouts: tuple[tuple[float, int], ...]  # probability and stream, of attention and of the halves' ends
    dtype: torch.dtype | None
    is_last: bool

    @property
    def gradient_dtype(self) -> torch.dtype | None:
        """That of the parameters' gradients where the kernels' own is not it: under autocast."""
        return None if self.dtype is None else torch.float32

    def dropouts_with(self, seed: Tensor | None) -> list[Dropout]:
        return [(p, seed if p > 0.0 else None, stream) for p, stream in self.dropouts]


class Ended(NamedTuple):
    """A half's end: y, under autocast y in half precision too, and what its backward pass reads."""

    y: Tensor
    half: Tensor | None
    z: Tensor
    mean: Tensor
    rstd: Tensor


def trained_layer(
    layer: Any,
    x: Tensor,
    take_half: Callable[[Tensor], Tensor | None],
    packing: Packing,
    dropouts: tuple[Dropout, Dropout, Dropout],
) -> tuple[Tensor, Tensor | None] | None:
    """The layer's output for ``x`` (total, hidden), and that in half precision under autocast; None where it has to go op by op.
    To be asked where gradients are enabled and nothing is compiled.

    take_half: gives x in half precision where somebody has it.
    """
    if type(x) is not Tensor or x.shape[0] == 0:
        return None
    if op_by_op_reasons(layer) or dispatch_mode_is_on() or transform_reasons():
        return None
    self_attention = layer.attention.self
    qkv = self_attention.query, self_attention.key, self_attention.value
    project, first, second = layer.attention.output.dense, layer.intermediate.dense, layer.output.dense
    norms = layer.attention.output.LayerNorm, layer.output.LayerNorm
    parameters = (
        *(linear.weight for linear in qkv), *(linear.bias for linear in qkv), project.weight, project.bias, norms[0].weight,
        norms[0].bias, first.weight, first.bias, second.weight, second.bias, norms[1].weight, norms[1].bias,
    )  # fmt: skip
    if any(p.dtype != x.dtype or p.device != x.device or not p.is_contiguous() for p in parameters):
        return None
    hidden, wide = x.shape[1], first.weight.shape[0]
    square, row = (hidden, hidden), (hidden,)
    shapes = (square, square, square, row, row, row, square, row, row, row, (wide, hidden), (wide,), (hidden, wide), row, row, row)
    if tuple(p.shape for p in parameters) != shapes:  # op by op says what is wrong
        return None
    if not (x.requires_grad or any(p.requires_grad for p in parameters)):
        return None
    dtype = torch.get_autocast_dtype(x.device.type) if under_autocast(x) else None
    if dtype is not None and not (x.dtype == torch.float32 and dtype in _HALVES):
        return None
    if not are_adjacent([linear.weight for linear in qkv], [linear.bias for linear in qkv]):
        return None
    if x.device.type == "cpu":
        check_sequences(packing.cu_seqlens, packing.max_seqlen, x.shape[0])
    eps, rates = (norms[0].eps, norms[1].eps), tuple((p, stream) for p, _, stream in dropouts)
    heads, scale = self_attention.num_attention_heads, self_attention.scaling
    call = Call(packing.max_seqlen, heads, scale, eps, rates, dtype, is_last_layer(layer))
    seed = next((seed for _, seed, _ in dropouts if seed is not None), None)
    half = None if dtype is None else take_half(x)
    in_half = packing.take_in_half(layer, dtype)
    return _TrainedLayer.apply(call, packing.cu_seqlens.contiguous(), seed, in_half, x.contiguous(), half, *parameters)


def op_by_op_reasons(layer: Any) -> list[str]:
    """What in a layer of the expected parts is not plain, so that its training goes op by op; empty where nothing is."""
    attention = layer.attention
    linears = {
        "attention.self.query": attention.self.query,
        "attention.self.key": attention.self.key,
        "attention.self.value": attention.self.value,
        "attention.output.dense": attention.output.dense,
        "intermediate.dense": layer.intermediate.dense,
        "output.dense": layer.output.dense,
    }
    reasons = []
    for name, linear in linears.items():
        if not is_plain_linear(linear):
            reasons.append(f"{name} is more than a Linear")
        elif linear.bias is None:
            reasons.append(f"{name} has no bias")
    if not is_exact_gelu(layer.intermediate.intermediate_act_fn):
        reasons.append("the activation is not the erf-GELU")
    for name, norm in (("attention.output", attention.output.LayerNorm), ("output", layer.output.LayerNorm)):
        if not has_plain_parameters(norm):
            reasons.append(f"{name}.LayerNorm has parameters that are none, or more than parameters")
    return reasons


class _TrainedLayer(torch.autograd.Function):
    """See the module; ``half`` and ``in_half``, of the matmuls' parameters, are made here where they are None under autocast."""

    @staticmethod
    def forward(
        ctx,
        call: Call,
        cu_seqlens: Tensor,
        seed: Tensor | None,
        in_half: tuple[Tensor, ...] | None,
        x: Tensor,
        half: Tensor | None,
        *parameters: Tensor,
    ):
        qkv_weights, qkv_biases = parameters[:3], parameters[3:6]
        wo, bo, weight1, ln_bias1, w1, b1, w2, b2, weight2, ln_bias2 = parameters[6:]
        wqkv, bqkv = joined(qkv_weights), joined(qkv_biases)
        ctx.call, ctx.has_half, dropouts = call, half is not None, call.dropouts_with(seed)
        if call.dtype is not None:
            wqkv, bqkv, wo, w1, b1, w2 = in_half or (t.to(call.dtype) for t in (wqkv, bqkv, wo, w1, b1, w2))
            x16 = x.to(call.dtype) if half is None else half
            qkv_weights = [wqkv]
        else:
            x16 = x
        with torch.autocast(x.device.type, enabled=False):
            qkv = linear_forward(x16, wqkv, bqkv).view(len(x), 3, call.num_heads, -1)
            context, lse, bits = _attention(call, qkv, cu_seqlens, dropouts[0])
            a = linear_forward(context.view(len(x), -1), wo, None)
            ended1 = _end(a, bo, x, weight1, ln_bias1, call.eps[0], dropouts[1])
            h = ended1.y if call.dtype is None else ended1.half
            f, *wide = _feed_forward(h, w1, b1, w2)
            ended2 = _end(f, b2, ended1.y, weight2, ln_bias2, call.eps[1], dropouts[2], in_half=not call.is_last)
        ctx.num_weights = len(qkv_weights)
        statistics = (ended1.z, ended1.mean, ended1.rstd, ended2.z, ended2.mean, ended2.rstd)
        ctx.save_for_backward(
            cu_seqlens, seed, x16, qkv, context, lse, bits, h, *statistics, wo, w1, b1, w2, weight1, weight2, *qkv_weights, *wide
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return ended2.y, ended2.half

    @staticmethod
    def backward(ctx, dy: Tensor | None, dhalf: Tensor | None):
        refuse_batched_gradients(dy, dhalf)
        with torch.no_grad():
            gradients = _TrainedLayer.gradients(ctx, dy, dhalf)
        if torch.is_grad_enabled():
            gradients = once_only("fastbert::trained_layer_backward", gradients)
        return None, None, None, None, *gradients

    @staticmethod
    def gradients(ctx, dy: Tensor | None, dhalf: Tensor | None) -> list[Tensor | None]:
        """Of the inputs that can have one: x, half and the parameters."""
        needs, call = ctx.needs_input_grad[4:], ctx.call
        if dy is None and dhalf is None:
            return [None] * len(needs)
        cu_seqlens, seed, x16, qkv, context, lse, bits, h, z1, mean1, rstd1, z2, mean2, rstd2, *others = ctx.saved_tensors
        wo, w1, b1, w2, weight1, weight2, *others = others
        dropouts = call.dropouts_with(seed)
        wqkv, wide = joined(others[: ctx.num_weights]), others[ctx.num_weights :]
        (
            needs_x, needs_half, needs_query, needs_key, needs_value, needs_qb, needs_kb, needs_vb, needs_wo, _, _, _, needs_w1,
            needs_b1, needs_w2, *_,
        ) = needs  # fmt: skip
        with torch.autocast(x16.device.type, enabled=False):
            df, dy1, dweight2, dln_bias2, db2 = _end_backward(dy, dhalf, z2, mean2, rstd2, weight2, dropouts[2], call.dtype)
            wanted = [True, needs_w1, needs_b1, needs_w2]
            dh, dw1, db1, dw2 = _feed_forward_backward(df, h, w1, b1, w2, wide, wanted, call.gradient_dtype)
            if call.dtype is None:
                dy1, dh = dy1.add_(dh), None
            da, dx, dweight1, dln_bias1, dbo = _end_backward(dy1, dh, z1, mean1, rstd1, weight1, dropouts[1], call.dtype)
            dwo = linear_dweight(da, context.view(da.shape), call.gradient_dtype) if needs_wo else None
            dx16, dwqkv, dbqkv = None, None, None
            if needs_x or any(needs[1:8]):
                dcontext = linear_dx(da, wo).view(context.shape)
                dqkv = _attention_backward(call, dcontext, qkv, context, lse, cu_seqlens, dropouts[0], bits).view(len(x16), -1)
                dx16 = linear_dx(dqkv, wqkv) if needs_x or needs_half else None
                dwqkv, dbqkv = linear_parameter_gradients(
                    dqkv, x16, needs_query or needs_key or needs_value, needs_qb or needs_kb or needs_vb, call.gradient_dtype
                )
            dwqkv, dbqkv = ((None,) * 3 if gradient is None else gradient.chunk(3) for gradient in (dwqkv, dbqkv))
        if dx16 is not None and not ctx.has_half:
            dx, dx16 = dx.add_(dx16), None
        # Autograd converts gradients to the dtype of what they belong to, where they do not have it.
        found = (
            dx, dx16, *dwqkv, *dbqkv, dwo, dbo, dweight1, dln_bias1, dw1, db1, dw2, db2, dweight2, dln_bias2,
        )  # fmt: skip
        return [gradient if needed else None for gradient, needed in zip(found, needs, strict=True)]


def _attention(call: Call, qkv: Tensor, cu_seqlens: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result, lse, and the bits that dropout drew, where CUDA C++ has both directions and its backward pass reads them."""
    module = _attention_module(call, qkv, "forward")
    arguments = qkv, cu_seqlens, call.max_seqlen, call.softmax_scale, *dropout
    if module is cuda and _attention_module(call, qkv, "backward") is cuda:
        return cuda.attention_forward_and_bits(*arguments)
    return *module.attention_forward(*arguments), None


def _attention_backward(
    call: Call,
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    dropout: Dropout,
    bits: Tensor | None,
) -> Tensor:
    arguments = dout, qkv, out, lse, cu_seqlens, call.max_seqlen, call.softmax_scale, *dropout
    if bits is not None:
        return cuda.attention_backward(*arguments, bits)
    return _attention_module(call, qkv, "backward").attention_backward(*arguments)


def _attention_module(call: Call, qkv: Tensor, direction: str) -> ModuleType:
    sizes = {"rows": len(qkv), "head_dim": qkv.shape[-1], "max_seqlen": call.max_seqlen}
    return implementation_for("attention", "auto", qkv, direction, **sizes)


def is_last_layer(layer: Any) -> bool:
    """Whether the layer is the last one of its model's encoder, whose z is kept in float32 under autocast.

    Of what a loss makes of hidden states, LayerNorm's backward pass can leave next to nothing (of the sum of y^2 nothing at all):
    after a z rounded to bfloat16 gradients were up to 3.2 times as far from the truth as transformers'. Other layers' z may be
    rounded: 1.0 times.
    """
    attention = layer.attention.self
    return attention.layer_idx == attention.config.num_hidden_layers - 1


def _end(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout: Dropout,
    in_half: bool = True,
) -> Ended:
    """``add_layer_norm``, or ``add_layer_norm_mixed`` where the residual has another dtype than x; in_half: whether z may be kept
    in x's."""
    mixed = x.dtype != residual.dtype
    if mixed and in_half and has_mixed_kernel(x):
        module = implementation_for("add_layer_norm_mixed", "auto", x, "forward")
        half, y, *kept = module.add_layer_norm_mixed_forward(x, bias, residual, weight, ln_bias, eps, *dropout)
        return Ended(y, half, *kept)
    rows = x.to(residual.dtype)
    module = implementation_for("add_layer_norm", "auto", rows, "forward", rows=len(rows), hidden=rows.shape[1])
    y, *kept = module.add_layer_norm_forward(rows, bias, residual, weight, ln_bias, eps, *dropout)
    return Ended(y, y.to(x.dtype) if mixed else None, *kept)


def _end_backward(
    dy: Tensor | None,
    dhalf: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dropout: Dropout,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight, dln_bias, dbias) of :func:`_end`, of whose results one may have no gradient; dtype: that of x under
    autocast. Without that dx may be dresidual itself."""
    dy, dhalf = (None if gradient is None else contiguous_grad(gradient) for gradient in (dy, dhalf))
    if z.dtype == dtype:
        module = implementation_for("add_layer_norm_mixed", "auto", z, "backward")
        return module.add_layer_norm_mixed_backward(dhalf, dy, z, mean, rstd, weight, True, *dropout)
    total = dy if dhalf is None else dhalf.to(z.dtype) if dy is None else dy + dhalf
    module = implementation_for("add_layer_norm", "auto", z, "backward", rows=len(z), hidden=z.shape[1])
    dx, dresidual, *gradients = module.add_layer_norm_backward(total, z, mean, rstd, weight, True, *dropout)
    dx = dresidual if dx is None else dx
    return dx if dtype is None else dx.to(dtype), dresidual, *gradients


def _feed_forward(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor) -> tuple[Tensor, ...]:
    """gelu(x weight^T + bias) out_weight^T and what of it is kept: the pre-activation without its bias, and where the backward pass
    does not make that again, gelu's result."""
    name = backends.choose("linear_gelu", "auto", x.device, x.dtype, "forward")
    y, u = backends.implementation("linear_gelu", name).linear_gelu_forward(x, weight, bias, True)
    f = linear_forward(y, out_weight, None)
    return (f, u) if name == "native" else (f, u, y)


def _feed_forward_backward(
    df: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    kept: list[Tensor],
    needs: list[bool],
    dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and out_weight; ``needs``: which are wanted; dtype: of the parameters', where it is not that
    of the parameters here."""
    module = implementation_for("linear_gelu", "auto", x, "backward")
    if len(kept) == 1:
        return module.feed_forward_backward(df, x, weight, bias, kept[0], out_weight, needs, dtype)
    u, y = kept
    dout_weight = linear_dweight(df, y, dtype) if needs[3] else None
    du, dbias = module.bias_gelu_backward(linear_dx(df, out_weight), u, bias, dtype or bias.dtype)
    return linear_dx(du, weight), linear_dweight(du, x, dtype) if needs[1] else None, dbias, dout_weight
