"""Where a measurement says that another backend than the device's first one is the faster: ``measured_backends.json``.

That file is one JSON object:

- ``margin``: by how much an entry's backend was faster at the least, as a share of its own time;
- ``results``: the documents, by their paths in the repository, that ``python -m benchmarks.fastest_backends`` made it from (nobody
  edits it by hand);
- ``entries``: objects of

  - ``architecture``: ``"sm_90"``, that of the GPU which measured. An entry holds for GPUs of the same alone;
  - ``op``, ``direction`` (``"forward"`` or ``"backward"``), ``dtype`` (``"bfloat16"``);
  - ``sizes``: for each of the op's sizes (:data:`SIZES`) the smallest and the largest that the entry holds for, both included, or
    null for no limit;
  - ``backend``: the faster one;
  - ``times_faster``: how many times as fast it was in the measured cases that the entry stands for, the least and the most;
  - ``source``: the ``file`` of the results, and the ``commit`` that was measured.

The first entry that holds decides. Where there is none, or its backend is not in this installation, nothing changes.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_suffix(".json")
# What an op's time depends on, of the ops that there is more than one GPU backend for. rows: of attention, all tokens together.
SIZES = {
    "embedding_layer_norm": ("rows", "hidden"),
    "attention": ("rows", "head_dim", "max_seqlen"),
    "add_layer_norm": ("rows", "hidden"),
    "gelu_layer_norm": ("rows", "hidden"),
    "mlm_loss": ("rows", "vocabulary"),
}
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Entry:
    """An object of the file's ``entries``; ``sizes`` in the order of :data:`SIZES`."""

    architecture: str
    op: str
    direction: str
    dtype: str
    sizes: tuple[tuple[int, int | None], ...]
    backend: str
    file: str
    commit: str

    def holds(self, sizes: dict[str, int]) -> bool:
        for name, (smallest, largest) in zip(SIZES[self.op], self.sizes):
            if sizes[name] < smallest or (largest is not None and sizes[name] > largest):
                return False
        return True

    def __str__(self) -> str:
        limits = [f"{name} {_range(*limit)}" for name, limit in zip(SIZES[self.op], self.sizes, strict=True)]
        where = f"{self.op} {self.direction}, {self.dtype}, {', '.join(limits)} on {self.architecture}"
        return f"{where}: {self.backend} ({self.file}, commit {self.commit})"


def _range(smallest: int, largest: int | None) -> str:
    if largest is None:
        return f"from {smallest}"
    return str(smallest) if smallest == largest else f"{smallest} to {largest}"


def read(path: Path = PATH) -> tuple[Entry, ...]:
    """The entries of a file; ValueError, with its name, for one that is no such table."""
    try:
        return tuple(_entry(content) for content in json.loads(path.read_text(encoding="utf-8"))["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of measured backends: {type(error).__name__}: {error}") from error


def _entry(content: dict[str, Any]) -> Entry:
    op, direction, source = content["op"], content["direction"], content["source"]
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}, expected one of {', '.join(DIRECTIONS)}")
    sizes = tuple((smallest, largest) for smallest, largest in (content["sizes"][name] for name in SIZES[op]))
    return Entry(
        content["architecture"], op, direction, content["dtype"], sizes, content["backend"], source["file"], source["commit"]
    )


ENTRIES = read()


@functools.cache
def entries_for(architecture: str | None, op: str, direction: str, dtype: torch.dtype) -> tuple[Entry, ...]:
    kind = (architecture, op, direction, str(dtype).removeprefix("torch."))
    return tuple(entry for entry in ENTRIES if (entry.architecture, entry.op, entry.direction, entry.dtype) == kind)


@functools.cache
def architecture(device: torch.device) -> str | None:
    """``"sm_90"`` for NVIDIA's GPUs of compute capability 9.0; None for what is none of NVIDIA's."""
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
