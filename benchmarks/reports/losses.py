"""Where fastbert does not help, as the measurements have it: it is slower than another contender of its dtype, less than 1.2x as
fast as transformers, or has no result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .rows import OpRow, Row
from .tables import markdown, milliseconds, op_label, times

WORTH_IT = 1.2  # times as fast as transformers


@dataclass(frozen=True)
class Loss:
    """ours: a row of fastbert; fastest: the fastest other contender, where it is faster or fastbert has no figures."""

    ours: Row
    fastest: Row | None


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


def op_losses(rows: Iterable[OpRow]) -> list[OpRow]:
    """Of one document's rows, in their order, the fastest other contender of each case and direction that is faster than fastbert's
    own choice in the same rounds."""
    faster: dict[tuple[str, str | None], list[OpRow]] = {}
    for row in rows:
        if row.fastbert_ratio is not None and row.fastbert_ratio < 1 and not row.ours and _comparable(row):
            faster.setdefault((op_label(row), row.direction), []).append(row)
    return [min(found, key=_median) for found in faster.values()]


def _comparable(row: OpRow) -> bool:
    """Not what does a part of the op's work, as a floor; nor one direction of Liger's losses, whose forward pass does the work of
    both."""
    if row.op == "mlm_loss" and row.contender.startswith("Liger"):
        return row.direction == "both"
    return row.contender != "plain linear"


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
                f"{other.contender} {other.dtype}" if other else None,
                milliseconds(_median(other)) if other else None,
                times(ours.ratio, ours.ratio_q25, ours.ratio_q75),
            ]
        )  # fmt: skip
    return markdown(headings, lines, text_columns=5)


def op_table(found: Iterable[tuple[str, OpRow]]) -> str:
    """With the machine's name before each."""
    headings = ("machine", "case", "direction", "the fastest other", "its ms", "fastbert, times as fast")
    lines = (
        [
            machine, op_label(row), row.direction, row.contender, milliseconds(_median(row)),
            times(row.fastbert_ratio, row.fastbert_ratio_q25, row.fastbert_ratio_q75),
        ]
        for machine, row in found
    )  # fmt: skip
    return markdown(headings, lines, text_columns=4)


def _median(row: Row | OpRow) -> float:
    """Of a row with figures."""
    assert row.median_s is not None
    return row.median_s
