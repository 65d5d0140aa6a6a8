"""What comes out of ``fastbert prepare``: the documents of the corpus, each once, whoever encodes them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from fastbert.data.corpus import read_documents
from fastbert.data.errors import CorpusError, TokenizerError
from fastbert.data.shards import open_shards
from fastbert.data.tokenizer import load_tokenizer
from fastbert.data.tokens import tokenize_documents
from fastbert.prepare import reader
from fastbert.prepare.run import PreparationStopped
from fastbert.prepare.settings import PrepareSettings
from fastbert.runs.errors import SettingsError

from ..processes import ForkedModule
from .helpers import all_documents, contents, documents, run

Corpus = tuple[str, ...]


def test_shards_hold_what_pretrain_makes_of_the_same_text(corpus: Corpus, tokenizer_folder: str, tmp_path: Path) -> None:
    result = run(corpus, tmp_path / "out", tokenizer=tokenizer_folder, held_out_fraction=0.0)
    expected = tokenize_documents(read_documents(corpus), load_tokenizer(tokenizer_folder))
    shards = open_shards(tmp_path / "out")
    assert len(shards) > 3 and len(shards.held_out) == 0
    assert documents(shards) == documents([expected])
    facts = result.facts
    assert (facts["documents"], facts["tokens"]) == (60, expected.num_tokens) == (shards.num_documents, shards.num_tokens)
    assert facts["sentences"] == expected.num_sentences
    words = sum(len(paragraph.split()) for document in read_documents(corpus) for paragraph in document.paragraphs)
    assert facts["words"] == words
    assert facts["sources"] == {corpus[0]: 25, corpus[1]: 35}


def test_shards_end_with_the_documents_that_fill_them(corpus: Corpus, tokenizer_folder: str, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out", tokenizer=tokenizer_folder, held_out_fraction=0.0)
    tokens = [shard.tokens for shard in open_shards(tmp_path / "out").shards]
    assert all(600 <= count < 1200 for count in tokens[:-1])


@pytest.mark.parametrize("options", [{}, {"tokens_per_shard": 5_000_000}])
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    corpus: Corpus, tokenizer_folder: str, tmp_path: Path, options: dict[str, int]
) -> None:
    for workers in (1, 3):
        result = run(corpus, tmp_path / str(workers), tokenizer=tokenizer_folder, workers=workers, **options)
        assert result.workers == workers
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert not multiprocessing.active_children()


def test_duplicates_are_dropped_and_counted(tmp_path: Path, tokenizer_folder: str, stories: list[list[str]]) -> None:
    texts = ["\n".join(paragraphs) for paragraphs in stories]
    again = [texts[3], texts[7].replace("\n", "\n  ") + "\n", texts[3], texts[50]]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*texts, *again]))
    once = run((str(path),), tmp_path / "once", tokenizer=tokenizer_folder)
    assert (once.facts["duplicates"], once.facts["documents"]) == (4, 60)
    kept = run((str(path),), tmp_path / "kept", tokenizer=tokenizer_folder, keep_duplicates=True)
    assert (kept.facts["duplicates"], kept.facts["documents"]) == (0, 64)
    assert sorted(contents(tmp_path / "once")) == sorted(contents(tmp_path / "kept"))  # and nothing of a database is left


def test_held_out_documents_depend_on_their_text_alone(corpus: Corpus, tokenizer_folder: str, tmp_path: Path) -> None:
    run(corpus, tmp_path / "one", tokenizer=tokenizer_folder)
    run(corpus[::-1], tmp_path / "other", tokenizer=tokenizer_folder)
    train, held_out = all_documents(tmp_path / "one")
    assert 2 <= len(held_out) <= 15 and len(train) + len(held_out) == 60
    for found, expected in zip(all_documents(tmp_path / "other"), (train, held_out), strict=True):
        assert found != expected and sorted(found) == sorted(expected)


@pytest.mark.parametrize("fraction", [0.0, 1e-9])
def test_too_few_held_out_documents_are_told(corpus: Corpus, tokenizer_folder: str, tmp_path: Path, fraction: float) -> None:
    result = run(corpus, tmp_path / "out", tokenizer=tokenizer_folder, held_out_fraction=fraction)
    assert len(result.notes) == 1 and "only 0 of 60 documents were held out" in result.notes[0]
    assert run(corpus, tmp_path / "out", tokenizer=tokenizer_folder, held_out_fraction=0.2, overwrite=True).notes == []


def test_too_few_documents_to_train_on_are_told(corpus: Corpus, tokenizer_folder: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"60 of 60 documents were held out \(--held-out-fraction 0.9999\).*a smaller fraction"):
        run(corpus, tmp_path / "out", tokenizer=tokenizer_folder, held_out_fraction=0.9999)


def test_a_corpus_of_one_document_is_refused(tokenizer_folder: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("A text.\nOf one document.\n\nA text.\nOf one document.")
    with pytest.raises(CorpusError, match="only one document"):
        run((str(tmp_path / "one.txt"),), tmp_path / "out", tokenizer=tokenizer_folder, held_out_fraction=0.0)


def test_several_processes_of_torchrun_are_refused(
    corpus: Corpus, tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="fastbert prepare runs in one process, torchrun has started 2"):
        run(corpus, tmp_path / "out", tokenizer=tokenizer_folder)
    assert not (tmp_path / "out").exists()


def test_copies_of_one_document_are_told(tokenizer_folder: str, tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("The same. Again.\n\n" * 4, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"only one document and 3 copies of it, which are left out \(--keep-duplicates\)"):
        run((str(tmp_path / "same.txt"),), tmp_path / "out", tokenizer=tokenizer_folder)


def test_documents_without_tokens_are_counted_as_empty(tmp_path: Path, tokenizer_folder: str) -> None:
    rows = ["One text.", "  \n ", "", "Another text.", "\u200b\u0007", "A third text."]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    result = run((str(tmp_path / "rows.jsonl"),), tmp_path / "out", tokenizer=tokenizer_folder, held_out_fraction=0.0)
    assert (result.facts["documents"], result.facts["empty"]) == (3, 3)


def test_a_vocabulary_is_trained_on_the_beginning(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stories: list[list[str]]
) -> None:
    said = []
    monkeypatch.setattr("fastbert.prepare.run.TOKENIZER_CHARACTERS", 500)
    monkeypatch.setattr("fastbert.prepare.run.train_wordpiece", trained := Recorder())
    from fastbert.prepare.run import prepare

    prepare(PrepareSettings(corpus=corpus, output=str(tmp_path / "out"), vocab_size=250, workers=1), said.append)
    characters = sum(map(len, trained.texts))
    assert trained.vocab_size == 250 and 500 <= characters < 1000
    assert trained.texts[0] == stories[0][0]
    assert "the beginning of the corpus" in said[0]
    manifest = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert manifest["tokenizer"]["name"] == "trained on its beginning"


class Recorder:
    def __call__(self, texts: list[str], vocab_size: int):
        from fastbert.data.tokenizer import train_wordpiece

        self.texts, self.vocab_size = texts, vocab_size
        return train_wordpiece(texts, vocab_size)


def test_a_tokenizer_that_is_not_there_costs_nothing_that_is(corpus: Corpus, tmp_path: Path, tokenizer_folder: str) -> None:
    with pytest.raises(TokenizerError, match="no such folder"):
        run(corpus, tmp_path / "out", tokenizer=str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()
    run(corpus, tmp_path / "out", tokenizer=tokenizer_folder)
    before = contents(tmp_path / "out")
    with pytest.raises(TokenizerError, match="no such folder"):
        run(corpus, tmp_path / "out", tokenizer=str(tmp_path / "none"), overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("mistake", ["a.text", "a.md"])
def test_a_corpus_that_is_none_costs_nothing_that_is(
    corpus: Corpus, tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """Not a file, but a name that a Hugging Face dataset could have; and a file that is no text."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    Path("a.md").write_text("A text.")
    run(corpus, tmp_path / "out", tokenizer=tokenizer_folder)
    before = contents(tmp_path / "out")
    for output, overwrite in (("out", True), ("new", False)):
        with pytest.raises(CorpusError, match=f"{mistake}: (no such file or folder, and loading|unknown file type)"):
            run((*corpus, mistake), tmp_path / output, tokenizer=tokenizer_folder, overwrite=overwrite)
    assert contents(tmp_path / "out") == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("problem", ["no column 'text'; it has 'words'", "needs pyarrow"])
def test_parquet_that_cannot_be_read_costs_nothing_that_is(
    corpus: Corpus, tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"words" if "words" in problem else "text": ["A text."]}), tmp_path / "a.parquet")
    if problem == "needs pyarrow":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CorpusError, match=f"a.parquet: .*{problem}"):
        run((*corpus, str(tmp_path / "a.parquet")), tmp_path / "new", tokenizer=tokenizer_folder)
    assert not (tmp_path / "new").exists()


def test_a_worker_that_dies_ends_the_run_with_a_clear_error(
    corpus: Corpus, tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_part = reader.read_part

    def killing(part, reading):
        for number, document in enumerate(read_part(part, reading)):
            if number == 20:
                for process in multiprocessing.active_children():
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
            yield document

    monkeypatch.setattr(reader, "read_part", killing)
    with pytest.raises(PreparationStopped, match="ended by itself"):
        run(corpus, tmp_path / "killed", tokenizer=tokenizer_folder, workers=2)
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    run(corpus, tmp_path / "killed", tokenizer=tokenizer_folder, resume=True)
    run(corpus, tmp_path / "whole", tokenizer=tokenizer_folder)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# As many bytes of a tokenizer as a pipe does not hold, and workers that end before they read any.
DYING_WORKERS = """
import multiprocessing, shutil
from fastbert.prepare.workers import encode_in_order

multiprocessing.set_executable(shutil.which("false"))
list(encode_in_order(iter([]), "x" * 1_000_000, 100, 2))
"""


def test_workers_that_die_while_they_start_are_no_reason_to_wait(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        process = ForkedModule([sys.executable, "-c", DYING_WORKERS], stdout=log, stderr=log)
        try:
            assert process.wait(timeout=60) == 1
        finally:
            process.kill()
    assert "WorkerDied: a process that encodes ended by itself" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": ()}, "--corpus"),
        ({"corpus": ("",)}, "--corpus is empty"),
        ({"output": ""}, "--output is empty"),
        ({"held_out_fraction": 1.0}, "--held-out-fraction is 1.0"),
        ({"held_out_fraction": -0.1}, "--held-out-fraction is -0.1"),
        ({"held_out_fraction": float("nan")}, "--held-out-fraction is nan"),
        ({"tokens_per_shard": 0}, "--tokens-per-shard is 0"),
        ({"rows_per_document": 0}, "--rows-per-document is 0"),
        ({"workers": 0}, "--workers is 0"),
        ({"vocab_size": 199}, "--vocab-size is 199"),
        ({"vocab_size": 300, "tokenizer": "folder"}, "--vocab-size is for a vocabulary that is trained"),
        ({"resume": True, "overwrite": True}, "--resume continues"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        PrepareSettings(**{"corpus": ("a.txt",), "output": "out", **options})


def test_real_text(data_folder: Path, tmp_path: Path) -> None:
    corpus = (str(data_folder / "pretrain" / "wikipedia" / "wiki_c.txt.gz"),)
    result = run(
        corpus, tmp_path / "out", tokenizer=str(data_folder / "vocab" / "bert-base-uncased"), tokens_per_shard=200_000, workers=2
    )
    expected = tokenize_documents(read_documents(corpus), load_tokenizer(data_folder / "vocab" / "bert-base-uncased"))
    train, held_out = all_documents(tmp_path / "out")
    assert result.facts["tokens"] == expected.num_tokens and len(held_out) >= 2
    assert sorted(train + held_out) == sorted(documents([expected]))
