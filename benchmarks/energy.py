"""Energy of a call, where the machine tells it: Linux's powercap counters of the CPU packages, NVML's of the GPU.

Both count all that the package or the card does, whoever asked for it. Virtual machines seldom show either.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness import first_line, synchronize

_POWERCAP = Path("/sys/class/powercap")
_SHORTEST_S = 0.5  # NVML's counter moves every 0.1 s, powercap's every millisecond


@dataclass(frozen=True)
class Meter:
    """joules(): a counter that rises; source: what is counted. ``reason``: why there is none, where joules is None."""

    source: str | None
    joules: Callable[[], float] | None
    reason: str | None = None

    def described(self) -> dict[str, str | None]:
        return {"source": self.source, "reason": self.reason}

    def per_run(self, run: Callable[[], Any], device: str) -> float | None:
        """Joules of ``run``, the mean of as many as half a second takes; None without a counter."""
        if self.joules is None:
            return None
        runs, start, before = 0, time.perf_counter(), self.joules()
        while time.perf_counter() - start < _SHORTEST_S:
            run()
            synchronize(device)
            runs += 1
        return (self.joules() - before) / runs


def meter(device: str, powercap: Path = _POWERCAP) -> Meter:
    return _nvml() if device == "cuda" else _packages(powercap)


def _packages(powercap: Path) -> Meter:
    """The zones intel-rapl:N (AMD's, too, go by that name) that are called package-N. Their parts (intel-rapl:N:M) are counted
    within them, and the zone psys, which some laptops have, is the whole machine with the packages in it."""
    zones, largest = [], []
    try:
        for zone in sorted(powercap.glob("intel-rapl:*")):
            if (zone / "name").read_text().startswith("package"):
                _microjoules(zone)
                zones.append(zone)
                largest.append(int((zone / "max_energy_range_uj").read_text()))
    except (OSError, ValueError) as error:
        return Meter(None, None, f"{first_line(error)} (only root may read the counters unless allowed)")
    if not zones:
        return Meter(None, None, f"{powercap} has no counters of the CPU packages")
    last, turns = [_microjoules(zone) for zone in zones], [0] * len(zones)

    def joules() -> float:
        for i, zone in enumerate(zones):
            now = _microjoules(zone)
            turns[i] += now < last[i]  # it starts again at 0 after its range
            last[i] = now
        return sum(value + turn * end for value, turn, end in zip(last, turns, largest, strict=True)) / 1e6

    return Meter(f"CPU packages ({powercap})", joules)


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())


def _nvml() -> Meter:
    if importlib.util.find_spec("pynvml") is None:
        return Meter(None, None, "pynvml, which reads the GPU's counter, is not installed (pip install nvidia-ml-py)")
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return Meter(None, None, f"NVML: {error}")
    return Meter("the GPU (NVML)", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
