"""Trackers get the lines of metrics.jsonl under one name for a run's whole life, and never end the run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fastbert.runs.errors import SettingsError, TrainingInterrupted
from fastbert.train.metrics import read_metrics
from fastbert.train.pretrain import pretrain
from fastbert.train.trackers import Trackers, check_trackers, new_run_name

from .runs import quiet, stop_at

pytest.importorskip("accelerate", reason="trackers go through accelerate")

NEEDS_TENSORBOARD = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")


class FakeRun:
    """What ``wandb.init`` and ``trackio.init`` return."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []
        self.finished = False

    def log(self, values: dict, step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


def install_fake(monkeypatch: pytest.MonkeyPatch, name: str, make=FakeRun) -> SimpleNamespace:
    """A package of that name for accelerate; ``inits``: the arguments of its starts, ``runs``: what they returned."""
    seen = SimpleNamespace(inits=[], runs=[], configs=[])

    def init(**arguments):
        seen.inits.append(arguments)
        seen.runs.append(make())
        return seen.runs[-1]

    module = ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    module.init = init
    module.config = SimpleNamespace(update=lambda values, allow_val_change: seen.configs.append(values))
    monkeypatch.setitem(sys.modules, name, module)
    metadata = importlib.metadata.metadata
    monkeypatch.setattr(importlib.metadata, "metadata", lambda package: {} if package == name else metadata(package))
    return seen


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_refused_before_any_work(toy_settings, monkeypatch, name):
    monkeypatch.setattr(f"accelerate.utils.is_{name}_available", lambda: False)
    settings = toy_settings(report_to=(name,))
    with pytest.raises(SettingsError, match=rf"--report-to {name}: not installed \(pip install {name}\)"):
        pretrain(settings, quiet)
    assert not Path(settings.output).exists()


def test_a_missing_accelerate_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'fastbert\[train\]'"):
        check_trackers(["wandb"])
    check_trackers([])


def test_an_accelerate_that_does_not_know_the_tracker(monkeypatch):
    monkeypatch.delitem(sys.modules["accelerate.tracking"].LOGGER_TYPE_TO_CLASS, "trackio")
    with pytest.raises(SettingsError, match="trackio needs a newer accelerate"):
        check_trackers(["trackio"])


def test_names_of_runs(tmp_path):
    names = {new_run_name(tmp_path / "runs" / "mine") for _ in range(2)}
    assert len(names) == 2 and all(name.startswith("mine-") for name in names)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_same_rows_as_in_metrics_jsonl_and_the_same_name_on_resume(toy_settings, monkeypatch, name):
    seen = install_fake(monkeypatch, name)
    settings = toy_settings(report_to=(name,))
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(TrainingInterrupted):
            pretrain(settings, quiet)
    pretrain(toy_settings(report_to=(name,), resume=True), quiet)
    assert len(seen.runs) == 2 and all(run.finished for run in seen.runs)
    first, second = seen.inits
    assert first == second and first["project"] == "fastbert" and first["resume"] == "allow"
    assert first["name"].startswith("run-")
    assert seen.configs[0]["tokens_per_batch"] == 256
    logged = [row for run in seen.runs for row in run.rows]
    rows = read_metrics(Path(settings.output) / "metrics.jsonl")
    assert [step for step, _ in logged] == [row["step"] for row in rows]
    for (_, values), row in zip(logged, rows, strict=True):
        assert "step" not in values
        expected = {f"held_out/{key}": value for key, value in row.get("held_out", {}).items()}
        expected |= {key: value for key, value in row.items() if key not in ("step", "held_out")}
        assert values == expected


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(toy_settings, monkeypatch):
    class Failing(FakeRun):
        def log(self, values: dict, step: int) -> None:
            super().log(values, step)
            if step == 3:
                raise ConnectionError("no route to host\nsecond line")

    seen = install_fake(monkeypatch, "wandb", Failing)
    others = install_fake(monkeypatch, "trackio")
    said = []
    settings = toy_settings(report_to=("wandb", "trackio"))
    result = pretrain(settings, said.append)
    assert result.steps == 8
    assert [line for line in said if "wandb" in line] == [
        "wandb failed and gets nothing more of this run (ConnectionError: no route to host); metrics.jsonl has it all"
    ]
    assert [step for step, _ in seen.runs[0].rows] == [0, 3]
    assert [step for step, _ in others.runs[0].rows] == [0, 3, 6, 8, 8]


def test_a_tracker_that_does_not_start(tmp_path, monkeypatch):
    def refuse():
        raise RuntimeError("not logged in")

    install_fake(monkeypatch, "wandb", refuse)
    said = []
    with Trackers(["wandb"], tmp_path, "a-1", None, {}, said.append) as trackers:
        trackers.log({"step": 1})
    assert len(said) == 1 and "not logged in" in said[0]


@NEEDS_TENSORBOARD
def test_tensorboard(toy_settings, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = toy_settings(report_to=("tensorboard",))
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(TrainingInterrupted):
            pretrain(settings, quiet)
    pretrain(toy_settings(report_to=("tensorboard",), resume=True), quiet)
    folder = Path(settings.output) / "tensorboard"
    events = EventAccumulator(str(folder))
    events.Reload()
    rows = read_metrics(Path(settings.output) / "metrics.jsonl")
    for tag in ("loss", "tokens_per_second", "grad_norm"):
        written = [(event.step, event.value) for event in events.Scalars(tag)]
        assert written == [(row["step"], pytest.approx(row[tag], rel=1e-6)) for row in rows if tag in row]
    assert [event.step for event in events.Scalars("held_out/mlm_loss")] == [0, 8]
    before = set(folder.iterdir())
    pretrain(toy_settings(report_to=("tensorboard",), overwrite=True, steps=2), quiet)
    assert not before & set(folder.iterdir())


@NEEDS_TENSORBOARD
def test_tensorboard_forgets_what_comes_again(tmp_path):
    """A run that was killed after step 7 goes on from its checkpoint of step 5."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((None, (4, 5, 6, 7)), (5, (6, 7, 8))):
        with Trackers(["tensorboard"], tmp_path, "a-1", resumed, {}, quiet) as trackers:
            for step in steps:
                trackers.log({"step": step, "loss": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 5, 6, 7, 8]
