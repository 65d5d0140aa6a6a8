"""Several processes take the steps of one: the same losses, the same weights; they stop, fail and go on together.

Processes come from a server that has imported torch and has no threads, with torchrun's environment; one test runs torchrun.
"""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastbert.runs.errors import SettingsError, TrainingError
from fastbert.runs.torchrun import Launch, launch, only_main_speaks
from fastbert.train import pretrain as pretrain_module
from fastbert.train.checkpoint import checkpoint_folders
from fastbert.train.distributed import Processes, _failure, check_shares, dropout_seed, local_device
from fastbert.train.loop import TrainingLoop
from fastbert.train.metrics import read_metrics
from fastbert.train.pretrain import pretrain
from fastbert.train.run_state import RunState
from fastbert.train.settings import PretrainSettings

from ..processes import run_python, server
from . import torchrun_worker

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and "forkserver" in multiprocessing.get_all_start_methods()),
    reason="no gloo, or no fork server",
)
# float32 sums in another order; the largest differences seen are 5e-8 of a loss and 1.2e-7 in a weight.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 5e-7, 1e-6
OF_THE_MACHINE = {"tokens_per_second", "seconds", "mfu", "loader_wait", "peak_rss_bytes", "checkpoint_wait"}
STEPS = {"batches_per_step": 4, "steps": 8, "log_steps": 1, "save_steps": 4}


@dataclasses.dataclass(frozen=True)
class Accident:
    """What happens to process ``rank`` at the beginning of step number ``step``, or (``other text``) before it starts."""

    kind: str
    rank: int
    step: int = 0

    def prepare(self) -> None:
        if self.kind == "other text":
            made = pretrain_module.prepare_data

            def other(*arguments: Any) -> Any:
                data = made(*arguments)
                return dataclasses.replace(data, facts={**data.facts, "fingerprint": "another"})

            pretrain_module.prepare_data = other
            return
        take_step = TrainingLoop._take_step

        def disturbed(loop: TrainingLoop, batches: Any) -> None:
            if loop.state.step + 1 == self.step:
                if self.kind == "raises":
                    raise TrainingError("an accident")
                os.kill(os.getpid(), signal.SIGTERM)
            take_step(loop, batches)

        TrainingLoop._take_step = disturbed


def run_together(settings: PretrainSettings, count: int, accident: Accident | None = None) -> list[dict[str, Any]]:
    """What became of ``count`` processes: ``error`` and ``message``, or ``result``; and the ``lines`` that were said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = server()
    queue = context.SimpleQueue()
    processes = [context.Process(target=_run_one, args=(settings, rank, count, port, accident, queue)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(250)
            assert process.exitcode == 0, f"exit code {process.exitcode}"
    finally:
        for process in processes:
            process.kill()
    return [outcome for _, outcome in sorted((queue.get() for _ in processes), key=lambda pair: pair[0])]


def _run_one(settings: PretrainSettings, rank: int, count: int, port: int, accident: Accident | None, queue: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    if accident is not None and accident.rank == rank:
        accident.prepare()
    outcome: dict[str, Any] = {"lines": []}
    sys.__stderr__ = io.StringIO()  # where a process speaks that is silent otherwise
    try:
        with only_main_speaks():
            outcome["result"] = pretrain(settings, outcome["lines"].append).to_dict()
    except (Exception, KeyboardInterrupt) as error:
        outcome |= {"error": type(error).__name__, "message": str(error)}
    queue.put((rank, outcome | {"stderr": sys.__stderr__.getvalue()}))


def assert_same_run(found: str, expected: str) -> None:
    """Losses, scores, counts of every step, and the final weights, within what the order of float32 sums explains."""
    rows, wanted = (read_metrics(Path(output) / "metrics.jsonl") for output in (found, expected))
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        values, others = ((r.get("held_out") or r) for r in (row, other))
        for name in values.keys() - OF_THE_MACHINE:
            assert values[name] == pytest.approx(others[name], rel=LOSS_TOLERANCE), (row["step"], name)
    weights, wanted_weights = (load_file(Path(output) / "model.safetensors") for output in (found, expected))
    assert weights.keys() == wanted_weights.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], wanted_weights[name], rtol=0, atol=WEIGHT_TOLERANCE, msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture
def settings(toy_settings: Callable[..., PretrainSettings]) -> Callable[..., PretrainSettings]:
    """With dropout, which every batch draws for itself."""
    return lambda output, **changes: toy_settings(output=str(output), **{**STEPS, **changes})


@pytest.fixture
def alone(settings: Callable[..., PretrainSettings], folder: Path) -> str:
    """The output of one process, made once."""
    output = folder / "alone"
    if not output.exists():
        pretrain(settings(output), print)
    return str(output)


@pytest.mark.parametrize("count", [2, 4])
def test_the_steps_of_one_process(settings, alone, tmp_path, count):
    outcomes = run_together(settings(tmp_path / "run"), count)
    assert [outcome.get("error") for outcome in outcomes] == [None] * count
    assert_same_run(str(tmp_path / "run"), alone)
    assert f"{count} processes over gloo, {4 // count} batches of a step for each" in outcomes[0]["lines"]
    assert outcomes[0]["result"]["tokens"] == outcomes[1]["result"]["tokens"]


def test_masked_words_alone_with_lamb(settings, tmp_path):
    changes = {"objective": "mlm", "optimizer": "lamb", "steps": 4}
    pretrain(settings(tmp_path / "alone", **changes), print)
    assert run_together(settings(tmp_path / "run", **changes), 2)[0].get("error") is None
    assert_same_run(str(tmp_path / "run"), str(tmp_path / "alone"))


def test_stopped_together_and_resumed_by_another_number(settings, alone, tmp_path):
    """One of two is asked to stop; both do so after the same step, with one checkpoint, from which four and then one go on."""
    outcomes = run_together(settings(tmp_path / "run"), 2, Accident("asked to stop", rank=1, step=3))
    assert {outcome["error"] for outcome in outcomes} == {"TrainingInterrupted"}
    assert len({outcome["message"] for outcome in outcomes}) == 1
    (checkpoint,) = checkpoint_folders(tmp_path / "run")
    assert checkpoint.name == "checkpoint-3"

    outcomes = run_together(settings(tmp_path / "run", resume=True), 4, Accident("asked to stop", rank=0, step=6))
    assert (
        "4 processes over gloo, 1 batches of a step for each; the run had 2 so far: the same steps, summed up in another order"
        in (outcomes[0]["lines"])
    )
    assert RunState.read(checkpoint_folders(tmp_path / "run")[0]).processes == 4
    pretrain(settings(tmp_path / "run", resume=True), print)
    assert_same_run(str(tmp_path / "run"), alone)


def test_an_error_of_one_ends_all(settings, tmp_path):
    outcomes = run_together(settings(tmp_path / "run"), 2, Accident("raises", rank=1, step=6))
    assert [outcome["error"] for outcome in outcomes] == ["TrainingError", "TrainingError"]
    assert outcomes[0]["message"] == "stopped, because process 1 of 2 failed: an accident"
    assert outcomes[1]["message"] == "an accident"
    assert [outcome["stderr"] for outcome in outcomes] == ["", "fastbert pretrain: process 1 of 2: an accident\n"]
    assert [path.name for path in checkpoint_folders(tmp_path / "run")] == ["checkpoint-4"]


def test_another_text_on_another_machine(settings, tmp_path):
    outcomes = run_together(settings(tmp_path / "run"), 2, Accident("other text", rank=1))
    assert outcomes[0]["message"].startswith("stopped, because process 1 of 2 failed: the text that this process reads is not")


def test_refused_before_anything_is_written(settings, tmp_path):
    for changes, message in (
        (
            {"batches_per_step": 3},
            "--batches-per-step 3 is for all processes together and no multiple of their number, 2: give 2 or 4",
        ),
        ({"batches_per_step": 1}, "--batches-per-step 1 is for all"),
    ):
        outcomes = run_together(settings(tmp_path / "run", **changes), 2)
        assert {outcome["error"] for outcome in outcomes} == {"SettingsError"}
        assert all(message in outcome["message"] for outcome in outcomes)
    assert not (tmp_path / "run").exists()


def test_shares_of_a_step():
    check_shares(8, 4)
    with pytest.raises(SettingsError, match="number, 4: give 8 or 12"):
        check_shares(9, 4)
    with pytest.raises(SettingsError, match="number, 4: give 4, or start"):
        check_shares(1, 4)


def test_dropout_is_another_in_every_batch_and_step():
    seeds = {dropout_seed(seed, step, batch) for seed in range(3) for step in range(5) for batch in range(4)}
    assert len(seeds) == 60 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_rank_without_a_meeting_point(monkeypatch):
    assert launch() is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not: start the processes with torchrun"):
        launch()


def test_a_gpu_for_every_process(monkeypatch):
    second = Launch(rank=1, world_size=2, local_rank=1)
    assert local_device(torch.device("cpu"), second) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SettingsError, match="process 1 of 2 finds 1 GPUs on its machine, where it is number 2"):
        local_device(torch.device("cuda"), second)
    with pytest.raises(SettingsError, match="--device cuda:0: every process has a GPU of its own"):
        local_device(torch.device("cuda:0"), second)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("[gloo/transport/unbound_buffer.cc:81] Timed out waiting 3600000ms for recv", "heard nothing .* for 1:00:00, which hangs"),
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer", "has lost contact with another one"),
    ],
)
def test_what_went_wrong_elsewhere(error, message):
    processes = Processes(Launch(rank=0, world_size=2, local_rank=0), dist.HashStore())
    failure = _failure(processes, RuntimeError(error))
    assert isinstance(failure, TrainingError) and re.search(f"process 0 of 2 .*{message}", str(failure))


def test_torchrun_starts_a_killed_run_again(settings, alone, tmp_path):
    """SIGKILL for one of two workers in step 6: all are started again, and go on from step 4 to the same end."""
    command = settings(tmp_path / "run").command().split()[1:]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    # Its workers are forked from it, as it is from the server: of the four none imports torch anew.
    worker = ["--start-method", "fork", "--run-path", str(Path(torchrun_worker.__file__)), "kill", "1", "6"]
    done = run_python(*torchrun, *worker, *command, "--json", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Resuming {tmp_path / 'run'} after step 4" in done.stderr
    first, last = (json.loads(line) for line in done.stdout.splitlines())
    assert first["exit_code"] == 1 and "lost contact" in first["error"]
    assert last["exit_code"] == 0 and last["steps"] == 8
    assert_same_run(str(tmp_path / "run"), alone)
