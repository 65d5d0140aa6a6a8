"""Made-up text and made-up tokenized corpora."""

from __future__ import annotations

import random

import numpy as np
import torch

from fastbert.data.batches import PackedBatch
from fastbert.data.corpus import Document
from fastbert.data.tokens import TokenizedCorpus

CLS, SEP, MASK = 2, 3, 4
_SUBJECTS = [
    "the old captain",
    "a tall ship",
    "my neighbour",
    "every sailor",
    "the harbour",
    "a grey gull",
    "the lighthouse keeper",
]
_VERBS = ["watched", "remembered", "followed", "painted", "answered", "forgot", "carried"]
_OBJECTS = ["the quiet sea", "a letter from home", "seven lanterns", "the north wind", "nothing at all", "a broken compass"]
_ENDS = ["before dawn", "in the winter of 1912", "without a word", "near the pier", "for many years", "again and again"]


def story(number: int, paragraphs: int) -> Document:
    """A document of ``paragraphs`` paragraphs of one to six sentences; the same number gives the same text."""
    draw = random.Random(number)

    def sentence() -> str:
        words = (draw.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS))
        return " ".join(words).capitalize() + draw.choice(".!?")

    return Document(f"story {number}", [" ".join(sentence() for _ in range(draw.randint(1, 6))) for _ in range(paragraphs)])


def numbered_corpus(document_lengths: list[list[int]]) -> TokenizedCorpus:
    """A corpus whose token at position p is 5 + p, so every token tells where it stands; one list of lengths a document."""
    sentences = [length for document in document_lengths for length in document]
    return TokenizedCorpus(
        ids=np.arange(5, 5 + sum(sentences), dtype=np.int32),
        sentence_offsets=np.concatenate([[0], np.cumsum(sentences, dtype=np.int64)]),
        document_offsets=np.concatenate([[0], np.cumsum([len(document) for document in document_lengths], dtype=np.int64)]),
    )


def random_lengths(documents: int, seed: int) -> list[list[int]]:
    """Documents of 1 to 30 sentences of 1 to 40 tokens, and some sentences of 150."""
    draw = random.Random(seed)
    return [[draw.randint(1, 40) if draw.random() < 0.97 else 150 for _ in range(draw.randint(1, 30))] for _ in range(documents)]


TENSORS = ("input_ids", "token_type_ids", "position_ids", "labels", "cu_seqlens", "next_sentence_label")


def same(first: PackedBatch, second: PackedBatch) -> bool:
    """Whether two batches of pairs are equal in every element."""
    return first.max_seqlen == second.max_seqlen and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in TENSORS
    )
