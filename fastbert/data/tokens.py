"""A tokenized corpus as three flat arrays, and its division into a training and a held-out part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from fastbert.data.documents import Document
from fastbert.data.encoding import SentenceEncoder
from fastbert.data.errors import CorpusError, why_too_few
from fastbert.data.sentences import split_sentences

_BATCH_CHARACTERS = 2_000_000
_HELD_OUT_EXCESS = 1.5


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """Documents of sentences of WordPiece ids, without special tokens; no sentence and no document is empty.

    ids: (num_tokens,), uint16 where the vocabulary fits, else int32; sentence_offsets: (num_sentences + 1,) int64 into ids;
    document_offsets: (num_documents + 1,) int64 into the sentences.
    """

    ids: NDArray[np.integer]
    sentence_offsets: NDArray[np.int64]
    document_offsets: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_sentences(self) -> int:
        return len(self.sentence_offsets) - 1

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1

    def __str__(self) -> str:
        return f"{self.num_documents:,} documents, {self.num_sentences:,} sentences, {self.num_tokens:,} tokens"

    def split(self, held_out_fraction: float, seed: int, *, least_documents: int = 2) -> tuple[TokenizedCorpus, TokenizedCorpus]:
        """(train, held_out), the latter with about ``held_out_fraction`` of the tokens.

        Whole documents are held out, drawn at random; one that would take the part to more than 1.5 times its size is
        passed over. Where that leaves less than half of the size asked for, or fewer than two documents on a side (a corpus
        of a few books), the last sentences of every document are held out instead: both sides then have the same documents.
        Raises ValueError for a fraction outside (0, 1), CorpusError for a corpus too small to be divided: ``least_documents`` on
        either side.
        """
        if not 0.0 < held_out_fraction < 1.0:
            raise ValueError(f"held_out_fraction must be between 0 and 1, not {held_out_fraction}")
        held_out = self._hold_out_documents(held_out_fraction, seed)
        if held_out is None:
            held_out = self._hold_out_ends(held_out_fraction)
        train_part, held_out_part = self._select(~held_out), self._select(held_out)
        if min(train_part.num_documents, held_out_part.num_documents) < least_documents:
            part = "a part with two documents" if least_documents > 1 else "a part"
            raise CorpusError(
                f"the corpus ({self}) is too small to hold out {part}; give more text, or documents of several sentences"
            )
        return train_part, held_out_part

    def _hold_out_documents(self, fraction: float, seed: int) -> NDArray[np.bool_] | None:
        """Which sentences (num_sentences,) belong to held-out documents; None where no set of documents fits."""
        document_tokens = np.diff(self.sentence_offsets[self.document_offsets])
        target = fraction * self.num_tokens
        chosen = np.zeros(self.num_documents, dtype=bool)
        held_out = tokens = 0
        for document in np.random.default_rng(seed).permutation(self.num_documents):
            if tokens >= target and held_out >= 2:
                break
            if tokens + document_tokens[document] <= _HELD_OUT_EXCESS * target:
                chosen[document] = True
                held_out, tokens = held_out + 1, tokens + int(document_tokens[document])
        if min(held_out, self.num_documents - held_out) < 2 or tokens < target / 2:
            return None
        return np.repeat(chosen, np.diff(self.document_offsets))

    def _hold_out_ends(self, fraction: float) -> NDArray[np.bool_]:
        """Which sentences (num_sentences,) are among the last of their document; a document's first sentence never is."""
        counts = np.diff(self.document_offsets)
        held_out = np.minimum(np.maximum(np.rint(fraction * counts).astype(np.int64), 1), counts - 1)
        position = np.arange(self.num_sentences) - np.repeat(self.document_offsets[:-1], counts)
        return position >= np.repeat(counts - held_out, counts)

    def _select(self, sentences: NDArray[np.bool_]) -> TokenizedCorpus:
        """The corpus of the marked sentences; documents that have none are gone."""
        lengths = np.diff(self.sentence_offsets)
        documents = np.repeat(np.arange(self.num_documents), np.diff(self.document_offsets))
        return _corpus(self.ids[np.repeat(sentences, lengths)], lengths[sentences], documents[sentences])


def concatenate(corpora: Sequence[TokenizedCorpus]) -> TokenizedCorpus:
    """The documents of all corpora, one behind the other; of one corpus that corpus itself, without a copy."""
    if len(corpora) == 1:
        return corpora[0]
    return TokenizedCorpus(
        np.concatenate([corpus.ids for corpus in corpora]),
        _offsets(np.concatenate([np.diff(corpus.sentence_offsets) for corpus in corpora])),
        _offsets(np.concatenate([np.diff(corpus.document_offsets) for corpus in corpora])),
    )


def _corpus(ids: NDArray, lengths: NDArray, documents: NDArray) -> TokenizedCorpus:
    """Builds a corpus from ids, the length of every sentence and the number of its document (both in reading order)."""
    filled = lengths > 0
    _, sentences = np.unique(documents[filled], return_counts=True)
    return TokenizedCorpus(ids, _offsets(lengths[filled]), _offsets(sentences))


def _offsets(lengths: NDArray) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    progress: Callable[[int, int], None] | None = None,
    least_documents: int = 2,
) -> TokenizedCorpus:
    """Splits documents into sentences and encodes them, a few MB of text at a time; special ids never come out of text.

    Sentences and documents that give no token are dropped. ``progress(documents, tokens)`` is called after each
    batch with what is done so far. Raises CorpusError where fewer than ``least_documents`` remain, and whatever the iterator of
    documents raises.
    """
    encoder = SentenceEncoder(tokenizer)
    ids: list[NDArray[np.integer]] = [np.empty(0, encoder.dtype)]
    lengths, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    documents_done = tokens_done = 0
    for sentences, document_numbers in _sentence_batches(documents):
        batch_ids, batch_lengths = encoder.encode(sentences)
        ids.append(batch_ids)
        lengths.append(batch_lengths)
        numbers.append(np.asarray(document_numbers, np.int64))
        documents_done, tokens_done = document_numbers[-1] + 1, tokens_done + len(batch_ids)
        if progress is not None:
            progress(documents_done, tokens_done)
    corpus = _corpus(np.concatenate(ids), np.concatenate(lengths), np.concatenate(numbers))
    if corpus.num_documents < least_documents:
        found = f"{corpus.num_documents} of {documents_done} documents give tokens"
        raise CorpusError(f"{found}: {why_too_few(least_documents)}")
    return corpus


def _sentence_batches(documents: Iterable[Document]) -> Iterator[tuple[list[str], list[int]]]:
    """Sentences of whole documents, some MB at a time, each with the number of its document."""
    sentences: list[str] = []
    numbers: list[int] = []
    characters = 0
    for number, document in enumerate(documents):
        for paragraph in document.paragraphs:
            split = split_sentences(paragraph)
            sentences += split
            numbers += [number] * len(split)
            characters += len(paragraph)
        if characters >= _BATCH_CHARACTERS:
            yield sentences, numbers
            sentences, numbers, characters = [], [], 0
    if sentences:
        yield sentences, numbers
