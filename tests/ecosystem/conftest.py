"""Each test finds accelerate's process-wide state as in a new process, whatever ran before it in this one."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    """An Accelerator or a Trainer leaves its mixed precision behind, and the next Accelerator may not ask for another."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
