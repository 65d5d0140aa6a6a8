"""One way to make a torch operator of a pair of functions, so that autograd, fake tensors and torch.compile know it.

``torch.library.define`` + ``impl`` + ``register_fake`` + ``register_autograd`` rather than ``custom_op``: 5 us per call
instead of 7 (and 15 for an out-variant), and operators stay functional, as ``opcheck`` wants them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode, _get_current_dispatch_mode_stack

NAMESPACE = "fastbert"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Defines ``fastbert::<name>`` with ``schema`` (arguments and results) for every device.

    ``fake`` computes result shapes, dtypes and devices without data; ``setup_context(ctx, inputs, output)`` and
    ``backward(ctx, *grads)`` are autograd's. Without them, as for the operators that are a backward themselves, asking for a
    derivative is an error.
    """
    _library.define(name + schema)
    qualified = f"{NAMESPACE}::{name}"

    @functools.wraps(implementation)
    def checked(*args):
        check_devices(qualified, args)
        if forward_ad._current_level >= 0:  # torch would drop the tangents: a derivative of 0 without a word
            raise RuntimeError(f"{qualified} has no forward-mode derivative (jvp): fastbert's ops have the one of backward()")
        return implementation(*args)

    _library.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is None:

        def backward(ctx, *grads):
            raise _no_derivative(qualified)

    def checked_backward(ctx, *grads):
        refuse_batched_gradients(*grads)
        return backward(ctx, *grads)

    torch.library.register_autograd(qualified, checked_backward, setup_context=setup_context, lib=_library)


def _no_derivative(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} has no derivative: fastbert's ops can be differentiated once; for second derivatives use "
        "fastbert.restore(model), with attn_implementation='eager'"
    )


class _Once(torch.autograd.Function):
    """Gradients as they are, whose own derivative is an error."""

    @staticmethod
    def forward(ctx, name: str, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.name = name
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx, *_: torch.Tensor | None):
        raise _no_derivative(ctx.name)


def once_only(name: str, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """What a backward pass that autograd did not watch has made: where somebody asked for a graph of it (create_graph=True), the
    second derivative is an error, as it is of every op."""
    there = [gradient.detach().requires_grad_() for gradient in gradients if gradient is not None]
    watched = iter(_Once.apply(name, *there))
    return [None if gradient is None else next(watched) for gradient in gradients]


def refuse_batched_gradients(*gradients: torch.Tensor | None) -> None:
    """RuntimeError in a backward pass for several gradients at once, which have no memory that a kernel could read."""
    if any(gradient is not None and (is_batchedtensor(gradient) or is_legacy_batchedtensor(gradient)) for gradient in gradients):
        raise RuntimeError(
            "fastbert's layers take one gradient at a time, not a batch of them (is_grads_batched=True, vectorize=True): ask for "
            "them one by one, or use fastbert.restore(model)"
        )


def check_devices(name: str, args: tuple[Any, ...]) -> None:
    """RuntimeError where an op's tensors are on several devices: a kernel would take one's addresses for another's."""
    device = None
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if device is None:
                device = arg.device
            elif arg.device != device:
                devices = ", ".join(sorted({str(arg.device) for arg in args if isinstance(arg, torch.Tensor)}))
                raise RuntimeError(f"{name} got tensors on {devices}: move them to one device")


def transform_reasons() -> list[str]:
    """Why no op of this namespace can take part in the differentiation that is going on; empty where all can."""
    if torch.compiler.is_compiling():
        return []
    if torch._C._are_functorch_transforms_active():
        return ["the transforms of torch.func (grad, vjp, jvp, vmap) know torch's own operators only"]
    if forward_ad._current_level >= 0:
        return ["forward-mode derivatives are asked for (torch.autograd.forward_ad), which fastbert's ops do not have"]
    return []


def dispatch_mode_is_on() -> bool:
    """Whether somebody watches torch's operators, or has them make tensors without memory (FakeTensorMode)."""
    return _get_current_dispatch_mode() is not None


def has_no_data() -> bool:
    """Whether tensors are made that have shapes alone: somebody asks what a call would need, or draws its graph."""
    if torch.compiler.is_compiling() or not dispatch_mode_is_on():
        return False
    return any(isinstance(mode, FakeTensorMode | ProxyTorchDispatchMode) for mode in _get_current_dispatch_mode_stack())


def under_autocast(x: torch.Tensor) -> bool:
    """Whether autocast chooses the dtype of matmuls of ``x``: it leaves float64 alone, and torch raises where it is asked about the
    meta device."""
    return x.dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """What losses are computed in: half precision becomes float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def check_shape(name: str, tensor: torch.Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError naming the argument, its shape and the one that would be right."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}: {meaning}")


def check_ids(name: str, ids: torch.Tensor, num_ids: int, meaning: str) -> None:
    """Raises ValueError where ids are no rows of a table of ``num_ids`` rows. Reads data: on a GPU it waits for it."""
    if ids.numel() == 0:
        return
    smallest, largest = (int(x) for x in ids.aminmax())
    if smallest < 0 or largest >= num_ids:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"{name} holds {wrong}, expected 0 to {num_ids - 1} ({meaning} is {num_ids})")


def check_dropout(dropout_p: float, seed: torch.Tensor | None) -> None:
    """Raises ValueError where dropout has no probability or no seed to draw its mask from."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected a probability from 0 to 1")
    if dropout_p > 0.0 and (seed is None or seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError("dropout_p > 0 needs a seed: an int64 tensor of one element on the inputs' device")


def contiguous_grad(grad: torch.Tensor) -> torch.Tensor:
    """Kernels read gradients row by row; autograd may hand over expanded ones (of ``out.sum()``, say)."""
    return grad if grad.is_contiguous() else grad.contiguous()
