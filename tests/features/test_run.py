"""Runs of ``fastbert embed``: the files that they write, in pieces or in one, on one process or two, killed or not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest

from fastbert.data.errors import DataError
from fastbert.features import embedder as embed_module
from fastbert.features import parts as parts_module
from fastbert.features import run as run_module
from fastbert.features import workers
from fastbert.features.embedder import Embedder
from fastbert.features.run import EmbeddingStopped, embed
from fastbert.features.settings import EmbedSettings, parts_folder
from fastbert.runs.errors import SettingsError

from ..processes import ForkedModule, server
from .helpers import TEXTS, save_checkpoint

MANY = [f"word{number % 40} word{number * 7 % 40} word{number * 3 % 40}{'.' * (number % 5)}" for number in range(600)]


def quiet(text: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("bert"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for level in ("sequence", "token"):
        monkeypatch.setitem(embed_module.CHUNK_CHARACTERS, level, 400)


@pytest.fixture
def smallest_chunks(small_chunks, monkeypatch):
    """One text each."""
    for level in ("sequence", "token"):
        monkeypatch.setitem(embed_module.CHUNK_CHARACTERS, level, 1)


@pytest.fixture
def lines(tmp_path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def many_lines(tmp_path) -> Path:
    path = tmp_path / "many.txt"
    path.write_text("\n".join(MANY) + "\n", encoding="utf-8")
    return path


def settings_for(checkpoint: Path, inputs: Path, output: Path, **options) -> EmbedSettings:
    return EmbedSettings(model=str(checkpoint), input=(str(inputs),), output=output, device="cpu", **options)


@contextlib.contextmanager
def fails_at(monkeypatch, chunk: int, error: OSError | KeyboardInterrupt):
    """The writing of that chunk, counted from 0, ends with ``error``."""
    written = []

    def write(path, embedded):
        if len(written) == chunk:
            raise error
        written.append(path)
        parts_module.write_part(path, embedded)

    with monkeypatch.context() as patch:
        patch.setattr("fastbert.features.workers.write_part", write)
        yield


def test_npy(checkpoint, many_lines, tmp_path):
    result = embed(settings_for(checkpoint, many_lines, tmp_path / "out.npy"), quiet)
    expected = Embedder.from_pretrained(str(checkpoint), device="cpu")(MANY)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy", allow_pickle=False), expected)
    assert (result.sequences, result.rows, result.dim, result.truncated) == (600, 600, 32, 0)
    assert result.chunks > 20 and result.resumed_chunks == 0 and result.tokens_per_second > 0
    assert result.tokens == Embedder.from_pretrained(str(checkpoint), device="cpu").embed(MANY).tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.txt", "out.npy"], "nothing else is left"
    json.dumps(result.to_dict(), allow_nan=False)


def test_npy_of_tokens(checkpoint, lines, tmp_path):
    result = embed(settings_for(checkpoint, lines, tmp_path / "out.npy", level="token"), quiet)
    rows, offsets = np.load(tmp_path / "out.npy"), np.load(tmp_path / "out.offsets.npy")
    assert offsets.dtype == np.int64 and result.files == [str(tmp_path / "out.npy"), str(tmp_path / "out.offsets.npy")]
    assert result.truncated == 1 and result.rows == len(rows) == result.tokens == offsets[-1]
    expected = Embedder.from_pretrained(str(checkpoint), level="token", device="cpu")(TEXTS)
    for index, row in enumerate(expected):
        np.testing.assert_array_equal(rows[offsets[index] : offsets[index + 1]], row)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_tables(checkpoint, tmp_path, kind, smallest_chunks):
    (tmp_path / "in.tsv").write_text("a\tb\n" + "".join(f"{text}\t{text[::2]}\n" for text in TEXTS), encoding="utf-8")
    output = tmp_path / f"out.{kind}"
    embed(settings_for(checkpoint, tmp_path / "in.tsv", output, text_column="a", text_pair_column="b"), quiet)
    expected = Embedder.from_pretrained(str(checkpoint), device="cpu")(TEXTS, [text[::2] for text in TEXTS])
    rows = read_rows(output)
    assert [list(row) for row in rows] == [["row", "text", "text_pair", "embedding"]] * len(TEXTS)
    assert [(row["row"], row["text"], row["text_pair"]) for row in rows] == [(i, t, t[::2]) for i, t in enumerate(TEXTS)]
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], np.float32), expected)
    if kind == "parquet":
        assert str(pyarrow.parquet.read_schema(output).field("embedding").type) == "fixed_size_list<element: float>[32]"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_tables_of_words(checkpoint, tmp_path, kind, smallest_chunks):
    words = [["word1", "word2word3"], ["word4\0"], ["word5", "\u200b", "word6"]]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"words": row}) for row in words), encoding="utf-8")
    output = tmp_path / f"out.{kind}"
    embed(settings_for(checkpoint, tmp_path / "in.jsonl", output, level="token", words_column="words"), quiet)
    rows = read_rows(output)
    expected = [(i, " ".join(row), position, word) for i, row in enumerate(words) for position, word in enumerate(row)]
    assert [(row["row"], row["text"], row["position"], row["token"]) for row in rows] == expected
    embedder = Embedder.from_pretrained(str(checkpoint), level="token", words=True, device="cpu")
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], np.float32), np.concatenate(embedder(words)))


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["out.npy", "out.parquet", "out.jsonl"])
def test_a_full_disk_loses_nothing_and_resume_gives_the_same_bytes(checkpoint, many_lines, tmp_path, monkeypatch, name):
    embed(settings_for(checkpoint, many_lines, tmp_path / f"whole-{name}"), quiet)
    settings = settings_for(checkpoint, many_lines, tmp_path / name)
    full = OSError(errno.ENOSPC, "No space left on device")

    def full_for_the_output(number: int) -> None:
        if os.readlink(f"/proc/self/fd/{number}").endswith(f"{name}.new"):
            raise full

    with fails_at(monkeypatch, 5, full), pytest.raises(EmbeddingStopped, match=r"No space left.*5 of \d+ chunks.*--resume"):
        embed(settings, quiet)
    assert not settings.output.exists()
    parts = {path: path.stat().st_mtime_ns for path in parts_folder(settings.output).glob("*.npz")}
    assert len(parts) == 5

    # The disk is full once more, when the file is put together.
    again = settings_for(checkpoint, many_lines, tmp_path / name, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_for_the_output)
        with pytest.raises(EmbeddingStopped, match="cannot be written.*No space left"):
            embed(again, quiet)
    assert {path: path.stat().st_mtime_ns for path in parts} == parts, "finished chunks are not made again"
    assert not settings.output.exists() and not list(tmp_path.glob(".out*"))
    result = embed(again, quiet)
    assert result.resumed_chunks == result.chunks and result.tokens_per_second is None and result.sequences == 600
    assert settings.output.read_bytes() == (tmp_path / f"whole-{name}").read_bytes()
    assert not parts_folder(settings.output).exists()


def test_ctrl_c_keeps_what_is_finished(checkpoint, many_lines, tmp_path, monkeypatch):
    settings = settings_for(checkpoint, many_lines, tmp_path / "out.npy")
    with fails_at(monkeypatch, 3, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        embed(settings, quiet)
    assert len(list(parts_folder(settings.output).glob("chunk*"))) == 3


KILLED = """
import sys
from fastbert.features import embedder as embed_module
embed_module.CHUNK_CHARACTERS.update(sequence=400, token=400)
import torch
torch.set_num_threads(1)
from fastbert.cli.main import app
app(sys.argv[1:])
"""


def test_a_killed_run_goes_on_to_the_same_bytes(checkpoint, many_lines, tmp_path):
    embed(settings_for(checkpoint, many_lines, tmp_path / "whole.npy"), quiet)
    output = tmp_path / "out.npy"
    folder = parts_folder(output)
    command = ["embed", "--model", str(checkpoint), "--input", str(many_lines), "--output", str(output), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        process = ForkedModule([sys.executable, "-c", KILLED, *command], stdout=log, stderr=log)
        while len(list(folder.glob("chunk*"))) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.001)
        process.kill()
        process.wait()
    finished = len(list(folder.glob("chunk*")))
    assert not output.exists() and folder.is_dir()

    with pytest.raises(SettingsError, match="holds an unfinished run: --resume"):
        embed(settings_for(checkpoint, many_lines, output), quiet)
    result = embed(settings_for(checkpoint, many_lines, output, resume=True), quiet)
    assert 2 <= result.resumed_chunks <= finished < result.chunks
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes() and not folder.exists()


def test_processes_give_the_same_bytes_and_stop_at_an_error(checkpoint, many_lines, tmp_path, monkeypatch):
    """Two of them make all chunks but one that cannot be written; this process makes that one."""
    embed(settings_for(checkpoint, many_lines, tmp_path / "one.npy"), quiet)
    output = tmp_path / "out.npy"
    real = run_module._chunk

    def last_is_unwritable(texts, bounds, index, parts, names):
        chunk = real(texts, bounds, index, parts, names)
        if index == parts.count - 1:
            object.__setattr__(chunk, "path", tmp_path / "no" / "folder.npz")
        return chunk

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_chunk", last_is_unwritable)
        patch.setattr(workers, "multiprocessing", SimpleNamespace(get_context=lambda method: server()))  # imports nothing anew
        with pytest.raises(EmbeddingStopped, match=r"No such file.*chunks are finished.*--resume"):
            embed(settings_for(checkpoint, many_lines, output, num_processes=2), said.append)
    assert "2 processes with 1 thread" in said[-1]
    result = embed(settings_for(checkpoint, many_lines, output, resume=True), quiet)
    assert result.chunks - 2 <= result.resumed_chunks <= result.chunks - 1 and result.processes == 1
    assert output.read_bytes() == (tmp_path / "one.npy").read_bytes()


def test_more_processes_than_chunks(checkpoint, lines, tmp_path, monkeypatch):
    monkeypatch.setitem(embed_module.CHUNK_CHARACTERS, "sequence", 10**6)
    assert embed(settings_for(checkpoint, lines, tmp_path / "out.npy", num_processes=7), quiet).processes == 1


def test_resume_refuses_another_run(checkpoint, many_lines, lines, tmp_path, monkeypatch):
    output = tmp_path / "out.npy"
    with fails_at(monkeypatch, 2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        embed(settings_for(checkpoint, many_lines, output), quiet)
    other = save_checkpoint(tmp_path / "other", layers=4)
    for model, inputs, options, message in (
        (
            checkpoint,
            many_lines,
            {"pooling": "cls", "max_seq_length": 9},
            "--pooling was mean and is now cls; --max-seq-length was not",
        ),
        (checkpoint, lines, {}, "the text is not the same"),
        (other, many_lines, {}, r"the model \(weights, configuration or tokenizer\) is not the same"),
    ):
        with pytest.raises(SettingsError, match=message):
            embed(settings_for(model, inputs, output, resume=True, **options), quiet)
    assert len(list(parts_folder(output).glob("chunk*"))) == 2, "what was there still is"
    # What decides nothing may change.
    assert embed(settings_for(checkpoint, many_lines, output, resume=True, num_processes=1), quiet).resumed_chunks == 2


def test_resume_with_nothing_there_begins(checkpoint, lines, tmp_path):
    """A run may be killed before its first file."""
    assert embed(settings_for(checkpoint, lines, tmp_path / "out.npy", resume=True), quiet).resumed_chunks == 0
    with pytest.raises(SettingsError, match="there and whole"):
        embed(settings_for(checkpoint, lines, tmp_path / "out.npy", resume=True), quiet)


def test_a_run_that_was_killed_while_it_deleted_its_parts(checkpoint, many_lines, tmp_path, monkeypatch):
    output = tmp_path / "out.npy"
    deleted = []

    def killed(path, *args, unlink=Path.unlink, **kwargs):
        if path.parent == parts_folder(output):
            if deleted:
                raise KeyboardInterrupt
            deleted.append(path)
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(settings_for(checkpoint, many_lines, output), quiet)
    expected = output.read_bytes()
    result = embed(settings_for(checkpoint, many_lines, output, resume=True), quiet)
    assert result.resumed_chunks == result.chunks - 1 and output.read_bytes() == expected


def test_overwrite_keeps_the_old_file_until_the_new_one_is_whole(checkpoint, many_lines, lines, tmp_path, monkeypatch):
    output = tmp_path / "out.npy"
    embed(settings_for(checkpoint, lines, output), quiet)
    old = output.read_bytes()
    with pytest.raises(SettingsError, match="--overwrite"):
        embed(settings_for(checkpoint, many_lines, output), quiet)
    with fails_at(monkeypatch, 2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        embed(settings_for(checkpoint, many_lines, output, overwrite=True), quiet)
    assert output.read_bytes() == old
    result = embed(settings_for(checkpoint, many_lines, output, overwrite=True), quiet)
    assert result.resumed_chunks == 0 and len(np.load(output)) == 600


def test_rows_and_offsets_are_overwritten_together(checkpoint, many_lines, lines, tmp_path, monkeypatch):
    output, both = tmp_path / "out.npy", ("out.npy", "out.offsets.npy")
    embed(settings_for(checkpoint, lines, output, level="token"), quiet)
    before = [(tmp_path / name).read_bytes() for name in both]
    with monkeypatch.context() as disk:
        disk.setattr(np.lib.format, "write_array_header_1_0", raiser(OSError(28, "No space left on device")))
        with pytest.raises(EmbeddingStopped, match="cannot be written"):
            embed(settings_for(checkpoint, many_lines, output, level="token", overwrite=True), quiet)
    assert [(tmp_path / name).read_bytes() for name in both] == before
    embed(settings_for(checkpoint, many_lines, output, level="token", overwrite=True), quiet)
    assert np.load(tmp_path / both[1])[-1] == len(np.load(output))
    embed(settings_for(checkpoint, many_lines, output, overwrite=True), quiet)
    assert not (tmp_path / both[1]).exists()  # which were of tokens
    np.save(tmp_path / both[1], np.arange(3))  # a file of the user's
    embed(settings_for(checkpoint, many_lines, output, overwrite=True), quiet)
    assert (tmp_path / both[1]).exists()


def raiser(error: Exception):
    def fails(*_args, **_options):
        raise error

    return fails


def test_pairs_need_room_for_both(checkpoint, tmp_path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("text\tsecond\na good one\ta bad one\n")
    given = {"text_column": "text", "text_pair_column": "second"}
    with pytest.raises(SettingsError, match="--max-seq-length must be at least 5 for pairs"):
        embed(settings_for(checkpoint, pairs, tmp_path / "a.npy", max_seq_length=4, **given), quiet)
    assert embed(settings_for(checkpoint, pairs, tmp_path / "b.npy", max_seq_length=5, **given), quiet).sequences == 1


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
def test_a_damaged_part_is_named_and_made_again(checkpoint, many_lines, tmp_path, monkeypatch, name, cut):
    output = tmp_path / name
    with fails_at(monkeypatch, 4, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        embed(settings_for(checkpoint, many_lines, output), quiet)
    part = sorted(parts_folder(output).glob("chunk*"))[1]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content[: len(content) // 2] if cut else content)
    with pytest.raises(DataError, match=f"{part.name}: the chunk was damaged"):
        embed(settings_for(checkpoint, many_lines, output, resume=True), quiet)
    embed(settings_for(checkpoint, many_lines, output, resume=True), quiet)
    embed(settings_for(checkpoint, many_lines, tmp_path / f"whole-{name}"), quiet)
    assert output.read_bytes() == (tmp_path / f"whole-{name}").read_bytes()


def test_folders_that_hold_other_files_are_left_alone(checkpoint, lines, tmp_path):
    output = tmp_path / "out.npy"
    parts_folder(output).mkdir()
    (parts_folder(output) / "thesis.doc").write_text("Years of work.", encoding="utf-8")
    with pytest.raises(SettingsError, match="from no run of fastbert embed"):
        embed(settings_for(checkpoint, lines, output, overwrite=True), quiet)
    assert (parts_folder(output) / "thesis.doc").exists()


def test_a_bad_text_is_named_by_its_file_and_line(tmp_path, lines):
    folder = save_checkpoint(tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    number = Embedder.from_pretrained(str(folder), device="cpu").tokenizer.vocab["word4"]
    weights["embeddings.word_embeddings.weight"][number] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lines.txt, line 2: the text gets an embedding with NaN or infinity"):
        embed(settings_for(folder, lines, tmp_path / "out.npy"), quiet)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_text_of_which_nothing_is_kept_is_named_before_the_first_chunk(checkpoint, tmp_path, processes):
    path, output = tmp_path / "many.txt", tmp_path / "out.npy"
    path.write_text("\n".join([*MANY[:300], "...", *MANY[300:], "\ufe0f", "word1"]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="many.txt, line 602: the text has nothing that the tokenizer keeps"):
        embed(settings_for(checkpoint, path, output, num_processes=processes), quiet)
    assert not parts_folder(output).exists()
    path.write_text(path.read_text(encoding="utf-8").replace("\ufe0f", "."), encoding="utf-8")
    assert embed(settings_for(checkpoint, path, output), quiet).sequences == 603


def test_a_disk_without_room_for_the_first_file(checkpoint, lines, tmp_path, monkeypatch):
    def full(path, document):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fastbert.features.parts.write_json", full)
        with pytest.raises(OSError, match="out.npy.parts cannot be written: No space left on device"):
            embed(settings_for(checkpoint, lines, tmp_path / "out.npy"), quiet)
    assert not (tmp_path / "out.npy.parts").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": Path("out.csv")}, "must end in one of .npy, .parquet, .jsonl"),
        ({"input": ()}, "--input"),
        ({"input": ("",)}, "--input is empty"),
        ({"model": ""}, "--model is empty"),
        ({"input": ("-", "-")}, "read once"),
        ({"num_processes": 0}, "--num-processes is 0; it must be at least 1"),
        ({"words_column": "w", "text_column": "t"}, "--words-column"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"dtype": "half"}, "known are float32"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(SettingsError, match=message):
        EmbedSettings(**{"model": "m", "input": ("a.txt",), "output": Path("out.npy"), **options})


def test_the_offsets_of_others_are_left_alone(checkpoint, lines, tmp_path):
    (tmp_path / "out.offsets.npy").write_bytes(b"mine")
    with pytest.raises(SettingsError, match="out.offsets.npy is there already"):
        embed(settings_for(checkpoint, lines, tmp_path / "out.npy", level="token"), quiet)
    assert (tmp_path / "out.offsets.npy").read_bytes() == b"mine"
    embed(settings_for(checkpoint, lines, tmp_path / "out.npy"), quiet)


def test_outputs_that_cannot_be_written(checkpoint, lines, tmp_path):
    with pytest.raises(SettingsError, match="is a folder"):
        (tmp_path / "folder.npy").mkdir()
        embed(settings_for(checkpoint, lines, tmp_path / "folder.npy"), quiet)
    with pytest.raises(SettingsError, match="there is no folder"):
        embed(settings_for(checkpoint, lines, tmp_path / "none" / "out.npy"), quiet)


def test_memory_does_not_grow_with_the_embeddings(checkpoint, tmp_path):
    """The largest array that is ever made is a chunk's, not the output's."""
    path = tmp_path / "many.txt"
    path.write_text("\n".join(MANY * 5) + "\n", encoding="utf-8")
    import tracemalloc

    tracemalloc.start()
    try:
        result = embed(settings_for(checkpoint, path, tmp_path / "out.npy", level="token"), quiet)
        largest = max(trace.size for trace in tracemalloc.take_snapshot().traces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = result.rows * result.dim * 4
    assert os.path.getsize(tmp_path / "out.npy") >= size > 2**21
    assert max(largest, peak) < size
