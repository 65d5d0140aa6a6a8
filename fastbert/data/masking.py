"""Dynamic masking for the masked language model (Devlin et al., 2019, section 3.1; redrawn in every epoch as in RoBERTa)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fastbert.data.sequences import ranges

IGNORE_INDEX = -100
MASKINGS = ("token", "whole-word", "span")
CONTINUATION = "##"
_MASKED_SHARE = 0.8
# Beyond what :func:`most_labels` says of masked tokens: see there.
_ALLOWANCE = {"token": 1.0, "whole-word": 1.0, "span": 1.1}
_RANDOM_SHARE = 0.1
# SpanBERT (Joshi et al., 2020, section 3.1): lengths in words from a geometric distribution, 3.8 on average.
_SPAN_SUCCESS = 0.2
_LONGEST_SPAN = 10


def mask_options(tokenizer: PreTrainedTokenizerBase, masking: str = "token", probability: float = 0.15) -> dict[str, Any]:
    """What :func:`mask_tokens` is told about a tokenizer and a kind of masking, as keyword arguments.

    Raises ValueError for an unknown kind, a probability outside (0, 1], and for words with a tokenizer that does not mark the
    pieces which go on with a word.
    """
    if masking not in MASKINGS:
        raise ValueError(f"masking is {masking!r}, expected one of {', '.join(MASKINGS)}")
    _check_probability(probability)
    continues = None
    if masking != "token":
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        continues = np.array([piece.startswith(CONTINUATION) and piece != CONTINUATION for piece in pieces])
        if not continues.any():
            raise ValueError(
                f"masking {masking!r} needs a tokenizer that marks the pieces inside of words with {CONTINUATION} (WordPiece), and "
                f"none of the {len(pieces):,} tokens of this one is marked; use masking 'token'"
            )
    return {
        "vocab_size": len(tokenizer),
        "mask_id": tokenizer.mask_token_id,
        "special_ids": list(tokenizer.all_special_ids),
        "probability": probability,
        "masking": masking,
        "continues": continues,
    }


def most_labels(num_tokens: int, num_sequences: int, *, special_tokens: int, probability: float, masking: str = "token") -> int:
    """How many labels :func:`mask_tokens` gives a batch of at most so many tokens and sequences, ``special_tokens`` in each.

    With masking "token" it is a bound that no batch exceeds: a sequence of n ordinary tokens has min(n, max(1, round(p n))) labels,
    at most p n + max(1/2, 1 - p), so s sequences have at most p (num_tokens - s special_tokens) + s max(1/2, 1 - p). Whole words
    have that, too, but where a sequence is given one that is longer than its share. Spans count words, and may cover long ones: of
    4,096 tokens of English they have 610 +- 9 labels, so for them it is a tenth more. Batches of few tokens may still exceed it.
    """
    excess = max(0.5, 1 - probability) - probability * special_tokens
    sequences = min(num_sequences, num_tokens // (special_tokens + 1)) if excess > 0 else 1
    bound = probability * num_tokens + excess * sequences
    # A product such as 0.15 * 4000 may come out a hair below a whole number.
    return min(num_tokens, int(bound * _ALLOWANCE[masking] + 1e-6))


def mask_tokens(
    ids: NDArray[np.integer],
    special_mask: NDArray[np.bool_],
    *,
    cu_seqlens: NDArray[np.integer],
    rng: np.random.Generator,
    vocab_size: int,
    mask_id: int,
    special_ids: Sequence[int],
    probability: float = 0.15,
    masking: str = "token",
    continues: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hides tokens of a packed batch: (masked ids, labels), both (total,) int64; labels are -100 where nothing is asked.

    ids: (total,); special_mask: (total,), True where a token must stay ([CLS], [SEP]); cu_seqlens: (batch + 1,) from 0 to
    total. ``masking``, of the n other tokens of each sequence:

    - "token": exactly max(1, round(probability * n)) are predicted: as in the original BERT a fixed share per sequence rather than
      a coin per token, so that every sequence has something to learn from and the number of labels hardly varies between batches.
    - "whole-word": words in random order, as many as fit into that number (a word that does not fit is passed over, as in
      BERT's whole word masking), but at least one. A word is a token with those behind it that go on with it: ``continues``
      (vocab_size,) says of each id whether it does.
    - "span": runs of words, of max(1, round(probability * words)) words together. Their lengths are geometric (p = 0.2, at most
      10: SpanBERT) but for the last one, which is cut; they lie anywhere with the same probability, the sequence taken as a ring.

    Of what is predicted 80% become ``mask_id``, 10% a random token that is none of ``special_ids``, 10% stay: decided token by
    token, of spans for the whole span. A sequence of special tokens alone has no labels.

    Raises ValueError for a probability outside (0, 1] or cu_seqlens that do not span the ids.
    """
    _check_probability(probability)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(ids):
        raise ValueError(f"cu_seqlens must run from 0 to {len(ids)} tokens, not from {cu_seqlens[0]} to {cu_seqlens[-1]}")
    cu_seqlens = np.asarray(cu_seqlens, np.int64)
    if masking == "token":
        chosen = _choose(special_mask, cu_seqlens, rng, probability)
        kind = rng.random(len(chosen))
    else:
        words = _Words(ids, special_mask, cu_seqlens, continues)
        if masking == "whole-word":
            chosen = words.tokens(_choose_words(words, rng, probability))
            kind = rng.random(len(chosen))
        else:
            numbers, spans = _choose_spans(words, rng, probability)
            chosen = words.tokens(numbers)
            kind = rng.random(len(numbers))[np.repeat(spans, words.lengths[numbers])]
    masked = ids.astype(np.int64)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
    labels[chosen] = masked[chosen]
    masked[chosen[kind < _MASKED_SHARE]] = mask_id
    replaced = chosen[(kind >= _MASKED_SHARE) & (kind < _MASKED_SHARE + _RANDOM_SHARE)]
    masked[replaced] = _random_tokens(len(replaced), rng, vocab_size, special_ids)
    return masked, labels


def _check_probability(probability: float) -> None:
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"probability must be above 0 and at most 1, not {probability}")


def _share(counts: NDArray[np.int64], probability: float) -> NDArray[np.int64]:
    """max(1, round(probability * count)) of each count, 0 of 0."""
    return np.minimum(np.maximum(np.rint(probability * counts), 1), counts).astype(np.int64)


def _shuffled(owners: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """The numbers of things that belong to ``owners`` (rising): owner by owner, of each owner in random order."""
    return np.argsort(owners + rng.random(len(owners)) / 2)


def _within(values: NDArray[np.int64], owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each value the sum of those before it that have the same owner; ``owners`` never fall."""
    before = np.cumsum(values) - values
    first = np.searchsorted(owners, owners)
    return before - before[first]


def _choose(
    special_mask: NDArray[np.bool_], cu_seqlens: NDArray[np.int64], rng: np.random.Generator, probability: float
) -> NDArray[np.int64]:
    """Indices into the batch: in every sequence those of the smallest of independent uniform keys, one key a token."""
    lengths = np.diff(cu_seqlens)
    maskable_before = np.concatenate([[0], np.cumsum(~special_mask)])
    counts = _share(np.diff(maskable_before[cu_seqlens]), probability)
    keys = np.where(special_mask, 1.0, rng.random(len(special_mask)))
    order = np.argsort(np.repeat(np.arange(len(lengths)), lengths) + keys / 2)
    rank = np.arange(len(special_mask)) - np.repeat(cu_seqlens[:-1], lengths)
    return order[rank < np.repeat(counts, lengths)]


class _Words:
    """The words of a batch in reading order. starts, lengths: (words,), in tokens; sequences: (words,), which one it is in;
    num_tokens: (batch,), tokens of words in each sequence. A word ends where a special token or a sequence begins."""

    def __init__(
        self, ids: NDArray[np.integer], special_mask: NDArray[np.bool_], cu_seqlens: NDArray[np.int64], continues: NDArray[np.bool_]
    ) -> None:
        begins = ~continues[ids]
        begins[cu_seqlens[:-1]] = True
        begins[1:] |= special_mask[:-1]
        starts = np.flatnonzero(begins | special_mask)
        lengths = np.diff(starts, append=len(ids))
        ordinary = ~special_mask[starts]
        self.starts, self.lengths = starts[ordinary], lengths[ordinary]
        self.sequences = np.searchsorted(cu_seqlens, self.starts, side="right") - 1
        self.num_sequences = len(cu_seqlens) - 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """(batch,): words of each sequence."""
        return np.bincount(self.sequences, minlength=self.num_sequences)

    def sums(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """(batch,): how many tokens of each sequence the words with these numbers have."""
        sums = np.bincount(self.sequences[words], self.lengths[words], self.num_sequences)
        return sums.astype(np.int64)

    def tokens(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices into the batch of the tokens of these words."""
        return ranges(self.starts[words], self.lengths[words])


def _choose_words(words: _Words, rng: np.random.Generator, probability: float) -> NDArray[np.int64]:
    """Numbers of words: in random order, those that fit into what the words before them leave of the sequence's share."""
    order = _shuffled(words.sequences, rng)
    room = _share(words.sums(order), probability)
    chosen = [np.empty(0, np.int64)]
    left = order
    while len(left):
        left = left[words.lengths[left] <= room[words.sequences[left]]]
        lengths, sequences = words.lengths[left], words.sequences[left]
        fits = _within(lengths, sequences) + lengths <= room[sequences]
        chosen.append(left[fits])
        room -= words.sums(left[fits])
        left = left[~fits]
    found = np.concatenate(chosen)
    has_none = np.bincount(words.sequences[found], minlength=words.num_sequences) == 0
    first = order[np.flatnonzero(np.diff(words.sequences[order], prepend=-1))]
    return np.concatenate([found, first[has_none[words.sequences[first]]]])


def _choose_spans(words: _Words, rng: np.random.Generator, probability: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(numbers of words, the number of the span that each is in).

    Spans and the words outside of them are shuffled like cards and laid out in a ring, which is then turned by chance: so every
    word is as likely to be in a span, at the edges too, and spans never overlap.
    """
    counts = words.counts
    shares = _share(counts, probability)
    owners = np.repeat(np.arange(words.num_sequences), shares)
    lengths = _span_lengths(len(owners), rng)
    room = shares[owners] - _within(lengths, owners)
    lengths, owners = np.minimum(lengths, room)[room > 0], owners[room > 0]
    spans = np.bincount(owners, minlength=words.num_sequences)
    cards = np.repeat(np.arange(words.num_sequences), counts - shares + spans)
    order = _shuffled(cards, rng)
    drawn = order[_within(np.ones_like(order), cards) < spans[cards]]
    card_lengths = np.ones(len(cards), np.int64)
    card_lengths[drawn] = lengths
    positions = _within(card_lengths, cards)[drawn] + rng.integers(0, np.maximum(counts, 1))[owners]
    numbers = ranges(positions, lengths)
    span_of = np.repeat(np.arange(len(lengths)), lengths)
    sequence = owners[span_of]
    return np.searchsorted(words.sequences, sequence) + numbers % counts[sequence], span_of


def _span_lengths(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(count,): from 1 to 10, each as likely as in a geometric distribution that knows no longer ones."""
    weights = (1 - _SPAN_SUCCESS) ** np.arange(_LONGEST_SPAN)
    edges = np.cumsum(weights)[:-1] / weights.sum()
    return 1 + np.searchsorted(edges, rng.random(count), side="right")


def _random_tokens(count: int, rng: np.random.Generator, vocab_size: int, special_ids: Sequence[int]) -> NDArray[np.int64]:
    """Uniform over the vocabulary without ``special_ids``: draws an ordinary token's rank, then steps over the special."""
    special = sorted(set(special_ids))
    tokens = rng.integers(0, vocab_size - len(special), count)
    for special_id in special:
        tokens += tokens >= special_id
    return tokens
