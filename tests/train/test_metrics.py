"""Averages weigh every masked token alike; the metrics file never repeats a step."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from fastbert.runs.errors import TrainingError
from fastbert.train.metrics import BatchScores, MetricsFile, ScoreSums, Window, read_metrics, scores_tensor


def scores(**values) -> BatchScores:
    defaults = {"mlm_loss": 2.0, "mlm_correct": 1, "mlm_count": 4, "nsp_loss": 0.5, "nsp_correct": 1, "nsp_count": 2}
    return BatchScores(**{**defaults, "grad_norm": 1.0, **values})


def test_means_weigh_by_counts():
    sums = ScoreSums()
    sums.add(scores(mlm_loss=1.0, mlm_correct=3, mlm_count=3, nsp_loss=0.2, nsp_correct=1, nsp_count=1))
    sums.add(scores(mlm_loss=3.0, mlm_correct=0, mlm_count=1, nsp_loss=0.6, nsp_correct=0, nsp_count=3))
    means = sums.means()
    assert means == pytest.approx({"mlm_loss": 1.5, "nsp_loss": 0.5, "loss": 2.0, "mlm_accuracy": 0.75, "nsp_accuracy": 0.25})


def test_scores_as_one_tensor():
    values = scores_tensor(
        mlm_loss=torch.tensor(2.5, requires_grad=True),
        mlm_correct=torch.tensor(2**24 + 1),
        mlm_count=2**24 + 3,
        nsp_loss=torch.tensor(0.5),
        nsp_correct=torch.tensor(3),
        nsp_count=4,
    )
    assert not values.requires_grad
    assert BatchScores(*values.tolist()) == BatchScores(2.5, 2**24 + 1, 2**24 + 3, 0.5, 3, 4)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"mlm_loss": float("nan")}, "the loss is nan"),
        ({"nsp_loss": float("inf")}, "the loss is inf"),
        ({"grad_norm": float("nan")}, "the gradient norm is nan"),
        ({"mlm_loss": 9.0, "loss_limit": 5.0}, "the loss is 9.5, above 5"),
    ],
)
def test_why_a_step_was_left_out(bad, reason):
    assert scores().reason is None
    assert scores(**bad, left_out=1.0).reason == reason


def test_without_sentence_pairs_there_are_no_scores_of_them():
    sums = ScoreSums()
    sums.add(BatchScores(2.0, 1, 4, 0.0, 0, 0))
    assert sums.means() == {"loss": 2.0, "mlm_loss": 2.0, "mlm_accuracy": 0.25}


def test_a_window_survives_json():
    window = Window.empty()
    window.add(scores(mlm_loss=1 / 3), tokens=100, flops=1e9)
    window.seconds, window.waited = 0.1, 0.025
    from dataclasses import asdict

    assert Window.from_dict(json.loads(json.dumps(asdict(window)))) == window
    row = window.row(5, 1e-4)
    assert (row["step"], row["tokens"], row["learning_rate"]) == (5, 100, 1e-4)
    assert (row["tokens_per_second"], row["loader_wait"], row["seconds"]) == pytest.approx((1000, 0.25, 0.1))


def test_rows_are_on_the_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write({"step": 1, "loss": 2.0})
        assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_a_listener_gets_every_row(tmp_path):
    heard = []
    with MetricsFile(tmp_path / "metrics.jsonl", listener=heard.append) as file:
        file.write({"step": 1})
        file.write({"step": 2})
    assert heard == [{"step": 1}, {"step": 2}] == read_metrics(tmp_path / "metrics.jsonl")


def test_resuming_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "held_out": {}}, *({"step": step} for step in (10, 20, 30)), {"step": 20, "held_out": {}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "lo', encoding="utf-8")
    with MetricsFile(path, resume_step=20) as file:
        file.write({"step": 30, "again": True})
    assert read_metrics(path) == [{"step": 0, "held_out": {}}, {"step": 10}, {"step": 20}, {"step": 30, "again": True}]


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"loss": 1.0}', b'{"step": "2"}', b"\xff", b""])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(TrainingError, match=r"metrics.jsonl, line 2: no row of metrics \(.*\); delete the line"):
        read_metrics(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file():
    """Closing the file tries to write once more what could not be written."""
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as full, MetricsFile(Path("/dev/full")) as file:
        file.write({"step": 1})
    assert full.value.errno == errno.ENOSPC
