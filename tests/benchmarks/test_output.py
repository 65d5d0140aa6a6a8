"""fastbert bench --output and python -m benchmarks.reports: a folder with documents, tables and pictures."""

from __future__ import annotations

import json
import os
import sys

import pytest

from benchmarks import bench as suites
from benchmarks import harness
from benchmarks.reports import __main__ as remake
from benchmarks.reports import pictures, report

from . import toy_documents as toys
from .toy_runs import TOY, invoke, use_toy_sizes


@pytest.fixture
def toy_sizes(monkeypatch):
    use_toy_sizes(monkeypatch)


@pytest.mark.parametrize("suite", ["inference", "pretrain"])
def test_a_report_of_a_run(suite, toy_sizes, tmp_path):
    folder = tmp_path / "not" / "there"
    result = invoke("--suite", suite, *TOY, "--profile", "--output", str(folder))
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.splitlines()[-1])
    name = f"{suite}-bert-tiny"
    document = json.loads((folder / f"{name}.json").read_text())
    assert document["benchmark"] == suite and document["command"].startswith("fastbert")
    assert {key: document[key] for key in printed if key in document and key != "command"}.items() <= printed.items()
    names = {f"{name}-{plot}.png" for plot in ("ratios", "roofline", "memory", "profile")}
    assert {path.name for path in folder.iterdir()} == {f"{name}.json", f"{name}.md", *names}
    text = (folder / f"{name}.md").read_text()
    assert text.startswith(f"# {suite}, bert-tiny\n") and "| **fastbert** | float32 |" in text and "## Where the time goes" in text
    for file, picture in pictures.pictures(document, name).items():
        assert f"]({file})" in text and pictures.digest_in(folder / file) == picture.digest
        assert f"written to {folder / file}" in result.stderr


@pytest.mark.parametrize("option", ["--output", "--save"])
@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_file_in_the_way_is_an_error_before_anything_is_measured(path, option, monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "run", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    (tmp_path / "file").write_text("mine")
    result = invoke(*TOY, option, str(tmp_path / path) if option == "--output" else path)
    assert result.exit_code == 2
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert error.startswith(f"{option} {tmp_path / path}: expected a folder, or a path where one can be made: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "run", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    result = invoke(*TOY, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert json.loads(result.stdout.splitlines()[-1])["error"] == f"--output {tmp_path}: the folder cannot be written to"


def test_wrong_usage_makes_no_folder(tmp_path):
    assert invoke("--suite", "glue", "--output", str(tmp_path / "report")).exit_code == 2
    assert not (tmp_path / "report").exists()


def test_a_report_replaces_the_earlier_one_of_its_suite(tmp_path):
    report.write(toys.finetune(), tmp_path, "finetune")
    report.write(toys.inference(toys.EQUAL), tmp_path, "inference")
    (tmp_path / "notes.png").write_text("mine")
    assert (tmp_path / "inference-by-length.png").exists()
    written = report.write(toys.inference(), tmp_path, "inference")
    names = {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in written} == {name for name in names if name.startswith("inference")}
    assert "inference-by-length.png" not in names and {"notes.png", "finetune.json", "finetune-ratios.png"} <= names
    assert "1 x 32" not in (tmp_path / "inference.md").read_text()


def test_what_a_report_says(tmp_path):
    report.write(toys.inference(), tmp_path, "inference")
    text = (tmp_path / "inference.md").read_text()
    versions = "fastbert 0.1.0 at commit abc1234; torch 2.13, transformers 5.23.0, python 3.11."
    assert f"\nAbacus, 2 cores, 2 threads. {versions}\n" in text
    made_by = "Made by `fastbert bench --suite inference`"
    assert f"{made_by}." in text and "Energy: not measured: no counters." in text
    assert "## 4 x 8: 4 sequences, 32 tokens" in text and "- transformers int8: not in int8 on cpu" in text
    assert "| fastbert | fastbert 0.1.0 | fastbert.BertModel |" in text and "| linear | 75.0 | 75.0 | 50.0 | 1.50 |" in text
    report.write({**toys.inference(), "unfinished": True}, tmp_path, "inference.partial")
    assert f"{made_by}, which has not come to its end." in (tmp_path / "inference.partial.md").read_text()
    report.write(toys.ops(), tmp_path, "ops")
    text = (tmp_path / "ops.md").read_text()
    assert text.startswith("# ops\n") and "torch eager" in text
    assert "- not asked for: torch-compile" in text and not list(tmp_path.glob("ops-*.png"))


def test_without_matplotlib_a_report_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "why_not", lambda: pictures.NEEDED)
    report.write(toys.inference(), tmp_path, "inference")
    assert {path.name for path in tmp_path.iterdir()} == {"inference.json", "inference.md"}
    assert (tmp_path / "inference.md").read_text().endswith(f"Without pictures: {pictures.NEEDED}\n")


def test_reports_of_a_folder_are_made_again(monkeypatch, tmp_path, capsys):
    folder, other = tmp_path / "results", tmp_path / "reports"
    folder.mkdir()
    for name, document in {"inference-1x32": toys.earlier_inference(), "pretrain": toys.earlier_race(), "ops": toys.ops()}.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(sys, "argv", ["reports", str(folder), "--output", str(other)])
    remake.main()
    expected = {
        "inference-1x32.md",
        "inference-1x32-ratios.png",
        "pretrain.md",
        "pretrain-ratios.png",
        "pretrain-memory.png",
        "ops.md",
    }
    assert {path.name for path in other.iterdir()} == expected
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.setattr(sys, "argv", ["reports", str(folder)])
    remake.main()
    assert {path.name for path in folder.iterdir()} == expected | {path.name for path in before}


@pytest.mark.parametrize(
    ("made", "arguments", "message"),
    [
        ([], ["{}/missing"], "missing does not exist"),
        ([], ["{}"], "has no document of fastbert bench"),
        (["ops.json", "file"], ["{}", "--output", "{}/file"], "file is a file: expected a folder"),
    ],
)
def test_wrong_usage_of_remaking(made, arguments, message, monkeypatch, tmp_path, capsys):
    for name in made:
        (tmp_path / name).write_text(json.dumps(toys.ops()))
    monkeypatch.setattr(sys, "argv", ["reports", *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as end:
        remake.main()
    assert end.value.code == 2 and message in capsys.readouterr().err
