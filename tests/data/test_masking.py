from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from fastbert.data.masking import IGNORE_INDEX, mask_tokens

from .helpers import CLS, MASK, SEP

VOCABULARY = 1000
SPECIAL_IDS = [MASK, 0, 1, CLS, SEP, 500, 999]


def batch(lengths: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, special_mask, cu_seqlens): sequences [CLS] ... [SEP] of the given lengths, ordinary tokens between."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(seed).integers(5, 500, cu_seqlens[-1]).astype(np.uint16)
    special = np.zeros(len(ids), dtype=bool)
    special[cu_seqlens[:-1]] = special[cu_seqlens[1:] - 1] = True
    ids[cu_seqlens[:-1]], ids[cu_seqlens[1:] - 1] = CLS, SEP
    return ids, special, cu_seqlens


def mask(ids: np.ndarray, special: np.ndarray, cu_seqlens: np.ndarray, seed: int = 0, **options):
    return mask_tokens(
        ids,
        special,
        cu_seqlens=cu_seqlens,
        rng=np.random.default_rng(seed),
        vocab_size=VOCABULARY,
        mask_id=MASK,
        special_ids=SPECIAL_IDS,
        **options,
    )


def within(successes: int, trials: int, probability: float) -> bool:
    """Within four standard deviations of the binomial distribution."""
    return abs(successes - trials * probability) <= 4 * sqrt(trials * probability * (1 - probability))


def test_every_sequence_has_its_exact_share() -> None:
    lengths = [3, 4, 5, 8, 12, 64, 128, 129, 511, 512] * 20
    ids, special, cu_seqlens = batch(lengths)
    _, labels = mask(ids, special, cu_seqlens)
    for length, start, end in zip(lengths, cu_seqlens[:-1], cu_seqlens[1:]):
        assert np.count_nonzero(labels[start:end] != IGNORE_INDEX) == max(1, round(0.15 * (length - 2)))


def test_special_tokens_are_never_chosen_and_the_rest_is_untouched() -> None:
    ids, special, cu_seqlens = batch([5, 40, 130] * 300)
    before = ids.copy()
    masked, labels = mask(ids, special, cu_seqlens)
    chosen = labels != IGNORE_INDEX
    assert masked.dtype == labels.dtype == np.int64
    assert np.array_equal(ids, before), "the input must not be written to"
    assert not (chosen & special).any()
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(masked[~chosen], ids[~chosen])


def test_eighty_ten_ten() -> None:
    ids, special, cu_seqlens = batch([130] * 4000)
    masked, labels = mask(ids, special, cu_seqlens)
    chosen = labels != IGNORE_INDEX
    total = np.count_nonzero(chosen)
    to_mask = np.count_nonzero(masked[chosen] == MASK)
    kept = np.count_nonzero(masked[chosen] == labels[chosen])
    drawn_by_chance = 0.1 / (VOCABULARY - len(SPECIAL_IDS))  # a random token may be the token itself
    assert total == 4000 * 19
    assert within(to_mask, total, 0.8)
    assert within(kept, total, 0.1 + drawn_by_chance)
    assert within(total - to_mask - kept, total, 0.1 - drawn_by_chance)


def test_random_tokens_are_uniform_and_never_special() -> None:
    ids, special, cu_seqlens = batch([130] * 20000)
    masked, labels = mask(ids, special, cu_seqlens, probability=0.5)
    replaced = masked[(labels != IGNORE_INDEX) & (masked != labels) & (masked != MASK)]
    counts = np.bincount(replaced, minlength=VOCABULARY)
    assert not counts[SPECIAL_IDS].any()
    ordinary = np.delete(counts, SPECIAL_IDS)
    assert len(counts) == VOCABULARY and ordinary.min() > 0
    # Ids 5 .. 499 occur in the text, where a token replaced by itself is not counted, so they are a little rarer.
    expected = len(replaced) / len(ordinary)
    assert abs(ordinary - expected).max() < 6 * sqrt(expected)


def test_every_position_is_as_likely_as_any_other() -> None:
    ids, special, cu_seqlens = batch([42] * 20000)
    _, labels = mask(ids, special, cu_seqlens)
    by_position = (labels != IGNORE_INDEX).reshape(20000, 42).sum(0)
    assert by_position[0] == by_position[-1] == 0
    assert all(within(int(count), 20000, 6 / 40) for count in by_position[1:-1])


def test_probability() -> None:
    ids, special, cu_seqlens = batch([10, 102, 402])
    _, labels = mask(ids, special, cu_seqlens, probability=0.05)
    assert [np.count_nonzero(part != IGNORE_INDEX) for part in np.split(labels, cu_seqlens[1:-1])] == [1, 5, 20]
    _, labels = mask(ids, special, cu_seqlens, probability=1.0)
    assert np.array_equal(labels == IGNORE_INDEX, special)


def test_a_sequence_of_special_tokens_has_no_labels() -> None:
    ids, special, cu_seqlens = batch([2, 3, 2])
    _, labels = mask(ids, special, cu_seqlens)
    assert np.count_nonzero(labels != IGNORE_INDEX) == 1
    assert labels[3] == ids[3]


def test_masks_follow_the_generator() -> None:
    ids, special, cu_seqlens = batch([64] * 10)
    first, again, other = (mask(ids, special, cu_seqlens, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_bad_arguments_are_refused() -> None:
    ids, special, cu_seqlens = batch([8, 8])
    for probability in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="probability must be above 0 and at most 1"):
            mask(ids, special, cu_seqlens, probability=probability)
    for wrong in (cu_seqlens[:-1], cu_seqlens[1:]):
        with pytest.raises(ValueError, match="cu_seqlens must run from 0 to 16 tokens"):
            mask(ids, special, wrong)
