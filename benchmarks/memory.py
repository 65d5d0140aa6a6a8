"""Peak memory of a call: of the GPU's allocator, or of the whole process on a CPU, where libraries allocate beside torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the high-water mark of the resident set to what is resident now


def peak_bytes(run: Callable[[], Any], device: str) -> int | None:
    """What ``run`` needs at its peak beyond what was there before it; None where the system does not tell (not Linux)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident_bytes()
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        before = None
    run()
    peak = _status("VmHWM")
    return None if before is None or peak is None else peak - before


def held_bytes(device: str) -> int | None:
    """What torch's tensors hold on the GPU, or this process on a CPU; None where the system does not tell (not Linux)."""
    return torch.cuda.memory_allocated() if device == "cuda" else resident_bytes()


def resident_bytes() -> int | None:
    """Memory of this process; what was freed and is kept for the next allocation is given back to the system first."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def _status(field: str) -> int | None:
    """A field of /proc/self/status, in bytes; None where this system, or a sandbox, does not have it."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
