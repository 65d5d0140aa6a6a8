"""AdamW as BERT was pretrained with it, LAMB, and the way of their state to tensors with names and back.

Which kernels take a step, by the bytes that it moves per parameter (all float32; a step waits for memory and for nothing else):

- AdamW as torch has it: the norm of the gradients 4 (read), clipping 8 (read, write), its fused kernel 28 (parameter, gradient and
  two averages read, all but the gradient written), 40 together. With the factor in torch's ``grad_scale`` it would be 36: that
  kernel writes the scaled gradients back. ``multi_tensor`` multiplies them as it reads them: 4 + 28 = 32. Without the clipping
  nothing would be left to be won.
- LAMB in torch's foreach functions (``lamb``): norm and clipping 12; the gradients, 0 in a step that is left out, 8; the averages
  8 + 12 and those of the squares 8 + 12; the direction's root 8, corrections 8 + 8, quotient 12 and weight decay 12; norms 4 + 4;
  the step 8 + 12; 136 together. ``multi_tensor``: norm 4; parameter, gradient and averages read, averages written, 24; parameter
  and averages read, parameter written, 16; 44 together.

So ``multi_tensor`` moves 0.8 of AdamW's bytes and 0.32 of LAMB's. No GPU has measured it yet: torch's stays the default, and
``backend="cuda"`` asks for ours.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from fastbert.runs.errors import SettingsError

from .lamb import LAMB
from .multi_tensor import MultiTensorAdamW, MultiTensorLAMB, not_supported_reason

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


def check_optimizer_backend(backend: str, device: torch.device) -> None:
    """Raises :class:`SettingsError` where the kernels of ``backend`` cannot train parameters on ``device``, naming the reason."""
    if backend == "cuda" and (reason := not_supported_reason(device)):
        raise SettingsError(f"--optimizer-backend cuda is not possible: {reason}")


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float, backend: str = "torch") -> AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over :func:`decay_groups`, in one kernel where torch has one for the device, or in ours
    (``backend`` "cuda").
    """
    groups, options = decay_groups(model, weight_decay), {"lr": learning_rate, "betas": BETAS, "eps": EPSILON}
    if backend == "cuda":
        return MultiTensorAdamW(groups, **options)
    return AdamW(groups, fused=next(model.parameters()).device.type in FUSED_DEVICE_TYPES, **options)


def build_lamb(model: nn.Module, learning_rate: float, weight_decay: float, backend: str = "torch") -> LAMB:
    """:class:`LAMB` over :func:`decay_groups`; biases and LayerNorm weights take Adam's steps, as in the paper's code."""
    decayed, others = decay_groups(model, weight_decay)
    made = MultiTensorLAMB if backend == "cuda" else LAMB
    return made([decayed, {**others, "trust_ratio": False}], lr=learning_rate, betas=BETAS, eps=EPSILON)


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
