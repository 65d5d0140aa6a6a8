"""Rows as Markdown: a table for each batch, who took no part and why, the ops, the limits, and where the time goes.

A column that no row of a table has is left out: earlier documents know less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .documents import Document, ceilings_of
from .rows import OpRow, Row

_AnyRow = TypeVar("_AnyRow", Row, OpRow)


def milliseconds(seconds: float) -> str:
    """As text with three digits or more."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}" if seconds < 1e-3 else f"{seconds * 1e3:.1f}"


def memory(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def times(median: float | None, low: float | None = None, high: float | None = None) -> str | None:
    """A ratio, with its quartiles where they are known; None where there is none."""
    if median is None:
        return None
    return f"{median:.2f}x" if low is None or high is None else f"{median:.2f}x ({low:.2f}-{high:.2f})"


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str | None]], text_columns: int = 1) -> str:
    """A table whose first ``text_columns`` are set left and the others right; empty cells are None, empty columns left out."""
    lines = list(lines)
    kept = [i for i in range(len(headings)) if any(line[i] for line in lines)]
    marks = ["---" if i < text_columns else "---:" for i in kept]
    cells = [[headings[i] for i in kept], marks, *([(line[i] or "").replace("|", "\\|") for i in kept] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def by_batch(rows: Iterable[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.batch, []).append(row)
    return grouped


_COLUMNS: dict[str, Callable[[Row], str | None]] = {
    "contender": lambda r: f"**{r.contender}**" if r.ours else r.contender,
    "dtype": lambda r: r.dtype,
    "ms (quartiles)": lambda r: _spread(r.median_s, r.q25_s, r.q75_s),
    "tokens/s": lambda r: _some(r.tokens_per_s, "{:,.0f}"),
    "sequences/s": lambda r: _some(r.sequences_per_s, "{:,.1f}"),
    "against transformers, same dtype": lambda r: times(r.ratio, r.ratio_q25, r.ratio_q75),
    "against transformers float32": lambda r: (
        times(r.float32_ratio, r.float32_ratio_q25, r.float32_ratio_q75) if r.dtype != "float32" else None
    ),
    "MFU": lambda r: _some(r.share_of_matmul_rate, "{:.0%}"),
    "of the limit": lambda r: _some(r.share_of_limit, "{:.0%}"),
    "memory": lambda r: None if r.peak_bytes is None else memory(r.peak_bytes),
    "J": lambda r: _some(r.joules, "{:,.2f}"),
}


def batch_table(rows: Iterable[Row]) -> str:
    """Of one batch's rows, those with figures, dtype by dtype."""
    timed = [row for row in rows if row.reason is None]
    dtypes = list(dict.fromkeys(row.dtype for row in timed))
    timed.sort(key=lambda row: dtypes.index(row.dtype))
    return markdown(list(_COLUMNS), ([cell(row) for cell in _COLUMNS.values()] for row in timed), text_columns=2)


def without_figures(rows: Sequence[Row]) -> list[str]:
    """A line of text for each contender that has no figures and each reason, with the dtypes, and the batches where those are not
    all."""
    batches = len(by_batch(rows))
    lines = []
    for (contender, reason), found in _by_reason(rows).items():
        where = dict.fromkeys(row.batch for row in found)
        lines.append(f"{contender}: {reason}" + ("" if len(where) == batches else f" ({'; '.join(where)})"))
    return lines


def _by_reason(rows: Iterable[_AnyRow]) -> dict[tuple[str, str], list[_AnyRow]]:
    """Rows without figures, by contender with its dtypes, and reason."""
    grouped: dict[tuple[str, str], list[_AnyRow]] = {}
    for row in rows:
        if row.reason is not None:
            grouped.setdefault((row.contender, row.reason), []).append(row)
    named: dict[tuple[str, str], list[_AnyRow]] = {}
    for (contender, reason), found in grouped.items():
        dtypes = ", ".join(dict.fromkeys(row.dtype for row in found))
        named[f"{contender} {dtypes}".strip(), reason] = found
    return named


def op_label(row: OpRow) -> str:
    dropout = f", dropout {row.dropout_p}" if row.dropout_p else ""
    return f"{row.op} {row.case}, {row.hidden}{dropout}, {row.dtype}"


_OP_COLUMNS: dict[str, Callable[[OpRow], str | None]] = {
    "case": op_label,
    "contender": lambda r: f"**{r.contender}**" if r.ours else r.contender,
    "direction": lambda r: r.direction,
    "ms (quartiles)": lambda r: _spread(r.median_s, r.q25_s, r.q75_s),
    "GFLOP/s": lambda r: f"{r.flops_per_s / 1e9:,.0f}" if r.flops_per_s else None,
    "GB/s": lambda r: f"{r.bytes_per_s / 1e9:,.1f}" if r.bytes_per_s else None,
    "of the limit": lambda r: _some(r.share_of_ceiling, "{:.0%}"),
    "fastbert, times as fast": lambda r: times(r.fastbert_ratio, r.fastbert_ratio_q25, r.fastbert_ratio_q75),
}


def ops_table(rows: Iterable[OpRow]) -> str:
    """Contenders of the same case and direction stand below each other."""
    timed = [row for row in rows if row.reason is None]
    order = {key: i for i, key in enumerate(dict.fromkeys(op_label(row) for row in timed))}
    directions = list(dict.fromkeys(row.direction for row in timed))
    timed.sort(key=lambda row: (order[op_label(row)], directions.index(row.direction)))
    return markdown(list(_OP_COLUMNS), ([cell(row) for cell in _OP_COLUMNS.values()] for row in timed), text_columns=3)


def ops_without_figures(rows: Iterable[OpRow]) -> list[str]:
    """A line of text for each contender that has no figures and each reason, with the dtypes and ops."""
    return [
        f"{contender}: {reason} ({', '.join(dict.fromkeys(row.op for row in found))})"
        for (contender, reason), found in _by_reason(rows).items()
    ]


def limits_table(document: Document) -> str:
    """The machine's ceilings as that run measured them."""

    def line(dtype: str, ceilings: Mapping[str, Any]) -> list[str | None]:
        libraries = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in ceilings.get("matmul_flops_by_library", {}).items())
        return [dtype, f"{ceilings['matmul_flops'] / 1e9:,.0f}", libraries, f"{ceilings['copy_bytes'] / 1e9:,.1f}"]

    headings = ("dtype", "matmul rate, GFLOP/s", "by library", "copy bandwidth, GB/s")
    return markdown(headings, (line(dtype, ceilings) for dtype, ceilings in ceilings_of(document).items()))


def contenders_table(document: Document) -> str | None:
    """Who was asked to take part, in which version and how each is run; None where the document does not say."""
    peers = document.get("peers")
    if not peers:
        return None
    lines = [[peer["title"], peer["version"], peer["how"]] for peer in peers.values()]
    return markdown(("contender", "version", "how it is run"), lines, text_columns=3)


def _some(value: float | None, text: str) -> str | None:
    return None if value is None else text.format(value)


def _spread(median: float | None, low: float | None, high: float | None) -> str | None:
    if median is None:
        return None
    quartiles = "" if low is None or high is None else f" ({milliseconds(low)}-{milliseconds(high)})"
    return milliseconds(median) + quartiles
