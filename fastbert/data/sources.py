"""Where labelled data come from: a file, or a split of a Hugging Face dataset."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DATASET_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Source:
    """``path``: a file; or ``dataset`` (``name`` or ``name:config``) and ``split`` of a Hugging Face dataset."""

    path: Path | None = None
    dataset: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else f"{self.dataset}, split {self.split}"
