"""Two processes that would write to one output: the second is refused and nothing is touched; a dead one holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastbert.runs.errors import SettingsError
from fastbert.runs.one_writer import one_writer

HOLD = """
import sys, time
from types import SimpleNamespace
from fastbert.runs.one_writer import one_writer

@one_writer
def run(settings):
    print("writing", flush=True)
    time.sleep(60)

run(SimpleNamespace(output=sys.argv[1]))
"""


@one_writer
def run(settings, word, *, ends):
    if ends == "badly":
        raise RuntimeError(word)
    return word


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("folder", ["run", "not/there/yet"])
def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path, folder):
    output = tmp_path / folder
    settings = SimpleNamespace(output=str(output))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "writing\n"
            with pytest.raises(SettingsError, match="another process is writing to .*(run|yet) "):
                run(settings, "mine", ends="well")
        finally:
            os.kill(holder.pid, signal.SIGKILL)
    assert run(settings, "mine", ends="well") == "mine"


def test_the_lock_is_free_again_after_an_error_and_other_outputs_never_wait(tmp_path):
    settings = SimpleNamespace(output=tmp_path / "a")
    with pytest.raises(RuntimeError, match="mine"):
        run(settings, "mine", ends="badly")

    @one_writer
    def outer(settings):
        return run(SimpleNamespace(output=settings.output / "inside"), "both", ends="well")

    assert outer(settings) == "both"
    assert run(settings, "mine", ends="well") == "mine"


def test_a_name_that_is_no_text_is_refused_at_once(tmp_path):
    """Bytes of Latin-1 on a system of UTF-8: the libraries that write tokenizer and weights would fail after the training."""
    output = tmp_path / os.fsdecode(b"gr\xf6\xdfe") / "run"
    with pytest.raises(SettingsError, match=r"the path is no text in utf-8.*PYTHONUTF8=1"):
        run(SimpleNamespace(output=str(output)), "mine", ends="well")
    assert not output.parent.exists()


def test_without_a_cache_folder_the_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run(SimpleNamespace(output=tmp_path / "run"), "mine", ends="well") == "mine"


def test_one_output_under_two_names(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")

    @one_writer
    def outer(settings):
        return run(SimpleNamespace(output=tmp_path / "run"), "mine", ends="well")

    with pytest.raises(SettingsError, match="choose another --output"):
        outer(SimpleNamespace(output=tmp_path / "link"))


def test_of_processes_that_torchrun_has_started_the_first_one_holds_the_lock(tmp_path, monkeypatch):
    settings = SimpleNamespace(output=tmp_path / "a")
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    @one_writer
    def first(settings):
        monkeypatch.setenv("RANK", "1")
        assert run(settings, "beside it", ends="well") == "beside it"
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(SettingsError, match="another process"):
            run(settings, "of another run", ends="well")

    monkeypatch.setenv("RANK", "0")
    first(settings)
