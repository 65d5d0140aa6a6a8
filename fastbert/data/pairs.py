"""Sentence pairs for next sentence prediction, built as for BERT (Devlin et al., 2019, section 3.1 and appendix A.2)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from fastbert.data.errors import CorpusError
from fastbert.data.tokens import TokenizedCorpus

SPECIAL_TOKENS_PER_PAIR = 3
SHORTEST_SEQUENCE = 8
IS_NEXT, NOT_NEXT = 0, 1
_SHORT_SHARE = 0.1
_PAIRS_STREAM = 0
_DRAWS_PER_PAIR = 4
_DRAWN_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class SentencePairs:
    """The pairs of an epoch, in training order, as ranges of the corpus; ``assemble`` makes ids of as many as are wanted.

    a_starts, b_starts: (num_pairs,) int64 into corpus.ids; segment_a_lengths, segment_b_lengths: (num_pairs,) int64;
    next_sentence_label: (num_pairs,) int64, 0 where B follows A, 1 where B is from another document;
    offsets: (num_pairs + 1,) int64, where each sequence [CLS] A [SEP] B [SEP] begins in the assembled ids.
    """

    corpus: TokenizedCorpus
    a_starts: NDArray[np.int64]
    segment_a_lengths: NDArray[np.int64]
    b_starts: NDArray[np.int64]
    segment_b_lengths: NDArray[np.int64]
    next_sentence_label: NDArray[np.int64]
    offsets: NDArray[np.int64]
    cls_id: int
    sep_id: int

    def __len__(self) -> int:
        return len(self.next_sentence_label)

    @property
    def input_ids(self) -> NDArray[np.int32]:
        """All pairs assembled, flat (offsets[-1],)."""
        return self.assemble(0, len(self))

    def assemble(self, first: int, last: int) -> NDArray[np.int32]:
        """The flat ids of the pairs first .. last - 1: [CLS] A [SEP] B [SEP] of each, one behind the other."""
        a_lengths, b_lengths = self.segment_a_lengths[first:last], self.segment_b_lengths[first:last]
        starts = self.offsets[first:last] - self.offsets[first]
        ids = np.empty(self.offsets[last] - self.offsets[first], dtype=np.int32)
        ids[starts] = self.cls_id
        ids[starts + a_lengths + 1] = self.sep_id
        ids[starts + a_lengths + b_lengths + 2] = self.sep_id
        ids[_ranges(starts + 1, a_lengths)] = self.corpus.ids[_ranges(self.a_starts[first:last], a_lengths)]
        ids[_ranges(starts + a_lengths + 2, b_lengths)] = self.corpus.ids[_ranges(self.b_starts[first:last], b_lengths)]
        return ids


def make_pairs(corpus: TokenizedCorpus, max_seq_length: int, *, seed: int, epoch: int, cls_id: int, sep_id: int) -> SentencePairs:
    """Draws the pairs of an epoch: a function of (corpus, max_seq_length, seed, epoch) alone, in shuffled order.

    Each document is walked once: sentences are taken until they fill a target length (max_seq_length - 3; for 10% of the
    pairs a random shorter one), the chunk is divided at a random sentence into A and B, and by a fair coin B is either the
    true rest (label 0) or text of the same length from a random sentence of another, uniformly drawn document (label 1), in
    which case the rest goes back to be used next. A pair that is too long loses tokens of its longer segment, at random
    from its front or back.

    In one point this is not the original procedure, which takes a random B whenever a chunk is one sentence and so draws
    more than half of its pairs at random: here the coin decides, and where it asks for a true rest, the next sentence is
    taken too; at a document's end the one before becomes A; a document of one sentence is divided within it.

    Raises ValueError for max_seq_length below 8, CorpusError for fewer than two documents or no document of two tokens.
    """
    if max_seq_length < SHORTEST_SEQUENCE:
        raise ValueError(f"max_seq_length must be at least {SHORTEST_SEQUENCE}, not {max_seq_length}")
    if corpus.num_documents < 2:
        raise CorpusError(f"next sentence prediction needs at least two documents, the corpus has {corpus.num_documents}")
    rng = np.random.default_rng([seed, epoch, _PAIRS_STREAM])
    max_tokens = max_seq_length - SPECIAL_TOKENS_PER_PAIR
    walk = np.fromiter(chain.from_iterable(_walk(corpus, max_tokens, rng)), np.int64).reshape(-1, 6)
    if len(walk) == 0:
        raise CorpusError(f"no sentence pair can be made of the corpus ({corpus}): its documents are single tokens")
    documents, a_starts, b_starts, b_ends, targets, labels = np.ascontiguousarray(rng.permutation(walk).T)
    a_lengths, b_lengths = b_starts - a_starts, b_ends - b_starts
    drawn = np.flatnonzero(labels == NOT_NEXT)
    b_starts[drawn], b_lengths[drawn] = _random_segments(corpus, documents[drawn], targets[drawn] - a_lengths[drawn], rng)
    a_starts, a_lengths, b_starts, b_lengths = _truncate(a_starts, a_lengths, b_starts, b_lengths, max_tokens, rng)
    offsets = np.concatenate([[0], np.cumsum(a_lengths + b_lengths + SPECIAL_TOKENS_PER_PAIR)])
    return SentencePairs(corpus, a_starts, a_lengths, b_starts, b_lengths, labels, offsets, cls_id, sep_id)


def _walk(corpus: TokenizedCorpus, max_tokens: int, rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    """Yields (document, A's start, B's start, B's end, target length, label); starts and ends are token positions.

    Where the label is NOT_NEXT, only A is meant: B is drawn later.
    """
    draws = _uniform(rng)
    document_offsets = corpus.document_offsets.tolist()
    for document in range(corpus.num_documents):
        offsets = corpus.sentence_offsets[document_offsets[document] : document_offsets[document + 1] + 1].tolist()
        end = len(offsets) - 1
        if offsets[end] - offsets[0] < 2:
            continue
        sentence = 0
        while sentence < end:
            short, length, coin, division = next(draws)
            target = 2 + int(length * (max_tokens - 1)) if short < _SHORT_SHARE else max_tokens
            label = IS_NEXT if coin < 0.5 else NOT_NEXT
            chunk_end = bisect_left(offsets, offsets[sentence] + target, sentence + 1, end)
            middle = sentence + 1
            if chunk_end > middle:
                middle += int(division * (chunk_end - middle))
            elif label == IS_NEXT and chunk_end < end:
                chunk_end += 1
            elif label == IS_NEXT:
                if sentence == 0:
                    cut = offsets[0] + 1 + int(division * (offsets[1] - offsets[0] - 1))
                    yield document, offsets[0], cut, offsets[1], target, label
                    break
                sentence, middle = sentence - 1, sentence
            yield document, offsets[sentence], offsets[middle], offsets[chunk_end], target, label
            sentence = chunk_end if label == IS_NEXT else middle


def _uniform(rng: np.random.Generator) -> Iterator[list[float]]:
    """Endless rows of uniform numbers, drawn many at a time: a call of numpy's generator costs more than a pair."""
    while True:
        yield from rng.random((_DRAWN_AT_ONCE, _DRAWS_PER_PAIR)).tolist()


def _random_segments(
    corpus: TokenizedCorpus, own_documents: NDArray[np.int64], targets: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts, lengths) of whole sentences up to ``targets`` tokens, at least one sentence, each from another document."""
    documents = rng.integers(0, corpus.num_documents - 1, len(own_documents))
    documents += documents >= own_documents
    first, end = corpus.document_offsets[documents], corpus.document_offsets[documents + 1]
    sentences = rng.integers(first, end)
    starts = corpus.sentence_offsets[sentences]
    last = np.searchsorted(corpus.sentence_offsets, starts + targets)
    return starts, corpus.sentence_offsets[np.clip(last, sentences + 1, end)] - starts


def _truncate(
    a_starts: NDArray[np.int64],
    a_lengths: NDArray[np.int64],
    b_starts: NDArray[np.int64],
    b_lengths: NDArray[np.int64],
    max_tokens: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], ...]:
    """Drops tokens as if one by one, always of the longer segment (of B where both are equal), by a coin front or back.

    Such a loop leaves the shorter segment alone until the longer one has come down to it, and then halves the room.
    """
    b_room = max_tokens // 2
    new_a = np.minimum(a_lengths, np.maximum(max_tokens - b_room, max_tokens - b_lengths))
    new_b = np.minimum(b_lengths, np.maximum(b_room, max_tokens - a_lengths))
    a_starts = a_starts + rng.binomial(a_lengths - new_a, 0.5)
    b_starts = b_starts + rng.binomial(b_lengths - new_b, 0.5)
    return a_starts, new_a, b_starts, new_b


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenation of arange(start, start + length) over all pairs of the two."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
