"""The picture of a run: losses, accuracies, learning rate and speed over the steps, with the held-out scores as points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.runs.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_losses(rows: Sequence[dict[str, Any]], path: Path, phase_starts: Sequence[int] = ()) -> None:
    """Draws the rows of ``metrics.jsonl`` to a PNG at ``path``.

    ``phase_starts``: the steps after which another phase begins, dashed lines. Steps that were left out are crosses at the
    bottom of the losses. What the rows do not have (next sentences of a run without pairs, the MFU where no rate is known) is
    not drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (loss_axes, accuracy_axes), (rate_axes, speed_axes) = figure.subplots(2, 2)
    _scores(loss_axes, rows, "mlm_loss", "masked LM", "C0")
    _scores(accuracy_axes, rows, "mlm_accuracy", "masked LM", "C0")
    _scores(accuracy_axes, rows, "nsp_accuracy", "next sentence", "C1")
    _line(rate_axes, rows, "learning_rate", color="C2")
    _line(speed_axes, rows, "tokens_per_second", color="C3", label="tokens/s")
    loss_axes.set(title="Loss", ylabel="nats per masked token")
    accuracy_axes.set(title="Accuracy", ylim=(0, 1))
    rate_axes.set(title="Learning rate", ylim=(0, None))
    speed_axes.set(title="Speed", ylabel="real tokens per second", ylim=(0, None))
    if skipped := [row["step"] for row in rows if "skipped" in row]:
        ground = loss_axes.get_xaxis_transform()
        loss_axes.plot(skipped, [0.02] * len(skipped), "x", color="red", transform=ground, label=f"left out: {len(skipped)}")
    for axes in (loss_axes, accuracy_axes, rate_axes, speed_axes):
        for step in phase_starts:
            axes.axvline(step, color="grey", linestyle="--", label="next phase" if axes is loss_axes else None)
        axes.grid(alpha=0.3)
        axes.set_xlabel("step")
    _mfu(speed_axes, rows)
    for axes in (loss_axes, accuracy_axes):
        if axes.get_lines():
            axes.legend()
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=110, format="png")


def _scores(axes: Axes, rows: Sequence[dict[str, Any]], name: str, label: str, colour: str) -> None:
    """A line of what was trained on, points of what was held out."""
    if not _line(axes, rows, name, color=colour, label=f"{label}, training"):
        return
    held_out = [(row["step"], row["held_out"][name]) for row in rows if "held_out" in row]
    axes.plot(*zip(*held_out, strict=True), "o", color=colour, label=f"{label}, held out")


def _line(axes: Axes, rows: Sequence[dict[str, Any]], name: str, **style: Any) -> bool:
    """Whether any row has it."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
    return bool(points)


def _mfu(speed_axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """On a scale of its own at the right."""
    if not any("mfu" in row for row in rows):
        return
    axes = speed_axes.twinx()
    _line(axes, rows, "mfu", color="C4", label="MFU")
    axes.set(ylim=(0, 1), ylabel="MFU")
    axes.legend(handles=[*speed_axes.get_lines()[:1], *axes.get_lines()])
