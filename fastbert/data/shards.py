"""Token shards: a corpus of any size on disk, mapped into memory file by file and never read as a whole.

A prepared folder (``fastbert prepare`` makes it) holds

- ``train-00000.safetensors`` ... and ``held-out-00000.safetensors`` ...: whole documents, in the order of the corpus. Each file has
  ``ids`` (num_tokens,), uint16 where the vocabulary fits, else int32, without special tokens; ``sentence_lengths``
  (num_sentences,) uint32, tokens of each sentence; ``document_lengths`` (num_documents,) uint32, sentences of each document;
- the tokenizer (``tokenizer.json``, ``tokenizer_config.json``);
- ``prepared.json``: which shards there are, with sizes and SHA-256, the tokenizer's fingerprint, and counts of the corpus.

The format is that of the safetensors library, so that other programs can read it too; offsets are not stored, because a running
sum of the lengths makes them again faster than a disk reads them. ``docs/pretraining.md`` has it measured beside Arrow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastbert.data.errors import CorpusError, TokenizerError
from fastbert.runs.whole_file import whole_file

if TYPE_CHECKING:  # transformers takes its time to import, and is_prepared needs none of it
    from transformers import PreTrainedTokenizerFast

    from fastbert.data.tokens import TokenizedCorpus

MANIFEST = "prepared.json"
FORMAT = 1
SPLITS = TRAIN, HELD_OUT = "train", "held-out"
_DTYPES = {"U16": np.dtype("<u2"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4")}
_ARRAYS = ("ids", "sentence_lengths", "document_lengths")
_SHARDS_KEPT_OPEN = 4
_READ_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a prepared folder: its name, its size in bytes, its SHA-256, and what it holds."""

    file: str
    bytes: int
    sha256: str
    documents: int
    sentences: int
    tokens: int


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.safetensors"


def write_shard(folder: Path, name: str, ids: NDArray, sentence_lengths: NDArray, document_lengths: NDArray) -> Shard:
    """Writes one shard, which appears whole; the same arrays give the same bytes. Raises OSError where it cannot be written."""
    from safetensors.numpy import save

    arrays = dict(zip(_ARRAYS, (ids, sentence_lengths.astype(np.uint32), document_lengths.astype(np.uint32))))
    content = save(arrays)
    with whole_file(folder / name, on_disk=True) as beside:
        beside.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return Shard(name, len(content), digest, len(document_lengths), len(sentence_lengths), len(ids))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over all that decides about ids: vocabulary, normalization, division into words, special tokens."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model")}
    deciding["added"] = [[token["id"], token["content"]] for token in parts["added_tokens"] if not token["special"]]
    roles = ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    deciding["special"] = {role: getattr(tokenizer, role) for role in roles}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def is_prepared(path: str | Path) -> bool:
    """Whether ``path`` is a folder that ``fastbert prepare`` has begun to fill; :func:`open_shards` says whether it is complete."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises CorpusError where it is missing, damaged, or of another version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorpusError(f"{folder}: no prepared corpus ({MANIFEST} cannot be read: {error.strerror})") from error
    except ValueError as error:
        raise CorpusError(f"{path}: not valid JSON ({error})") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CorpusError(f"{path}: format {found!r} is not known here, only {FORMAT}; prepare the corpus anew")
    try:
        _check_entries(manifest)
    except (KeyError, TypeError) as error:
        raise CorpusError(f"{path}: damaged ({type(error).__name__}: {error}); prepare the corpus anew") from error
    return manifest


def _check_entries(manifest: dict[str, Any]) -> None:
    """Raises KeyError or TypeError where there is not what a reader will look for."""
    kinds = {"complete": bool, "facts": dict, "settings": dict, "shards": dict}
    kinds["tokenizer" if manifest["complete"] else "position"] = dict
    for name, kind in kinds.items():
        if not isinstance(manifest[name], kind):
            raise TypeError(f"{name} is {manifest[name]!r:.40}")
    if manifest["complete"]:
        manifest["tokenizer"]["fingerprint"]
    for shard in _shards(manifest, *SPLITS):
        for field in dataclasses.fields(Shard):
            value = getattr(shard, field.name)
            if type(value) is not {"str": str, "int": int}[field.type]:
                raise TypeError(f"{field.name} of a shard is {value!r:.40}")


def open_shards(folder: str | Path) -> TokenShards:
    """The training split of a prepared folder; ``.held_out`` is the other one.

    Raises CorpusError for a folder that is not prepared to the end, and for a shard that is missing or has another size than it
    was written with, naming the file; :meth:`TokenShards.verify` reads the files, too.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise CorpusError(
            f"{folder} is prepared in part only ({len(manifest['shards'][TRAIN])} shards): "
            "the command that began it, with --resume, goes on"
        )
    check_sizes(folder, manifest)
    return TokenShards(folder, manifest, TRAIN)


def check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises CorpusError for a shard that is not there or was cut short."""
    for shard in _shards(manifest, *SPLITS):
        path = folder / shard.file
        try:
            found = path.stat().st_size
        except OSError as error:
            raise CorpusError(f"{path}: this shard cannot be read ({error.strerror}); prepare the corpus anew") from error
        if found != shard.bytes:
            raise CorpusError(
                f"{path}: this shard has {found:,} bytes and was written with {shard.bytes:,}; prepare the corpus anew"
            )


class TokenShards(Sequence["TokenizedCorpus"]):
    """The shards of one split of a prepared folder, each a :class:`~fastbert.data.tokens.TokenizedCorpus`.

    ``ids`` of a shard are mapped, read only: the system reads what is used and drops it where memory is short. Its offsets
    (8 bytes a sentence and document) are made when the shard is asked for. The shards asked for last stay open, a few of them.
    It can be pickled (processes that load data), and threads may share it only with a lock around it.

    folder; split: "train" or "held-out"; shards: what the manifest says of each.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str) -> None:
        self.folder, self.split = folder, split
        self.shards = tuple(_shards(manifest, split))
        self._manifest = manifest
        self._open: dict[int, TokenizedCorpus] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShards, (self.folder, self._manifest, self.split)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> TokenizedCorpus:
        """Raises IndexError, and CorpusError for a file that is not the one that was written."""
        index = range(len(self))[index]
        corpus = self._open.pop(index, None) or self._map(self.shards[index])
        self._open[index] = corpus  # last, as the one asked for last
        if len(self._open) > _SHARDS_KEPT_OPEN:
            del self._open[next(iter(self._open))]
        return corpus

    def __str__(self) -> str:
        return f"{self.num_documents:,} documents, {self.num_sentences:,} sentences, {self.num_tokens:,} tokens"

    @property
    def num_documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def num_sentences(self) -> int:
        return sum(shard.sentences for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def held_out(self) -> TokenShards:
        """The documents that were held out, which no training shard has; without shards where none were."""
        return TokenShards(self.folder, self._manifest, HELD_OUT)

    @property
    def facts(self) -> dict[str, Any]:
        """Counts of the corpus, JSON-ready: documents, sentences, words and tokens in all, by split, and what was left out."""
        return self._manifest["facts"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of all shards, held-out ones included: other ids or other bounds give another one."""
        digest = hashlib.sha256()
        for shard in _shards(self._manifest, *SPLITS):
            digest.update(f"{shard.file} {shard.sha256}\n".encode())
        return digest.hexdigest()

    @property
    def tokenizer_fingerprint(self) -> str:
        return self._manifest["tokenizer"]["fingerprint"]

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that the ids are of. Raises TokenizerError where its files are missing or were changed."""
        from fastbert.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.folder)
        if tokenizer_fingerprint(tokenizer) != self.tokenizer_fingerprint:
            raise TokenizerError(f"{self.folder}: its tokenizer was changed after the shards were made; prepare the corpus anew")
        return tokenizer

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises TokenizerError where ``tokenizer`` is not the one that the ids are of."""
        found = tokenizer_fingerprint(tokenizer)
        if found != self.tokenizer_fingerprint:
            made, name = self._manifest["tokenizer"], tokenizer.name_or_path or "the tokenizer given"
            raise TokenizerError(
                f"{self.folder} was prepared with the tokenizer {made['name']} ({made['vocab_size']:,} entries, fingerprint "
                f"{made['fingerprint'][:12]}), and {name} is another one ({len(tokenizer):,} entries, fingerprint {found[:12]}): "
                f"use the one that is saved in {self.folder}, or prepare the corpus anew"
            )

    def verify(self) -> Iterator[Shard]:
        """Reads all shards, held-out ones included, and yields each that is as it was written. Raises CorpusError."""
        for shard in _shards(self._manifest, *SPLITS):
            path, digest = self.folder / shard.file, hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_READ_AT_ONCE):
                    digest.update(block)
            if digest.hexdigest() != shard.sha256:
                raise CorpusError(
                    f"{path}: this shard was changed: its SHA-256 is {digest.hexdigest()}, it was {shard.sha256}; "
                    "prepare the corpus anew"
                )
            yield shard

    def _map(self, shard: Shard) -> TokenizedCorpus:
        from fastbert.data.tokens import TokenizedCorpus

        path = self.folder / shard.file
        try:
            arrays = map_arrays(path)
            ids, sentence_lengths, document_lengths = (arrays[name] for name in _ARRAYS)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CorpusError(f"{path}: this shard is damaged ({error}); prepare the corpus anew") from error
        corpus = TokenizedCorpus(ids, _offsets(sentence_lengths), _offsets(document_lengths))
        counts = (corpus.num_documents, corpus.num_sentences, corpus.num_tokens)
        sums = (corpus.document_offsets[-1], corpus.sentence_offsets[-1])
        if counts != (shard.documents, shard.sentences, shard.tokens) or sums != (shard.sentences, shard.tokens):
            raise CorpusError(f"{path}: this shard was changed: its bounds are not those that it was written with; prepare anew")
        return corpus


def map_arrays(path: Path) -> dict[str, NDArray]:
    """The arrays of a safetensors file, mapped into memory and read only. (safetensors' own reader for numpy copies them.)

    Raises OSError, and ValueError, LookupError or TypeError for a file that is none.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(size))
    arrays = {}
    for name, array in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = _DTYPES[array["dtype"]], tuple(array["shape"]), array["data_offsets"]
        if math.prod(shape) * dtype.itemsize != end - start:
            raise ValueError(f"{name} has a shape of another size than its data")
        arrays[name] = np.memmap(path, dtype, "r", 8 + size + start, shape)
    return arrays


def _shards(manifest: dict[str, Any], *splits: str) -> Iterator[Shard]:
    for split in splits:
        for shard in manifest["shards"][split]:
            yield Shard(**shard)


def _offsets(lengths: NDArray) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
