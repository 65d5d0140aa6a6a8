"""``encoder_layer``: a whole encoder layer on packed rows, for inference: one call instead of seven.

    h = LayerNorm(x + Wo attention(x Wqkv))        y = LayerNorm(h + W2 gelu(W1 h))

No dropout and no derivative. On CPUs the native backend packs the weights once, in the order that its matmul reads them, and
runs the layer on blocks of rows that stay in the caches. :class:`EncoderLayerWeights` is what a layer is made of, ``pack`` what a
backend makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .attention import check_cu_seqlens, check_sequences
from .native.encoder_layer import PackedEncoderLayer, PackedEncoderLayers, not_supported_reasons, run_layers
from .registration import check_devices, check_shape


class LinearWeights(NamedTuple):
    """weight (out_features, in_features), bias (out_features,) or None; scale (out_features,) float32 of an int8 weight's rows."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


class LayerNormWeights(NamedTuple):
    """weight and bias (hidden,)."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class EncoderLayerWeights:
    """qkv: hidden -> 3 * hidden (queries, keys, values); intermediate: hidden -> any width, output: back again."""

    qkv: LinearWeights
    attention_output: LinearWeights
    attention_norm: LayerNormWeights
    intermediate: LinearWeights
    output: LinearWeights
    output_norm: LayerNormWeights
    num_heads: int
    softmax_scale: float

    @property
    def hidden(self) -> int:
        return self.qkv.weight.shape[1]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    @property
    def dtype(self) -> torch.dtype:
        """That of the linear layers' weights: float32, bfloat16 or int8."""
        return self.qkv.weight.dtype

    def linears(self) -> Iterator[tuple[str, LinearWeights]]:
        for name in ("qkv", "attention_output", "intermediate", "output"):
            yield name, getattr(self, name)

    def tensors(self) -> Iterator[Tensor]:
        for _, part in (*self.linears(), *self.norms()):
            yield from (value for value in part if isinstance(value, Tensor))

    def norms(self) -> Iterator[tuple[str, LayerNormWeights]]:
        for name in ("attention_norm", "output_norm"):
            yield name, getattr(self, name)

    def with_linears(self, dtype: torch.dtype) -> EncoderLayerWeights:
        """The linear layers' weights converted; the LayerNorms stay as they are, as under autocast."""
        converted = {
            name: LinearWeights(linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))
            for name, linear in self.linears()
        }
        return replace(self, **converted)

    def check(self) -> None:
        """Raises ValueError where shapes or dtypes do not fit together."""
        hidden, wide = self.hidden, self.intermediate.weight.shape[0]
        if self.num_heads < 1 or hidden % self.num_heads:
            raise ValueError(f"hidden {hidden} is not divisible by num_heads {self.num_heads}")
        shapes = {"qkv": (3 * hidden, hidden), "attention_output": (hidden, hidden)}
        shapes |= {"intermediate": (wide, hidden), "output": (hidden, wide)}
        for name, linear in self.linears():
            check_shape(f"{name}.weight", linear.weight, shapes[name], "(out_features, in_features)")
            check_shape(f"{name}.bias", linear.bias, shapes[name][:1], "(out_features,)")
            check_shape(f"{name}.scale", linear.scale, shapes[name][:1], "(out_features,)")
            if linear.weight.dtype != self.dtype or (linear.scale is None) != (self.dtype != torch.int8):
                raise ValueError(
                    f"{name}.weight is {linear.weight.dtype} {'without' if linear.scale is None else 'with'} scale, qkv's is "
                    f"{self.dtype}: expected one dtype, and scales for int8 alone"
                )
        for name, norm in self.norms():
            check_shape(f"{name}.weight", norm.weight, (hidden,), "(hidden,)")
            check_shape(f"{name}.bias", norm.bias, (hidden,), "(hidden,)")


def encoder_layer(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights: EncoderLayerWeights, *, backend: str = "auto") -> Tensor:
    """One encoder layer (Vaswani et al., 2017, with the erf-GELU of Devlin et al., 2019) on a packed batch, without dropout.

    x: (total, hidden), of the weights' dtype, or float32 under weights of bfloat16 (as in autocast) and float32 or bfloat16 under
    int8: a linear layer then rounds its input to the weights' dtype; cu_seqlens: (batch + 1,) int32 from 0
    to total; max_seqlen: the longest sequence. backend: "auto", "native" (weights are packed for this call: keep what
    ``native.encoder_layer.PackedEncoderLayer`` makes of them for more than one) or "reference".

    Returns (total, hidden) in x's dtype. Raises ValueError for shapes and bounds that do not fit, RuntimeError for tensors on
    several devices and where an explicitly named backend cannot do it.
    """
    weights.check()
    check_shape("x", x, (*x.shape[:1], weights.hidden), "(total, hidden)")
    check_cu_seqlens(cu_seqlens)
    check_devices("encoder_layer", (x, cu_seqlens, *weights.tensors()))
    if x.device.type == "cpu":
        check_sequences(cu_seqlens, max_seqlen, x.shape[0])
    reasons = not_supported_reasons(weights, x.dtype, x.device.type)
    if backend == "native" and reasons:
        raise RuntimeError(f"backend 'native' cannot run encoder_layer: {'; '.join(reasons)}")
    if backend not in ("auto", "native", "reference"):
        raise ValueError(f"unknown backend {backend!r}; there are 'auto', 'native' and 'reference'")
    if backend == "reference" or reasons:
        return reference.encoder_layer_forward(x, cu_seqlens, max_seqlen, weights)
    packed = PackedEncoderLayers([PackedEncoderLayer(weights, x.dtype)])
    return run_layers(packed, x, cu_seqlens)
