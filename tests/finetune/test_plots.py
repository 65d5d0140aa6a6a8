"""Pictures of a fine-tuning: what is drawn is in them, and the files are PNG and whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastbert.finetune import plots

LOG = [
    {"step": 10, "epoch": 0.5, "loss": 0.7, "grad_norm": 1.0, "learning_rate": 1e-5},
    {"step": 20, "epoch": 1.0, "loss": 0.4, "grad_norm": 1.0, "learning_rate": 1e-5},
    {"step": 20, "epoch": 1.0, "eval_loss": 0.5, "eval_accuracy": 0.8, "eval_f1": 0.7, "eval_runtime": 1.0},
    {"step": 40, "epoch": 2.0, "eval_loss": 0.6, "eval_accuracy": 0.9, "eval_f1": 0.8, "eval_runtime": 1.0},
    {"step": 40, "train_runtime": 3.0, "train_loss": 0.55},
]


@pytest.fixture
def figures(monkeypatch) -> list:
    """What is drawn, before it becomes a file."""
    drawn = []
    save = plots._save

    def remember(figure, path):
        drawn.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", remember)
    return drawn


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_learning_curves(tmp_path, figures):
    plots.plot_learning_curves({"seed 1": LOG, "seed 2": LOG[:2]}, "accuracy", tmp_path / "curves.png")
    assert is_png(tmp_path / "curves.png") and [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    losses, scores = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert lines == {
        "training, seed 1": [[10, 0.7], [20, 0.4]],
        "dev, seed 1": [[20, 0.5], [40, 0.6]],
        "training, seed 2": [[10, 0.7], [20, 0.4]],
    }
    assert [line.get_xydata().tolist() for line in scores.lines] == [[[20, 0.8], [40, 0.9]]]
    assert scores.get_title() == "accuracy (dev)"


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="eval_f2"):
        plots.plot_learning_curves({"a": [{"step": 1, "eval_f1": 0.5}]}, "f2", tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_confusion(tmp_path, figures):
    truth, predicted = ["a", "a", "b", "b", "b"], ["a", "b", "b", "b", "b"]
    assert plots.plot_confusion(truth, predicted, ["b", "a", "never"], tmp_path / "c.png") == ["b", "a", "never"]
    assert is_png(tmp_path / "c.png")
    axes = figures[0].axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 0]])
    assert [text.get_text() for text in axes.texts] == ["3", "0", "0", "1", "1", "0", "0", "0", "0"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b", "a", "never"]
    assert axes.get_ylabel() == "true" and axes.get_title() == ""


def test_of_many_labels_the_most_confused_are_shown(tmp_path, figures):
    labels = [f"l{number}" for number in range(60)]
    truth = labels * 3
    predicted = [*labels, *labels, *("l59" if number >= 50 else label for number, label in enumerate(labels))]
    shown = plots.plot_confusion(truth, predicted, labels, tmp_path / "c.png")
    assert len(shown) == plots.MOST_LABELS == 40 and shown[-10:] == labels[50:] and shown[:30] == labels[:30]
    axes = figures[0].axes[0]
    assert axes.get_title() == "the 40 labels of 60 with the most errors" and not axes.texts


def test_refusals(tmp_path):
    for truth, predicted, message in ((["a"], ["a", "b"], "1 true labels and 2"), ([], [], "at least one"), (["x"], ["a"], "'x'")):
        with pytest.raises(ValueError, match=message):
            plots.plot_confusion(truth, predicted, ["a", "b"], tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plots.plot_learning_curves({"a": LOG}, "accuracy", path)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_missing_packages(monkeypatch):
    assert plots.missing_packages() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sklearn" else object())
    assert plots.missing_packages() == "pictures need scikit-learn: pip install 'fastbert[train,eval]'"


def test_labels_are_no_formulas(tmp_path):
    labels = ["$a^$", "$\\frac{$"]  # which matplotlib's parser of mathematics refuses
    plots.plot_confusion(labels, labels, labels, tmp_path / "c.png")
    assert is_png(tmp_path / "c.png")
