"""Rows as pictures: rates by length and by number of sequences, ratios with their spread, the roofline, memory.

Each picture shows some of a document's rows and is made only where there are such. A panel per dtype, contenders by colour and
marker, so that it reads in grey, too; the colours are Okabe and Ito's for all kinds of colour vision
(https://jfly.uni-koeln.de/color/).

They need matplotlib (``pip install 'fastbert[viz]'``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .rows import DTYPES, OURS, THEIRS, Row
from .tables import memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHORTEST_CURVE = 3  # batches; two points are no curve
_EQUAL = re.compile(r"(\d+) x (\d+)")
_PANEL_WIDTH, _LINE_HEIGHT, DPI = 4.6, 0.14, 110
_NEAR = 1.3  # of the roofline's logarithmic x: two names within this factor would lie upon each other

_BLACK, _ORANGE, _SKY, _GREEN, _YELLOW, _BLUE, _VERMILION, _PURPLE, _GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
)  # fmt: skip
_STYLES = {
    OURS: (_VERMILION, "o"),
    f"{OURS} packed": (_VERMILION, "*"),
    THEIRS: (_BLACK, "s"),
    f"{THEIRS} eager": (_GREY, "D"),
    f"{THEIRS} compiled": (_PURPLE, "P"),
    f"{THEIRS} sorted, oneDNN": (_SKY, "^"),
    f"{THEIRS} sorted in micro-batches, oneDNN": (_SKY, "^"),
    f"{THEIRS} padded to the longest, oneDNN": (_BLUE, "v"),
    "ONNX Runtime": (_GREEN, "X"),
    "OpenVINO": (_ORANGE, "d"),
    "CTranslate2": (_YELLOW, "h"),
}
# Of contenders that are not above, in the order of their names.
_OTHER_STYLES = [(colour, marker) for marker in "<>p8" for colour in (_GREEN, _BLUE, _PURPLE, _ORANGE, _SKY, _GREY)]


@dataclass(frozen=True)
class Plot:
    """shown: of a document's rows those that the picture shows, none where it has nothing to show; draw: makes it of these."""

    title: str
    shown: Callable[[Sequence[Row]], list[Row]]
    draw: Callable[[Sequence[Row]], Figure]


def styles(contenders: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each; the known ones have theirs in every picture."""
    others = sorted(set(contenders) - set(_STYLES))
    return {**_STYLES, **{name: _OTHER_STYLES[i % len(_OTHER_STYLES)] for i, name in enumerate(others)}}


# --- which rows ----------------------------------------------------------------------------------------------------------


def equal_lengths(row: Row) -> tuple[int, int] | None:
    """Sequences and tokens of each, of a batch such as "32 x 128"; None for other batches."""
    match = _EQUAL.fullmatch(row.batch)
    return match and (int(match[1]), int(match[2]))


def _curve(rows: Sequence[Row], same: Callable[[int, int], Hashable]) -> list[Row]:
    """Of batches of equal lengths that have ``same`` in common, the largest group, if it has the points of a curve."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        if row.tokens_per_s is not None and (shape := equal_lengths(row)):
            groups.setdefault(same(*shape), []).append(row)
    largest = max(groups.values(), key=lambda group: len({row.batch for row in group}), default=[])
    return largest if len({row.batch for row in largest}) >= SHORTEST_CURVE else []


def _with_length(rows: Sequence[Row]) -> list[Row]:
    return _curve(rows, lambda sequences, length: sequences * length)


def _with_sequences(rows: Sequence[Row]) -> list[Row]:
    return _curve(rows, lambda sequences, length: length)


def _with_ratio(rows: Sequence[Row]) -> list[Row]:
    """In a dtype that transformers has not, such as int8, those with a ratio to its float32."""
    same = {row.dtype for row in rows if row.ratio is not None}
    return [row for row in rows if (row.ratio if row.dtype in same else row.float32_ratio) is not None]


def _with_work(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.median_s and row.flops and row.bytes]


def _with_memory(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.peak_bytes is not None]


# --- drawing -------------------------------------------------------------------------------------------------------------


def _panels(rows: Sequence[Row], height: float, shared_y: bool) -> tuple[Figure, dict[str, Axes]]:
    """An axes for each dtype, without pyplot, which would choose a backend for the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = sorted({row.dtype for row in rows}, key=lambda dtype: (DTYPES.index(dtype) if dtype in DTYPES else len(DTYPES), dtype))
    figure = Figure(figsize=(1.6 + _PANEL_WIDTH * len(dtypes), height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(dtypes), squeeze=False, sharey=shared_y)[0]
    for one, dtype in zip(axes, dtypes, strict=True):
        one.set_title(dtype)
        one.grid(alpha=0.3)
    return figure, dict(zip(dtypes, axes, strict=True))


def _finish(figure: Figure, rows: Sequence[Row], title: str) -> Figure:
    """Title, and a legend of all contenders below the panels."""
    from matplotlib.lines import Line2D

    names = _contenders(rows)
    of_name = styles(names)
    handles = [Line2D([], [], label=name, linestyle="none", **_marker(of_name[name], _is_ours(rows, name))) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 4), fontsize=9)
    figure.suptitle(title)
    for text in figure.texts:
        text.set_parse_math(False)  # a checkpoint's name with two $ is no formula
    return figure


def _contenders(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.contender for row in rows))


def _is_ours(rows: Sequence[Row], name: str) -> bool:
    return any(row.ours for row in rows if row.contender == name)


def _marker(style: tuple[str, str], ours: bool) -> dict[str, Any]:
    colour, marker = style
    return {"color": colour, "marker": marker, "markersize": 9 if ours else 7, "markeredgecolor": _BLACK, "markeredgewidth": 0.6}


def _subject(rows: Sequence[Row]) -> str:
    return f"{rows[0].suite}, {rows[0].model}"


def _rates(rows: Sequence[Row], along: int, xlabel: str, title: str) -> Figure:
    """Tokens/s over the sequences (``along`` 0) or the tokens of each (1)."""
    figure, panels = _panels(rows, 4.6, shared_y=False)
    of_name = styles(_contenders(rows))
    for dtype, axes in panels.items():
        for name in _contenders(rows):
            points = [(equal_lengths(row)[along], row) for row in rows if (row.contender, row.dtype) == (name, dtype)]
            points.sort(key=lambda point: point[0])
            if points:
                ours = points[0][1].ours
                axes.plot(
                    [x for x, _ in points], [row.tokens_per_s or 0.0 for _, row in points],
                    linewidth=2.5 if ours else 1.2, zorder=3 if ours else 2, **_marker(of_name[name], ours),
                )  # fmt: skip
        ticks = sorted({equal_lengths(row)[along] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set(xlabel=xlabel, ylabel="real tokens per second", ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:,.0f}")
    return _finish(figure, rows, title)


def _by_length(rows: Sequence[Row]) -> Figure:
    sequences, length = equal_lengths(rows[0])
    return _rates(rows, 1, "tokens of each sequence", f"{_subject(rows)}: batches of {sequences * length:,} tokens")


def _by_sequences(rows: Sequence[Row]) -> Figure:
    _, length = equal_lengths(rows[0])
    return _rates(rows, 0, "sequences in a batch", f"{_subject(rows)}: sequences of {length:,} tokens")


def _against(row: Row) -> tuple[float, float, float]:
    """The median and quartiles of the ratio that :func:`_with_ratio` has found."""
    same = (row.ratio, row.ratio_q25, row.ratio_q75)
    median, low, high = same if row.ratio is not None else (row.float32_ratio, row.float32_ratio_q25, row.float32_ratio_q75)
    assert median is not None
    return median, median if low is None else low, median if high is None else high


def _dots(
    rows: Sequence[Row], value: Callable[[Row], tuple[float, float, float]], text: Callable[[float], str]
) -> tuple[Figure, dict[str, Axes]]:
    """A panel per dtype with the batches from top to bottom, in each the contenders below each other: a point with its quartiles
    (``value``: median, low, high), and fastbert's as ``text``."""
    names, batches = _contenders(rows), list(dict.fromkeys(row.batch for row in rows))
    of_name = styles(names)
    figure, panels = _panels(rows, 1.8 + _LINE_HEIGHT * len(batches) * (len(names) + 1), shared_y=True)
    for dtype, axes in panels.items():
        for row in rows:
            if row.dtype == dtype:
                median, low, high = value(row)
                y = batches.index(row.batch) + (names.index(row.contender) + 1) / (len(names) + 1) - 0.5
                axes.errorbar(
                    median, y, xerr=[[median - low], [high - median]], capsize=3, ecolor=_BLACK, elinewidth=1,
                    linestyle="none", **_marker(of_name[row.contender], row.ours),
                )  # fmt: skip
                if row.ours:
                    axes.annotate(text(median), (high, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)
        for border in range(1, len(batches)):
            axes.axhline(border - 0.5, color=_GREY, linewidth=0.5)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(batches) - 0.5, -0.5)
        axes.set_yticks(range(len(batches)), batches, parse_math=False)
        axes.margins(x=0.22)  # room for the text
    return figure, panels


def _ratios(rows: Sequence[Row]) -> Figure:
    figure, panels = _dots(rows, _against, "{:.2f}x".format)
    for dtype, axes in panels.items():
        same = any(row.ratio is not None for row in rows if row.dtype == dtype)
        axes.axvline(1, color=_BLACK, linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.set_xlabel(f"times as fast as transformers{'' if same else ' float32'} (bars: quartiles)")
    return _finish(figure, rows, f"{_subject(rows)}: against transformers")


def _memory(rows: Sequence[Row]) -> Figure:
    figure, panels = _dots(rows, lambda row: (row.peak_bytes / 1e9,) * 3, lambda size: memory(round(size * 1e9)))
    for axes in panels.values():
        axes.set(xlabel="peak memory beyond weights and batch, GB", xlim=(0, None))
    return _finish(figure, rows, f"{_subject(rows)}: memory")


def _roofline(rows: Sequence[Row]) -> Figure:
    """Points at the FLOPs per byte of the batch's least work and the FLOP/s reached, below the roofs of that run."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, panels = _panels(rows, 5.2, shared_y=True)
    of_name = styles(_contenders(rows))
    at = [row.flops / row.bytes for row in rows]
    ridges = [row.matmul_flops / row.copy_bytes for row in rows]
    left, right = min(*at, *ridges) / 3, max(*at, *ridges) * 3
    for dtype, axes in panels.items():
        of_dtype = [row for row in rows if row.dtype == dtype]
        rate, copies = of_dtype[0].matmul_flops, of_dtype[0].copy_bytes
        ridge = rate / copies
        axes.plot([left, ridge, right], [min(x * copies, rate) / 1e9 for x in (left, ridge, right)], color=_BLACK)
        roofs = f"roofs: {rate / 1e9:,.0f} GFLOP/s of matmuls,\n{copies / 1e9:,.0f} GB/s of copies"
        axes.text(0.03, 0.97, roofs, transform=axes.transAxes, va="top", fontsize=8)
        for row in of_dtype:
            axes.plot(
                row.flops / row.bytes, row.flops / row.median_s / 1e9,
                linestyle="none", zorder=3 if row.ours else 2, **_marker(of_name[row.contender], row.ours),
            )  # fmt: skip
        for x, batches in _near({row.batch: row.flops / row.bytes for row in of_dtype}):
            name = batches[0] + (f" and {len(batches) - 1} more" if len(batches) > 1 else "")
            axes.axvline(x, color=_GREY, linewidth=0.4)
            axes.annotate(
                name, (x, 0.02), xycoords=axes.get_xaxis_transform(), xytext=(-6, 0), textcoords="offset points",
                rotation=90, ha="right", va="bottom", fontsize=7, parse_math=False,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte of the batch's least work", ylabel="GFLOP/s reached")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.6g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    reached = [row.flops / row.median_s for row in rows]
    roof = max(row.matmul_flops or 0.0 for row in rows)
    axes.set_ylim(min(reached) / 1e9 / 4, max(*reached, roof) / 1e9 * 3)  # room for the names below and the roofs' text above
    return _finish(figure, rows, f"{_subject(rows)}: roofline")


def _near(places: Mapping[str, float]) -> list[tuple[float, list[str]]]:
    """Names by place, those that are too near to be told apart together at the first one's."""
    found: list[tuple[float, list[str]]] = []
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        if found and place < _NEAR * found[-1][0]:
            found[-1][1].append(name)
        else:
            found.append((place, [name]))
    return found


PLOTS: Mapping[str, Plot] = {
    "by-length": Plot("Tokens per second by length", _with_length, _by_length),
    "by-sequences": Plot("Tokens per second by number of sequences", _with_sequences, _by_sequences),
    "ratios": Plot("Ratios to transformers, with quartiles", _with_ratio, _ratios),
    "roofline": Plot("Roofline", _with_work, _roofline),
    "memory": Plot("Peak memory", _with_memory, _memory),
}
