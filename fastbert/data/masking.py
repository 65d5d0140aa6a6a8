"""Dynamic masking for the masked language model (Devlin et al., 2019, section 3.1; redrawn in every epoch as in RoBERTa)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100
_MASKED_SHARE = 0.8
_RANDOM_SHARE = 0.1


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
    max_predictions: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hides tokens of a packed batch: (masked ids, labels), both (total,) int64; labels are -100 where nothing is asked.

    ids: (total,); special_mask: (total,), True where a token must stay ([CLS], [SEP]); cu_seqlens: (batch + 1,) from 0 to
    total. Of the n other tokens of each sequence exactly max(1, round(probability * n)) are predicted, at most
    ``max_predictions``: as in the original BERT a fixed share per sequence rather than a coin per token, so that every
    sequence has something to learn from and the number of labels hardly varies between batches. Of these 80% become
    ``mask_id``, 10% a random token that is none of ``special_ids``, 10% stay. A sequence of special tokens alone has no
    labels.

    Raises ValueError for a probability outside (0, 1], max_predictions below 1 or cu_seqlens that do not span the ids.
    """
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"probability must be above 0 and at most 1, not {probability}")
    if max_predictions is not None and max_predictions < 1:
        raise ValueError(f"max_predictions must be at least 1, not {max_predictions}")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(ids):
        raise ValueError(f"cu_seqlens must run from 0 to {len(ids)} tokens, not from {cu_seqlens[0]} to {cu_seqlens[-1]}")
    masked = ids.astype(np.int64)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
    chosen = _choose(special_mask, np.asarray(cu_seqlens, np.int64), rng, probability, max_predictions)
    labels[chosen] = masked[chosen]
    kind = rng.random(len(chosen))
    masked[chosen[kind < _MASKED_SHARE]] = mask_id
    replaced = chosen[(kind >= _MASKED_SHARE) & (kind < _MASKED_SHARE + _RANDOM_SHARE)]
    masked[replaced] = _random_tokens(len(replaced), rng, vocab_size, special_ids)
    return masked, labels


def _choose(
    special_mask: NDArray[np.bool_],
    cu_seqlens: NDArray[np.int64],
    rng: np.random.Generator,
    probability: float,
    max_predictions: int | None,
) -> NDArray[np.int64]:
    """Indices into the batch: in every sequence those of the smallest of independent uniform keys, one key a token."""
    lengths = np.diff(cu_seqlens)
    maskable_before = np.concatenate([[0], np.cumsum(~special_mask)])
    maskable = np.diff(maskable_before[cu_seqlens])
    counts = np.minimum(np.maximum(np.rint(probability * maskable), 1), maskable).astype(np.int64)
    if max_predictions is not None:
        counts = np.minimum(counts, max_predictions)
    keys = np.where(special_mask, 1.0, rng.random(len(special_mask)))
    order = np.argsort(np.repeat(np.arange(len(lengths)), lengths) + keys / 2)
    rank = np.arange(len(special_mask)) - np.repeat(cu_seqlens[:-1], lengths)
    return order[rank < np.repeat(counts, lengths)]


def _random_tokens(count: int, rng: np.random.Generator, vocab_size: int, special_ids: Sequence[int]) -> NDArray[np.int64]:
    """Uniform over the vocabulary without ``special_ids``: draws an ordinary token's rank, then steps over the special."""
    special = sorted(set(special_ids))
    tokens = rng.integers(0, vocab_size - len(special), count)
    for special_id in special:
        tokens += tokens >= special_id
    return tokens
