"""The profiles of a suite's document (``benchmarks.profile``) as Markdown tables and as a picture of stacked bars.

Where fastbert does the work of two parts in one pass (``linear + gelu``), a table has one row for both, of transformers and the
floor, too; in the picture such a piece has the colour of the first and is hatched with that of the second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..parts import (
    ATTENTION,
    COPIES,
    EMBEDDINGS,
    GELU,
    LAYER_NORM,
    LINEAR,
    LOSS,
    MEANING,
    OPTIMIZER,
    OTHER,
    OUTSIDE,
    in_order,
    members,
    merged_rows,
)

THEIRS, OURS, FLOOR = "transformers", "fastbert", "floor"
# The colours of Okabe and Ito (2008), which people who are colour-blind can tell apart, and greys for what no model asks for.
COLOURS = {
    LINEAR: "#0072B2", ATTENTION: "#E69F00", LAYER_NORM: "#009E73", GELU: "#F0E442", EMBEDDINGS: "#56B4E9", LOSS: "#CC79A7",
    OPTIMIZER: "#D55E00", COPIES: "#4D4D4D", OTHER: "#969696", OUTSIDE: "#DEDEDE",
}  # fmt: skip
_DARK = (LINEAR, LAYER_NORM, OPTIMIZER, COPIES)
_SHOWN_SHARE = 0.05  # of the longest bar: a narrower piece has no room for its value
_NOTHING = "–"


class Profiles(NamedTuple):
    """Of a batch in a dtype: by library the entry of the document, of those that were profiled; floors: seconds by part."""

    batch: str
    dtype: str
    libraries: Mapping[str, Mapping[str, Any]]
    floors: Mapping[str, float]


def profiles_of(document: Mapping[str, Any]) -> list[Profiles]:
    """In the document's order, batch by batch; empty where it was made without ``--profile``, or before that had floors."""
    return list(_profiles(document))


def _profiles(document: Mapping[str, Any]) -> Iterator[Profiles]:
    for run in document.get("runs", {"": document}).values():  # training has a document for each dtype
        for batch, contenders in run.get("profile", {}).items():
            # Before there were floors, a profile had other parts.
            for dtype, floors in run.get("floors", {}).get(batch, {}).items():
                of_dtype = {name.removesuffix(f" {dtype}"): entry for name, entry in contenders.items()}
                libraries = {library: of_dtype[library] for library in (THEIRS, OURS) if library in of_dtype}
                if libraries:
                    yield Profiles(batch, dtype, libraries, floors)


def profile_table(document: Mapping[str, Any]) -> str:
    """In Markdown a table for each batch and dtype: milliseconds of each part in both libraries, its floor and how many times the
    floor fastbert takes. Empty where the document has no profile."""
    found = profiles_of(document)
    if not found:
        return ""
    rows = {part for profiles in found for part in _rows(profiles) for part in members(part)}
    legend = [f"- {part}: {MEANING[part]}" for part in in_order(rows)]
    return "\n\n".join([*map(_table, found), "\n".join(legend)])


def _rows(profiles: Profiles) -> list[str]:
    names = [part for entry in profiles.libraries.values() for part in entry["parts"]]
    return merged_rows([*names, *profiles.floors])


def _table(profiles: Profiles) -> str:
    lines = [
        f"**{profiles.batch}, {profiles.dtype}**\n",
        f"| part | {THEIRS} ms | {OURS} ms | {FLOOR} ms | gap ({OURS} / {FLOOR}) |",
        "|---|---:|---:|---:|---:|",
    ]
    parts = {library: entry["parts"] for library, entry in profiles.libraries.items()}
    for row in _rows(profiles):
        theirs, ours = (_sum_of(parts[library], row) if library in parts else None for library in (THEIRS, OURS))
        lines.append(_line(row, theirs, ours, _sum_of(profiles.floors, row)))
    seconds = {library: entry["seconds"] for library, entry in profiles.libraries.items()}
    lines.append(_line("**together**", seconds.get(THEIRS), seconds.get(OURS), sum(profiles.floors.values())))
    return "\n".join(lines)


def _sum_of(parts: Mapping[str, float], row: str) -> float:
    """Seconds of the parts, fused ones included, that a row stands for."""
    wanted = set(members(row))
    return sum(seconds for part, seconds in parts.items() if wanted.issuperset(members(part)))


def _line(title: str, theirs: float | None, ours: float | None, floor: float) -> str:
    gap = f"{ours / floor:.2f}" if ours and floor else _NOTHING
    return " | ".join([f"| {title}", _milliseconds(theirs), _milliseconds(ours), _milliseconds(floor), f"{gap} |"])


def _milliseconds(seconds: float | None) -> str:
    if not seconds:
        return _NOTHING
    return f"{seconds * 1e3:,.1f}" if seconds >= 0.01 else f"{seconds * 1e3:.3f}"


def profile_picture(document: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a PNG to ``path``: for each batch and dtype stacked bars of transformers, fastbert and the floor, in milliseconds.
    metadata: text that the PNG carries, by keyword.

    Raises ValueError where the document has no profile, ModuleNotFoundError without matplotlib.
    """
    found = profiles_of(document)
    if not found:
        raise ValueError("the document has no profile: fastbert bench makes one with --profile")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a picture of a profile needs matplotlib: pip install 'fastbert[viz]'") from error
    figure = Figure(figsize=(10, 0.9 + 1.7 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    shown: set[str] = set()
    for axes, profiles in zip(figure.subplots(len(found), squeeze=False)[:, 0], found, strict=True):
        bars = {library: entry["parts"] for library, entry in profiles.libraries.items()} | {FLOOR: profiles.floors}
        _draw(axes, bars)
        axes.set_title(f"{profiles.batch}, {profiles.dtype}", loc="left", fontsize=10)
        shown |= {part for parts in bars.values() for part in parts if parts[part]}
    axes.set_xlabel("milliseconds")
    patches = [Patch(label=part, **_look(part)) for part in in_order(shown)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 6), fontsize=9, frameon=False)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(beside, format="png", dpi=150, metadata=dict(metadata or {}))
    os.replace(beside, path)


def _draw(axes: Any, bars: Mapping[str, Mapping[str, float]]) -> None:
    longest = max(sum(parts.values()) for parts in bars.values())
    for height, parts in enumerate(bars.values()):
        left = 0.0
        for part in in_order(parts):
            width = parts[part] * 1e3
            axes.barh(height, width, left=left, height=0.75, linewidth=0.5, **_look(part))
            if parts[part] >= _SHOWN_SHARE * longest:
                axes.text(left + width / 2, height, _short(width), ha="center", va="center", fontsize=8, **_text(part))
            left += width
        axes.text(left + longest * 10, height, f"{_short(left)} ms", ha="left", va="center", fontsize=9, fontweight="bold")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1e3 * 1.08)
    axes.spines[["top", "right"]].set_visible(False)


def _look(part: str) -> dict[str, Any]:
    """The same of a part in every picture."""
    first, *others = members(part)
    return {"facecolor": COLOURS[first], "edgecolor": COLOURS[others[0]] if others else "white", "hatch": "///" if others else None}


def _text(part: str) -> dict[str, Any]:
    first, *others = members(part)
    colour = "white" if first in _DARK else "black"
    # Between the lines of a hatch a figure needs a ground of its own.
    return {"color": colour, "bbox": {"facecolor": COLOURS[first], "edgecolor": "none", "pad": 1.0} if others else None}


def _short(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
