"""LAMB: Adam's direction for every tensor, at a length that follows the tensor's own: large batches without divergence.

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (ICLR 2020), algorithm 2. Neither torch nor
transformers has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LAMB(torch.optim.Optimizer):
    """For a tensor x with gradient g, in its step t, with Adam's averages m and v::

        r = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * x
        x = x - lr * (norm(x) / norm(r)) * r

    The trust ratio norm(x) / norm(r) is 1 where a norm is 0, and in groups with ``trust_ratio`` False (biases, LayerNorm). The
    global gradient norm is clipped by the caller, before. State per tensor as AdamW's: exp_avg, exp_avg_sq, step.

    Like torch's fused AdamW it leaves weights and state as they are, without waiting for the device, in a step for which its
    attribute ``found_inf`` (float32, 0-d, on the device) is 1; gradients are lost then.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        trust_ratio: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "trust_ratio": trust_ratio}
        super().__init__(params, defaults)
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_group(group, parameters)

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        averages, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        gradients = [parameter.grad for parameter in parameters]
        beta1, beta2 = group["betas"]
        one = parameters[0].new_ones(())
        left_out = one - 1 if self.found_inf is None else self.found_inf
        # In a step that is left out gradients are 0 and the averages' factors 1, so nothing below changes anything.
        for gradient in gradients:
            gradient.masked_fill_(left_out.bool(), 0.0)
        # As a list: one 0-d tensor would be taken for a number here, which the host would have to wait for.
        torch._foreach_add_(steps, [1 - left_out] * len(steps))
        torch._foreach_mul_(averages, torch.where(left_out.bool(), one, beta1))
        torch._foreach_add_(averages, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, torch.where(left_out.bool(), one, beta2))
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)

        updates = _adam_directions(averages, squares, steps, group)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        factors = [group["lr"] * (1 - left_out)] * len(updates)
        if group["trust_ratio"]:
            norms = zip(factors, torch._foreach_norm(parameters), torch._foreach_norm(updates), strict=True)
            factors = [factor * torch.where((x > 0) & (r > 0), x / r, one) for factor, x, r in norms]
        torch._foreach_mul_(updates, factors)
        torch._foreach_sub_(parameters, updates)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _adam_directions(
    averages: list[Tensor], squares: list[Tensor], steps: list[Tensor], group: dict[str, Any]
) -> tuple[Tensor, ...]:
    """m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) of every tensor."""
    # Before a first step that counts, t is 0 and the averages are, too: any correction but 0 will do.
    corrections = [[_bias_correction(beta, step.clamp(min=1)) for step in steps] for beta in group["betas"]]
    # What is the same for a whole tensor goes into the divisor, so that no tensor is read more often than needed.
    divisors = torch._foreach_sqrt(squares)
    torch._foreach_mul_(divisors, [first / second.sqrt() for first, second in zip(*corrections, strict=True)])
    torch._foreach_add_(divisors, [group["eps"] * first for first in corrections[0]])
    return torch._foreach_div(averages, divisors)


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step, of whose digits float32 would lose three at beta 0.999."""
    return 1 - beta ** step.double()
