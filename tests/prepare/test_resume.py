"""A run that was stopped, killed included, goes on to the bytes of one that was not; with anything else it is refused."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbert.data.corpus import read_documents
from fastbert.data.errors import CorpusError
from fastbert.prepare.run import PreparationStopped
from fastbert.prepare.seen import SeenDocuments
from fastbert.prepare.settings import PrepareSettings
from fastbert.runs.errors import SettingsError

from .helpers import contents, run

Corpus = tuple[str, ...]
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

# A run in a process of its own that prints those of its workers before it kills itself.
KILLED_WITH_WORKERS = """
import json, multiprocessing, os, signal, sys
from fastbert.prepare import run, seen

def commit(self):
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

seen.SeenDocuments.commit = commit
run.prepare(run.PrepareSettings(**json.loads(sys.argv[1])), lambda text: None)
"""


@pytest.fixture
def options(tokenizer_folder: str) -> dict:
    return {"tokenizer": tokenizer_folder, "tokens_per_shard": 600, "held_out_fraction": 0.1, "workers": 1}


def kill_at(corpus: Corpus, output: Path, options: dict, when: str, owner: Any, name: str, number: int) -> None:
    """Runs in a child that kills itself before or after the n-th call of a function, which no handler can notice."""
    child = os.fork()
    if child == 0:
        try:
            setattr(owner, name, dying(getattr(owner, name), when, number))
            run(corpus, output, **options)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def dying(function: Callable, when: str, number: int) -> Callable:
    calls = itertools.count(1)

    def counted(*args, **kwargs):
        is_last = next(calls) == number
        if is_last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


@pytest.mark.parametrize(
    ("when", "owner", "name", "number"),
    [
        ("before", os, "fsync", 3),  # the first shard is written beside its name
        ("after", os, "replace", 4),  # it is there, and its manifest is not
        ("before", SeenDocuments, "commit", 3),
        ("after", SeenDocuments, "commit", 4),
        ("before", os, "replace", 12),
        ("after", os, "replace", 13),
        ("before", SeenDocuments, "close", 1),  # everything is written, and the manifest does not say so
    ],
)
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    corpus: Corpus, tmp_path: Path, options: dict, when: str, owner: Any, name: str, number: int
) -> None:
    Path(corpus[1]).write_text(Path(corpus[1]).read_text() + "\n\n" + Path(corpus[0]).read_text()[:2000])  # with duplicates
    run(corpus, tmp_path / "whole", **options)
    kill_at(corpus, tmp_path / "killed", options, when, owner, name, number)
    left = contents(tmp_path / "killed")
    run(corpus, tmp_path / "killed", **options, resume=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not json.loads(left["prepared.json"])["complete"]


def test_workers_end_when_the_parent_is_killed_and_others_go_on(corpus: Corpus, tmp_path: Path, options: dict) -> None:
    settings = {"corpus": corpus, "output": str(tmp_path / "killed"), **options, "workers": 2}
    command = [sys.executable, "-c", KILLED_WITH_WORKERS, json.dumps(settings)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert process.returncode == -signal.SIGKILL
    workers = [int(number) for number in process.stdout.split()]
    assert len(set(workers)) == 2
    for _ in range(200):
        alive = [number for number in workers if is_alive(number)]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive
    run(corpus, tmp_path / "killed", **{**options, "workers": 3}, resume=True)
    run(corpus, tmp_path / "whole", **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/status")  # nobody may be there to take what a dead one returned
    return not (status.exists() and "State:\tZ" in status.read_text())


@pytest.fixture
def stopped(corpus: Corpus, tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that found the disk full at its third shard."""
    fsync, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PreparationStopped, match="No space left on device"):
        run(corpus, tmp_path / "stopped", **options)
    monkeypatch.setattr(os, "fsync", fsync)
    return tmp_path / "stopped"


def test_a_full_disk_leaves_finished_shards_that_a_run_goes_on_behind(
    stopped: Path, corpus: Corpus, tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: content for name, content in contents(stopped).items() if name.startswith("train")}
    assert kept and json.loads((stopped / "prepared.json").read_text())["facts"]["tokens"] > 0
    read = []
    monkeypatch.setattr("fastbert.prepare.workers.encode_documents", lambda *args: read.append(args) or encode(*args))
    from fastbert.prepare.encode import encode_documents as encode

    run(corpus, stopped, **options, resume=True)
    encoded = sum(len(documents) for _, documents in read)
    assert 0 < encoded < len(list(read_documents(corpus)))  # not all anew
    run(corpus, tmp_path / "whole", **options)
    assert contents(stopped) == contents(tmp_path / "whole")
    assert kept.items() <= contents(stopped).items()


def test_a_stopped_run_is_not_written_over_unasked(stopped: Path, corpus: Corpus, options: dict, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="prepared in part: --resume goes on with it, --overwrite deletes it"):
        run(corpus, stopped, **options)
    run(corpus, stopped, **options, overwrite=True)
    run(corpus, tmp_path / "whole", **options)
    assert contents(stopped) == contents(tmp_path / "whole")


def test_other_settings_are_refused_by_name(stopped: Path, corpus: Corpus, options: dict) -> None:
    with pytest.raises(SettingsError, match="--tokens-per-shard was 600 and is now 700"):
        run(corpus, stopped, **{**options, "tokens_per_shard": 700}, resume=True)
    with pytest.raises(SettingsError, match="--corpus was"):
        run(corpus[:1], stopped, **options, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "b.txt").write_text("Another text.\n\nAnd one more."), "b.txt was changed since the run began"),
        (lambda folder: (folder / "c.txt").write_text("Another text."), "c.txt was added since the run began"),
        (lambda folder: (folder / "a.txt").unlink(), "a.txt is gone since the run began"),
    ],
)
def test_a_corpus_that_changed_is_refused(
    corpus: Corpus, tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch, change, message: str
) -> None:
    folder = (str(tmp_path / "corpus"),)
    kill_at(folder, tmp_path / "out", options, "after", SeenDocuments, "commit", 3)
    change(tmp_path / "corpus")
    with pytest.raises(CorpusError, match=message):
        run(folder, tmp_path / "out", **options, resume=True)


def test_other_documents_under_the_same_size_and_time_are_refused(corpus: Corpus, tmp_path: Path, options: dict) -> None:
    kill_at(corpus, tmp_path / "out", options, "after", SeenDocuments, "commit", 2)
    path = Path(corpus[0])
    facts, text = path.stat(), path.read_text()
    path.write_text(text.replace("a", "e", 1))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(CorpusError, match=r"a.txt is not what it was: its first \d+ documents"):
        run(corpus, tmp_path / "out", **options, resume=True)


def test_shards_and_tokenizer_that_changed_are_refused(stopped: Path, corpus: Corpus, options: dict) -> None:
    shard = stopped / "train-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CorpusError, match="train-00000.safetensors: this shard has"):
        run(corpus, stopped, **options, resume=True)
    shard.write_bytes(content)
    tokenizer = stopped / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"lowercase": true', '"lowercase": false'))
    with pytest.raises(PreparationStopped, match="the tokenizer in .* was changed"):
        run(corpus, stopped, **options, resume=True)


def test_digests_that_are_gone_are_told(stopped: Path, corpus: Corpus, options: dict) -> None:
    for path in stopped.glob("seen.sqlite*"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(CorpusError, match=r"seen\.sqlite is gone, .* --overwrite begins anew"):
            run(corpus, stopped, **options, resume=True)


def test_a_finished_corpus_is_not_touched(corpus: Corpus, tmp_path: Path, options: dict) -> None:
    run(corpus, tmp_path / "out", **options)
    before = contents(tmp_path / "out")
    with pytest.raises(SettingsError, match="complete: pretrain reads it"):
        run(corpus, tmp_path / "out", **options)
    with pytest.raises(SettingsError, match="complete: there is nothing to resume"):
        run(corpus, tmp_path / "out", **options, resume=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(("when", "number"), [("before", 1), ("after", 1), ("before", 2)])
def test_a_run_that_was_killed_at_its_very_beginning_is_begun_again(
    corpus: Corpus, tmp_path: Path, options: dict, when: str, number: int
) -> None:
    kill_at(corpus, tmp_path / "killed", options, when, os, "replace", number)
    assert list((tmp_path / "killed").iterdir())
    run(corpus, tmp_path / "killed", **options)
    run(corpus, tmp_path / "whole", **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_run_that_was_killed_at_its_very_end_is_tidied_up(corpus: Corpus, tmp_path: Path, options: dict) -> None:
    run(corpus, tmp_path / "whole", **options)
    before = contents(tmp_path / "whole")
    # inputs.json, every shard, and a manifest at the beginning, with the tokenizer, behind each train shard, and at the end.
    manifests = 3 + sum(name.startswith("train") for name in before)
    replaces = 1 + manifests + sum(name.endswith(".safetensors") for name in before)
    kill_at(corpus, tmp_path / "killed", options, "after", os, "replace", replaces)
    assert json.loads((tmp_path / "killed" / "prepared.json").read_text())["complete"]
    assert {"inputs.json", "seen.sqlite"} <= set(contents(tmp_path / "killed"))
    with pytest.raises(SettingsError, match="there is nothing to resume"):
        run(corpus, tmp_path / "killed", **options, resume=True)
    assert contents(tmp_path / "killed") == before


def test_what_was_left_out_is_counted_once_however_often_a_run_stops(
    tmp_path: Path, options: dict, stories: list[list[str]]
) -> None:
    rows = [text for paragraphs in stories for text in ("\n".join(paragraphs), " ", "\n".join(paragraphs))]
    lines = [json.dumps({"text": text}) for text in rows]
    for place in range(0, len(lines), 7):
        lines[place] += "\n{"
    corpus = (str(tmp_path / "rows.jsonl"),)
    Path(corpus[0]).write_text("\n".join(lines))
    options = {**options, "skip_bad_text": True}
    whole = run(corpus, tmp_path / "whole", **options).facts
    assert (whole["duplicates"], whole["empty"], whole["bad_text"]) == (60, 60, len(range(0, 180, 7)))
    kill_at(corpus, tmp_path / "killed", options, "after", SeenDocuments, "commit", 3)
    kill_at(corpus, tmp_path / "killed", {**options, "resume": True}, "after", SeenDocuments, "commit", 2)
    run(corpus, tmp_path / "killed", **options, resume=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_folders_that_are_not_ours_are_left_alone(corpus: Corpus, tmp_path: Path, options: dict) -> None:
    output = tmp_path / "out"
    with pytest.raises(SettingsError, match="holds no prepared corpus"):
        run(corpus, output, **options, resume=True)
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / "tokenizer.json").write_text("{}")
    with pytest.raises(SettingsError, match="holds tokenizer.json but no prepared.json"):
        run(corpus, output, **options)
    (output / "tokenizer.json").unlink()
    run(corpus, output, **options)
    run(corpus, output, **options, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    with pytest.raises(SettingsError, match="is a file"):
        run(corpus, output / "notes.txt", **options)
    with pytest.raises(SettingsError, match="is the folder of the tokenizer"):
        run(corpus, Path(options["tokenizer"]), **options, overwrite=True)


def test_bad_text_stops_a_run_that_goes_on_without_it(corpus: Corpus, tmp_path: Path, options: dict) -> None:
    path = Path(corpus[1])
    path.write_bytes(path.read_bytes().replace(b"\n\n", b"\n\n\xff\xfe\n\n", 9).replace(b"\n\n\xff\xfe\n\n", b"\n\n", 8))
    with pytest.raises(CorpusError, match=r"b.txt, line \d+: not UTF-8"):
        run(corpus, tmp_path / "out", **options)
    result = run(corpus, tmp_path / "out", **options, resume=True, skip_bad_text=True)
    assert (result.facts["bad_text"], result.facts["documents"]) == (1, 60)
    run(corpus, tmp_path / "whole", **options, skip_bad_text=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert PrepareSettings(corpus=corpus, output="x").skip_bad_text is False
