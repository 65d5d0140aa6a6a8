"""``Int8Linear``: what :func:`fastbert.quantize` puts in the place of a Linear. See :mod:`fastbert.ops.int8_linear`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import int8_linear
from ..ops.int8_linear import quantize_weight


class Int8Linear(nn.Module):
    """A Linear with int8 weights, for inference: x (..., in_features) -> (..., out_features) in x's dtype.

    Buffers: weight, (out_features, in_features, 1) int8; weight_scale, (out_features,) float32, the step of each channel; bias,
    (out_features,) float32, or None. They keep these dtypes whatever dtype the model is given.

    The weight's last dimension is for files: whoever wrote them, a model of plain Linears that would take the integers for its
    weights ends with an error. ``matrix`` is the weight as the arithmetic takes it.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, matrix: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.register_buffer("weight", matrix.unsqueeze(-1).data)  # no view, which the layer would not move
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """Rounds the weight of ``linear``; on the meta device that gives shapes and dtypes, to load a checkpoint into.

        Raises ValueError for weights that are not finite.
        """
        weight, bias = linear.weight.detach(), linear.bias
        if not (weight.is_meta or weight.isfinite().all()):
            raise ValueError("its weight holds inf or NaN")
        with torch.inference_mode(False), torch.no_grad():  # memory made in inference mode could not be moved by the layer
            return cls(*quantize_weight(weight), None if bias is None else bias.detach().float().clone())

    @property
    def matrix(self) -> Tensor:
        """(out_features, in_features) int8, a view."""
        return self.weight.squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError("an int8 Linear of fastbert cannot be exported to ONNX: export the model that it was made of")
        rows = int8_linear(x.reshape(-1, self.in_features), self.matrix, self.weight_scale, self.bias)
        return rows.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """What ``to``, ``bfloat16``, ``cuda`` and their like call: devices change, dtypes do not."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


def join(linears: list[Int8Linear]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(matrix, weight_scale, bias) of the Linear that gives the results of several, side by side."""
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        bias = None
    else:
        zeros = [torch.zeros_like(linear.weight_scale) if linear.bias is None else linear.bias for linear in linears]
        bias = torch.cat(zeros)
    return torch.cat([linear.matrix for linear in linears]), torch.cat([linear.weight_scale for linear in linears]), bias
