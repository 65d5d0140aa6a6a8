from __future__ import annotations

import numpy as np
import pytest

from fastbert.data.errors import CorpusError
from fastbert.data.packing import pack
from fastbert.data.passages import SMALLEST_GAP, fill_gaps, make_passages

from .helpers import CLS, SEP, numbered_corpus, random_lengths


def passages(lengths: list[list[int]], max_seq_length: int) -> list[list[int]]:
    """The positions of the corpus that stand in each passage."""
    made = make_passages(numbered_corpus(lengths), max_seq_length)
    assert made.b_starts is made.b_lengths is made.next_sentence_label is None
    ids = made.assemble(0, len(made), cls_id=CLS, sep_id=SEP)
    parts = np.split(ids, made.offsets[1:-1])
    assert all(part[0] == CLS and part[-1] == SEP for part in parts)
    return [(part[1:-1] - 5).tolist() for part in parts]


def test_whole_sentences_while_they_fit() -> None:
    found = passages([[3, 3, 3, 3, 2], [5, 4], [1], [6, 3]], 11)
    lengths = [len(part) for part in found]
    assert lengths == [9, 5, 9, 1, 9]
    assert [position for part in found for position in part] == list(range(33))


def test_a_sentence_that_is_too_long_is_cut() -> None:
    assert [len(part) for part in passages([[2, 25, 3], [1]], 12)] == [2, 10, 10, 8, 1]


@pytest.mark.parametrize("max_seq_length", [8, 32, 512])
def test_no_token_is_lost_and_no_passage_crosses_documents(max_seq_length: int) -> None:
    lengths = random_lengths(40, seed=max_seq_length)
    corpus = numbered_corpus(lengths)
    found = passages(lengths, max_seq_length)
    assert [position for part in found for position in part] == list(range(corpus.num_tokens))
    starts = corpus.sentence_offsets[corpus.document_offsets]
    for part in found:
        assert len(part) + 2 <= max_seq_length
        assert np.searchsorted(starts, part[0], "right") == np.searchsorted(starts, part[-1], "right")


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(CorpusError, match="no documents"):
        make_passages(numbered_corpus([]), 16)


def filled(lengths: list[list[int]], tokens_per_batch: int, max_seq_length: int, max_sequences: int = 99, seed: int = 0):
    """(passages, bounds) before and after: lists of the corpus's positions, and where the batches are."""
    corpus = numbered_corpus(lengths)
    made = make_passages(corpus, max_seq_length)
    shuffled = np.random.default_rng(seed).permutation(len(made))
    order, bounds = pack(made.lengths[shuffled], tokens_per_batch, max_sequences=max_sequences)
    before = made.take(shuffled[order])
    options = {"tokens_per_batch": tokens_per_batch, "max_seq_length": max_seq_length, "max_sequences": max_sequences}
    return corpus, (before, bounds), fill_gaps(before, bounds, **options)


def divided(lengths: list[list[int]], bounds: list[int], tokens_per_batch: int, max_sequences: int = 9) -> list[list[tuple]]:
    """(start, end) of the passages in each batch, once the gaps of batches with these bounds are filled."""
    made = make_passages(numbered_corpus(lengths), 82)
    options = {"tokens_per_batch": tokens_per_batch, "max_seq_length": 82, "max_sequences": max_sequences}
    after, new = fill_gaps(made, np.array(bounds), **options)
    passages = [(start, start + length) for start, length in zip(after.a_starts.tolist(), after.a_lengths.tolist())]
    return [passages[first:last] for first, last in zip(new, new[1:])]


def test_gaps_take_whole_sentences_of_the_last_passages() -> None:
    documents = [[20] * 4] * 5
    assert divided(documents, [0, 2, 4, 5], 164 + 50) == [
        [(0, 80), (80, 160), (320, 360)],  # 50 tokens hold [CLS], two sentences and [SEP]
        [(160, 240), (240, 320), (360, 400)],
    ]
    assert divided(documents, [0, 2, 4, 5], 164 + 40) == [
        [(0, 80), (80, 160), (320, 340)],
        [(160, 240), (240, 320), (340, 360)],
        [(360, 400)],
    ]
    assert divided(documents, [0, 2, 4, 5], 164 + 31) == [[(0, 80), (80, 160)], [(160, 240), (240, 320)], [(320, 400)]]
    assert divided(documents, [0, 2, 4, 5], 164 + 50, max_sequences=2)[2] == [(320, 400)]


def test_a_gap_that_no_sentence_fits_takes_a_piece_of_one() -> None:
    assert divided([[80], [80], [80]], [0, 1, 2, 3], 82 + 34) == [[(0, 80), (160, 192)], [(80, 160), (192, 224)], [(224, 240)]]


def test_a_large_gap_takes_several_passages() -> None:
    assert divided([[80], [80], [80], [80]], [0, 1, 2, 3, 4], 82 + 150) == [
        [(0, 80), (240, 320), (160, 226)],
        [(80, 160), (226, 240)],
    ]


@pytest.mark.parametrize("max_sequences", [4, 99])
@pytest.mark.parametrize("max_seq_length", [16, 64, 256])
def test_filled_batches_hold_every_token_once(max_seq_length: int, max_sequences: int) -> None:
    for seed in range(5):
        budget = 4 * max_seq_length
        corpus, (before, old), (after, new) = filled(random_lengths(30, seed), budget, max_seq_length, max_sequences, seed)
        positions = np.concatenate([np.arange(a, a + n) for a, n in zip(after.a_starts, after.a_lengths)])
        assert np.array_equal(np.sort(positions), np.arange(corpus.num_tokens)) and (after.a_lengths > 0).all()
        documents = corpus.sentence_offsets[corpus.document_offsets]
        assert np.array_equal(
            np.searchsorted(documents, after.a_starts, "right"),
            np.searchsorted(documents, after.a_starts + after.a_lengths - 1, "right"),
        )
        tokens, counts = np.diff(after.offsets[new]), np.diff(new)
        assert (after.lengths <= max_seq_length).all() and (tokens <= budget).all() and (counts > 0).all()
        assert counts.max() <= max_sequences and new[0] == 0 and new[-1] == len(after)
        full = counts[:-1] < max_sequences
        assert (tokens[:-1][full] > budget - SMALLEST_GAP).all()
        # Passages stay as they are, in their places, and parts come behind them.
        for (first, last), (new_first, new_last) in zip(zip(old, old[1:]), zip(new[:-2], new[1:-1])):
            kept = min(last - first, new_last - new_first)
            assert np.array_equal(after.a_starts[new_first : new_first + kept], before.a_starts[first : first + kept])
