"""Shards on disk: what was written comes back, and a folder that is damaged, unfinished or of another tokenizer says so."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast

from fastbert.data.errors import CorpusError, TokenizerError
from fastbert.data.shards import (
    HELD_OUT,
    MANIFEST,
    TRAIN,
    TokenShards,
    is_prepared,
    open_shards,
    shard_name,
    tokenizer_fingerprint,
    write_shard,
)
from fastbert.data.tokenizer import load_tokenizer, train_wordpiece
from fastbert.data.tokens import TokenizedCorpus

from .helpers import numbered_corpus, random_lengths


def write_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, train: list[TokenizedCorpus], held_out: list[TokenizedCorpus]):
    """A prepared folder of these corpora, one a shard."""
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    shards = {
        split: [
            vars(
                write_shard(
                    folder, shard_name(split, index), part.ids, np.diff(part.sentence_offsets), np.diff(part.document_offsets)
                )
            )
            for index, part in enumerate(parts)
        ]
        for split, parts in ((TRAIN, train), (HELD_OUT, held_out))
    }
    made = {"name": "mine", "vocab_size": len(tokenizer), "fingerprint": tokenizer_fingerprint(tokenizer)}
    manifest = {"format": 1, "complete": True, "tokenizer": made, "shards": shards, "facts": {"documents": 5}, "settings": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def parts() -> list[TokenizedCorpus]:
    return [numbered_corpus(random_lengths(documents, seed)) for seed, documents in enumerate((5, 1, 8, 2, 3, 4))]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, parts: list[TokenizedCorpus]) -> Path:
    write_folder(tmp_path / "prepared", tokenizer, parts, parts[:1])
    return tmp_path / "prepared"


def assert_same(found: TokenizedCorpus, expected: TokenizedCorpus) -> None:
    for name in ("ids", "sentence_offsets", "document_offsets"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype


def test_shards_come_back_as_they_were_written(folder: Path, parts: list[TokenizedCorpus]) -> None:
    shards = open_shards(folder)
    assert len(shards) == 6 and len(shards.held_out) == 1
    for found, expected in zip(shards, parts, strict=True):
        assert_same(found, expected)
    assert_same(shards[-1], parts[-1])
    assert_same(shards.held_out[0], parts[0])
    assert shards.num_documents == sum(part.num_documents for part in parts)
    assert shards.num_tokens == sum(part.num_tokens for part in parts)
    assert shards.facts == {"documents": 5}
    with pytest.raises(IndexError):
        shards[6]


def test_ids_are_mapped_and_read_only(folder: Path) -> None:
    ids = open_shards(folder)[0].ids
    assert isinstance(ids, np.memmap) and not ids.flags.writeable and ids.flags.aligned


def test_only_a_few_shards_stay_open(folder: Path) -> None:
    shards = open_shards(folder)
    first = shards[0]
    assert shards[0] is first
    for index in range(1, 6):
        shards[index]
    assert len(shards._open) == 4 and shards[0] is not first


def test_shards_are_pickled_without_what_they_mapped(folder: Path, parts: list[TokenizedCorpus]) -> None:
    shards = open_shards(folder)
    shards[2]
    copy = pickle.loads(pickle.dumps(shards))
    assert isinstance(copy, TokenShards) and not copy._open and copy.fingerprint == shards.fingerprint
    assert_same(copy[2], parts[2])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_shards_are_safetensors_files(tmp_path: Path, dtype: type) -> None:
    ids = np.array([7, 300, 9], dtype)
    shard = write_shard(tmp_path, "a.safetensors", ids, np.array([2, 1]), np.array([2]))
    arrays = load_file(tmp_path / "a.safetensors")
    assert arrays["ids"].dtype == dtype and arrays["ids"].tolist() == [7, 300, 9]
    assert arrays["sentence_lengths"].tolist() == [2, 1] and arrays["document_lengths"].tolist() == [2]
    assert (shard.documents, shard.sentences, shard.tokens) == (1, 2, 3)
    assert shard.bytes == (tmp_path / "a.safetensors").stat().st_size


def test_no_part_of_a_shard_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path, "a.safetensors", np.array([7], np.uint16), np.array([1]), np.array([1]))
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_follows_ids_and_bounds(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "prepared"
    fingerprints = set()
    for lengths in ([[2, 3], [4]], [[5], [4]], [[2, 3, 4]], [[2, 3], [4]]):
        write_folder(folder, tokenizer, [numbered_corpus(lengths)], [])
        fingerprints.add(open_shards(folder).fingerprint)
    assert len(fingerprints) == 3
    assert len(open_shards(folder).held_out) == 0


def test_a_shard_cut_short_is_named_with_both_sizes(folder: Path) -> None:
    path = folder / "train-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(CorpusError, match=rf"train-00002.safetensors: .* {len(content) - 10:,} bytes.* {len(content):,}"):
        open_shards(folder)
    path.unlink()
    with pytest.raises(CorpusError, match="train-00002.safetensors: this shard cannot be read"):
        open_shards(folder)


def test_changed_bounds_are_found_when_a_shard_is_mapped(folder: Path) -> None:
    path = folder / "train-00000.safetensors"
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    content = bytearray(path.read_bytes())
    content[start] += 1  # the first document's length
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="train-00000.safetensors: this shard was changed"):
        open_shards(folder)[0]


@pytest.mark.parametrize("at", [0, 9])
def test_a_damaged_header_is_a_clear_error(folder: Path, at: int) -> None:
    path = folder / "train-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[at : at + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="train-00000.safetensors: this shard is damaged"):
        open_shards(folder)[0]


def test_verify_finds_one_changed_id(folder: Path) -> None:
    assert len(list(open_shards(folder).verify())) == 7
    path = folder / "held-out-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_shards(folder).held_out[0]
    with pytest.raises(CorpusError, match="held-out-00000.safetensors: this shard was changed: its SHA-256"):
        list(open_shards(folder).verify())


def test_an_unfinished_folder_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "complete": False, "position": {}}))
    assert is_prepared(folder)
    with pytest.raises(CorpusError, match=r"in part only \(6 shards\).*--resume"):
        open_shards(folder)


@pytest.mark.parametrize(
    "changes",
    [
        *({"without": name} for name in ("complete", "facts", "settings", "shards", "tokenizer")),
        *({name: 3} for name in ("complete", "facts", "settings", "shards", "tokenizer")),
        {"complete": False}, {"complete": False, "position": 3},  # of where to go on
        {"tokenizer": {}}, {"shards": {}}, {"shards": {"train": [7], "held-out": []}},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_without_what_is_read_is_refused(folder: Path, changes: dict) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop(changes.pop("without", None), None)
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(CorpusError, match=rf"{MANIFEST}: damaged \(.*\); prepare the corpus anew"):
        open_shards(folder)


@pytest.mark.parametrize("field", ["file", "bytes", "sha256", "documents", "sentences", "tokens"])
@pytest.mark.parametrize("value", [None, "without", [1]])
def test_a_manifest_with_a_damaged_shard_is_refused(folder: Path, field: str, value: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    shard = manifest["shards"]["train"][0]
    if value == "without":
        del shard[field]
    else:
        shard[field] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match=rf"{MANIFEST}: damaged"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no prepared corpus"), ("{", "not valid JSON"), ('{"format": 99}', "format 99 is not known"), ("[]", "format None")],
)
def test_a_folder_without_a_sound_manifest_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    assert is_prepared(tmp_path) == (content is not None)
    with pytest.raises(CorpusError, match=message):
        open_shards(tmp_path)


def test_another_tokenizer_is_refused_and_both_are_named(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    shards = open_shards(folder)
    shards.check_tokenizer(tokenizer)
    shards.check_tokenizer(shards.load_tokenizer())
    other = train_wordpiece(["a text about other things than ships and harbours"] * 3, 200)
    with pytest.raises(TokenizerError) as caught:
        shards.check_tokenizer(other)
    for part in (str(folder), "mine", shards.tokenizer_fingerprint[:12], tokenizer_fingerprint(other)[:12]):
        assert part in str(caught.value)
    other.save_pretrained(folder)
    with pytest.raises(TokenizerError, match="its tokenizer was changed"):
        shards.load_tokenizer()


def test_the_tokenizer_fingerprint_is_that_of_its_ids(
    tmp_path: Path, data_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    uncased = load_tokenizer(data_folder / "vocab" / "bert-base-uncased")
    (tmp_path / "vocab.txt").write_bytes((data_folder / "vocab" / "bert-base-uncased" / "vocab.txt").read_bytes())
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == tokenizer_fingerprint(uncased)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "saved")) == tokenizer_fingerprint(tokenizer)
    cased = load_tokenizer(data_folder / "vocab" / "bert-base-cased")
    assert len({tokenizer_fingerprint(one) for one in (uncased, cased, tokenizer)}) == 3


def test_asking_whether_a_folder_is_prepared_imports_nothing_heavy(folder: Path) -> None:
    code = f"""import sys
from fastbert.data.shards import is_prepared
assert is_prepared({str(folder)!r})
assert not {{"torch", "transformers", "tokenizers"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)
