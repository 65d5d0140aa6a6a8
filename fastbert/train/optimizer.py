"""AdamW as BERT was pretrained with it, LAMB, and the way of their state to tensors with names and back."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from .lamb import LAMB

# google-research/bert, optimization.py: AdamWeightDecayOptimizer(beta_1=0.9, beta_2=0.999, epsilon=1e-6), no decay for
# LayerNorm and bias parameters. Its missing bias correction is the one point where AdamW differs, as in transformers.
BETAS = (0.9, 0.999)
EPSILON = 1e-6
_STATE = ("exp_avg", "exp_avg_sq", "step")
FUSED_DEVICE_TYPES = frozenset({"cpu", "cuda"})


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The parameters that train, in two groups: weights with ``weight_decay``, biases and LayerNorm weights without."""
    without_decay = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or name == "bias" or name.endswith("_bias")
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p not in without_decay], "weight_decay": weight_decay},
        {"params": [p for p in trained if p in without_decay], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over :func:`decay_groups`, in one kernel where torch has one for the device."""
    fused = next(model.parameters()).device.type in FUSED_DEVICE_TYPES
    return AdamW(decay_groups(model, weight_decay), lr=learning_rate, betas=BETAS, eps=EPSILON, fused=fused)


def build_lamb(model: nn.Module, learning_rate: float, weight_decay: float) -> LAMB:
    """:class:`LAMB` over :func:`decay_groups`; biases and LayerNorm weights take Adam's steps, as in the paper's code."""
    decayed, others = decay_groups(model, weight_decay)
    return LAMB([decayed, {**others, "trust_ratio": False}], lr=learning_rate, betas=BETAS, eps=EPSILON)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by name, ``<parameter>.<exp_avg | exp_avg_sq | step>``; empty before the first step."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The reverse of :func:`optimizer_tensors`, of an optimizer that has taken a step.

    Raises ``ValueError`` where there are none, naming the tensors that belong to no parameter of ``model``, and the parameter that
    has some of its state only. One that has none at all is one that never had a gradient.
    """
    if not tensors:
        raise ValueError("the optimizer state has no tensors")
    remaining = dict(tensors)
    for name, parameter in model.named_parameters():
        found = {key: remaining.pop(f"{name}.{key}", None) for key in _STATE}
        missing = [key for key, tensor in found.items() if tensor is None]
        if 0 < len(missing) < len(_STATE):
            raise ValueError(f"the optimizer state of {name} lacks {', '.join(missing)}")
        for key, tensor in found.items() if not missing else ():
            # A copy: memory of torch's own allocator has one alignment, so the continued sums round as they would have.
            optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)
    if remaining:
        raise ValueError(f"the optimizer state has {len(remaining)} tensors of no parameter, such as {min(remaining)}")
