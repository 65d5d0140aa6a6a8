"""``fastbert glue`` from the command line: exit codes, JSON, Ctrl-C, and continuing with --resume alone."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fastbert.cli.main import app

from ..glue.helpers import write_toy_glue, write_tsv

OPTIONS = ["--max-seq-length", "32", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory, toy_model) -> list[str]:
    """--data and --model of toys."""
    return ["--data", str(write_toy_glue(tmp_path_factory.mktemp("GLUE"))), "--model", str(toy_model)]


def glue(*words: str):
    return CliRunner().invoke(app, ["glue", *words])


def last_line(stdout: str) -> dict:
    return json.loads(stdout.splitlines()[-1])


def test_json_and_a_resume_that_repeats_no_setting(toy, tmp_path):
    output = ["--output", str(tmp_path / "run")]
    first = glue(*toy, *OPTIONS, *output, "--tasks", "RTE", "SST-2", "--json")
    assert first.exit_code == 0, first.output
    document = last_line(first.stdout)
    assert (document["command"], document["exit_code"]) == ("glue", 0) and set(document["tasks"]) == {"rte", "sst2"}
    assert (
        first.stdout.count("\n") == 1
        and "SST-2, seed 0 (1 of 2)" in first.stderr
        and "Mean of 2 tasks (SST-2, RTE)" in first.stderr
    )

    again = glue(*output, "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert again.stderr.count("done before") == 2 and last_line(again.stdout)["tasks"] == document["tasks"]
    changed = glue(*output, "--resume", "--epochs", "2")
    assert changed.exit_code == 2 and "--epochs was 1.0 and is now 2.0" in changed.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "cola", "squad"], "'squad' is no task of GLUE; there are cola, sst2"),
        (["--tasks", "cola", "CoLA"], "each of them once"),
        (["--seeds", "1", "1"], "--seeds"),
        (["--mode", "half"], "--mode is 'half'; it must be one of full, head"),
        (["--lora-r", "4"], "--lora-r is for --mode lora"),
        (["--limit", "0"], "--limit is 0"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--max-seq-length", "1000"], "--max-seq-length is 1000"),
        (["--model", "no/where/at-all"], "--model no/where/at-all"),
    ],
)
def test_wrong_usage(toy, tmp_path, words, message):
    run = glue(*toy, *OPTIONS, "--output", str(tmp_path / "run"), *words)
    assert run.exit_code == 2 and message in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "run").exists()


def test_data_and_model_are_needed(toy, tmp_path):
    for words, name in ((toy[:2], "--model"), (toy[2:], "--data")):
        run = glue(*words, "--output", str(tmp_path / "run"))
        assert run.exit_code == 2 and f"{name} missing; fastbert glue --help" in run.stderr


def test_what_is_no_run_of_glue_is_not_resumed(tmp_path):
    run = glue("--resume", "--output", str(tmp_path / "run"))
    assert run.exit_code == 2 and "holds no run: there is nothing to resume" in run.stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(
        '{"command_name": "finetune", "command": "fastbert finetune", "settings": {"task": 1}}'
    )
    run = glue("--resume", "--output", str(tmp_path / "run"))
    assert run.exit_code == 2 and "holds a run of another command (fastbert finetune)" in run.stderr


def test_bad_data(toy, tmp_path):
    run = glue("--data", str(tmp_path / "nowhere"), *toy[2:], *OPTIONS, "--output", str(tmp_path / "run"), "--json")
    assert run.exit_code == 1 and "no such folder" in last_line(run.stdout)["error"]
    root = write_toy_glue(tmp_path / "GLUE")
    write_tsv(root / "CoLA/train.tsv", [("gj04", "1", "", "house"), ("gj04", "3", "", "river")])
    run = glue("--data", str(root), *toy[2:], *OPTIONS, "--output", str(tmp_path / "run"), "--json")
    assert run.exit_code == 1
    assert "CoLA/train.tsv, line 2, column 'label': holds '3', expected 0 or 1" in last_line(run.stdout)["error"]
    assert not (tmp_path / "run").exists()


def test_ctrl_c_says_how_to_go_on(toy, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbert.glue.run.finetune", interrupted)
    run = glue(*toy, *OPTIONS, "--output", str(tmp_path / "run"), "--tasks", "wnli", "--json")
    assert run.exit_code == 130
    error = last_line(run.stdout)["error"]
    assert (
        error.startswith("interrupted; what is done stays") and error.endswith("--device cpu --resume") and "--tasks wnli" in error
    )
