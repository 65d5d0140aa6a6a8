"""Sequences without pairs, for the masked language model alone (DOC-SENTENCES in Liu et al., "RoBERTa", 2019, section 4.2)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain

import numpy as np

from fastbert.data.errors import CorpusError
from fastbert.data.sequences import Sequences
from fastbert.data.tokens import TokenizedCorpus

SPECIAL_TOKENS_PER_PASSAGE = 2


def make_passages(corpus: TokenizedCorpus, max_seq_length: int) -> Sequences:
    """Every token of the corpus, in passages of at most ``max_seq_length`` tokens, in reading order.

    A passage takes the next sentences of a document while they fit; what is left at a document's end is a passage of its own,
    however short. A sentence that is longer than a passage is cut into passages.

    Raises CorpusError for a corpus without documents.
    """
    if corpus.num_documents == 0:
        raise CorpusError("the corpus has no documents")
    room = max_seq_length - SPECIAL_TOKENS_PER_PASSAGE
    starts = np.fromiter(chain.from_iterable(_starts(corpus, room)), np.int64)
    return Sequences(corpus, starts, np.diff(starts, append=corpus.num_tokens))


def _starts(corpus: TokenizedCorpus, room: int) -> Iterator[list[int]]:
    """Where the passages of each document start."""
    bounds = corpus.document_offsets.tolist()
    for first, last in zip(bounds, bounds[1:]):
        offsets = corpus.sentence_offsets[first : last + 1].tolist()
        starts, position, end = [], offsets[0], offsets[-1]
        while position < end:
            starts.append(position)
            fitting = offsets[bisect_right(offsets, position + room) - 1]
            position = fitting if fitting > position else position + room
        yield starts
