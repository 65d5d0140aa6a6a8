"""What a launcher needs to know about the device that its tensors are on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from .precision import INTERPRETED

INTERPRETER_PROCESSORS = 2
INTERPRETER_CAPABILITY = 90


def device_guard(x: Tensor) -> AbstractContextManager:
    """Makes ``x``'s GPU the current one, which is where Triton launches; does nothing for a CPU tensor (interpreter)."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def num_processors(x: Tensor) -> int:
    """The number of multiprocessors of ``x``'s GPU: what a launch with a fixed number of programs is sized by."""
    if not x.is_cuda:
        return INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def cuda_capability() -> int:
    """The compute capability of the GPU that would be launched on, 90 for 9.0; 0 for one that is not NVIDIA's.

    The interpreter runs what Hopper would: its kernels are the ones that no other check of their numbers reaches.
    """
    if INTERPRETED.value:
        return INTERPRETER_CAPABILITY
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0
