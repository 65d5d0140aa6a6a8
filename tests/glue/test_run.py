"""A whole GLUE run on toy files with a toy BERT: scores, report, submission, and going on after it was stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from scipy import stats

import fastbert.glue.run as glue_module
from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.finetune.folder import read_run
from fastbert.finetune.run import finetune
from fastbert.finetune.settings import FinetuneSettings
from fastbert.glue.run import glue, pair_folder, write_report
from fastbert.glue.settings import GlueSettings
from fastbert.runs.errors import SettingsError, TrainingError
from fastbert.tasks.glue_data import glue_text_task
from fastbert.tasks.predictor import Predictor

from .helpers import write_toy_glue, write_tsv

TASKS = ("mnli", "stsb", "rte", "qqp")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_toy_glue(tmp_path_factory.mktemp("GLUE"))


@pytest.fixture(scope="module")
def make_settings(data, toy_model) -> Callable[..., GlueSettings]:
    def make(output: Path, **changes) -> GlueSettings:
        values = {
            "data": str(data), "model": str(toy_model), "output": str(output), "max_seq_length": 32, "epochs": 1, "batch_size": 8,
            "learning_rate": 5e-3, "device": "cpu",
        }  # fmt: skip
        return GlueSettings(**{**values, **changes})

    return make


@pytest.fixture(scope="module")
def run(make_settings, tmp_path_factory) -> tuple[Path, dict, list[str]]:
    """(folder, document, what was said) of four tasks with two seeds."""
    output, said = tmp_path_factory.mktemp("run"), []
    document = glue(make_settings(output, tasks=TASKS, seeds=(0, 1)), said.append)
    return output, document, said


def predictions(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"predictions_{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def labels(data: Path, name: str, file: str) -> list:
    return [example.label for example in glue_text_task(name).read(Source(path=data / file))]


def test_scores_are_those_of_the_predictions(run, data):
    output, document, _ = run
    for seed in ("0", "1"):
        rte = document["tasks"]["rte"]["seeds"][seed]
        right = [
            p["label"] == label
            for p, label in zip(predictions(output / f"rte/seed-{seed}", "dev"), labels(data, "rte", "RTE/dev.tsv"))
        ]
        assert rte["figures"] == {"dev": {"accuracy": pytest.approx(100 * sum(right) / 12)}}
        mnli = document["tasks"]["mnli"]["seeds"][seed]
        accuracies = []
        for split, name in (("dev_matched", "dev"), ("dev_mismatched", "dev_mismatched")):
            truth = labels(data, "mnli", f"MNLI/{split}.tsv")
            right = [p["label"] == label for p, label in zip(predictions(output / f"mnli/seed-{seed}", name), truth)]
            accuracies.append(100 * sum(right) / 12)
            assert mnli["figures"][split]["accuracy"] == pytest.approx(accuracies[-1])
        assert mnli["score"] == pytest.approx(sum(accuracies) / 2)
        stsb = document["tasks"]["stsb"]["seeds"][seed]
        numbers = [p["score"] for p in predictions(output / f"stsb/seed-{seed}", "dev")]
        expected = 100 * stats.spearmanr(numbers, labels(data, "stsb", "STS-B/dev.tsv"))[0]
        assert stsb["figures"]["dev"]["spearman"] == pytest.approx(expected)
    means = [document["tasks"][name]["score"]["mean"] for name in TASKS]
    assert document["average"]["value"] == pytest.approx(sum(means) / 4)
    assert document["average"]["name"] == "mean of 4 tasks (STS-B, QQP, MNLI, RTE)"
    assert document["tasks"]["rte"]["score"]["n"] == 2 and document["average"]["n"] == 2
    assert json.loads((output / "run.json").read_text(encoding="utf-8")) == document


def test_small_tasks_start_from_the_mnli_model(run, toy_model):
    output, document, _ = run
    best = document["tasks"]["mnli"]["best_seed"]
    for name, start in (("rte", output / f"mnli/seed-{best}"), ("stsb", output / f"mnli/seed-{best}"), ("qqp", toy_model)):
        assert document["tasks"][name]["seeds"]["1"]["started_from"] == str(start)
    assert (
        f"RTE: started from the MNLI model of seed-{best}, not from {toy_model} (Phang et al. 2018)"
        in document["tasks"]["rte"]["notes"]
    )
    report = (output / "report.md").read_text(encoding="utf-8")
    assert report.count("(Phang et al. 2018)") == 2


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_other_modes(mode, make_settings, toy_model, tmp_path):
    document = glue(make_settings(tmp_path, tasks=("mnli", "rte"), mode=mode), lambda line: None)
    start = toy_model if mode == "head" else tmp_path / "mnli/seed-0"
    assert document["tasks"]["rte"]["seeds"]["0"]["started_from"] == str(start)
    assert Predictor.from_pretrained(tmp_path / "rte/seed-0", device="cpu")([("house song", "river film")])


def test_the_submission_is_the_best_seed_s(run):
    output, document, _ = run
    assert document["submission"]["files"] == ["STS-B", "QQP", "MNLI-m", "MNLI-mm", "AX", "RTE"]
    assert document["submission"]["missing"] == ["CoLA", "SST-2", "MRPC", "QNLI", "WNLI"]
    with zipfile.ZipFile(output / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(f"{name}.tsv" for name in document["submission"]["files"])
        files = {name: archive.read(name).decode().splitlines() for name in archive.namelist()}
    assert all(lines[0] == "index\tprediction" and len(lines) == 7 for lines in files.values())
    for name, file, split in (("rte", "RTE", "test"), ("mnli", "AX", "ax"), ("mnli", "MNLI-mm", "test_mismatched")):
        best = pair_folder(output, name, document["tasks"][name]["best_seed"])
        expected = [f"{number}\t{row['label']}" for number, row in enumerate(predictions(best, split))]
        assert files[f"{file}.tsv"][1:] == expected
    assert all(0 <= float(line.split("\t")[1]) <= 5 and len(line.split(".")[1]) == 3 for line in files["STS-B.tsv"][1:])


def test_the_report_tells_dev_from_test(run):
    output, document, said = run
    report = (output / "report.md").read_text(encoding="utf-8")
    for words in (
        "Mean of 4 tasks (STS-B, QQP, MNLI, RTE), dev",
        "it is no GLUE score",
        "| BERT-base | test | 52.1 | 93.5 | 88.9 / – | – / 85.8 | 71.2 / – | 84.6 / 83.4 | 90.5 | 66.4 | – | 79.6",
        "| 1. Turing ULR v6 (Microsoft Alexander v-team) | test | 73.3 | 97.5 | 94.2 / 92.3 | 93.5 / 93.1 | 76.4 / 90.9 |",
        "![scores](scores.png)",
        "GLUE's server wants all files and refuses a zip without CoLA.tsv, SST-2.tsv",
        "QQP: 1 row of train.tsv has an empty text; kept",
        f"fastbert glue --data {document['data']}",
    ):
        assert words in report, words
    assert (output / "scores.png").read_bytes().startswith(b"\x89PNG")
    table = said[-2].splitlines()
    assert table[0].split()[:2] == ["task", "metric"] and len(table) == 6


def test_the_report_is_made_of_the_document_alone(run, tmp_path):
    output, document, _ = run
    write_report(json.loads(json.dumps(document)), tmp_path)
    assert (tmp_path / "report.md").read_bytes() == (output / "report.md").read_bytes()


def test_every_folder_predicts(run, data):
    output, document, _ = run
    folder = pair_folder(output, "rte", 1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    predictor = Predictor.from_pretrained(folder, device="cpu")
    examples = predictor.read(data / "RTE/test.tsv")
    expected = predictions(folder, "test")
    assert [row["label"] for row in predictor.predict(examples)] == [row["label"] for row in expected]
    assert [row["input"] for row in expected] == [example.place for example in examples]
    assert predictor([("house song", "river film")])[0]["label"] in ("entailment", "not_entailment")


def test_predicting_other_files_than_glue_s(run, tmp_path):
    output, _, _ = run
    task = glue_text_task("rte")
    path = write_tsv(tmp_path / "mine.tsv", [("premise", "hypothesis", "label"), ("house", "river", "whatever")])
    example = task.read_unlabelled(Source(path=path)).items[0]
    assert (example.text, example.text_pair) == ("house", "river")
    (tmp_path / "mine.txt").write_text("house\nriver\n", encoding="utf-8")
    assert [example.text for example in glue_text_task("cola").read_unlabelled(Source(path=tmp_path / "mine.txt"))] == [
        "house",
        "river",
    ]
    cola = write_tsv(tmp_path / "dev.tsv", [("gj04", "not known", "", "house river")])
    assert glue_text_task("cola").read_unlabelled(Source(path=cola)).items[0].text == "house river"


def figures(document: dict) -> dict:
    return {name: [seed["figures"] for seed in entry["seeds"].values()] for name, entry in document["tasks"].items()}


def test_a_run_that_was_stopped_goes_on(make_settings, tmp_path, monkeypatch):
    """Stopped in the second of two trainings: the first is not done again, the second goes on, and all scores are as without."""
    settings = make_settings(tmp_path / "stopped", tasks=("cola", "qnli"), epochs=2)
    trained = []

    def stop_in_the_second(pair, say):
        trained.append(pair.task)

        def interrupt(line):
            if "step 6" in line and len(trained) == 2:
                raise KeyboardInterrupt
            say(line)

        return finetune(pair, interrupt)

    monkeypatch.setattr(glue_module, "finetune", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        glue(settings, lambda line: None)
    assert trained == ["cola", "qnli"]
    document = read_run(tmp_path / "stopped")
    assert list(document["tasks"]) == ["cola"] and document["submission"]["files"] == []

    said = []
    resumed = glue(dataclasses.replace(settings, resume=True), said.append)
    assert trained == ["cola", "qnli", "qnli"]
    assert [line.strip()[:6] for line in said if line.strip().startswith("step")] == ["step 6"]
    assert said.index("  done before") == said.index("CoLA, seed 0 (1 of 2)") + 1
    whole = glue(make_settings(tmp_path / "whole", tasks=("cola", "qnli"), epochs=2), lambda line: None)
    assert figures(resumed) == figures(whole)
    assert (tmp_path / "stopped/submission.zip").read_bytes() == (tmp_path / "whole/submission.zip").read_bytes()

    # Another seed of one task, whose folder a crash has left half made: nothing else is trained, and the report is of all.
    half = pair_folder(tmp_path / "stopped", "cola", 3)
    half.mkdir()
    (half / ".run.json.new").write_text("{")
    shutil.copytree(half.with_name("seed-0"), half.with_name("seed-0-copy"))  # a user's, which is none of the run
    more = glue(dataclasses.replace(settings, resume=True, tasks=("cola",), seeds=(0, 3)), lambda line: None)
    assert trained[3:] == ["cola", "qnli", "cola"]  # "cola", "qnli" of the whole run
    assert set(more["tasks"]) == {"cola", "qnli"} and set(more["tasks"]["cola"]["seeds"]) == {"0", "3"}
    assert more["average"]["sd"] is None
    assert "--tasks cola qnli --seeds 0 3" in more["command"]  # what gives all that is there

    before = (tmp_path / "stopped/submission.zip").read_bytes()
    for damaged in (tmp_path / "stopped").glob("*/seed-*/predictions_test.jsonl"):
        damaged.write_bytes(damaged.read_bytes()[:-30])
    glue(dataclasses.replace(settings, resume=True, seeds=(0, 3)), lambda line: None)
    assert trained[6:] == ["qnli"]  # with the other seed
    assert (tmp_path / "stopped/submission.zip").read_bytes() == before


def test_a_library_that_is_missing_is_named_at_once(make_settings, tmp_path, monkeypatch):
    monkeypatch.setitem(glue_module._NEEDED, "no_such_library", "eval")
    with pytest.raises(SettingsError, match=r"fastbert glue needs no_such_library: pip install 'fastbert\[eval\]'"):
        glue(make_settings(tmp_path / "run"), lambda line: None)


@pytest.mark.parametrize("change", [{"epochs": 2.0}, {"model": "bert-base-uncased"}, {"limit": 3}, {"mode": "head"}])
def test_a_run_is_not_continued_with_other_settings(run, make_settings, change):
    name = next(iter(change))
    with pytest.raises(SettingsError, match=f"cannot resume .*--{name} was .* and is now"):
        glue(make_settings(run[0], tasks=TASKS, resume=True, **change), lambda line: None)


def test_a_folder_with_a_run_is_left_alone(run, make_settings, tmp_path):
    with pytest.raises(SettingsError, match="already holds a run: --resume continues it"):
        glue(make_settings(run[0]), lambda line: None)
    with pytest.raises(SettingsError, match="nothing to resume"):
        glue(make_settings(tmp_path / "nothing", resume=True), lambda line: None)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match="choose another --output"):
        glue(make_settings(tmp_path), lambda line: None)
    before = sorted(path.name for path in run[0].rglob("*"))
    with pytest.raises(SettingsError, match="--top-k-layers is 9"):
        glue(make_settings(run[0], mode="top-k", top_k_layers=9, overwrite=True), lambda line: None)
    assert sorted(path.name for path in run[0].rglob("*")) == before


def test_a_quick_look_is_marked(make_settings, data, tmp_path):
    document = glue(make_settings(tmp_path / "run", tasks=("sst2",), limit=5), lambda line: None)
    assert document["tasks"]["sst2"]["rows"] == {"train": 5, "dev": 5, "test": 5}
    assert document["submission"]["why_none"] == "--limit cuts the test sets" and not (tmp_path / "run/submission.zip").exists()
    report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert "**A quick look: at most 5 examples of each split were used. These scores are no results on GLUE.**" in report
    assert "There is none: --limit cuts the test sets." in report


def test_what_is_missing_is_left_out_and_said(make_settings, tmp_path):
    root = write_toy_glue(tmp_path / "GLUE")
    (root / "WNLI/test.tsv").unlink()
    (root / "RTE/dev.tsv").unlink()
    for path in sorted((root / "CoLA").iterdir()):
        path.unlink()
    (root / "CoLA").rmdir()
    said = []
    document = glue(make_settings(tmp_path / "run", data=str(root), tasks=("wnli", "rte", "cola")), said.append)
    assert list(document["tasks"]) == ["wnli"] and set(document["left_out"]) == {"rte", "cola"}
    reason = "RTE is left out: RTE/dev.tsv is missing (the folder holds test.tsv, train.tsv)"
    assert reason in said and f"CoLA is left out: {root} holds no folder CoLA" in said
    assert document["submission"]["why_none"] == "no task that was run has a test file"
    report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert "- RTE: RTE/dev.tsv is missing" in report and "WNLI: WNLI/test.tsv is missing" in report

    # A test file that comes later is predicted by the model that is there.
    write_toy_glue(root, test=9)
    later = glue(make_settings(tmp_path / "run", data=str(root), tasks=("wnli",), resume=True), said.append)
    assert said[-3] == "  done before" and later["submission"]["files"] == ["WNLI"]
    assert len((tmp_path / "run/submission/WNLI.tsv").read_text(encoding="utf-8").splitlines()) == 10


def test_other_files_are_not_resumed_on(make_settings, tmp_path):
    """Rows of a test file in another order are predicted again; of train or dev they are another run's."""
    root, said = write_toy_glue(tmp_path / "GLUE"), []
    settings = make_settings(tmp_path / "run", data=str(root), tasks=("sst2",))
    glue(settings, said.append)
    first = (tmp_path / "run/submission/SST-2.tsv").read_text(encoding="utf-8").splitlines()
    assert len({line.split("\t")[1] for line in first[1:]}) == 2
    again = dataclasses.replace(settings, resume=True, seeds=(0, 1))

    for split in ("train", "dev"):
        path = root / f"SST-2/{split}.tsv"
        before = path.read_text(encoding="utf-8")
        path.write_text("\n".join(before.splitlines()[:-1]) + "\n", encoding="utf-8")
        with pytest.raises(SettingsError, match=f"SST-2: the examples of .*SST-2/{split}.tsv are not those that seed 0 began with"):
            glue(again, said.append)
        path.write_text(before, encoding="utf-8")
    assert not pair_folder(tmp_path / "run", "sst2", 1).exists()

    header, *rows = (root / "SST-2/test.tsv").read_text(encoding="utf-8").splitlines()
    (root / "SST-2/test.tsv").write_text("\n".join([header, *reversed(rows)]) + "\n", encoding="utf-8")
    glue(dataclasses.replace(settings, resume=True), said.append)
    assert said[-3] == "  done before"
    reversed_ones = (tmp_path / "run/submission/SST-2.tsv").read_text(encoding="utf-8").splitlines()
    assert reversed_ones == [first[0], *reversed(first[1:])]


@pytest.mark.parametrize("of", ["fastbert.glue.run", "fastbert.finetune.run"])
def test_a_full_disk_is_named(of, make_settings, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"{of}.write_json", full)
    with pytest.raises(TrainingError, match=rf"{tmp_path}.* cannot be written to: .*No space left on device.* MB are free there"):
        glue(make_settings(tmp_path / "run", tasks=("rte",)), lambda line: None)


def test_without_any_task_nothing_begins(make_settings, tmp_path):
    root, said = write_toy_glue(tmp_path / "GLUE"), []
    (root / "RTE/dev.tsv").unlink()
    (root / "CoLA").rename(root / "other")
    with pytest.raises(DataError, match="no task can be run: CoLA: .*; RTE: RTE/dev.tsv is missing"):
        glue(make_settings(tmp_path / "other", data=str(root), tasks=("rte", "cola")), said.append)
    assert not (tmp_path / "other").exists()


def test_a_bad_file_ends_the_run_before_it_begins(make_settings, tmp_path):
    root = write_toy_glue(tmp_path / "GLUE")
    write_tsv(root / "WNLI/test.tsv", [("id", "sentence1", "sentence2"), (0, "a", "b")])
    with pytest.raises(DataError, match=r"WNLI/test.tsv: has no column 'index'"):
        glue(make_settings(tmp_path / "run", data=str(root)), lambda line: None)
    write_tsv(root / "WNLI/test.tsv", [("index", "sentence1", "sentence2"), (0, "a")])
    with pytest.raises(DataError, match=r"WNLI/test.tsv, line 2: has 2 fields"):
        glue(make_settings(tmp_path / "run", data=str(root)), lambda line: None)
    assert not (tmp_path / "run").exists()


def test_rows_that_are_left_out_are_said(data, toy_model, tmp_path):
    """By finetune, and by predict, whose rows say their line."""
    said, output = [], tmp_path / "run"
    finetune(
        FinetuneSettings(
            task="qqp",
            model=str(toy_model),
            data=str(data / "QQP"),
            output=str(output),
            max_steps=1,
            max_seq_length=32,
            device="cpu",
        ),
        said.append,
    )
    notes = [
        "QQP: 2 rows of train.tsv without the 6 fields of the header; left out",
        "QQP: 1 row of train.tsv has an empty text; kept",
    ]
    assert said[:2] == notes
    predictor, heard = Predictor.from_pretrained(output, device="cpu"), []
    examples = predictor.read(data / "QQP/train.tsv")
    assert len(predictor.predict(examples, say=heard.append)) == 25 and heard == notes
    assert examples.items[-1].place == "line 26"


@pytest.mark.parametrize("named", [True, False])
def test_finetune_needs_no_dev_file_in_the_folder(named, data, toy_model, tmp_path):
    """One may be named, and a share of the training examples serves else."""
    folder, said = tmp_path / "RTE", []
    folder.mkdir()
    shutil.copy(data / "RTE/train.tsv", folder)
    settings = FinetuneSettings(
        task="rte",
        model=str(toy_model),
        data=str(folder),
        dev=str(data / "RTE/dev.tsv") if named else None,
        output=str(tmp_path / "run"),
        max_steps=1,
        max_seq_length=32,
        device="cpu",
    )
    result = finetune(settings, said.append)
    assert [result.data[split]["examples"] for split in ("train", "dev")] == ([24, 12] if named else [22, 2])
    assert any(line.startswith("No dev data: 2 of the training examples are held out") for line in said) is not named


def test_finetune_reads_a_task_s_folder(data, toy_model, tmp_path):
    settings = FinetuneSettings(
        task="MNLI",
        model=str(toy_model),
        data=str(data / "MNLI"),
        output=str(tmp_path / "run"),
        epochs=1,
        max_seq_length=32,
        device="cpu",
    )
    result = finetune(settings, lambda line: None)
    assert set(result.scores) == {"dev", "dev_mismatched"} and result.task == "mnli"
    assert len(predictions(tmp_path / "run", "test_mismatched")) == len(predictions(tmp_path / "run", "ax")) == 6
    with pytest.raises(SettingsError, match="--task cola reads GLUE's files, .* leave --text-column out"):
        finetune(dataclasses.replace(settings, task="cola", text_column="text", output=str(tmp_path / "other")), lambda line: None)
