"""What a document says of the machine and of the code that it measured."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from benchmarks import machine


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_new_results_leave_the_commit_what_it_is_and_changed_sources_do_not(tmp_path):
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    source, result = tmp_path / "source.py", tmp_path / "benchmarks" / "results" / "here" / "ops.json"
    result.parent.mkdir(parents=True)
    for path in (source, result):
        path.write_text("old")
    git("init")
    git("add", ".")
    git("commit", "--message", "one")
    clean = machine.commit(tmp_path)
    assert clean and not clean.endswith("-dirty")
    result.write_text("new")
    (tmp_path / "notes").write_text("untracked, as for git describe")
    assert machine.commit(tmp_path) == clean
    source.write_text("new")
    assert machine.commit(tmp_path) == f"{clean}-dirty"


def test_without_a_repository_there_is_no_commit(tmp_path):
    assert machine.commit(tmp_path) is None
