"""Runs of ``fastbert prepare``, and what is in their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.shards import TokenShards, open_shards
from fastbert.prepare.run import PrepareResult, prepare
from fastbert.prepare.settings import PrepareSettings

TOKENS_PER_SHARD = 600


def run(corpus: tuple[str, ...], output: Path, **options: Any) -> PrepareResult:
    """In this process, with several small shards."""
    settings = {"tokens_per_shard": TOKENS_PER_SHARD, "workers": 1, "held_out_fraction": 0.1, **options}
    return prepare(PrepareSettings(corpus=corpus, output=str(output), **settings), lambda text: None)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(shards: TokenShards) -> list[list[list[int]]]:
    """Ids by document and sentence."""
    found = []
    for corpus in shards:
        sentences = np.split(corpus.ids.tolist(), corpus.sentence_offsets[1:-1])
        for first, last in zip(corpus.document_offsets[:-1], corpus.document_offsets[1:]):
            found.append([list(map(int, sentence)) for sentence in sentences[first:last]])
    return found


def all_documents(folder: Path) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """Those to train on and those held out."""
    shards = open_shards(folder)
    return documents(shards), documents(shards.held_out)
