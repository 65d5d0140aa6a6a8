"""Sequences without pairs, for the masked language model alone (DOC-SENTENCES in Liu et al., "RoBERTa", 2019, section 4.2)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from fastbert.data.errors import CorpusError
from fastbert.data.sequences import Sequences
from fastbert.data.tokens import TokenizedCorpus

SPECIAL_TOKENS_PER_PASSAGE = 2
# Tokens of a batch that are worth a passage: a handful of words teaches little.
SMALLEST_GAP = 32


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


def fill_gaps(
    passages: Sequences, bounds: NDArray[np.int64], *, tokens_per_batch: int, max_seq_length: int, max_sequences: int
) -> tuple[Sequences, NDArray[np.int64]]:
    """(passages, bounds) again, where parts of the last passages stand in what the batches before them have left.

    bounds: (num_batches + 1,), batch i holds the passages bounds[i] : bounds[i + 1]. Passages of whole sentences are a little
    shorter than they could be, so that a batch for eight of them has room for a fraction of a ninth: of Wikipedia and books 2.4% of
    its tokens at 512 tokens and 4,096 a batch, of which 0.3% are left. A part is as many whole sentences as fit into a gap of
    ``SMALLEST_GAP`` tokens or more, or where none does a piece of one. What is left of the last passage that was begun is a passage
    in its old place. Every token is still there once.
    """
    starts, ends = passages.a_starts.tolist(), (passages.a_starts + passages.a_lengths).tolist()
    sentences, offsets, limits = passages.corpus.sentence_offsets, passages.offsets, bounds.tolist()
    places, part_starts, part_ends = [], [], []
    donor = len(starts) - 1
    for first, last in zip(limits, limits[1:]):
        gap, free = tokens_per_batch - int(offsets[last] - offsets[first]), max_sequences - (last - first)
        while gap >= SMALLEST_GAP and free > 0 and donor >= last:
            start, fitting = starts[donor], starts[donor] + min(gap, max_seq_length) - SPECIAL_TOKENS_PER_PASSAGE
            end = int(sentences[np.searchsorted(sentences, fitting, "right") - 1])
            end = min(ends[donor], end if end > start else fitting)
            places.append(last)
            part_starts.append(start)
            part_ends.append(end)
            gap, free = gap - (end - start) - SPECIAL_TOKENS_PER_PASSAGE, free - 1
            starts[donor] = end
            donor -= end == ends[donor]
    kept = donor + 1
    begin, end = (np.insert(np.array(of, np.int64)[:kept], places, part) for of, part in ((starts, part_starts), (ends, part_ends)))
    counts = np.diff(np.minimum(bounds, kept)) + np.bincount(np.searchsorted(bounds, places) - 1, minlength=len(bounds) - 1)
    filled = np.concatenate([[0], np.cumsum(counts[counts > 0])])
    return Sequences(passages.corpus, begin, end - begin), filled


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
