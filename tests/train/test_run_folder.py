"""Nobody's files are written over: a run's only on request, others never."""

from __future__ import annotations

import json

import pytest

from fastbert.runs.errors import SettingsError
from fastbert.runs.folder import write_json
from fastbert.train.checkpoint import write_checkpoint
from fastbert.train.run_folder import check_folders, check_output_folder, delete_run
from fastbert.train.settings import PretrainSettings


@pytest.fixture
def run_folder(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    for name in ("run.json", "config.json", "metrics.jsonl", "README.md", "model.safetensors", "vocab.txt"):
        (output / name).write_text("{}", encoding="utf-8")
    write_checkpoint(output, 5, lambda folder: (folder / "model.safetensors").write_bytes(b"weights"), keep=2)
    return output


def check(output, resume=False, overwrite=False):
    check_output_folder(output, resume=resume, overwrite=overwrite)


def test_new_and_empty_folders_are_fine(tmp_path):
    check(tmp_path / "deep" / "new")
    check(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_refused_unless_asked(run_folder):
    with pytest.raises(SettingsError, match="already holds a run.*--resume.*--overwrite"):
        check(run_folder)
    check(run_folder, resume=True)
    check(run_folder, overwrite=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(SettingsError, match="nothing to resume"):
        check(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("run", "refused"),
    [
        ({"settings": {}, "results": None}, None),
        ({"settings": {}, "results": {}}, "nothing to resume .--overwrite"),
        ({"results": None}, "run.json is not that of a run"),
    ],
)
def test_a_run_without_a_checkpoint_is_resumed_unless_it_is_finished(tmp_path, run, refused):
    write_json(tmp_path / "run.json", run)
    if refused is None:
        check(tmp_path, resume=True)
        return
    with pytest.raises(SettingsError, match=refused):
        check(tmp_path, resume=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_left_alone(tmp_path, overwrite):
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"README\.md but no run\.json"):
        check(tmp_path, overwrite=overwrite)


@pytest.mark.parametrize("source", [{"model": ""}, {"model": "checkpoint-5"}, {"tokenizer": ""}])
def test_a_run_is_not_deleted_that_another_one_starts_from(run_folder, source):
    settings = {name: str(run_folder / below) for name, below in source.items()}
    with pytest.raises(SettingsError, match="--overwrite deletes .*, which the run needs, is in it"):
        check_folders(PretrainSettings(output=str(run_folder), overwrite=True, **settings))
    check_folders(PretrainSettings(output=str(run_folder.parent / "other"), overwrite=True, **settings))


def test_a_run_lies_outside_of_the_text_that_it_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for corpus in (".", "texts", str(tmp_path)):
        with pytest.raises(SettingsError, match="metrics.jsonl of the run too"):
            check_folders(PretrainSettings(output="texts/run", corpus=(corpus,)))
    check_folders(PretrainSettings(output="run", corpus=("texts", "texts/file.txt", "wikipedia")))
    (tmp_path / "texts" / "prepared.json").write_text("{}", encoding="utf-8")
    check_folders(PretrainSettings(output="texts/run", corpus=("texts",)))


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SettingsError, match="is a file"):
        check(tmp_path / "file")
    with pytest.raises(SettingsError, match="is a file"):
        check(tmp_path / "file" / "below")


def test_deleting_a_run_deletes_its_files_only(run_folder):
    (run_folder / "notes.txt").write_text("mine", encoding="utf-8")
    (run_folder / "figures").mkdir()
    (run_folder / ".unfinished-checkpoint-6").mkdir()
    delete_run(run_folder)
    assert sorted(entry.name for entry in run_folder.iterdir()) == ["figures", "notes.txt"]
    delete_run(run_folder / "figures" / "none")


def test_json_is_written_whole_or_not(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
