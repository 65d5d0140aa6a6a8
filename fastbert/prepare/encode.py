"""What the processes of ``fastbert prepare`` do: documents to sentences to ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastbert.data.encoding import SentenceEncoder
from fastbert.data.sentences import cut_text, split_sentences

# Some 900 tokens: more than any pair of sentences takes.
LONGEST_SENTENCE = 4000


@dataclass(frozen=True)
class Encoded:
    """Documents as ids: the three arrays of a shard, uint32 lengths, without sentences and documents that give no token.

    words (separated by white space) and characters: of all documents; empty: documents that gave no token; cut_sentences: longer
    than 4,000 characters, divided at white space.
    """

    ids: NDArray[np.integer]
    sentence_lengths: NDArray[np.uint32]
    document_lengths: NDArray[np.uint32]
    words: int
    characters: int
    empty: int
    cut_sentences: int


def encode_documents(encoder: SentenceEncoder, documents: list[list[str]]) -> Encoded:
    """documents: lists of paragraphs."""
    sentences: list[str] = []
    sentences_before = [0]
    words = characters = cut = 0
    for paragraphs in documents:
        for paragraph in paragraphs:
            words += len(paragraph.split())
            characters += len(paragraph)
            split = split_sentences(paragraph)
            if len(paragraph) > LONGEST_SENTENCE:
                cut += sum(len(sentence) > LONGEST_SENTENCE for sentence in split)
                split = [piece for sentence in split for piece in cut_text(sentence, LONGEST_SENTENCE)]
            sentences += split
        sentences_before.append(len(sentences))
    ids, lengths = encoder.encode(sentences)
    filled = lengths > 0
    filled_before = np.concatenate([[0], np.cumsum(filled)])[sentences_before]
    document_lengths = np.diff(filled_before)
    return Encoded(
        ids,
        lengths[filled].astype(np.uint32),
        document_lengths[document_lengths > 0].astype(np.uint32),
        words,
        characters,
        int((document_lengths == 0).sum()),
        cut,
    )
