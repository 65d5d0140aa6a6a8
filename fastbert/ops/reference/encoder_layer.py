"""A whole encoder layer, for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from .add_layer_norm import add_layer_norm_forward
from .attention import attention_forward
from .int8_linear import int8_linear_forward

if TYPE_CHECKING:
    from ..encoder_layer import EncoderLayerWeights, LayerNormWeights, LinearWeights


def encoder_layer_forward(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights: EncoderLayerWeights) -> Tensor:
    """The ops above, one after the other: attention, its output's linear layer and LayerNorm, the feed-forward network.

    x: (total, hidden), cu_seqlens (batch + 1,) int32; weights: see :class:`fastbert.ops.encoder_layer.EncoderLayerWeights`. Returns
    (total, hidden).
    """

    def linear(rows: Tensor, layer: LinearWeights) -> Tensor:
        if layer.scale is not None:
            return int8_linear_forward(rows, layer.weight, layer.scale, layer.bias, "none")
        return F.linear(rows.to(layer.weight.dtype), layer.weight, layer.bias)

    def add_norm(rows: Tensor, residual: Tensor, norm: LayerNormWeights) -> Tensor:
        return add_layer_norm_forward(rows.to(residual.dtype), None, residual, norm.weight, norm.bias, norm.eps)[0]

    qkv = linear(x, weights.qkv).view(-1, 3, weights.num_heads, weights.head_dim)
    context = attention_forward(qkv, cu_seqlens, max_seqlen, weights.softmax_scale)[0].flatten(1)
    h = add_norm(linear(context, weights.attention_output), x, weights.attention_norm)
    return add_norm(linear(F.gelu(linear(h, weights.intermediate)), weights.output), h, weights.output_norm)
