"""Goals and how far a measured run is from them: one table for GPUs (``gpu_goals``) and CPUs (``cpu_goals``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """measured: the figure out of a table's measurements, None where it was not measured."""

    name: str
    goal: float
    unit: str
    measured: Callable[[Any], float | None]
    at_most: bool = False  # the goal is an upper bound


def compare(goals: Iterable[Goal], measurements: Any) -> list[dict[str, Any]]:
    """A row for each goal: its value, the measured one and whether it is met (both None where it was not measured)."""
    rows = []
    for goal in goals:
        value = goal.measured(measurements)
        met = None if value is None else (value <= goal.goal if goal.at_most else value >= goal.goal)
        rows.append({"name": goal.name, "goal": goal.goal, "unit": goal.unit, "measured": value, "met": met})
    return rows


def table(rows: list[dict[str, Any]], title: str) -> str:
    width = max(len(text) for text in (title, *(row["name"] for row in rows)))
    lines = [f"{title:<{width}}{'goal':>12}{'measured':>14}  {'unit':<17}"]
    for row in rows:
        measured = "not measured" if row["measured"] is None else number(row["measured"])
        verdict = {None: "", True: "met", False: "not met"}[row["met"]]
        lines.append(f"{row['name']:<{width}}{number(row['goal']):>12}{measured:>14}  {row['unit']:<17}{verdict}".rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
