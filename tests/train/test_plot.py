"""The picture has what the rows have, whatever kind of run they are of."""

from __future__ import annotations

import pytest

from fastbert.train.plot import plot_losses

figures = pytest.importorskip("matplotlib.figure", reason="the picture needs matplotlib")


def row(step: int, **changes) -> dict:
    values = {"loss": 2.0, "mlm_loss": 1.5, "mlm_accuracy": 0.4, "nsp_accuracy": 0.6, "learning_rate": 1e-4}
    row = {"step": step, **values, "tokens_per_second": 1000.0, "mfu": 0.5, **changes}
    return {name: value for name, value in row.items() if value is not None}


def drawn(rows: list[dict], tmp_path, monkeypatch, **options) -> dict[str, list[str]]:
    """Labels of the lines by the title of their panel; MFU's scale has none."""
    found = []
    savefig = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: (found.append(self), savefig(self, *a, **k)))
    plot_losses(rows, tmp_path / "loss.png", **options)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    return {axes.get_title(): [str(line.get_label()) for line in axes.get_lines()] for axes in found[0].axes}


def held_out(step: int, *names: str) -> dict:
    return {"step": step, "held_out": dict.fromkeys(names, 0.5)}


def test_all_of_a_run(tmp_path, monkeypatch):
    scores = ("mlm_loss", "mlm_accuracy", "nsp_accuracy")
    rows = [held_out(0, *scores), row(10), {"step": 15, "skipped": {"step": 15}}, row(20), held_out(20, *scores)]
    lines = drawn(rows, tmp_path, monkeypatch, phase_starts=[12])
    assert lines["Loss"] == ["masked LM, training", "masked LM, held out", "left out: 1", "next phase"]
    assert [label for label in lines["Accuracy"] if "sentence" in label] == ["next sentence, training", "next sentence, held out"]
    assert len(lines["Learning rate"]) == 2  # the phase's line, too
    assert lines["Speed"][0] == "tokens/s" and lines[""] == ["MFU"]


def test_without_sentence_pairs_a_rate_or_anything_left_out(tmp_path, monkeypatch):
    scores = ("mlm_loss", "mlm_accuracy")
    rows = [held_out(0, *scores), row(10, nsp_accuracy=None, mfu=None), held_out(10, *scores)]
    lines = drawn(rows, tmp_path, monkeypatch)
    assert lines["Loss"] == ["masked LM, training", "masked LM, held out"]
    assert lines["Accuracy"] == ["masked LM, training", "masked LM, held out"]
    assert lines["Speed"] == ["tokens/s"] and "" not in lines


def test_a_run_of_which_nothing_was_logged(tmp_path, monkeypatch):
    assert drawn([held_out(0, "mlm_loss")], tmp_path, monkeypatch)["Loss"] == []
