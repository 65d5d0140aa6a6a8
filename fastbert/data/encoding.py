"""Encodes sentences with a WordPiece tokenizer, a word once.

WordPiece never looks across white space and a corpus repeats its words: encoding every distinct word once and joining the
results gives the ids of ``Tokenizer.encode_batch`` in a third of the time.
"""

from __future__ import annotations

import json
from array import array
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

if TYPE_CHECKING:  # it takes its time to import, and processes that only encode need none of it
    from transformers import PreTrainedTokenizerFast

# About 200 bytes of memory a word; the most frequent ones are soon back after all were forgotten.
_MOST_WORDS_KEPT = 250_000
_LONGEST_WORD_KEPT = 64
_LARGEST_UINT16_VOCABULARY = int(np.iinfo(np.uint16).max) + 1


class SentenceEncoder:
    """Sentences to ids, without special tokens, padding or truncation.

    A special token's name standing in the text ("[MASK]" in a paper about BERT) is encoded as the characters that it is
    written with, so special ids (but the unknown token's) never come out of text. ``tokenizer`` itself is left as it is.
    ``dtype``: that of the ids, uint16 where the vocabulary fits, else int32.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._start(tokenizer.backend_tokenizer.to_str(), len(tokenizer))

    @classmethod
    def from_json(cls, tokenizer_json: str, vocab_size: int) -> SentenceEncoder:
        """The encoder of a tokenizer's ``backend_tokenizer.to_str()`` and ``len(tokenizer)``, without transformers."""
        encoder = cls.__new__(cls)
        encoder._start(tokenizer_json, vocab_size)
        return encoder

    def _start(self, tokenizer_json: str, vocab_size: int) -> None:
        self._backend = Tokenizer.from_str(tokenizer_json)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self.dtype = np.dtype(np.uint16 if vocab_size <= _LARGEST_UINT16_VOCABULARY else np.int32)
        self._words = _EncodedWords(self._backend, self.dtype) if _words_are_independent(self._backend) else None

    def encode(self, sentences: list[str]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """(ids of all sentences, flat; number of ids of each sentence)."""
        if self._words is None:
            encoded = [encoding.ids for encoding in self._backend.encode_batch_fast(sentences, add_special_tokens=False)]
            return np.fromiter(chain.from_iterable(encoded), self.dtype), _lengths(encoded)
        words = self._words
        if len(words) > _MOST_WORDS_KEPT:
            words.clear()
        joined = [b"".join([words[word] for word in sentence.split(" ")]) for sentence in sentences]
        return np.frombuffer(b"".join(joined), self.dtype), _lengths(joined) // self.dtype.itemsize


class _EncodedWords(dict[str, bytes]):
    """The ids of words, as the bytes of an array; a word that is not there is encoded and, unless it is long, kept."""

    def __init__(self, backend: Tokenizer, dtype: np.dtype) -> None:
        super().__init__()
        self._backend, self._typecode = backend, dtype.char

    def __missing__(self, word: str) -> bytes:
        ids = array(self._typecode, self._backend.encode(word, add_special_tokens=False).ids).tobytes()
        if len(word) <= _LONGEST_WORD_KEPT:
            self[word] = ids
        return ids


def _lengths(lists: list[list[int]] | list[bytes]) -> NDArray[np.int64]:
    return np.fromiter(map(len, lists), np.int64, len(lists))


def _words_are_independent(backend: Tokenizer) -> bool:
    """Whether the ids of a text are those of its space-separated words: true of BERT's own tokenizer, not of every other.

    BertNormalizer works on characters, BertPreTokenizer divides at spaces; an added token that is no special one could
    hold a space.
    """
    parts = json.loads(backend.to_str())
    types = [(parts[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    return types == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and all(token["special"] for token in parts["added_tokens"])
