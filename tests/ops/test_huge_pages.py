"""Memory on huge pages is memory: of the size that was asked for, writable, and gone with its last view."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from fastbert.ops import huge_pages

MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, huge_pages.HUGE_PAGE - 1, huge_pages.HUGE_PAGE, 3 * huge_pages.HUGE_PAGE + 5])
def test_all_of_it_can_be_written(num_bytes):
    memory = huge_pages.empty(num_bytes)
    assert memory.shape == (num_bytes,) and memory.dtype == torch.uint8
    memory.fill_(7)
    assert (memory == 7).all()
    if num_bytes >= huge_pages.HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        assert memory.data_ptr() % huge_pages.HUGE_PAGE == 0


def test_a_view_keeps_it():
    part = huge_pages.empty(2 * huge_pages.HUGE_PAGE).split(huge_pages.HUGE_PAGE)[1]
    part.fill_(3)
    assert (part == 3).all()


@pytest.mark.parametrize("asked", [huge_pages.empty, lambda n: huge_pages.ask_for(torch.empty(n, dtype=torch.uint8))])
def test_the_kernel_is_asked_for_huge_pages(asked):
    if not MODES.exists() or "[never]" in MODES.read_text():
        pytest.skip("this kernel has no transparent huge pages, or they are switched off")
    memory = asked(64 * huge_pages.HUGE_PAGE)
    address, flags = memory.data_ptr() + huge_pages.HUGE_PAGE, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(bound, 16) for bound in first.split("-"))
            inside = start <= address < end
        elif first == "VmFlags:" and inside:
            flags = rest
    assert "hg" in flags


def test_small_tensors_are_left_alone():
    small = torch.ones(5)
    assert huge_pages.ask_for(small) is small and (small == 1).all()
    assert huge_pages.ask_for(torch.empty(0)).numel() == 0
