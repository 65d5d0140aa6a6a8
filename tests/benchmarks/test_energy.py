"""Energy from counters that wrap around, may be unreadable, and count some things twice; memory where the system tells it."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import energy, memory
from benchmarks.energy import Meter, meter


def zone(folder, number: str, name: str, microjoules: int, largest: int = 1000):
    path = folder / f"intel-rapl:{number}"
    path.mkdir()
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{largest}\n")
    return path / "energy_uj"


def test_packages_are_added_and_their_parts_and_the_whole_machine_left_out(tmp_path):
    first, second = zone(tmp_path, "0", "package-0", 100), zone(tmp_path, "1", "package-1", 200)
    others = [zone(tmp_path, "0:0", "core", 7), zone(tmp_path, "2", "psys", 900)]
    (tmp_path / "intel-rapl").mkdir()  # the control type itself
    found = meter("cpu", tmp_path)
    assert found.described() == {"source": f"CPU packages ({tmp_path})", "reason": None}
    before = found.joules()
    first.write_text("150")
    second.write_text("260")
    for other in others:
        other.write_text("999")
    assert found.joules() - before == pytest.approx(110e-6)


def test_a_counter_that_starts_again(tmp_path):
    counter = zone(tmp_path, "0", "package-0", 990, largest=1000)
    found = meter("cpu", tmp_path)
    before = found.joules()
    readings = []
    for microjoules in (995, 15, 999, 3):
        counter.write_text(str(microjoules))
        readings.append(round((found.joules() - before) * 1e6))
    assert readings == [5, 25, 1009, 1013]


def test_no_counter(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        found = meter("cpu", folder)
        assert (found.source, found.joules) == (None, None)
        assert found.reason == f"{folder} has no counters of the CPU packages"
        assert found.per_run(lambda: pytest.fail("nothing is run for a counter that is not there"), "cpu") is None


@pytest.mark.parametrize("spoil", ["unreadable", "rubbish", "no range"])
def test_a_counter_that_cannot_be_read(spoil, tmp_path, monkeypatch):
    counter = zone(tmp_path, "0", "package-0", 100)
    if spoil == "unreadable":  # a folder is, even for root
        counter.unlink()
        counter.mkdir()
    elif spoil == "rubbish":
        counter.write_text("")
    else:
        (counter.parent / "max_energy_range_uj").unlink()
    found = meter("cpu", tmp_path)
    assert found.joules is None and "only root may read the counters" in found.reason


def test_joules_of_a_run_are_the_mean_of_as_many_as_half_a_second_takes(monkeypatch):
    clock, used = [0.0], [0.0]
    monkeypatch.setattr(energy.time, "perf_counter", lambda: clock[0])

    def run():
        clock[0] += 0.2
        used[0] += 3.0

    counted = Meter("a counter", lambda: used[0])
    assert counted.per_run(run, "cpu") == pytest.approx(3.0)
    assert used[0] == pytest.approx(9.0)  # 0.6 s

    def slow():
        clock[0] += 13.0
        used[0] += 400.0

    used[0] = 0.0
    assert counted.per_run(slow, "cpu") == 400.0 == used[0]


@pytest.mark.skipif(importlib.util.find_spec("pynvml") is not None, reason="pynvml is installed")
def test_a_gpu_without_its_library():
    found = meter("cuda")
    assert found.joules is None and "pip install nvidia-ml-py" in found.reason


def test_memory_where_the_system_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert memory.held_bytes("cpu") is memory.peak_bytes(lambda: None, "cpu") is None
    (tmp_path / "status").write_text("Name:\tpython\n")  # a sandbox's, without the fields
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "clear_refs")
    assert memory.held_bytes("cpu") is memory.peak_bytes(lambda: None, "cpu") is None
    (tmp_path / "status").write_text("VmHWM:\t  30 kB\nVmRSS:\t  10 kB\n")
    assert memory.held_bytes("cpu") == 10 * 1024 and memory.peak_bytes(lambda: None, "cpu") == 20 * 1024
