"""The picture of a run: losses and accuracies over the steps, with the held-out ones as points."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the rows of ``metrics.jsonl`` to a PNG at ``path``: masked-LM loss on the left, accuracies on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [row for row in rows if "loss" in row]
    held_out = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    steps = [row["step"] for row in train]
    held_out_steps = [step for step, _ in held_out]
    for axes, name, label, colour in (
        (loss_axes, "mlm_loss", "masked LM", "C0"),
        (accuracy_axes, "mlm_accuracy", "masked LM", "C0"),
        (accuracy_axes, "nsp_accuracy", "next sentence", "C1"),
    ):
        if any(name not in row for row in train):  # a run without sentence pairs
            continue
        axes.plot(steps, [row[name] for row in train], color=colour, label=f"{label}, training")
        axes.plot(held_out_steps, [s[name] for _, s in held_out], "o", color=colour, label=f"{label}, held out")
    loss_axes.set(title="Loss", xlabel="step", ylabel="nats per masked token")
    accuracy_axes.set(title="Accuracy", xlabel="step", ylim=(0, 1))
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
