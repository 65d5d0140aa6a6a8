"""Where fastbert does not help, as the measurements have it: it is slower than another contender of its dtype, less than 1.2x as
fast as transformers, or has no result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .rows import OpRow, Row
from .tables import markdown, milliseconds, op_label, times

WORTH_IT = 1.2  # times as fast as transformers
# Contenders that do a part of an op's work, as a floor.
_PARTS = ("plain linear",)


@dataclass(frozen=True)
class Loss:
    """ours: a row of fastbert; fastest: of the others, where it is faster; reason: why ours has no figures."""

    ours: Row
    fastest: Row | None


@dataclass(frozen=True)
class OpLoss:
    """ours: the fastest backend of fastbert in a case and direction; fastest: the faster other contender."""

    ours: OpRow
    fastest: OpRow


def losses(rows: Sequence[Row]) -> list[Loss]:
    """Of one document's rows, in their order."""
    found = []
    for ours in rows:
        if not ours.ours:
            continue
        raced = [row for row in rows if (row.batch, row.dtype) == (ours.batch, ours.dtype) and row.median_s is not None]
        fastest = min((row for row in raced if not row.ours), key=_median, default=None)
        if fastest is not None and ours.median_s is not None and _median(fastest) >= ours.median_s:
            fastest = None
        if fastest is not None or ours.median_s is None or (ours.ratio is not None and ours.ratio < WORTH_IT):
            found.append(Loss(ours, fastest))
    return found


def op_losses(rows: Iterable[OpRow]) -> list[OpLoss]:
    """Of one document's rows, in their order: a case and direction where no backend of fastbert is the fastest."""
    raced: dict[tuple[str, str | None], list[OpRow]] = {}
    for row in rows:
        if row.median_s is not None and row.contender not in _PARTS:
            raced.setdefault((op_label(row), row.direction), []).append(row)
    found = []
    for contenders in raced.values():
        contenders.sort(key=_median)
        ours = next((row for row in contenders if row.ours), None)
        if ours is not None and ours is not contenders[0]:
            found.append(OpLoss(ours, contenders[0]))
    return found


def table(found: Iterable[tuple[str, Loss]]) -> str:
    """With the machine's name before each."""
    headings = ("machine", "suite", "model", "batch", "contender", "ms", "the fastest other", "its ms", "against transformers")
    lines = []
    for machine, loss in found:
        ours, other = loss.ours, loss.fastest
        lines.append(
            [
                machine, ours.suite, ours.model, ours.batch, f"{ours.contender} {ours.dtype}",
                milliseconds(ours.median_s) if ours.median_s is not None else f"no result: {ours.reason}",
                other and f"{other.contender} {other.dtype}",
                other and milliseconds(_median(other)),
                times(ours.ratio, ours.ratio_q25, ours.ratio_q75) if ours.ratio is not None else None,
            ]
        )  # fmt: skip
    return markdown(headings, lines, text_columns=5)


def op_table(found: Iterable[tuple[str, OpLoss]]) -> str:
    headings = ("machine", "case", "direction", "fastbert", "ms", "the fastest other", "its ms")
    return markdown(
        headings,
        (
            [
                machine, op_label(loss.ours), loss.ours.direction, loss.ours.contender, milliseconds(_median(loss.ours)),
                loss.fastest.contender, milliseconds(_median(loss.fastest)),
            ]
            for machine, loss in found
        ),
        text_columns=4,
    )  # fmt: skip


def _median(row: Row | OpRow) -> float:
    """Of a row with figures."""
    assert row.median_s is not None
    return row.median_s
