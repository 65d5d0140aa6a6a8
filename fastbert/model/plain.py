"""Whether a module is exactly what its class says: what reads a module's weights instead of calling it has to ask first."""

from __future__ import annotations

from itertools import chain

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


def class_was_changed(module: nn.Module) -> bool:
    """Whether somebody put another ``forward`` on the class itself, which is defined elsewhere then."""
    kind = type(module)
    return getattr(kind.forward, "__module__", None) != kind.__module__


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


def is_exact_gelu(activation: nn.Module) -> bool:
    """Whether an activation is the erf-GELU of the BERT paper and nothing else."""
    exact = type(activation) is GELUActivation or (type(activation) is nn.GELU and activation.approximate == "none")
    return exact and is_plain(activation)
