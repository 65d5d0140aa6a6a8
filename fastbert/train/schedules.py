"""The learning rate as a function of the step: warmup and decay, one cycle over all steps or one for each phase."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import get_linear_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup

from .settings import PretrainSettings

# NVIDIA's BERT with LAMB decays by the square root of what is left (You et al., 2020, decay linearly: --schedule linear).
POLYNOMIAL_POWER = 0.5


@dataclass(frozen=True)
class Cycle:
    """Steps ``first_step + 1`` to ``last_step``: the rate rises to ``peak`` for ``warmup_steps`` of them, then falls."""

    first_step: int
    last_step: int
    peak: float
    warmup_steps: int

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step


def cycles(settings: PretrainSettings) -> tuple[Cycle, ...]:
    """One over all steps; two where the second phase has a peak of its own, each with its warmup (the second's a tenth of it)."""
    if settings.second_phase_learning_rate is None:
        return (Cycle(0, settings.steps, settings.learning_rate, settings.effective_warmup_steps),)
    first, second = settings.phases
    warmup_steps = first.steps // 10 if settings.warmup_steps is None else min(settings.warmup_steps, first.steps)
    return (
        Cycle(first.first_step, first.last_step, settings.learning_rate, warmup_steps),
        Cycle(second.first_step, second.last_step, settings.second_phase_learning_rate, second.steps // 10),
    )


class Schedule:
    """Sets the rate of ``optimizer``'s next step, as it stands after ``start_step`` steps.

    It is a function of the step alone, so a continued run needs no saved state for it. ``linear`` and ``polynomial`` are
    transformers' schedules (from 0 and back to 0), ``one-cycle`` is torch's OneCycleLR (Smith and Topin, 2018): up from a 25th of
    the peak and down to nearly nothing along cosines, while Adam's first beta goes from 0.95 to 0.85 and back.
    """

    def __init__(self, optimizer: Optimizer, settings: PretrainSettings, start_step: int = 0):
        self._optimizer = optimizer
        self._name = settings.schedule
        self._cycles = cycles(settings)
        self._step = start_step
        self._torch_schedule = self._start(self._current_cycle())

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self._torch_schedule.get_last_lr()[0]

    def step(self) -> None:
        """After every step of the optimizer."""
        self._step += 1
        cycle = self._current_cycle()
        if self._step == cycle.first_step:
            self._torch_schedule = self._start(cycle)
        else:
            self._torch_schedule.step()

    def _current_cycle(self) -> Cycle:
        """The one of the next step; after the last step, the last."""
        return next((cycle for cycle in self._cycles if self._step < cycle.last_step), self._cycles[-1])

    def _start(self, cycle: Cycle) -> LRScheduler:
        done = self._step - cycle.first_step
        for group in self._optimizer.param_groups:
            group["initial_lr"] = cycle.peak
        if self._name == "linear":
            return get_linear_schedule_with_warmup(self._optimizer, cycle.warmup_steps, cycle.steps, last_epoch=done - 1)
        if self._name == "polynomial":
            # transformers divides by the length of the way down, of which a warmup over all steps leaves nothing.
            steps = max(cycle.steps, cycle.warmup_steps + 1)
            return get_polynomial_decay_schedule_with_warmup(
                self._optimizer, cycle.warmup_steps, steps, lr_end=0.0, power=POLYNOMIAL_POWER, last_epoch=done - 1
            )
        # torch divides by the length of the rise, which is 0 for a rise of one step: there is none then. The rate after the last
        # step, which torch wants to have, is that of one step more.
        rise = cycle.warmup_steps / (cycle.steps + 1) if cycle.warmup_steps > 1 else 0.0
        arguments = {"max_lr": cycle.peak, "total_steps": cycle.steps + 1, "pct_start": rise}
        schedule = OneCycleLR(self._optimizer, **arguments)  # writes its bounds into the groups
        return OneCycleLR(self._optimizer, **arguments, last_epoch=done - 1) if done else schedule
