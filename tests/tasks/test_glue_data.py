"""GLUE's own files: the real ones, and toy ones with the quirks that the real ones have."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.runs.errors import SettingsError
from fastbert.tasks.glue_data import (
    find_folders,
    find_glue_splits,
    finetune_names,
    glue_sources,
    glue_text_task,
    read_glue,
    read_index,
)
from fastbert.tasks.glue_tasks import GLUE_TASKS, SUBMISSION_NAMES, glue_task

from ..glue.helpers import write_toy_glue, write_tsv

# Rows as published, without header lines; the samples' as README.md of the data names them.
REAL_ROWS = {
    "cola": {"train": 8551, "dev": 1043, "test": 1063},
    "sst2": {"train": 67349, "dev": 872, "test": 1821},
    "mrpc": {"train": 3668, "dev": 408, "test": 1725},
    "stsb": {"train": 5749, "dev": 1500, "test": 1379},
    "qqp": {"train": 23496},
    "mnli": {"dev_matched": 9815},
    "qnli": {"train": 10475, "dev": 5463},
    "rte": {},
    "wnli": {"train": 635, "dev": 71, "test": 146},
}
# Labels of dev (of QQP: train) in the order of the label set.
REAL_LABELS = {
    "cola": (322, 721), "sst2": (428, 444), "mrpc": (129, 279), "qqp": (14749, 8747), "mnli": (3479, 3123, 3213),
    "qnli": (2702, 2761), "wnli": (40, 31),
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy_glue(tmp_path_factory.mktemp("GLUE"))


@pytest.mark.parametrize("task", GLUE_TASKS, ids=lambda task: task.name)
def test_the_real_files(task, data_folder):
    splits = find_glue_splits(task, find_folders(data_folder / "glue")[task.name])
    examples = {split: read_glue(task, Source(path=path)) for split, path in splits.files.items()}
    assert {split: len(items) for split, items in examples.items()} == REAL_ROWS[task.name]
    for split, items in examples.items():
        labelled = split == "train" or split in task.dev
        assert all((item.label is not None) == labelled and item.text.strip() for item in items)
        assert all((item.text_pair is None) == (len(task.texts) == 1) for item in items)
        if not labelled:
            assert read_index(task, Source(path=splits.files[split])) == [str(number) for number in range(len(items))]
    if task.name in REAL_LABELS:
        labels = [item.label for item in examples[task.dev[0] if task.dev[0] in examples else "train"]]
        assert tuple(map(labels.count, task.labels)) == REAL_LABELS[task.name]
    if task.name == "stsb":
        values = [item.label for item in examples["train"]]
        assert (min(values), max(values)) == (0.0, 5.0)


@pytest.mark.parametrize(
    ("name", "why_not"),
    [
        ("qqp", "QQP/dev.tsv is missing (the folder holds train_sample.tsv)"),
        ("mnli", "MNLI/train.tsv is missing (the folder holds dev_matched.tsv)"),
        ("rte", "RTE/train.tsv is missing (the folder holds format_sample.tsv) and RTE/dev.tsv is missing"),
        ("qnli", None),
    ],
)
def test_what_the_real_files_lack_is_named(name, why_not, data_folder):
    splits = find_glue_splits(glue_task(name), data_folder / "glue" / glue_task(name).title)
    if why_not is None:
        assert splits.why_not is None
        assert splits.notes == ["QNLI: train is read from train_sample.tsv, there is no train.tsv"]
        assert glue_sources(splits)["train"].path.name == "train_sample.tsv"
    else:
        assert splits.why_not.startswith(why_not)
    if "train" in splits.missing:
        with pytest.raises(DataError, match=splits.missing["train"].split(" ")[0]):
            glue_sources(splits)
    else:
        assert "train" in glue_sources(splits)


@pytest.mark.parametrize("task", GLUE_TASKS, ids=lambda task: task.name)
def test_files_as_glue_has_them(task, toy):
    splits = find_glue_splits(task, toy / task.title)
    assert set(splits.files) == set(task.splits) and not splits.missing and not splits.notes
    assert set(glue_sources(splits)) == set(finetune_names(task).values()) >= {"train", "dev", "test"}
    text_task = glue_text_task(task.title)
    for split, source in glue_sources(splits).items():
        examples = text_task.read(source)
        labelled = split in ("train", "dev", "dev_mismatched")
        text_task.check(examples, labelled=labelled)
        assert [example.label is not None for example in examples] == [labelled] * len(examples)
        assert len(examples) == {"train": 24 + (task.name == "qqp"), "dev": 12, "dev_mismatched": 12}.get(split, 6)
    assert text_task.config()["num_labels"] == (len(task.labels) or 1)
    assert text_task.main_metric == task.main_metric


def test_quirks_of_glue_s_files(toy):
    examples = read_glue(glue_task("qqp"), Source(path=toy / "QQP/train.tsv"))
    assert (examples.items[-1].text, examples.items[-1].text_pair, examples.items[-1].label) == ("", "house", "0")
    assert examples.notes == (
        "QQP: 2 rows of train.tsv without the 6 fields of the header; left out",
        "QQP: 1 row of train.tsv has an empty text; kept",
    )
    cola = glue_task("cola")
    assert read_glue(cola, Source(path=toy / "CoLA/dev.tsv")).items[0].place == "line 1"
    assert read_glue(cola, Source(path=toy / "CoLA/test.tsv")).items[0].place == "line 2"
    quoted = read_glue(glue_task("mrpc"), Source(path=toy / "MRPC/train.tsv"))
    assert all(example.text.startswith('"') for example in quoted)


def test_names_of_tasks_in_any_spelling():
    for name in ("sst2", "sst-2", "SST-2", "SST_2"):
        assert glue_task(name).name == "sst2"
    assert [glue_task(task.name) for task in GLUE_TASKS] == [glue_task(task.title) for task in GLUE_TASKS] == list(GLUE_TASKS)
    with pytest.raises(SettingsError, match="'squad' is no task of GLUE; there are cola, sst2"):
        glue_task("squad")


def test_the_order_of_labels_and_the_files_of_a_submission():
    assert glue_task("mnli").labels == ("entailment", "neutral", "contradiction")
    assert glue_task("rte").labels == glue_task("qnli").labels == ("entailment", "not_entailment")
    assert all(glue_task(name).labels == ("0", "1") for name in ("cola", "sst2", "mrpc", "qqp", "wnli"))
    assert set(SUBMISSION_NAMES) == {
        "CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX",
    }  # fmt: skip


def test_folders_in_other_spellings(tmp_path):
    write_toy_glue(tmp_path)
    (tmp_path / "SST-2").rename(tmp_path / "sst2")
    assert find_folders(tmp_path)["sst2"] == tmp_path / "sst2"
    (tmp_path / "SST_2").mkdir()
    with pytest.raises(DataError, match="both SST_2 and sst2 are folders of SST-2"):
        find_folders(tmp_path)


@pytest.mark.parametrize(
    ("path", "rows", "message"),
    [
        ("CoLA/dev.tsv", [("gj04", "2", "", "A text.")], r"dev.tsv, line 1, column 'label': holds '2', expected 0 or 1"),
        ("CoLA/dev.tsv", [("gj04", "1", "A text.")], r"dev.tsv, line 1: has 3 fields"),
        (
            "RTE/dev.tsv",
            [("index", "sentence1", "label"), (0, "a", "entailment")],
            r"dev.tsv: has no column 'sentence2'",
        ),
        (
            "MNLI/dev_matched.tsv",
            [("index", "sentence1", "sentence2", "gold_label"), (0, "a", "b", "-")],
            r"line 2, column 'gold_label': holds '-', expected entailment, neutral or contradiction",
        ),
        (
            "STS-B/dev.tsv",
            [("index", "sentence1", "sentence2", "score"), (0, "a", "b", "5.2")],
            r"line 2, column 'score': holds '5.2', expected a number from 0 to 5",
        ),
        ("STS-B/dev.tsv", [("index", "sentence1", "sentence2", "score"), (0, "a", "b", "x")], r"holds 'x'"),
        ("QQP/dev.tsv", [("id", "question1", "question2", "is_duplicate"), (0, "a")], r"none of its 1 rows has the 4 fields"),
    ],
)
def test_bad_files_are_named(path, rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_glue(glue_task(path.partition("/")[0]), Source(path=write_tsv(tmp_path / path, rows)))


def test_one_text_of_a_pair_may_be_one_that_the_tokenizer_drops(toy_tokenizer):
    task = glue_text_task("qqp")
    features = task.features(task.examples_from([("good", "\ufe0f"), ("", "bad")]), toy_tokenizer, 16, labelled=False)
    assert len(features.rows) == 2
    with pytest.raises(DataError, match="input 1, column 'text': holds .* of which the tokenizer keeps nothing"):
        task.features(task.examples_from([("\ufe0f", "\u200d")]), toy_tokenizer, 16, labelled=False)


def test_a_pair_without_any_text_is_refused(tmp_path):
    path = write_tsv(tmp_path / "dev.tsv", [("index", "sentence1", "sentence2", "label"), (0, " ", "", "entailment")])
    task = glue_text_task("rte")
    examples = task.read(Source(path=path))
    with pytest.raises(DataError, match="line 2, column 'sentence1': is empty"):
        task.check(examples, labelled=True)


def test_several_files_for_a_split(tmp_path):
    folder = write_toy_glue(tmp_path) / "RTE"
    (folder / "train.tsv").rename(folder / "train_a.tsv")
    assert find_glue_splits(glue_task("rte"), folder).files["train"].name == "train_a.tsv"
    (folder / "train_b.tsv").write_bytes((folder / "train_a.tsv").read_bytes())
    with pytest.raises(DataError, match=r"no train.tsv, but train_a.tsv and train_b.tsv; rename the right one train.tsv"):
        find_glue_splits(glue_task("rte"), folder)


def test_a_folder_that_is_not_glue(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        find_folders(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no folder of a task of GLUE; expected CoLA, SST-2"):
        find_folders(tmp_path)


def test_a_test_file_without_index(tmp_path):
    path = write_tsv(tmp_path / "test.tsv", [("sentence",), ("A text.",)])
    with pytest.raises(DataError, match="has no column 'index', which numbers the rows of SST-2's test file"):
        read_index(glue_task("sst2"), Source(path=path))


def test_other_tables_than_tsv(tmp_path):
    """Labels that are null are held back, as in test sets of Hugging Face."""
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("entailment", None)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    for name in ("test.jsonl", "test.parquet"):
        examples = read_glue(glue_task("rte"), Source(tmp_path / name))
        assert [example.label for example in examples] == ["entailment", None]
    (tmp_path / "null.jsonl").write_text('{"sentence1": null, "sentence2": "b", "label": "entailment"}', encoding="utf-8")
    with pytest.raises(DataError, match="null.jsonl, line 1, column 'sentence1': expected a text, found None"):
        read_glue(glue_task("rte"), Source(tmp_path / "null.jsonl"))
    (tmp_path / "cola.csv").write_text('sentence,label\n"a, b",1\n', encoding="utf-8")
    examples = read_glue(glue_task("cola"), Source(tmp_path / "cola.csv"))
    assert [(example.text, example.label) for example in examples] == [("a, b", "1")]
