"""What a launcher needs to know about the device that its tensors are on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

INTERPRETER_PROCESSORS = 2


def device_guard(x: Tensor) -> AbstractContextManager:
    """Makes ``x``'s GPU the current one, which is where Triton launches; does nothing for a CPU tensor (interpreter)."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def num_processors(x: Tensor) -> int:
    """The number of multiprocessors of ``x``'s GPU: what a launch with a fixed number of programs is sized by."""
    if not x.is_cuda:
        return INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count
