"""Sequences that are still ranges of a corpus: a few numbers each, of which ids are made when a batch is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastbert.data.tokens import TokenizedCorpus

SHORTEST_SEQUENCE = 8


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences [CLS] A [SEP] B [SEP], or [CLS] A [SEP] where the three fields of pairs are None.

    a_starts, b_starts: (num_sequences,) int64 into corpus.ids; a_lengths, b_lengths: (num_sequences,) int64;
    next_sentence_label: (num_sequences,) int64, 0 where B follows A, 1 where B is from another document.
    """

    corpus: TokenizedCorpus
    a_starts: NDArray[np.int64]
    a_lengths: NDArray[np.int64]
    b_starts: NDArray[np.int64] | None = None
    b_lengths: NDArray[np.int64] | None = None
    next_sentence_label: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.a_starts)

    @property
    def special_tokens(self) -> int:
        """Of each sequence."""
        return 2 if self.b_lengths is None else 3

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(num_sequences + 1,): where each sequence begins in the assembled ids of all."""
        lengths = self.a_lengths + self.special_tokens
        if self.b_lengths is not None:
            lengths = lengths + self.b_lengths
        return np.concatenate([[0], np.cumsum(lengths)])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(num_sequences,), special tokens included."""
        return np.diff(self.offsets)

    def take(self, order: NDArray[np.integer]) -> Sequences:
        """The sequences with the numbers ``order``, in that order."""
        columns = (self.a_starts, self.a_lengths, self.b_starts, self.b_lengths, self.next_sentence_label)
        return Sequences(self.corpus, *(None if column is None else column[order] for column in columns))

    def assemble(self, first: int, last: int, *, cls_id: int, sep_id: int) -> NDArray[np.int32]:
        """The flat ids of the sequences first .. last - 1, one behind the other."""
        starts = self.offsets[first:last] - self.offsets[first]
        lengths = self.a_lengths[first:last]
        ids = np.empty(self.offsets[last] - self.offsets[first], dtype=np.int32)
        ids[starts] = cls_id
        ids[ranges(starts + 1, lengths)] = self.corpus.ids[ranges(self.a_starts[first:last], lengths)]
        ends = starts + lengths + 1
        ids[ends] = sep_id
        if self.b_lengths is not None:
            lengths = self.b_lengths[first:last]
            ids[ranges(ends + 1, lengths)] = self.corpus.ids[ranges(self.b_starts[first:last], lengths)]
            ids[ends + lengths + 1] = sep_id
        return ids


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenation of arange(start, start + length) over all pairs of the two."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
