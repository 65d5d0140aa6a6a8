"""Memory that a call reads or writes whole, on pages of 2 MB.

bert-base has 340 MB of float32 weights in its layers: 83,000 pages of 4 KB, each with an entry of the page table that a core has
to fetch from memory again whenever something else has been through its caches. Kernels come with huge pages "madvise"d or
"always" (Documentation/admin-guide/mm/transhuge.rst); where they are off, or none is free, the memory has small ones.
"""

from __future__ import annotations

import ctypes
import functools
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20


def empty(num_bytes: int) -> Tensor:
    """(num_bytes,) uint8 on the CPU, which begins at a huge page where it is as large as one."""
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    # Room to align the start and to round up the end; pages that nobody touches are none.
    memory = mmap.mmap(-1, num_bytes + 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    all_bytes = torch.frombuffer(memory, dtype=torch.uint8)
    start = -all_bytes.data_ptr() % HUGE_PAGE
    # The last page only where most of it is used.
    memory.madvise(mmap.MADV_HUGEPAGE, start, (num_bytes + HUGE_PAGE // 2) // HUGE_PAGE * HUGE_PAGE)
    return all_bytes[start : start + num_bytes]


def ask_for(tensor: Tensor) -> Tensor:
    """``tensor``, on the CPU, for whose memory the kernel is asked for huge pages, as far as it has none yet.

    For results of tens of megabytes, which malloc takes from the kernel and gives back each time: clearing them a page of 4 KB
    at a time takes longer than computing them.
    """
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // HUGE_PAGE * HUGE_PAGE
    if start < end and (madvise := _madvise()) is not None:
        madvise(start, end - start, mmap.MADV_HUGEPAGE)  # where the kernel declines, nothing is lost
    return tensor


@functools.cache
def _madvise():
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
