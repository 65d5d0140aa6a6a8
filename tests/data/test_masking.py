from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fastbert.data import masking as masking_module
from fastbert.data.masking import IGNORE_INDEX, mask_options, mask_tokens, most_labels

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


# --- words and spans -------------------------------------------------------------------------------------------------------

# Ids from 600 on go on with a word.
CONTINUES = np.arange(VOCABULARY) >= 600


def words_batch(rows: list[list[list[int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids, special_mask, cu_seqlens, word_of): rows of segments of word lengths: [CLS] segment [SEP] segment [SEP].

    word_of: (total,), the number of each token's word, -1 of special tokens. Its id tells a token's place: words begin with an id
    below 500 and go on with ids from 600 on.
    """
    rng = np.random.default_rng(0)
    ids, word_of, cu_seqlens, word = [], [], [0], 0
    for segments in rows:
        ids.append(CLS)
        word_of.append(-1)
        for segment in segments:
            for length in segment:
                ids += [int(rng.integers(5, 500)), *rng.integers(600, 999, length - 1).tolist()]
                word_of += [word] * length
                word += 1
            ids.append(SEP)
            word_of.append(-1)
        cu_seqlens.append(len(ids))
    return np.array(ids), np.array(word_of) == -1, np.array(cu_seqlens), np.array(word_of)


def random_words(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).choice([1, 1, 1, 2, 3, 5], count).tolist()


def word_counts(labels: np.ndarray, word_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens that are asked for, tokens) of each word."""
    inside = word_of >= 0
    return np.bincount(word_of[inside], labels[inside] != IGNORE_INDEX), np.bincount(word_of[inside])


@pytest.mark.parametrize("masking", ["whole-word", "span"])
@pytest.mark.parametrize("probability", [0.15, 0.4, 1.0])
def test_words_are_masked_whole(masking: str, probability: float) -> None:
    rows = [[random_words(1 + row % 37, row), random_words(1 + row % 23, row + 99)] for row in range(300)]
    ids, special, cu_seqlens, word_of = words_batch(rows)
    masked, labels = mask(ids, special, cu_seqlens, masking=masking, continues=CONTINUES, probability=probability)
    chosen = labels != IGNORE_INDEX
    assert not (chosen & special).any()
    assert np.array_equal(labels[chosen], ids[chosen]) and np.array_equal(masked[~chosen], ids[~chosen])
    asked, lengths = word_counts(labels, word_of)
    assert set(asked[asked != lengths]) <= {0}, "never a half"
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:]):
        assert chosen[start:end].any()
    if probability == 1.0:
        assert np.array_equal(chosen, ~special)


def test_a_segment_may_begin_inside_of_a_word() -> None:
    """Truncation cuts words: what is left behind a special token, or at a sequence's beginning, is a word of its own."""
    ids = np.array([CLS, 700, 701, 20, SEP, 702, SEP, 703, 30, 704])
    special = np.isin(ids, [CLS, SEP])
    words = masking_module._Words(ids, special, np.array([0, 7, 10]), CONTINUES)
    assert words.starts.tolist() == [1, 3, 5, 7, 8] and words.lengths.tolist() == [2, 1, 1, 1, 2]
    assert words.sequences.tolist() == [0, 0, 0, 1, 1] and words.counts.tolist() == [3, 2]


def test_whole_words_fill_the_share_of_tokens_as_far_as_they_fit() -> None:
    rows = [[random_words(20 + row % 30, row), random_words(20, row + 99)] for row in range(400)]
    ids, special, cu_seqlens, word_of = words_batch(rows)
    _, labels = mask(ids, special, cu_seqlens, masking="whole-word", continues=CONTINUES)
    exact = 0
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:]):
        share = max(1, round(0.15 * (end - start - 3)))
        asked, lengths = word_counts(
            labels[start:end], np.where(word_of[start:end] < 0, -1, word_of[start:end] - word_of[start + 1])
        )
        assert asked.sum() <= share
        left_out = lengths[asked == 0]
        assert (left_out > share - asked.sum()).all(), "another word would have fitted"
        exact += asked.sum() == share
    assert exact == 400, "words of one token fill every rest"
    ids, special, cu_seqlens, word_of = words_batch([[[3] * 10, [3] * 10]] * 50 + [[[9], [9]]] * 50)
    _, labels = mask(ids, special, cu_seqlens, masking="whole-word", continues=CONTINUES)
    counts = [np.count_nonzero(part != IGNORE_INDEX) for part in np.split(labels, cu_seqlens[1:-1])]
    assert counts == [9] * 50 + [9] * 50, "three words of the nine tokens; one where none fits into three"


def test_every_word_is_as_likely_as_any_other_and_kinds_are_drawn_by_token() -> None:
    trials = 3000
    ids, special, cu_seqlens, word_of = words_batch([[[2] * 20, [2] * 20]] * trials)
    masked, labels = mask(ids, special, cu_seqlens, masking="whole-word", continues=CONTINUES)
    asked, _ = word_counts(labels, word_of)
    by_word = (asked.reshape(trials, 40) > 0).sum(0)
    assert all(within(int(count), trials, 6 / 40) for count in by_word)
    chosen = labels != IGNORE_INDEX
    total = np.count_nonzero(chosen)
    assert within(np.count_nonzero(masked[chosen] == MASK), total, 0.8)
    halves = (masked[chosen] == MASK).reshape(-1, 2)
    assert within(np.count_nonzero(halves[:, 0] != halves[:, 1]), total // 2, 2 * 0.8 * 0.2), "a word's tokens are independent"


def test_span_lengths_are_geometric_up_to_ten() -> None:
    count = 100_000
    lengths = masking_module._span_lengths(count, np.random.default_rng(0))
    expected = 0.2 * 0.8 ** np.arange(10)
    expected *= count / expected.sum()
    found = np.bincount(lengths, minlength=11)
    assert found[0] == 0 and len(found) == 11
    # The 99.9th percentile of chi-square with nine degrees of freedom.
    assert ((found[1:] - expected) ** 2 / expected).sum() < 27.9
    assert abs(lengths.mean() - 3.797) < 0.04, "SpanBERT, section 3.1: 3.8 on average"


def runs(chosen: np.ndarray) -> np.ndarray:
    """The lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    return edges[1::2] - edges[::2]


def test_spans_have_their_share_of_the_words_everywhere_alike() -> None:
    trials = 2000
    ids, special, cu_seqlens, _ = words_batch([[[1] * 30, [1] * 70]] * trials)
    masked, labels = mask(ids, special, cu_seqlens, masking="span", continues=CONTINUES)
    chosen = (labels != IGNORE_INDEX).reshape(trials, 103)
    assert (chosen.sum(1) == 15).all()
    by_word = np.delete(chosen.sum(0), [0, 31, 102])
    assert all(within(int(count), trials, 0.15) for count in by_word), "at the edges too"
    # 15 words in spans of 3.8 on average are 4 spans and a rest; single words would be 13 runs.
    assert 4.0 < np.mean([len(runs(row)) for row in chosen]) < 5.5


def test_words_of_several_tokens_get_their_share_of_tokens_on_average() -> None:
    rows = [[random_words(100, row), random_words(100, row + 9999)] for row in range(600)]
    ids, special, cu_seqlens, _ = words_batch(rows)
    _, labels = mask(ids, special, cu_seqlens, masking="span", continues=CONTINUES)
    assert abs(np.count_nonzero(labels != IGNORE_INDEX) / np.count_nonzero(~special) - 0.15) < 0.002


def test_spans_are_masked_replaced_or_kept_as_a_whole() -> None:
    ids, special, cu_seqlens, _ = words_batch([[[1] * 3000, [1] * 3000]] * 40)
    masked, labels = mask(ids, special, cu_seqlens, masking="span", continues=CONTINUES, probability=0.02)
    chosen = labels != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    kinds = []
    for start, end in zip(edges[::2], edges[1::2]):
        hidden, kept = masked[start:end] == MASK, masked[start:end] == ids[start:end]
        kinds.append("masked" if hidden.all() else "kept" if kept.all() else "mixed" if hidden.any() else "random")
    # Two spans may touch, hardly ever with so few of them.
    assert kinds.count("mixed") < 0.02 * len(kinds)
    spans = len(kinds)
    assert spans > 1000
    assert abs(kinds.count("masked") - 0.8 * spans) < 0.04 * spans
    for kind in ("kept", "random"):
        assert abs(kinds.count(kind) - 0.1 * spans) < 0.03 * spans


def test_short_and_empty_sequences_have_spans_and_words() -> None:
    ids, special, cu_seqlens, _ = words_batch([[[1], []], [[], []], [[2], [1]]])
    for masking in ("whole-word", "span"):
        _, labels = mask(ids, special, cu_seqlens, masking=masking, continues=CONTINUES)
        counts = [np.count_nonzero(part != IGNORE_INDEX) for part in np.split(labels, cu_seqlens[1:-1])]
        assert counts[:2] == [1, 0] and counts[2] in (1, 2)


def test_options_of_a_tokenizer(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mask_options(tokenizer)["continues"] is None
    continues = mask_options(tokenizer, "span", 0.2)["continues"]
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert [piece for piece, goes_on in zip(pieces, continues) if goes_on] == [piece for piece in pieces if piece.startswith("##")]
    assert 10 < continues.sum() < len(tokenizer)
    with pytest.raises(ValueError, match="masking is 'word', expected one of token, whole-word, span"):
        mask_options(tokenizer, "word")
    with pytest.raises(ValueError, match="probability must be above 0 and at most 1, not 1.5"):
        mask_options(tokenizer, "token", 1.5)
    monkeypatch.setattr(tokenizer, "convert_ids_to_tokens", lambda ids: [f"\u2581{number}" for number in ids])
    with pytest.raises(ValueError, match="masking 'span' needs a tokenizer that marks the pieces inside of words with ##"):
        mask_options(tokenizer, "span")


@pytest.mark.parametrize("special_tokens", [2, 3])
@pytest.mark.parametrize("probability", [0.05, 0.15, 0.2, 0.4, 0.8, 1.0])
def test_no_batch_has_more_labels_than_the_bound(probability: float, special_tokens: int) -> None:
    """Against the best that any division of the tokens into sequences can do; and the bound is of use."""
    tokens = 90
    labels = [0] + [min(n, max(1, round(probability * n))) for n in range(1, tokens)]
    best = np.zeros(tokens + 1, np.int64)  # of so many tokens in the sequences so far
    for sequences in range(1, 25):
        longer = best.copy()
        for n in range(1, tokens - special_tokens + 1):
            length = n + special_tokens
            longer[length:] = np.maximum(longer[length:], best[:-length] + labels[n])
        best = longer
        bound = most_labels(tokens, sequences, special_tokens=special_tokens, probability=probability)
        assert best[-1] <= bound <= best[-1] + 0.9 * sequences + 1


def test_spans_get_a_tenth_more() -> None:
    options = {"special_tokens": 2, "probability": 0.15}
    assert most_labels(4096, 8, **options) == int(0.15 * (4096 - 16) + 0.85 * 8)
    assert most_labels(4096, 8, **options, masking="whole-word") == int(0.15 * (4096 - 16) + 0.85 * 8)
    assert most_labels(4096, 8, **options, masking="span") == int(1.1 * (0.15 * (4096 - 16) + 0.85 * 8))
    assert most_labels(20, 8, special_tokens=2, probability=1.0, masking="span") == 20
