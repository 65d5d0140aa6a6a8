"""Documents to ids: long sentences, and the readers' limits on a line that has no end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastbert.data.encoding import SentenceEncoder
from fastbert.data.tokenizer import load_tokenizer
from fastbert.prepare import reader
from fastbert.prepare.encode import LONGEST_SENTENCE, encode_documents

from .helpers import run


@pytest.fixture(scope="module")
def encoder(tokenizer_folder: str) -> SentenceEncoder:
    return SentenceEncoder(load_tokenizer(tokenizer_folder))


def test_documents_and_sentences_are_counted(encoder: SentenceEncoder) -> None:
    found = encode_documents(encoder, [["The sea. The ship.", "A gull."], ["\u200b"], ["My  neighbour."], []])
    assert found.document_lengths.tolist() == [3, 1] and len(found.sentence_lengths) == 4
    assert found.sentence_lengths.sum() == len(found.ids)
    assert (found.words, found.characters, found.empty, found.cut_sentences) == (9, 40, 2, 0)
    assert found.ids.dtype == np.uint16 and found.sentence_lengths.dtype == found.document_lengths.dtype == np.uint32


def test_nothing_gives_empty_arrays(encoder: SentenceEncoder) -> None:
    found = encode_documents(encoder, [])
    assert len(found.ids) == len(found.sentence_lengths) == len(found.document_lengths) == 0
    assert found.ids.dtype == np.uint16


def test_a_long_sentence_is_divided_at_white_space(encoder: SentenceEncoder) -> None:
    endless = "the quiet sea " * 1000
    found = encode_documents(encoder, [["Before it. The " + endless + ". After it."]])
    whole, lengths = encoder.encode(["Before it.", "The " + endless + ".", "After it."])
    assert found.cut_sentences == 1 and len(found.sentence_lengths) == 2 + -(-(4 + len(endless)) // LONGEST_SENTENCE)
    np.testing.assert_array_equal(found.ids, whole)
    exact = encode_documents(encoder, [["a" * LONGEST_SENTENCE], ["a" * (LONGEST_SENTENCE + 1)]])
    assert exact.cut_sentences == 1 and exact.sentence_lengths.tolist() == [1, 1, 1]
    assert lengths.sum() == len(whole)


@pytest.mark.parametrize(("unit", "cut_documents"), [("harbour {} ", 1), ("\u6d77", 0)])
def test_a_line_of_some_megabytes_is_divided_and_counted(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch, unit: str, cut_documents: int
) -> None:
    monkeypatch.setattr(reader, "LONGEST_DOCUMENT", 1_000_000)
    text = "".join(unit.format(number) for number in range(150_000 if "{" in unit else 900_000))
    assert len(text.encode()) > 2 * reader.LONGEST_LINE
    (tmp_path / "a.txt").write_text(f"A line before.\n{text}\nA line behind.\n\nAnother document.", encoding="utf-8")
    result = run((str(tmp_path / "a.txt"),), tmp_path / "out", tokenizer=tokenizer_folder, tokens_per_shard=10**9)
    facts = result.facts
    assert facts["cut_lines"] == 1 and facts["cut_documents"] == cut_documents
    assert facts["documents"] == (5 if cut_documents else 2)
    assert facts["cut_sentences"] == 3  # a piece of the line each
    white_space = text.count(" ")
    assert facts["words"] == 8 + (white_space or 3)
    assert facts["characters"] == sum(map(len, ("A line before.", "A line behind.", "Another document.", text))) - 3 * (
        white_space > 0
    )
    assert facts["tokens"] >= (300_000 if cut_documents else 900_000)
