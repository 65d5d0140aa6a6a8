"""The pictures of a document: of its rows (``plots``) and of its profile (``profile_plot``).

Each PNG carries the SHA-256 of the rows, or of the profile, that it shows (:data:`DIGEST`): whether it belongs to a document can be
told without drawing it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbert.runs.whole_file import whole_file

from .documents import Document
from .plots import DPI, PLOTS, Plot
from .profile_plot import profile_picture, profiles_of
from .rows import MODEL_SUITES, Row, digest, rows_of

DIGEST = "Rows-SHA256"  # the keyword of the PNG's text chunk
PROFILE = "profile"
NAMES = (*PLOTS, PROFILE)
NEEDED = "matplotlib is not installed (pip install 'fastbert[viz]')"


@dataclass(frozen=True)
class Picture:
    """save: draws it into a PNG."""

    title: str
    digest: str
    save: Callable[[Path], None]


def why_not() -> str | None:
    """Why no picture can be made here."""
    return None if importlib.util.find_spec("matplotlib") else NEEDED


def pictures(document: Document, prefix: str) -> dict[str, Picture]:
    """By file name (``<prefix>-<name>.png``, a name in :data:`NAMES`) those that the document has something to show in."""
    rows = rows_of(document) if document["benchmark"] in MODEL_SUITES else []
    found = {}
    for name, plot in PLOTS.items():
        if shown := plot.shown(rows):
            found[f"{prefix}-{name}.png"] = Picture(plot.title, digest(shown), functools.partial(_save, plot, shown))
    if profiles := profiles_of(document):
        of_profile = hashlib.sha256(json.dumps(profiles, sort_keys=True).encode()).hexdigest()
        save = functools.partial(profile_picture, document, metadata={DIGEST: of_profile})
        found[f"{prefix}-{PROFILE}.png"] = Picture("Where the time goes", of_profile, save)
    return found


def digest_in(path: Path) -> str | None:
    """The digest that a PNG carries; None where it has none."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(DIGEST)


def _save(plot: Plot, shown: Sequence[Row], path: Path) -> None:
    with whole_file(path) as beside:
        plot.draw(shown).savefig(beside, dpi=DPI, format="png", metadata={DIGEST: digest(shown)})
