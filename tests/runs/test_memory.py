"""The C library's malloc keeps what is freed where the process asks for it; it is asked for in processes of their own."""

from __future__ import annotations

import pytest

from fastbert.runs import memory

from ..processes import run_python

FAULTS = """
import resource, torch
from fastbert.runs.memory import keep_freed_memory
reason = keep_freed_memory() if {keep} else None
assert reason is None, reason
for round in range(24):  # an aligned request does not fit a freed one of its size: it takes some rounds until all find their places
    if round == 20: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(9 << 20) for _ in range(2)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(memory._no_glibc_reason() is not None, reason="malloc is not glibc's")
def test_freed_memory_is_used_again():
    def faults(keep):
        done = run_python("-c", FAULTS.format(keep=keep))
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    fresh, kept = faults(False), faults(True)
    assert fresh > 1000, "malloc keeps tensors of 36 MB without being told: this module is not needed any more"
    assert kept < fresh / 20


def test_advice_is_given_until_it_is_followed(monkeypatch):
    monkeypatch.setattr(memory, "_no_glibc_reason", lambda: None)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    advice = memory.advice()
    name, _, value = advice.partition("=")
    monkeypatch.setenv(name, value)
    assert memory.advice() is None
    monkeypatch.setattr(memory, "_no_glibc_reason", lambda: "another malloc")
    assert memory.advice() is None and memory.keep_freed_memory() == "another malloc"


def test_fresh_pages_are_measured():
    assert all(seconds > 0 for seconds in memory.fresh_page_seconds(megabytes=4))
