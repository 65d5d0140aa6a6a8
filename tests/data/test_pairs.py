from __future__ import annotations

import random
from math import sqrt

import numpy as np
import pytest

from fastbert.data import pairs as pairs_module
from fastbert.data.corpus import CorpusError
from fastbert.data.pairs import IS_NEXT, NOT_NEXT, make_pairs
from fastbert.data.sequences import Sequences
from fastbert.data.streams import Stream, generator
from fastbert.data.tokens import TokenizedCorpus

from .helpers import CLS, SEP, numbered_corpus, random_lengths


def draw(corpus: TokenizedCorpus, max_seq_length: int, seed: int = 0, epoch: int = 0) -> Sequences:
    return make_pairs(corpus, max_seq_length, generator(seed, Stream.SEQUENCES, epoch))


def assembled(pairs: Sequences) -> np.ndarray:
    return pairs.assemble(0, len(pairs), cls_id=CLS, sep_id=SEP)


def segments(pairs: Sequences) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """(A, B, label) of every pair, as positions of the corpus (the token at position p of a numbered corpus is 5 + p)."""
    found = []
    input_ids = assembled(pairs)
    for start, end, a_length, label in zip(pairs.offsets[:-1], pairs.offsets[1:], pairs.a_lengths, pairs.next_sentence_label):
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
    assert assembled(pairs).dtype == np.int32 and pairs.next_sentence_label.dtype == np.int64
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
    corpus = numbered_corpus([[1] * 30_000] * 20)
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


def test_pairs_depend_on_the_generator_alone() -> None:
    corpus = numbered_corpus(random_lengths(40, seed=3))
    first, again = draw(corpus, 64, seed=1, epoch=2), draw(corpus, 64, seed=1, epoch=2)
    for name in ("a_starts", "a_lengths", "b_starts", "b_lengths", "next_sentence_label"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not np.array_equal(assembled(first), assembled(draw(corpus, 64, seed=seed, epoch=epoch)))


def test_a_random_b_is_as_likely_from_a_book_as_a_true_one() -> None:
    """Two books of half of the sentences beside many articles: what kind of text B is says nothing about the label."""
    corpus = numbered_corpus([[4] * 2000] * 2 + [[4] * 100] * 40)
    from_book = {IS_NEXT: [], NOT_NEXT: []}
    for epoch in range(4):
        for _, b, label in segments(draw(corpus, 32, epoch=epoch)):
            from_book[label].append(document_of(corpus, b[0]) < 2)
    drawn = np.array(from_book[NOT_NEXT])
    # Of an article's 7,900 other sentences 4,000 are in books, of a book's 6,000 others 2,000; by document it were 2 of 41 and 1.
    assert abs(drawn.mean() - (4000 / 7900 + 2000 / 6000) / 2) < 4 * 0.5 / sqrt(len(drawn))
    assert abs(np.mean(from_book[IS_NEXT]) - 1 / 2) < 0.05


def test_long_documents_are_walked_in_pieces_that_differ_between_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "_PIECE_LENGTH", 4)
    corpus = numbered_corpus([[3] * 1000, [3] * 999, [40] * 70, [500] * 5, [1], [3]])
    length = 4 * 29
    cuts = set()
    for epoch in range(5):
        document, first, end = pairs_module._pieces(corpus, length, generator(0, Stream.SEQUENCES, epoch))
        tokens = corpus.sentence_offsets[end] - corpus.sentence_offsets[first]
        assert (first[1:] >= end[:-1]).all() and (
            document[first > 0] == np.searchsorted(corpus.document_offsets, first[first > 0], "right") - 1
        ).all()
        covered = np.concatenate([np.arange(*bounds) for bounds in zip(first, end)])
        assert sorted(covered) == [s for s in range(corpus.num_sentences) if s != corpus.num_sentences - 2], "one token is no pair"
        plain = tokens[document < 2]
        assert plain.min() >= length / 2 - 3 and plain.max() <= 1.5 * length + 3
        cuts.add(int(first[1]))
        used = np.zeros(corpus.num_tokens, dtype=int)
        for a, b, label in segments(draw(corpus, 32, epoch=epoch)):
            assert document_of(corpus, a[0]) == document_of(corpus, a[-1])
            if len(a) + len(b) + 3 < 32:
                used[a] += 1
                if label == IS_NEXT:
                    used[b] += 1
    assert len(cuts) > 2


def test_any_part_can_be_assembled() -> None:
    pairs = draw(numbered_corpus(random_lengths(20, seed=4)), 40)
    whole = assembled(pairs)
    assert len(whole) == pairs.offsets[-1]
    for first, last in ((0, 1), (3, 17), (len(pairs) - 1, len(pairs))):
        assert np.array_equal(
            pairs.assemble(first, last, cls_id=CLS, sep_id=SEP), whole[pairs.offsets[first] : pairs.offsets[last]]
        )


def test_what_cannot_be_paired() -> None:
    with pytest.raises(CorpusError, match="needs at least two documents, the corpus has 1"):
        draw(numbered_corpus([[3] * 9]), 32)
    assert len(draw(numbered_corpus([[1], [1], [1]]), 32)) == 0
    assert len(draw(numbered_corpus([[1], [1], [2]]), 32)) == 1
