"""``fastbert pretrain`` from the command line: exit codes, JSON, Ctrl-C, and continuing with --resume alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastbert.cli.main import app
from fastbert.train.metrics import read_metrics

from ..processes import ForkedModule

SIZES = "--vocab-size 200 --model tiny --num-hidden-layers 1 --hidden-size 32 --max-seq-length 32 --tokens-per-batch 256"
OPTIONS = f"{SIZES} --held-out-fraction 0.2 --device cpu".split()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[str]:
    """Two files of documents."""
    folder = tmp_path_factory.mktemp("corpora")
    words = ["time", "water", "light", "house", "river", "stone", "paper", "table", "garden", "winter"]
    paths = []
    for name, shift in (("a.txt", 1), ("b.txt", 3)):
        documents = []
        for start in range(30):
            sentences = [
                " ".join(words[(start + shift * place + line) % len(words)] for place in range(6)).capitalize() + "."
                for line in range(12)
            ]
            documents.append("\n".join(sentences))
        (folder / name).write_text("\n\n".join(documents), encoding="utf-8")
        paths.append(str(folder / name))
    return paths


def pretrain(*words: str):
    return CliRunner().invoke(app, ["pretrain", *words])


def last_line(stdout: str) -> dict:
    return json.loads(stdout.splitlines()[-1])


def test_a_run_and_the_refusal_to_write_over_it(corpora, tmp_path):
    output = str(tmp_path / "run")
    run = pretrain("--corpus", *corpora, *OPTIONS, "--steps", "3", "--output", output, "--compare", "--json")
    assert run.exit_code == 0, run.output
    assert len(run.stdout.splitlines()) == 1
    document = last_line(run.stdout)
    assert (document["command"], document["exit_code"], document["steps"]) == ("pretrain", 0, 3)
    assert document["data"]["documents"] == 60 and document["comparison"]["agree"]
    assert "60 documents" in run.stderr

    again = pretrain("--corpus", *corpora, *OPTIONS, "--steps", "3", "--output", output, "--json")
    assert again.exit_code == 2 and "already holds a run" in last_line(again.stdout)["error"]
    changed = pretrain("--resume", "--output", output, "--steps", "4")
    assert changed.exit_code == 2 and "--steps was 3 and is now 4" in changed.stderr
    repeated = pretrain("--resume", "--output", output, "--corpus", *corpora, "--json")
    assert repeated.exit_code == 0 and last_line(repeated.stdout)["held_out"] == document["held_out"]


def test_a_corpus_whose_name_is_no_text(corpora, tmp_path):
    """Bytes of Latin-1 on a system of UTF-8: terminal and model card show them as codes."""
    corpus = tmp_path / os.fsdecode(b"b\xfccher.txt")
    corpus.write_bytes(Path(corpora[0]).read_bytes())
    run = pretrain("--corpus", str(corpus), *OPTIONS, "--steps", "1", "--output", str(tmp_path / "run"))
    assert run.exit_code == 0, run.output
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert r"b\udcfccher.txt" in card and r"b\udcfccher.txt" in run.stdout


def test_losses_that_differ_fail_the_command(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert.train.compare.AGREEMENT_TOLERANCE", -1.0)
    run = pretrain("--corpus", *corpora, *OPTIONS, "--steps", "1", "--output", str(tmp_path / "run"), "--compare", "--json")
    assert run.exit_code == 1 and "DISAGREE" in run.stderr
    assert last_line(run.stdout)["comparison"]["agree"] is False
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"One document.\nOf two lines.\n", "two documents"), (b"", "two documents"), (b"A.\n\nB\xff.\n", "bad.txt, line 3")],
)
def test_a_bad_corpus_fails_with_its_name(tmp_path, content, message):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    run = pretrain("--corpus", str(bad), *OPTIONS, "--output", str(tmp_path / "run"), "--json")
    assert run.exit_code == 1
    error = last_line(run.stdout)["error"]
    assert message in error and str(bad) in error and "Traceback" not in run.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--no-such-option"], "--no-such-option"),
        (["--resume"], "nothing to resume"),
        (["--tokenizer", "x", "--vocab-size", "500"], "--vocab-size"),
    ],
)
def test_wrong_usage(tmp_path, words, message):
    run = pretrain(*words, "--output", str(tmp_path / "run"))
    assert run.exit_code == 2 and message in run.stderr


def test_a_missing_tokenizer_fails(corpora, tmp_path):
    run = pretrain("--corpus", *corpora, "--tokenizer", str(tmp_path), "--output", str(tmp_path / "run"), "--json")
    assert run.exit_code == 1 and "tokenizer.json" in last_line(run.stdout)["error"]


def test_ctrl_c_keeps_a_checkpoint_that_resume_finishes(corpora, tmp_path):
    output = tmp_path / "run"
    steps = 300
    command = [sys.executable, "-m", "fastbert.cli", "pretrain", "--corpus", *corpora, *OPTIONS, "--json"]
    command += ["--steps", str(steps), "--log-steps", "1", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics = output / "metrics.jsonl"
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as printed, err.open("w") as complained:
        process = ForkedModule(command, stdout=printed, stderr=complained, env=environment)
        while not (metrics.is_file() and len(read_metrics(metrics)) > 2):
            assert process.poll() is None, err.read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    stdout, stderr = out.read_text(), err.read_text()
    assert code == 130, stderr
    document = last_line(stdout)
    resume = f"fastbert pretrain --output {output} --resume"
    assert document["exit_code"] == 130 and resume in document["error"] and resume in stderr
    (checkpoint,) = output.glob("checkpoint-*")
    assert 0 < int(checkpoint.name.removeprefix("checkpoint-")) < steps
    assert load_file(checkpoint / "model.safetensors")

    finished = pretrain("--output", str(output), "--resume", "--json")
    assert finished.exit_code == 0, finished.output
    assert last_line(finished.stdout)["steps"] == steps
    assert [row["step"] for row in read_metrics(metrics) if "held_out" not in row] == list(range(1, steps + 1))


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(corpora, tmp_path, monkeypatch):
    output = str(tmp_path / "run")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastbert.train.loop.TrainingLoop.run", full)
        assert pretrain("--corpus", *corpora, *OPTIONS, "--steps", "2", "--output", output).exit_code == 1
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    changed = pretrain("--resume", "--output", output, "--steps", "4")
    assert changed.exit_code == 2 and "--steps was 2 and is now 4" in changed.stderr
    finished = pretrain("--resume", "--output", output, "--json")
    assert finished.exit_code == 0 and last_line(finished.stdout)["steps"] == 2
    assert "stopped before its first checkpoint: the run begins anew" in finished.stderr


def test_an_interrupt_before_training_writes_nothing(corpora, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbert.train.pretrain.prepare_data", interrupted)
    run = pretrain("--corpus", *corpora, "--output", str(tmp_path / "run"), "--json")
    assert run.exit_code == 130 and "no checkpoint yet" in last_line(run.stdout)["error"]
    assert not (Path(tmp_path) / "run").exists()
