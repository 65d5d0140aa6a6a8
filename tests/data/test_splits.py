from __future__ import annotations

from pathlib import Path

import pytest

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.splits import find_splits


def folder(path: Path, *names: str) -> str:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    return str(path)


def names(splits: dict[str, Source]) -> dict[str, str]:
    return {split: source.path.name for split, source in splits.items() if source.path is not None}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["test.tsv", "dev.tsv", "train.tsv"], {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}),
        (["Train.CSV", "valid.csv"], {"train": "Train.CSV", "dev": "valid.csv"}),
        (["training.jsonl", "validation.jsonl"], {"train": "training.jsonl", "dev": "validation.jsonl"}),
        (["train.txt", "val.txt", "latest.txt", "vocab.txt"], {"train": "train.txt", "dev": "val.txt"}),
        (["train_4k.tsv.gz", "test_4k.tsv.gz"], {"train": "train_4k.tsv.gz", "test": "test_4k.tsv.gz"}),
        (["train-sample-v1.1.json.gz", "dev-v1.1.json"], {"train": "train-sample-v1.1.json.gz", "dev": "dev-v1.1.json"}),
        (["a-ud-train.conllu.gz", "a-ud-dev.iob2"], {"train": "a-ud-train.conllu.gz", "dev": "a-ud-dev.iob2"}),
        (["wnut17train.conll", "emerging.dev.conll"], {"train": "wnut17train.conll", "dev": "emerging.dev.conll"}),
        (["train.parquet", "train.log", ".dev.tsv", "dev/dev.tsv", "train/x.tsv"], {"train": "train.parquet"}),
        (
            ["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv", "test_matched.tsv", "test_mismatched.tsv"],
            {
                "train": "train.tsv",
                "dev": "dev_matched.tsv",
                "dev_mismatched": "dev_mismatched.tsv",
                "test": "test_matched.tsv",
                "test_mismatched": "test_mismatched.tsv",
            },
        ),
    ],
)
def test_splits_of_a_folder(tmp_path: Path, files: list[str], expected: dict[str, str]) -> None:
    splits = find_splits(folder(tmp_path, *files))
    assert names(splits) == expected
    assert list(splits) == list(expected)
    assert {source.path.parent for source in splits.values() if source.path} == {tmp_path}


def test_files_that_are_given_besides(tmp_path: Path) -> None:
    data = folder(tmp_path, "train.tsv", "dev.tsv", "dev2.tsv", "other/held_out.tsv")
    with pytest.raises(DataError, match=r"both dev\.tsv and dev2\.tsv could be dev; give the one you mean by itself"):
        find_splits(data)
    other = str(tmp_path / "other" / "held_out.tsv")
    assert names(find_splits(data, dev=other)) == {"train": "train.tsv", "dev": "held_out.tsv"}
    assert names(find_splits(str(tmp_path / "dev.tsv"))) == {"train": "dev.tsv"}
    assert names(find_splits(str(tmp_path / "dev.tsv"), test=other)) == {"train": "dev.tsv", "test": "held_out.tsv"}


def test_splits_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.chdir(tmp_path)
    calls = []
    published = ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched", "unsupervised"]
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *args: calls.append(args) or published)
    splits = find_splits("glue:mnli")
    assert splits["dev_mismatched"] == Source(dataset="glue:mnli", split="validation_mismatched")
    assert {split: source.split for split, source in splits.items()} == dict(
        zip(("train", "dev", "dev_mismatched", "test", "test_mismatched"), published)
    )
    published[:] = ["train", "test"]
    (tmp_path / "mine.tsv").touch()
    splits = find_splits("someone/set", dev="mine.tsv")
    assert splits["dev"] == Source(Path("mine.tsv"))
    assert splits["test"] == Source(dataset="someone/set", split="test")
    assert calls == [("glue", "mnli"), ("someone/set", None)]
    published[:] = ["test_a", "test_b"]
    with pytest.raises(DataError, match="someone/set: both the split test_a and the split test_b could be test"):
        find_splits("someone/set")
    published[:] = ["test", "all"]
    with pytest.raises(DataError, match="has no split for training; it has test, all"):
        find_splits("someone/set")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train.tsv", "train.tsv.gz"], r"both train\.tsv and train\.tsv\.gz could be train"),
        (["train.tsv", "train_test.tsv"], r"train_test\.tsv has train and test in its name"),
        (["dev.tsv", "train.md"], r"no file for training: expected one with train in its name.*holds dev\.tsv, train\.md$"),
        ([f"{number}.tsv" for number in range(12)], r"holds 0\.tsv, .* and 2 more$"),
        ([".train.tsv"], r"no file for training.*holds no files$"),
    ],
)
def test_folders_that_leave_no_choice_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_splits(folder(tmp_path, *files))


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in ("data/train.tsv", "train.json.gz", "/no/such/folder", "a b"):
        with pytest.raises(DataError, match=f"^{data}: no such file or folder$"):
            find_splits(data)
    data = folder(tmp_path, "train.tsv")
    with pytest.raises(DataError, match=r"^dev\.tsv: no such file \(given as dev\)"):
        find_splits(data, dev="dev.tsv")
    with pytest.raises(DataError, match=r"a folder, expected a file \(given as test\)"):
        find_splits(data, test=data)
    pytest.importorskip("datasets", reason="datasets is not installed")

    def unreachable(*args: str | None) -> None:
        raise ConnectionError("the Hub cannot be reached")

    monkeypatch.setattr("datasets.get_dataset_split_names", unreachable)
    with pytest.raises(DataError, match=r"^imbd: no such file or folder, and looking for a .* failed \(ConnectionError: the Hub"):
        find_splits("imbd")


def test_the_real_folders(data_folder: Path) -> None:
    assert names(find_splits(str(data_folder / "glue/CoLA"))) == {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}
    assert names(find_splits(str(data_folder / "glue/QNLI"))) == {"train": "train_sample.tsv", "dev": "dev.tsv"}
    assert names(find_splits(str(data_folder / "qa/squad_v1.1"))) == {
        "train": "train-sample-v1.1.json.gz",
        "dev": "dev-v1.1.json.gz",
    }
    assert list(find_splits(str(data_folder / "pos/ud_english_ewt"))) == ["train", "dev", "test"]


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "train.tsv").symlink_to(tmp_path / "gone.tsv")
    with pytest.raises(DataError, match=r"no file for training.* holds no files, and a link to nothing, train\.tsv$"):
        find_splits(str(tmp_path))
