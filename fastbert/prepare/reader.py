"""Documents of a corpus in batches, duplicates left out, each either to train on or held out.

A batch knows the position behind it: a run that goes on there reads the same documents into the same batches.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastbert.data.corpus import CorpusPart, Document, Reading, read_part
from fastbert.data.errors import CorpusError

from .seen import SeenDocuments
from .settings import PrepareSettings

# A batch keeps a core busy for a tenth of a second; more would only take memory.
_BATCH_CHARACTERS = 1_000_000
LONGEST_LINE = 1 << 20
LONGEST_DOCUMENT = 10_000_000
_DIGEST_BYTES = 16
_LEFT_OUT = ("duplicates", "empty", "bad_text", "cut_lines", "cut_documents")


@dataclass(frozen=True)
class Position:
    """How far reading has come: behind ``documents`` documents of part ``part``, duplicates included, and before batch ``batch``.

    digest: over these documents; left_out: counts of the whole corpus up to here; sources: documents of each, without duplicates.
    """

    batch: int
    part: int
    documents: int
    digest: str
    left_out: dict[str, int]
    sources: dict[str, int]

    @classmethod
    def start(cls) -> Position:
        return cls(0, 0, 0, "", dict.fromkeys(_LEFT_OUT, 0), {})


@dataclass(frozen=True)
class Batch:
    """Documents, as lists of paragraphs, to train on and held out; ``end``: the position behind them."""

    train: list[list[str]]
    held_out: list[list[str]]
    end: Position


def make_reading(settings: PrepareSettings) -> Reading:
    return Reading(
        settings.text_column,
        settings.rows_per_document,
        settings.skip_bad_text,
        longest_line=LONGEST_LINE,
        longest_document=LONGEST_DOCUMENT,
    )


class CorpusReader:
    """Reads ``parts`` from ``start`` on. ``seen``: None where duplicates are kept.

    ``position``: what was read so far, counts of all parts included, also behind the last batch.
    """

    def __init__(self, parts: Sequence[CorpusPart], settings: PrepareSettings, seen: SeenDocuments | None, start: Position) -> None:
        self.position = start
        self._parts, self._settings, self._seen = parts, settings, seen
        self._held_out_below = int(settings.held_out_fraction * (1 << 64))
        self._characters = min(_BATCH_CHARACTERS, settings.tokens_per_shard)

    def batches(self) -> Iterator[Batch]:
        """Raises CorpusError for bad input, and where the documents before ``start`` are not those that were there."""
        start = self.position
        train: list[list[str]] = []
        held_out: list[list[str]] = []
        characters, batch = 0, start.batch
        left_out, sources = dict(start.left_out), dict(start.sources)
        for number in range(start.part, len(self._parts)):
            part, reading = self._parts[number], make_reading(self._settings)
            documents, digest, count = read_part(part, reading), hashlib.sha256(), 0
            if number == start.part:
                count = self._skip(documents, digest, start, part)
                for name, value in reading.left_out.items():
                    left_out[name] -= value  # it is counted again
            before = dict(left_out)
            for document in documents:
                own_digest = _digest(document)
                digest.update(own_digest)
                count += 1
                if self._seen is not None and not self._seen.add(own_digest, batch):
                    before["duplicates"] += 1
                    continue
                sources[part.source] = sources.get(part.source, 0) + 1
                is_held_out = int.from_bytes(own_digest[:8], "big") < self._held_out_below
                (held_out if is_held_out else train).append(document.paragraphs)
                characters += sum(map(len, document.paragraphs))
                if characters >= self._characters:
                    batch += 1
                    left_out = _sum(before, reading.left_out)
                    self.position = Position(batch, number, count, digest.hexdigest(), left_out, dict(sources))
                    yield Batch(train, held_out, self.position)
                    train, held_out, characters = [], [], 0
            left_out = _sum(before, reading.left_out)
            self.position = Position(batch, number, count, digest.hexdigest(), left_out, dict(sources))
        if train or held_out:
            self.position = replace(self.position, batch=batch + 1)
            yield Batch(train, held_out, self.position)

    def _skip(self, documents: Iterator[Document], digest: Any, start: Position, part: CorpusPart) -> int:
        for _ in range(start.documents):
            document = next(documents, None)
            if document is None:
                break
            digest.update(_digest(document))
        if start.documents and digest.hexdigest() != start.digest:
            raise CorpusError(
                f"{part} is not what it was: its first {start.documents:,} documents are others than those that the run has read; "
                "with --overwrite it begins anew"
            )
        return start.documents


def _digest(document: Document) -> bytes:
    return hashlib.blake2b("\n".join(document.paragraphs).encode(), digest_size=_DIGEST_BYTES).digest()


def _sum(counts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: value + more.get(name, 0) for name, value in counts.items()}


def inputs(parts: Sequence[CorpusPart]) -> dict[str, list[int] | None]:
    """Bytes and time of the last change (ns) of every file by its name, JSON-ready; None of a dataset."""
    listed: dict[str, list[int] | None] = {}
    for part in parts:
        facts = None if part.path is None else os.stat(part.path)
        listed[str(part)] = None if facts is None else [facts.st_size, facts.st_mtime_ns]
    return listed


def check_inputs(now: dict[str, list[int] | None], then: dict[str, list[int] | None]) -> None:
    """Raises CorpusError naming a file that was changed, added or taken away since the run began."""
    for name in {**then, **now}:
        if name not in now:
            problem = "is gone"
        elif name not in then:
            problem = "was added"
        elif now[name] != then[name]:
            problem = "was changed"
        else:
            continue
        raise CorpusError(f"{name} {problem} since the run began, which can only go on with the same text; --overwrite begins anew")
