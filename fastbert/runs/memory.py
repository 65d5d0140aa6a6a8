"""Memory of a training process on a CPU: what a step frees is what the next one gets, instead of pages fresh from the kernel.

glibc maps memory of its own for every tensor above 32 MB and returns the top of its heap when a backward pass frees it, and the
kernel clears each 4 KB page of it again in the next step: at bert-base sizes tens of thousands of page faults, a twentieth of a
step on one core and more on several, because the other cores wait. A process that does nothing but train keeps its memory
instead; a library must not decide that for the process that it is in, so only commands call :func:`keep_freed_memory`, and
``fastbert doctor`` names what everybody else can set before the start.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time

import torch

# mallopt(3). Heap instead of mmap for all sizes, and nothing given back before the end.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _NEVER = -1, -4, -1
# The same for others: glibc reads it when a process starts.
TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"


def keep_freed_memory() -> str | None:
    """Makes malloc keep what is freed, for the rest of the process; returns why it cannot, or None where it does."""
    if (reason := _no_glibc_reason()) is not None:
        return reason
    libc = ctypes.CDLL(None)
    done = libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    return None if done else "mallopt refused"


def fresh_page_seconds(megabytes: int = 64) -> tuple[float, float]:
    """Seconds to write a new tensor of that size, and to write it once more: the difference is the kernel's."""
    elements = megabytes * 2**20 // 4
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        tensor = torch.empty(elements, dtype=torch.float32, device="cpu").fill_(0)
        between = time.perf_counter()
        tensor.fill_(1)
        rounds.append((between - start, time.perf_counter() - between))
        del tensor
    return min(first for first, _ in rounds), min(second for _, second in rounds)


def advice() -> str | None:
    """What to set before the start for fewer page faults; None where it is set or malloc is another's."""
    if _no_glibc_reason() is not None or "glibc.malloc.mmap_max=0" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    return f"GLIBC_TUNABLES={TUNABLES}"


def _no_glibc_reason() -> str | None:
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return "the C library is not glibc"
    return None
