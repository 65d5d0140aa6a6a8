"""Steps that would spoil the weights: a loss or a gradient that is not finite, or a loss far above those before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.runs.errors import TrainingError

# The running mean forgets a step after about 50; before 20 steps have been seen it says too little.
DECAY = 0.98
LEAST_STEPS = 20
SHOWN_STEPS = 5


class Guard:
    """Decides on the ``device``, without waiting for it, whether a step is left out.

    ``loss_spike``: how many times the running mean a loss may be; 0 for no limit. The mean is that of the steps which were not left
    out, an exponential one, corrected for its start as Adam's are.
    """

    def __init__(self, loss_spike: float, device: torch.device):
        self._loss_spike = loss_spike
        # One memory for good: a CUDA graph reads and writes what it has seen when it was recorded.
        self._sum, self._steps = torch.zeros(2, dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Forgets the losses so far: those to come are of another kind."""
        self.load_state({"sum": 0.0, "steps": 0})

    def check(self, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the step is left out (0-d bool) and the loss's limit (0-d, infinite while there is none).

        ``loss``: 0-d float64; ``grad_norm``: 0-d, before clipping.
        """
        limit = loss.new_full((), float("inf"))
        if self._loss_spike:
            mean = self._sum / (1 - DECAY**self._steps)
            limit = torch.where(self._steps >= LEAST_STEPS, self._loss_spike * mean, limit)
        kept = loss.isfinite() & grad_norm.isfinite() & (loss <= limit)
        self._sum.copy_(torch.where(kept, DECAY * self._sum + (1 - DECAY) * loss, self._sum))
        self._steps.add_(kept)
        return ~kept, limit

    def state(self) -> dict[str, Any]:
        """JSON-ready; waits for the device."""
        return {"sum": self._sum.item(), "steps": int(self._steps.item())}

    def load_state(self, state: dict[str, Any]) -> None:
        self._sum.fill_(state["sum"])
        self._steps.fill_(state["steps"])


def skipped_text(skipped: dict[str, Any]) -> str:
    """A step that was left out, as it is in ``RunState.skipped``."""
    return "step {step} (epoch {epoch}, block {block}, from batch {batch} on): {reason}".format(**skipped)


def check_skipped(skipped: list[dict[str, Any]], most: int) -> None:
    """Raises :class:`TrainingError`, naming them, where more than ``most`` steps of a run were left out."""
    if len(skipped) <= most:
        return
    shown = "; ".join(map(skipped_text, skipped[-SHOWN_STEPS:]))
    raise TrainingError(
        f"steps left out: {len(skipped)}, and --max-skipped-steps allows {most}; the last: {shown}. A lower --learning-rate or a "
        "longer --warmup-steps usually helps"
    )
