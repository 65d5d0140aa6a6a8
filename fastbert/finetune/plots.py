"""The pictures of a fine-tuning: its learning curves, and which labels it takes for which. PNG files, written whole.

They need matplotlib and scikit-learn (``pip install 'fastbert[train,eval]'``); :func:`missing_packages` says so beforehand.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastbert.runs.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LABELS = 40  # more are not legible
_EVALUATED = "eval_"
_NUMBERS_UP_TO = 15  # labels; in more of them the numbers run into each other


def missing_packages() -> str | None:
    """Why no pictures can be drawn, and what to install; None where they can."""
    missing = [name for name, module in (("matplotlib", "matplotlib"), ("scikit-learn", "sklearn")) if not _is_there(module)]
    return f"pictures need {' and '.join(missing)}: pip install 'fastbert[train,eval]'" if missing else None


def plot_learning_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, path: Path) -> None:
    """Draws the loss and the dev set's ``metric`` against the optimizer steps.

    logs: for each training (of one seed, say) by its name the rows of transformers' ``trainer.state.log_history``: those with
    ``loss`` are of training, those with ``eval_<metric>`` (and ``eval_loss``) of the dev set. A training whose rows have nothing of
    a kind has no such curve. Raises ValueError where there is nothing to draw at all.
    """
    figure = _figure(11, 4)
    loss_axes, score_axes = figure.subplots(1, 2)
    drawn = 0
    for number, (name, rows) in enumerate(logs.items()):
        colour, label = f"C{number % 10}", f", {name}" if len(logs) > 1 else ""
        for axes, key, kind, style in (
            (loss_axes, "loss", "training", "-"),
            (loss_axes, f"{_EVALUATED}loss", "dev", "o--"),
            (score_axes, f"{_EVALUATED}{metric}", "dev", "o-"),
        ):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points), style, color=colour, label=f"{kind}{label}", markersize=4)
                drawn += 1
    if not drawn:
        raise ValueError(f"no row has a loss or {_EVALUATED}{metric}: there is nothing to draw")
    loss_axes.set(title="Loss", xlabel="step")
    score_axes.set(title=f"{metric} (dev)", xlabel="step")
    for axes in (loss_axes, score_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    _save(figure, path)


def plot_confusion(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str], path: Path) -> list[str]:
    """Draws how often each label (a row) was taken for each (a column), and returns the labels that the picture shows.

    truth, predicted: one of ``labels`` for each example, the same length. Of more than 40 labels those are shown that take part in
    the most errors, in the order of ``labels``, and examples of others are left out, which the title says. Colours are shares of a
    row, so that rare labels are seen, too; numbers are counts.

    Raises ValueError for a label that is not among ``labels``, and for examples that are none.
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    if len(truth) != len(predicted) or not len(truth):
        raise ValueError(f"there are {len(truth)} true labels and {len(predicted)} predicted ones; expected as many, at least one")
    if unknown := sorted({*truth, *predicted} - set(labels)):
        raise ValueError(f"{unknown[0]!r} is not among the labels ({', '.join(labels[:10])})")
    counts = confusion_matrix(truth, predicted, labels=list(labels))
    shown = most_confused(counts, MOST_LABELS)
    names = [labels[number] for number in shown]
    part = counts[np.ix_(shown, shown)]
    shares = part / np.maximum(part.sum(1, keepdims=True), 1)

    size = 3 + 0.3 * len(names)
    figure = _figure(size + 1, size)
    axes = figure.subplots()
    ConfusionMatrixDisplay(shares, display_labels=names).plot(
        ax=axes, cmap="Blues", include_values=False, xticks_rotation="vertical", im_kw={"vmin": 0, "vmax": 1}
    )
    for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        tick.set_parse_math(False)  # a label with two $ is no formula
    if len(names) <= _NUMBERS_UP_TO:
        for (row, column), count in np.ndenumerate(part):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) < len(labels):
        axes.set_title(f"the {len(names)} labels of {len(labels)} with the most errors", fontsize=10)
    _save(figure, path)
    return names


def most_confused(counts: NDArray[np.integer], most: int) -> list[int]:
    """The numbers of at most ``most`` labels, ascending: those in whose row and column (n, n) ``counts`` hold the most errors.

    Of labels with equally many errors the first ones are taken.
    """
    if len(counts) <= most:
        return list(range(len(counts)))
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    return sorted(np.argsort(-errors, kind="stable")[:most].tolist())


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _figure(width: float, height: float) -> Figure:
    """Without pyplot, which would choose a backend for the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
