"""``fastbert finetune`` and ``fastbert predict`` as commands: exit codes, JSON, files."""

from __future__ import annotations

import csv
import errno
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fastbert.cli.main import app
from fastbert.data import tables
from fastbert.runs.one_writer import writing_to

from ..toys import write_sentiment


def run(*arguments: object, **options):
    return CliRunner().invoke(app, [*map(str, arguments)], **options)


@pytest.fixture(scope="module")
def trained_once(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    data, output = write_sentiment(folder / "sentiment"), folder / "run"
    done = run(
        "finetune", "--task", "sentiment", "--model", toy_model, "--data", data, "--output", output, "--epochs", 8,
        "--batch-size", 16, "--learning-rate", 1e-2, "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["scores"]["dev"]["accuracy"]["mean"] > 0.9
    return output


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A copy for the test alone, with which it may do what it likes."""
    return shutil.copytree(trained_once, tmp_path / "run")


def test_texts_and_files(trained, tmp_path):
    done = run("predict", "--model", trained, "the film is great", "the song was awful", "--json")
    assert [row["label"] for row in json.loads(done.stdout.splitlines()[-1])["results"]] == ["pos", "neg"]

    lines = tmp_path / "lines.txt"
    lines.write_text("the film is great\nthe song was awful\n", encoding="utf-8")
    done = run("predict", "--model", trained, "--input", lines, "--output", tmp_path / "out.csv")
    assert done.exit_code == 0, done.output
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["input"], row["label"]) for row in rows] == [("line 1", "pos"), ("line 2", "neg")]
    assert json.loads(rows[0]["probabilities"])["pos"] == pytest.approx(float(rows[0]["probability"]))

    done = run("predict", "--model", trained, "--input", "-", input="the film is great\n")
    assert json.loads(done.stdout)["label"] == "pos"
    assert run("predict", "--model", trained, "--input", lines, "--output", tmp_path / "out.csv").exit_code == 2

    table = tmp_path / "table.csv"
    table.write_text("id,remark\n1,the film is great\n", encoding="utf-8")
    unknown = run("predict", "--model", trained, "--input", table)
    assert unknown.exit_code == 1 and "has the columns 'id', 'remark'; --text-column names the one with the text" in unknown.stderr
    named = run("predict", "--model", trained, "--input", table, "--text-column", "remark")
    assert json.loads(named.stdout)["label"] == "pos"
    assert run("predict", "--model", trained, "--input", lines, "--output", tmp_path / "out.csv", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "nowhere", "x"], 1, "nowhere: no such folder; fastbert finetune writes the models that predict"),
        (["--model", "file.txt", "x"], 1, "file.txt: a file, expected a folder; fastbert finetune writes the models that predict"),
        (["--model", "folder.csv", "x"], 1, "folder.csv: the folder holds no task.json; fastbert finetune writes it"),
        (["--model", "nowhere"], 2, "give either texts or --input FILE"),
        (["--model", "nowhere", "--input", "absent.txt"], 2, "--input absent.txt: no such file"),
        (["--model", "nowhere", "x", "--output", "a.xml"], 2, "must end in .jsonl or .csv"),
        (["--model", "nowhere", "x", "--text-column", "a"], 2, "--text-column a is for a file with columns: give --input FILE"),
        (["--model", "nowhere", "--input", "-", "--text-pair-column", "b"], 2, "--text-pair-column b is for a file with columns"),
        (["--model", "nowhere", "--input", "folder.csv"], 2, "--input folder.csv: a folder, expected a file"),
        (["--model", "nowhere", "x", "--output", "folder.csv"], 2, "--output folder.csv is a folder; give the name of a file"),
        (["--model", "nowhere", "x", "--output", "folder.csv", "--overwrite"], 2, "--output folder.csv is a folder"),
        (["--model", "nowhere", "x", "--output", f"{'n' * 249}.csv"], 2, "is longer than 250 bytes"),
        (["--model", "", "x"], 2, "--model is empty"),
    ],
)
def test_wrong_usage_of_predict(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file.txt").touch()
    done = run("predict", *arguments)
    assert done.exit_code == code
    assert message in done.stderr


def test_one_command_at_a_time_predicts_to_a_file(trained, tmp_path):
    output = tmp_path / "out.csv"
    with writing_to(output):
        done = run("predict", "--model", trained, "the film", "--output", output)
    assert done.exit_code == 2 and "another process is writing to" in done.stderr and not output.exists()


def test_a_file_that_cannot_be_written_is_named(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    done = run("predict", "--model", trained, "the film", "--output", tmp_path / "out.csv")
    assert done.exit_code == 1 and "out.csv cannot be written: No space left on device" in done.stderr
    assert not list(tmp_path.glob("*out.csv*"))


def test_closed_standard_streams(trained, monkeypatch):
    monkeypatch.setattr(tables, "sys", SimpleNamespace(stdin=None))
    done = run("predict", "--model", trained, "--input", "-")
    assert done.exit_code == 1 and done.stderr.endswith("standard input is closed\n")


def test_a_resume_repeats_no_setting(trained):
    again = run("finetune", "--output", trained, "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert "Seed 0: done before" in again.stderr
    changed = run("finetune", "--output", trained, "--resume", "--epochs", 3)
    assert changed.exit_code == 2 and "--epochs was 8.0 and is now 3.0" in changed.stderr
    lost = run("finetune", "--task", "ner")
    assert lost.exit_code == 2 and "--model, --data missing" in lost.stderr


def test_an_empty_line_names_itself(trained, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("the film\n \nthe song\n", encoding="utf-8")
    done = run("predict", "--model", trained, "--input", lines)
    assert done.exit_code == 1
    assert "lines.txt, line 2, column 'text': is empty" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs is 0.0; it must be a positive number"),
        (["--mode", "half"], "--mode is 'half'; it must be one of full, head, lora, top-k"),
        (["--lora-r", "4"], "--lora-r is for --mode lora, not for --mode full"),
        (["--seeds", "1", "1"], "--seeds is 1 1; it must be different numbers from 0 on"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--dtype", "float16"], "--dtype is 'float16'; it must be one of float32, bfloat16"),
    ],
)
def test_wrong_usage_of_finetune(arguments, message):
    done = run("finetune", "--task", "ner", "--model", "m", "--data", "d", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "message"),
    [
        (["--input", "-"], b"good\ncaf\xe9\n", 1, "standard input, line 2: not UTF-8"),
        (["--input", "-"], b"", 1, "standard input: there are no lines"),
        (["good", "caf\udce9"], b"", 2, "text 2 is not UTF-8"),
    ],
)
def test_what_is_no_text(arguments, stdin, code, message, trained):
    done = run("predict", "--model", trained, *arguments, input=stdin)
    assert done.exit_code == code
    assert message in done.stderr


def test_blank_lines_at_the_end_of_stdin_are_none(trained):
    assert len(run("predict", "--model", trained, "--input", "-", input="good\r\nbad\n\n").stdout.splitlines()) == 2


@pytest.mark.parametrize("command", ["predict", "embed"])
def test_the_input_is_not_overwritten(command, trained, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "good"}\n', encoding="utf-8")
    done = run(command, "--model", trained, "--input", lines, "--output", lines, "--overwrite")
    assert done.exit_code == 2
    assert "--output" in done.stderr and "give another name" in done.stderr
    assert lines.read_text(encoding="utf-8") == '{"text": "good"}\n'


def test_a_terminal_that_knows_ascii_only(trained, monkeypatch):
    document = (trained / "task.json").read_text(encoding="utf-8")
    (trained / "task.json").write_text(document.replace('"pos"', '"schön"'), encoding="utf-8")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    with pytest.raises(SystemExit) as end:
        app(["predict", "--model", str(trained), "the film is great"])
    assert end.value.code == 0
    assert json.loads(stdout.buffer.getvalue())["label"] == "schön"


def test_what_is_cut_is_said(trained):
    done = run("predict", "--model", trained, "the film is great", "the film " * 50)
    assert done.exit_code == 0
    assert done.stderr.strip() == "1 of 2 inputs are longer than 64 tokens and were cut"


def test_ctrl_c_says_how_to_go_on(toy_model, sentiment_folder, tmp_path, monkeypatch):
    def interrupted(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbert.finetune.run.train_seed", interrupted)
    output = tmp_path / "a run"
    words = ["finetune", "--task", "sentiment", "--model", toy_model, "--data", sentiment_folder, "--output", output, "--json"]
    done = run(*words)
    assert done.exit_code == 130
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error.startswith("interrupted; what is done stays") and error.endswith(f"--output '{output}' --resume")
