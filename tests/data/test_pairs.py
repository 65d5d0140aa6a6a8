from __future__ import annotations

import random
from math import sqrt

import numpy as np
import pytest

from fastbert.data import pairs as pairs_module
from fastbert.data.corpus import CorpusError
from fastbert.data.pairs import IS_NEXT, NOT_NEXT, SentencePairs, make_pairs
from fastbert.data.tokens import TokenizedCorpus

from .helpers import CLS, SEP, numbered_corpus, random_lengths


def draw(corpus: TokenizedCorpus, max_seq_length: int, seed: int = 0, epoch: int = 0) -> SentencePairs:
    return make_pairs(corpus, max_seq_length, seed=seed, epoch=epoch, cls_id=CLS, sep_id=SEP)


def segments(pairs: SentencePairs) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """(A, B, label) of every pair, as positions of the corpus (the token at position p of a numbered corpus is 5 + p)."""
    found = []
    input_ids = pairs.input_ids
    for start, end, a_length, label in zip(
        pairs.offsets[:-1], pairs.offsets[1:], pairs.segment_a_lengths, pairs.next_sentence_label
    ):
        ids = input_ids[start:end]
        assert (ids[0], ids[a_length + 1], ids[-1]) == (CLS, SEP, SEP)
        a, b = ids[1 : a_length + 1] - 5, ids[a_length + 2 : -1] - 5
        assert len(a) and len(b) and (a >= 0).all() and (b >= 0).all()
        found.append((a, b, int(label)))
    return found


def document_of(corpus: TokenizedCorpus, position: int) -> int:
    starts = corpus.sentence_offsets[corpus.document_offsets]
    return int(np.searchsorted(starts, position, side="right")) - 1


@pytest.mark.parametrize("max_seq_length", [8, 9, 32, 128])
def test_segments_are_spans_in_order_and_b_is_the_rest_or_from_another_document(max_seq_length: int) -> None:
    corpus = numbered_corpus(random_lengths(60, seed=max_seq_length))
    pairs = draw(corpus, max_seq_length)
    lengths = np.diff(pairs.offsets)
    assert lengths.max() <= max_seq_length
    assert pairs.input_ids.dtype == np.int32 and pairs.next_sentence_label.dtype == np.int64
    for a, b, label in segments(pairs):
        assert (np.diff(a) == 1).all() and (np.diff(b) == 1).all()
        a_documents = {document_of(corpus, a[0]), document_of(corpus, a[-1])}
        b_documents = {document_of(corpus, b[0]), document_of(corpus, b[-1])}
        assert len(a_documents) == len(b_documents) == 1
        if label == IS_NEXT:
            assert a_documents == b_documents and a[-1] < b[0]
            truncated = len(a) + len(b) + 3 == max_seq_length
            assert truncated or a[-1] + 1 == b[0], "only truncation may open a gap between A and B"
        else:
            assert not a_documents & b_documents


def test_without_truncation_segments_are_whole_sentences() -> None:
    corpus = numbered_corpus([[3] * 50, [3] * 50, [3] * 50])
    for a, b, label in segments(draw(corpus, 63)):
        assert len(a) % 3 == len(b) % 3 == a[0] % 3 == b[0] % 3 == 0
        assert label == NOT_NEXT or a[-1] + 1 == b[0]


def test_labels_are_fair_coins() -> None:
    """Whatever the documents are like: long sentences, single ones, and short documents are where a bias would come from."""
    shapes = {
        "mixed": random_lengths(150, seed=1),
        "one sentence each": [[7]] * 800,
        "two sentences each": [[7, 9]] * 800,
        "longer than the target": [[100] * 20] * 40,
        "two books": [[12] * 4000] * 2,
    }
    for name, lengths in shapes.items():
        corpus = numbered_corpus(lengths)
        labels = np.concatenate([draw(corpus, 48, epoch=epoch).next_sentence_label for epoch in range(6)])
        assert set(labels) == {IS_NEXT, NOT_NEXT}
        assert len(labels) > 1000
        assert abs(labels.mean() - 0.5) < 3 * 0.5 / sqrt(len(labels)), name


def test_every_sentence_is_used_and_the_rest_of_a_random_pair_is_put_back() -> None:
    corpus = numbered_corpus([[4] * 300, [4] * 300])
    pairs = draw(corpus, 43)
    used = np.zeros(corpus.num_tokens, dtype=int)
    for a, b, label in segments(pairs):
        used[a] += 1
        if label == IS_NEXT:
            used[b] += 1
    # A chunk of a short target may be one sentence; asked for a true rest at a document's end, it reuses the one before.
    assert used.min() == 1
    assert np.count_nonzero(used > 1) <= 2 * 4


def test_sentences_longer_than_the_target_are_paired_with_the_next() -> None:
    corpus = numbered_corpus([[100] * 30, [100] * 30])
    used = set()
    for a, b, label in segments(draw(corpus, 48)):
        sentences = {int(a[0]) // 100, int(a[-1]) // 100}, {int(b[0]) // 100, int(b[-1]) // 100}
        assert len(sentences[0]) == len(sentences[1]) == 1
        assert label == NOT_NEXT or max(sentences[0]) + 1 == max(sentences[1])
        used |= sentences[0] if label == NOT_NEXT else sentences[0] | sentences[1]
    assert used == set(range(60))


def test_random_segments_come_from_all_other_documents_and_all_their_sentences() -> None:
    corpus = numbered_corpus([[2] * 40] * 6)
    seen = np.zeros((6, 6), dtype=int)
    starts = set()
    for epoch in range(40):
        for a, b, label in segments(draw(corpus, 16, epoch=epoch)):
            if label == NOT_NEXT:
                seen[document_of(corpus, a[0]), document_of(corpus, b[0])] += 1
                starts.add(int(b[0]) // 2)
    assert (np.diag(seen) == 0).all()
    others = seen[~np.eye(6, dtype=bool)]
    expected = others.sum() / 30
    assert abs(others - expected).max() < 5 * sqrt(expected)
    assert len(starts) > 0.95 * corpus.num_sentences


def test_one_pair_in_ten_is_short() -> None:
    corpus = numbered_corpus([[1] * 300_000] * 2)
    pairs = draw(corpus, 131)
    lengths = np.diff(pairs.offsets) - 3
    next_lengths = lengths[pairs.next_sentence_label == IS_NEXT]
    share = (next_lengths < 128).mean()
    # One of the 127 targets of a short pair, 2 .. 128, is the full length.
    assert abs(share - 0.1 * 126 / 127) < 4 * sqrt(0.1 * 0.9 / len(next_lengths))
    short = next_lengths[next_lengths < 128]
    assert short.min() < 12 and short.max() > 118 and abs(short.mean() - 64.5) < 5 * 37 / sqrt(len(short))


def test_truncation_is_that_of_dropping_tokens_one_by_one() -> None:
    random_numbers = random.Random(2)
    a_lengths = np.array([random_numbers.randint(1, 60) for _ in range(3000)])
    b_lengths = np.array([random_numbers.randint(1, 60) for _ in range(3000)])
    for room in (5, 28, 29, 120):
        zeros = np.zeros(3000, dtype=np.int64)
        result = pairs_module._truncate(zeros, a_lengths, zeros, b_lengths, room, np.random.default_rng(0))
        for a, b, a_start, new_a, b_start, new_b in zip(a_lengths, b_lengths, *result):
            kept_a, kept_b = a, b
            while kept_a + kept_b > room:
                if kept_a > kept_b:
                    kept_a -= 1
                else:
                    kept_b -= 1
            assert (new_a, new_b) == (kept_a, kept_b)
            assert 0 <= a_start <= a - new_a and 0 <= b_start <= b - new_b
        for lengths, starts, new_lengths in ((a_lengths, *result[:2]), (b_lengths, *result[2:])):
            dropped = (lengths - new_lengths).sum()
            assert abs(starts.sum() - dropped / 2) <= 4 * 0.5 * sqrt(dropped)


def test_pairs_depend_on_seed_and_epoch_alone() -> None:
    corpus = numbered_corpus(random_lengths(40, seed=3))
    first, again = draw(corpus, 64, seed=1, epoch=2), draw(corpus, 64, seed=1, epoch=2)
    for name in ("input_ids", "offsets", "segment_a_lengths", "next_sentence_label"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not np.array_equal(first.input_ids, draw(corpus, 64, seed=seed, epoch=epoch).input_ids)


def test_the_order_is_shuffled() -> None:
    starts = draw(numbered_corpus([[3] * 400] * 5), 32).a_starts
    assert abs(np.corrcoef(starts, np.arange(len(starts)))[0, 1]) < 0.2


def test_any_part_can_be_assembled() -> None:
    pairs = draw(numbered_corpus(random_lengths(20, seed=4)), 40)
    whole = pairs.input_ids
    assert len(whole) == pairs.offsets[-1]
    for first, last in ((0, 1), (3, 17), (len(pairs) - 1, len(pairs))):
        assert np.array_equal(pairs.assemble(first, last), whole[pairs.offsets[first] : pairs.offsets[last]])


def test_what_cannot_be_paired_is_refused() -> None:
    corpus = numbered_corpus([[3] * 9, [4] * 9])
    with pytest.raises(ValueError, match="max_seq_length must be at least 8, not 7"):
        draw(corpus, 7)
    with pytest.raises(CorpusError, match="needs at least two documents, the corpus has 1"):
        draw(numbered_corpus([[3] * 9]), 32)
    with pytest.raises(CorpusError, match="no sentence pair can be made .* its documents are single tokens"):
        draw(numbered_corpus([[1], [1], [1]]), 32)
    assert len(draw(numbered_corpus([[1], [1], [2]]), 32)) == 1
