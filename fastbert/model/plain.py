"""Whether a module is exactly what its class says: what reads a module's weights instead of calling it has to ask first."""

from __future__ import annotations

import functools
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from .int8 import Int8Linear

# transformers records hidden states and attention weights with hooks that stay for good and do nothing in other calls;
# torch's sharding gathers parameters in them, whatever the shape of the inputs.
_HARMLESS_HOOKS = ("transformers.utils.output_capturing", "torch.distributed.")


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches or changes the calls of this module, so that it has to be called as transformers would."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return False
    hooks = chain(
        module._forward_hooks.values(), module._forward_pre_hooks.values(),
        module._backward_hooks.values(), module._backward_pre_hooks.values(),
    )  # fmt: skip
    return any(not (getattr(hook, "__module__", None) or "").startswith(_HARMLESS_HOOKS) for hook in hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody put another ``forward`` on the instance; accelerate leaves that of the class there when its hooks go."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


# The classes whose calls are passed by, with the ``forward`` that each had when fastbert was imported.
_FORWARDS: dict[type, Any] = {}


def remember(*kinds: type) -> None:
    """To be called at import, with classes of torch and transformers, so that :func:`class_was_changed` knows their ``forward``."""
    for kind in kinds:
        _FORWARDS.setdefault(kind, kind.forward)


remember(nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding, nn.GELU, nn.Tanh, GELUActivation)


def class_was_changed(module: nn.Module) -> bool:
    """Whether somebody put another ``forward`` on the class itself: since then, or before, of another module."""
    kind = type(module)
    return getattr(kind.forward, "__module__", None) != kind.__module__ or base_was_changed(kind)


def base_was_changed(kind: type) -> bool:
    """Whether somebody put another ``forward`` on a class that ``kind`` is or was made of, and that may not be called."""
    if torch.compiler.is_compiling():
        return False
    return any(base.forward is not forward for base, forward in _bases(kind))


@functools.cache
def _bases(kind: type) -> list[tuple[type, Any]]:
    return [(base, _FORWARDS[base]) for base in kind.__mro__ if base in _FORWARDS and "forward" in vars(base)]


def is_watched(module: nn.Module) -> bool:
    """Whether a module does more than its class says: it has hooks, or somebody put another ``forward`` on the instance."""
    return has_own_forward(module) or has_hooks(module)


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what its class did when that was written, and nothing else."""
    return not (class_was_changed(module) or is_watched(module))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether reading ``weight`` and ``bias`` is all there is to this Linear.

    PEFT's LoRA class is also *named* Linear, and quantisers put tensor subclasses in the place of the weight: reading
    ``weight`` would ignore the one and break the other.
    """
    return type(module) is nn.Linear and type(module.weight) in (nn.Parameter, Tensor) and is_plain(module)


def is_int8_linear(module: nn.Module) -> bool:
    """Whether reading the buffers of an Int8Linear is all there is to this module."""
    return type(module) is Int8Linear and not is_watched(module)


def has_plain_parameters(norm: nn.LayerNorm) -> bool:
    """Whether reading ``weight`` and ``bias`` is all there is to this LayerNorm."""
    compiling = torch.compiler.is_compiling()  # torch.export has tensors of its own in their places
    return all(type(p) in (nn.Parameter, Tensor) or (compiling and p is not None) for p in (norm.weight, norm.bias))


def has_attributes_for_parameters(module: nn.Module) -> bool:
    """Whether a tensor that is no registered parameter is in the place of ``weight`` or ``bias``. Reading it is right, but neither
    ``parameters()`` nor a snapshot of the module knows of it."""
    return not vars(module).keys().isdisjoint(("weight", "bias"))


def lends_parameters(module: nn.Module) -> bool:
    """Whether ``torch.func.functional_call`` has put tensors in the places of parameters, for one call."""
    parameters = (parameter for part in module.modules() for parameter in part._parameters.values())
    return any(parameter is not None and not isinstance(parameter, nn.Parameter) for parameter in parameters)


def is_exact_gelu(activation: nn.Module) -> bool:
    """Whether an activation is the erf-GELU of the BERT paper and nothing else."""
    exact = type(activation) is GELUActivation or (type(activation) is nn.GELU and activation.approximate == "none")
    return exact and is_plain(activation)
