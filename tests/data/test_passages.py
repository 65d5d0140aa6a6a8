from __future__ import annotations

import numpy as np
import pytest

from fastbert.data.errors import CorpusError
from fastbert.data.passages import make_passages

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
