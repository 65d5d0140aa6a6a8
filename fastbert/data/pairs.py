"""Sentence pairs for next sentence prediction, built as for BERT (Devlin et al., 2019, section 3.1 and appendix A.2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastbert.data.errors import CorpusError
from fastbert.data.sequences import Sequences
from fastbert.data.tokens import TokenizedCorpus

SPECIAL_TOKENS_PER_PAIR = 3
IS_NEXT, NOT_NEXT = 0, 1
_SHORT_SHARE = 0.1
# Documents are walked through all at once, in numpy, which pays where they are many and short: long ones are cut into pieces of
# so many times the longest pair. A piece's end makes some two pairs short, as a document's does.
_PIECE_LENGTH = 256


def make_pairs(corpus: TokenizedCorpus, max_seq_length: int, rng: np.random.Generator) -> Sequences:
    """Draws pairs of at most ``max_seq_length`` tokens that use every sentence once: a function of the arguments alone. Their order
    is no random one.

    Each document is walked once: sentences are taken until they fill a target length (max_seq_length - 3; for 10% of the
    pairs a random shorter one), the chunk is divided at a random sentence into A and B, and by a fair coin B is either the
    true rest (label 0) or text of the same length from a random sentence of another document (label 1), in which case the rest
    goes back to be used next. A pair that is too long loses tokens of its longer segment, at random from its front or back.

    In three points this is not the original procedure:

    - It takes a random B whenever a chunk is one sentence and so draws more than half of its pairs at random: here the coin
      decides, and where it asks for a true rest, the next sentence is taken too; at a document's end the one before becomes A;
      a document of one sentence is divided within it.
    - It draws the document of a random B uniformly, then a sentence of it. Where a few books stand beside many articles, hardly
      any random B is from a book although half of the true ones are: B's kind of text alone tells 76% of the labels (23 books,
      1,408 articles). Here each sentence of all other documents is as likely as any other, so a random B is from where true ones
      are as often, and the same tells 52%. That A and B are of different kinds still gives a random B away, as in BERT.
    - Documents longer than 256 pairs are walked in pieces of about that length, cut at other sentences in every epoch.

    Documents of a single token have no pair. Raises CorpusError for fewer than two documents.
    """
    if corpus.num_documents < 2:
        raise CorpusError(f"next sentence prediction needs at least two documents, the corpus has {corpus.num_documents}")
    max_tokens = max_seq_length - SPECIAL_TOKENS_PER_PAIR
    documents, a_starts, b_starts, b_ends, targets, labels = _walk(corpus, max_tokens, rng)
    a_lengths, b_lengths = b_starts - a_starts, b_ends - b_starts
    drawn = np.flatnonzero(labels == NOT_NEXT)
    b_starts[drawn], b_lengths[drawn] = _random_segments(corpus, documents[drawn], targets[drawn] - a_lengths[drawn], rng)
    return Sequences(corpus, *_truncate(a_starts, a_lengths, b_starts, b_lengths, max_tokens, rng), labels)


def _walk(corpus: TokenizedCorpus, max_tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(6, num_pairs): document, A's start, B's start, B's end, target length, label; starts and ends are token positions.

    Where the label is NOT_NEXT, only A is meant: B is drawn later. All pieces of documents are walked at the same time, one pair
    of each a round.
    """
    offsets = corpus.sentence_offsets
    document, sentence, end = _pieces(corpus, _PIECE_LENGTH * max_tokens, rng)
    first = corpus.document_offsets[document]
    rounds = [np.empty((6, 0), np.int64)]
    while len(sentence):
        short, length, coin, division = rng.random((4, len(sentence)))
        target = np.where(short < _SHORT_SHARE, 2 + (length * (max_tokens - 1)).astype(np.int64), max_tokens)
        is_next = coin < 0.5
        chunk_end = np.clip(np.searchsorted(offsets, offsets[sentence] + target), sentence + 1, end)
        single = chunk_end == sentence + 1
        middle = sentence + 1 + (division * (chunk_end - sentence - 1)).astype(np.int64)
        lacks_rest = single & is_next
        at_end = chunk_end == end
        chunk_end += lacks_rest & ~at_end
        back = lacks_rest & at_end & (sentence > first)
        a_first = sentence - back
        b_start = offsets[np.where(back, sentence, middle)]
        alone = np.flatnonzero(lacks_rest & at_end & ~back)
        start = offsets[sentence[alone]]
        b_start[alone] = start + 1 + (division[alone] * (offsets[end[alone]] - start - 1)).astype(np.int64)
        label = np.where(is_next, IS_NEXT, NOT_NEXT)
        rounds.append(np.stack([document, offsets[a_first], b_start, offsets[chunk_end], target, label]))
        sentence = np.where(is_next, chunk_end, middle)
        going = sentence < end
        document, first, sentence, end = (values[going] for values in (document, first, sentence, end))
    return np.concatenate(rounds, axis=1)


def _pieces(corpus: TokenizedCorpus, length: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """(document, first sentence, end) of pieces of about ``length`` tokens; documents of a single token have none."""
    offsets, bounds = corpus.sentence_offsets, corpus.document_offsets
    starts = offsets[bounds]
    cuts = np.maximum(np.diff(starts) / length - 0.5, 0).astype(np.int64)
    owner = np.repeat(np.arange(corpus.num_documents), cuts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    shift = rng.uniform(0.5, 1.0, corpus.num_documents)
    positions = starts[owner] + ((number + shift[owner]) * length).astype(np.int64)
    edges = np.unique(np.concatenate([bounds, np.searchsorted(offsets, positions)]))
    first, end = edges[:-1], edges[1:]
    document = np.searchsorted(bounds, first, side="right") - 1
    divisible = np.diff(starts)[document] >= 2
    return document[divisible], first[divisible], end[divisible]


def _random_segments(
    corpus: TokenizedCorpus, own_documents: NDArray[np.int64], targets: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts, lengths) of whole sentences of one document up to ``targets`` tokens, at least one sentence, none of the own
    document; each first sentence is as likely as any other."""
    bounds = corpus.document_offsets
    own_first = bounds[own_documents]
    own_count = bounds[own_documents + 1] - own_first
    sentences = rng.integers(0, corpus.num_sentences - own_count)
    sentences += np.where(sentences >= own_first, own_count, 0)
    end = bounds[np.searchsorted(bounds, sentences, side="right")]
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
