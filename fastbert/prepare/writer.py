"""Encoded documents collected into shards: one of the training split and one of the held-out split for each piece of the corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastbert.data.shards import HELD_OUT, TRAIN, Shard, shard_name, write_shard

from .encode import Encoded
from .folder import PreparedFolder
from .reader import Position

_ARRAYS = ("ids", "sentence_lengths", "document_lengths")


class ShardWriter:
    """Holds what belongs to the shards that are not full yet. tokens: of both splits together."""

    def __init__(self, folder: PreparedFolder) -> None:
        self._folder = folder
        self._clear()

    def _clear(self) -> None:
        self._parts: dict[str, list[Encoded]] = {TRAIN: [], HELD_OUT: []}
        self.tokens = 0

    def add(self, train: Encoded, held_out: Encoded) -> None:
        for split, encoded in ((TRAIN, train), (HELD_OUT, held_out)):
            self._parts[split].append(encoded)
            self.tokens += len(encoded.ids)

    def write(self, position: Position) -> None:
        """Writes what it holds, of either split what there is, and lets it go. ``position``: behind it. Raises OSError."""
        path, counts = self._folder.path, dict.fromkeys(self._folder.facts, 0)
        written: dict[str, Shard | None] = {TRAIN: None, HELD_OUT: None}
        for split, parts in self._parts.items():
            for encoded in parts:
                for name in ("words", "characters", "empty", "cut_sentences"):
                    counts[name] += getattr(encoded, name)
            ids, sentence_lengths, document_lengths = (np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS)
            if len(ids):
                name = shard_name(split, len(self._folder.manifest["shards"][split]))
                shard = written[split] = write_shard(path, name, ids, sentence_lengths, document_lengths)
                for unit in ("documents", "sentences", "tokens"):
                    counts[unit] += getattr(shard, unit)
                    counts[f"{split.replace('-', '_')}_{unit}"] += getattr(shard, unit)
        self._folder.add(written[TRAIN], written[HELD_OUT], counts, position)
        self._clear()


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
