"""Nobody's files are written over: a run's only on request, others never."""

from __future__ import annotations

import json

import pytest

from fastbert.train.checkpoint import write_checkpoint
from fastbert.train.errors import SettingsError
from fastbert.train.run_folder import check_output_folder, delete_run, write_json


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


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_left_alone(tmp_path, overwrite):
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"README\.md but no run\.json"):
        check(tmp_path, overwrite=overwrite)


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
