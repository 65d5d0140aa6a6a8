"""``linear``: x W^T + b, and its three products by the faster of the matmul libraries that torch carries.

On CPUs torch sends float32 matmuls to MKL, which on AMD reaches 40% of what oneDNN does, and adds the bias in a pass of its own
before the matmul (x W^T + b takes up to 1.5 times the time of x W^T at BERT's small widths). oneDNN's linear, which torch
carries for its compiler, adds the bias as it stores, and computes the backward's two products too, once their operands are seen
transposed: as views, or as copies, which cost memory traffic and gain where rows are many. :mod:`.calibration` measures which of
these is the fastest for float32 and bfloat16; all of them multiply in the operands' dtype and add in float32. It has one of our
own to choose, too (``csrc/cpu/matmul.cpp``), which takes transposed operands at full speed: for float32, and for bfloat16 where
the CPU has its dot product. GPUs, compilers and other dtypes take torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends, calibration
from .registration import contiguous_grad, register, under_autocast

DTYPES = (torch.float32, torch.bfloat16)
_HALVES = (torch.bfloat16, torch.float16)
# Below FEW_ROWS a matmul is bound by reading (and packing) its weight. Less than MEASURED_FLOPS takes the first candidate:
# calls cost as much as their work there, and a model of that size must not wait for a measurement.
FEW_ROWS, MEASURED_FLOPS = 256, 1 << 24
# (rows, in_features, out_features) of the products that are timed.
_TIMED = {"few rows": (64, 768, 3072), "many rows": (2048, 768, 3072)}


@functools.cache
def onednn_unavailable_reason() -> str | None:
    """Why oneDNN's linear cannot be used, or None where it can."""
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch does not expose oneDNN's linear (mkldnn::_linear_pointwise)"
    return None


@functools.cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN's linear takes this dtype on this CPU: bfloat16 needs AVX-512, and fails elsewhere."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return dtype != torch.bfloat16 or (supported is not None and supported())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def _native() -> ModuleType:
    return backends.implementation("linear", "native")


# product -> name -> function.
_FORWARD: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "fastbert": lambda x, weight, bias: _native().matmul(x, weight.t(), bias),
    "onednn": _onednn,
    "torch": F.linear,
}
_DX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fastbert": lambda dy, weight: _native().matmul(dy, weight),
    "onednn": lambda dy, weight: _onednn(dy, weight.t()),
    "onednn on copies": lambda dy, weight: _onednn(dy, weight.t().contiguous()),
    "torch": torch.mm,
}
_DWEIGHT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fastbert": lambda dy, x: _native().matmul(dy.t(), x),
    "onednn": lambda dy, x: _onednn(dy.t(), x.t()),
    "onednn on copies": lambda dy, x: _onednn(dy.t().contiguous(), x.t().contiguous()),
    "torch": lambda dy, x: dy.t() @ x,
}
PRODUCTS = {"forward": _FORWARD, "dx": _DX, "dweight": _DWEIGHT}


def candidates(product: str, dtype: torch.dtype) -> Mapping[str, Callable[..., Tensor]]:
    """name -> function of those that this installation can choose from; the first one is taken where nothing is measured.

    That is our own in float32, whose results do not depend on the number of threads, and in bfloat16 torch's, which is oneDNN's.
    """
    return _usable(product, dtype, backends.unavailable_reason("native") is None and _native().multiplies(dtype))


@functools.cache
def _usable(product: str, dtype: torch.dtype, own: bool) -> Mapping[str, Callable[..., Tensor]]:
    there = {"fastbert": own, "torch": True}
    onednn = onednn_multiplies(dtype)
    usable = {name: function for name, function in PRODUCTS[product].items() if there.get(name, onednn)}
    return usable if dtype == torch.float32 else {"torch": usable["torch"], **usable}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, in_features), weight (out_features, in_features), bias (out_features,) or None -> (rows, out_features).

    Under autocast all of them are converted to its dtype, but for float64, as torch does.
    """
    if torch.compiler.is_compiling():  # it chooses its own matmul
        return F.linear(x, weight, bias)
    if x.device.type == "cpu" and under_autocast(x):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not is_ours(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.fastbert.linear(x, weight, bias)


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear` without autograd, for use inside other operators."""
    if not is_ours(x, weight):
        return F.linear(x, weight, bias)
    return _FORWARD[choice("forward", x.dtype, x.shape[0], weight.numel())](x, weight, bias)


def linear_forward_into(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in ``out`` or, where a library gives its results in memory of its own, there."""
    if is_ours(x, weight):
        name = choice("forward", x.dtype, x.shape[0], weight.numel())
        if name != "torch":
            return _native().matmul(x, weight.t(), out=out) if name == "fastbert" else _FORWARD[name](x, weight, None)
    return torch.mm(x, weight.t(), out=out)


def linear_gelu_without_gradients(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """gelu(x W^T + b) with the erf-GELU inside the matmul, or None where another library than oneDNN multiplies faster."""
    if not is_ours(x, weight) or choice("forward", x.dtype, x.shape[0], weight.numel()) != "onednn":
        return None
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x: dy W, (rows, in_features)."""
    if not is_ours(dy, weight):
        return dy @ weight
    return _DX[choice("dx", dy.dtype, dy.shape[0], weight.numel())](dy, weight)


def linear_dweight(dy: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of the weight: dy^T x, (out_features, in_features), in dy's dtype.

    dtype: torch.float32 where that of the weight is and dy's is not. A GPU and our own matmul store the sums as they are then,
    which saves their rounding and the pass that would convert them; with other libraries nothing changes.
    """
    return _dweight_by(_dweight_choice(dy, x), dy, x, dtype)


def _dweight_choice(dy: Tensor, x: Tensor) -> str:
    return choice("dweight", dy.dtype, dy.shape[0], dy.shape[1] * x.shape[1]) if is_ours(dy, x) else "torch"


def _dweight_by(name: str, dy: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype == torch.float32 and dy.dtype in _HALVES:
        if dy.device.type == "cuda":
            return torch.mm(dy.t(), x, out_dtype=dtype)
        if name == "fastbert":
            return _native().matmul(dy.t(), x, dtype=dtype)
    return _DWEIGHT[name](dy, x)


def linear_parameter_gradients(
    dy: Tensor, x: Tensor, needs_weight: bool, needs_bias: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`linear_dweight` and the gradient of the bias, the sums of dy's columns, (out_features,) in dy's dtype or float32."""
    name = _dweight_choice(dy, x) if needs_weight else None
    if name == "fastbert" and needs_bias:
        return _native().matmul_and_row_sums(dy.t(), x, dtype)
    return _dweight_by(name, dy, x, dtype) if needs_weight else None, dy.sum(0, dtype=dtype) if needs_bias else None


def linear_then_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """u = x W^T and gelu(u + bias) in one pass, or None where another library multiplies faster, or in bfloat16."""
    return _native().matmul_gelu(x, weight.t(), bias) if _takes_gelu_along("forward", x, weight) else None


def linear_dx_through_gelu(
    dy: Tensor, weight: Tensor, u: Tensor, bias: Tensor | None, gelu_wanted: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Where dy W is the gradient of gelu(u + bias): that of u, and if it is wanted gelu(u + bias), in one pass, or None where
    another library multiplies faster, or in bfloat16."""
    if not _takes_gelu_along("dx", dy, weight):
        return None
    return _native().matmul_gelu_gradient(dy, weight, u, bias, gelu_wanted)


def _takes_gelu_along(product: str, rows: Tensor, weight: Tensor) -> bool:
    ours = rows.dtype == torch.float32 and is_ours(rows, weight)
    return ours and choice(product, rows.dtype, rows.shape[0], weight.numel()) == "fastbert"


def linear_dweight_into(out: Tensor, dy: Tensor, x: Tensor) -> None:
    """:func:`linear_dweight` written to ``out``, which has contiguous rows."""
    name = _dweight_choice(dy, x)
    if name == "fastbert":
        _native().matmul(dy.t(), x, out=out)
    elif name == "torch":
        torch.mm(dy.t(), x, out=out)
    else:
        out.copy_(_DWEIGHT[name](dy, x))


def is_ours(a: Tensor, b: Tensor) -> bool:
    """Whether there is a choice for a product of these: on a CPU, of one dtype that oneDNN knows, and not empty."""
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype
        and a.dtype in DTYPES
        and a.numel() > 0
        and b.numel() > 0
        and torch.backends.mkldnn.enabled
        and onednn_unavailable_reason() is None
    )


def choice(product: str, dtype: torch.dtype, rows: int, weight_elements: int) -> str:
    """Which of the :func:`candidates` computes it: its name."""
    usable = candidates(product, dtype)
    if len(usable) == 1 or 2 * rows * weight_elements < MEASURED_FLOPS or not calibration.is_on():
        return next(iter(usable))
    size = "few rows" if rows < FEW_ROWS else "many rows"
    timed_rows, in_features, out_features = _TIMED[size]
    return calibration.fastest(
        f"{product}, {str(dtype).removeprefix('torch.')}, {size}",
        usable,
        lambda: _operands(product, dtype, timed_rows, in_features, out_features),
        2.0 * timed_rows * in_features * out_features,
        "fastbert",  # it has ends that save passes: GELU, its derivative, the bias' gradient
    )


def _operands(product: str, dtype: torch.dtype, rows: int, in_features: int, out_features: int) -> tuple[Tensor, ...]:
    """Of the size that is timed, drawn without touching torch's random state."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    if product == "forward":
        return draw(rows, in_features), draw(out_features, in_features), draw(out_features)
    if product == "dx":
        return draw(rows, out_features), draw(out_features, in_features)
    return draw(rows, out_features), draw(rows, in_features)


def calibrate() -> None:
    """Measures all that has not been measured yet on this machine."""
    for product in PRODUCTS:
        for dtype in DTYPES:
            for rows, in_features, out_features in _TIMED.values():
                choice(product, dtype, rows, in_features * out_features)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    dy = contiguous_grad(dy)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    dx = linear_dx(dy, weight) if needs_x else None
    return dx, *linear_parameter_gradients(dy, x, needs_weight, needs_bias and ctx.has_bias)


register("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear_forward, _fake, _setup_context, _backward)
