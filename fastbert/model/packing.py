"""Padded batches <-> packed rows: padding is taken out once at the model's boundary and put back once at its end."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packing:
    """Where the rows of a packed batch (total, ...) come from, and what their sequences are.

    cu_seqlens: (num_sequences + 1,) int32, the running sum of the sequence lengths; max_seqlen: the longest one.
    shape: (batch, length) of the tensors that the caller passed and gets back. indices: (total,) int64, the flat position of
    each row in that shape, or None where nothing was padding and rows and positions are the same.
    seed: (1,) int64, from which every dropout mask of this forward pass is drawn, or None.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    shape: tuple[int, int]
    indices: Tensor | None = None
    seed: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Packing:
        """The real tokens of a padded batch: those where ``mask`` (batch, length) is not 0; all of them where it is None."""
        batch, length = shape
        if mask is not None:
            mask = mask != 0
            lengths = mask.sum(1, dtype=torch.int32)
            indices = mask.flatten().nonzero().squeeze(1)
            if indices.numel() != batch * length:
                cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
                return cls(cu_seqlens, int(lengths.max()) if batch else 0, shape, indices)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return cls(cu_seqlens, length, shape)

    def unpad(self, x: Tensor) -> Tensor:
        """(batch, length, ...) -> (total, ...)."""
        flat = x.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def pad(self, x: Tensor) -> Tensor:
        """(total, ...) -> (batch, length, ...), with zeros where there was padding."""
        if self.indices is not None:
            positions = self.shape[0] * self.shape[1]
            x = x.new_zeros(positions, *x.shape[1:]).index_copy(0, self.indices, x)
        return x.view(*self.shape, *x.shape[1:])

    def first_positions(self, x: Tensor) -> Tensor:
        """(total, ...) -> (num_sequences, ...): what stands at each sequence's first position, the [CLS] that BERT pools.

        Of a padded batch it is column 0, as in transformers, hence 0 where that column is padding.
        """
        rows = self.cu_seqlens[:-1]
        if self.indices is None or x.shape[0] == 0:
            return x.index_select(0, rows) if x.shape[0] else x.new_zeros(self.num_sequences, *x.shape[1:])
        rows = rows.clamp(max=x.shape[0] - 1)
        columns = torch.arange(self.shape[0], device=rows.device) * self.shape[1]
        return x.index_select(0, rows) * (self.indices[rows] == columns).unsqueeze(-1)

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    # A layer that cannot run packed gets one sequence per row, (num_sequences, max_seqlen, ...), whatever the caller's layout.

    def to_sequences(self, x: Tensor) -> Tensor:
        """(total, ...) -> (num_sequences, max_seqlen, ...), zeros after each sequence's end."""
        padded = x.new_zeros(self.num_sequences * self.max_seqlen, *x.shape[1:]).index_copy(0, self._sequence_rows, x)
        return padded.view(self.num_sequences, self.max_seqlen, *x.shape[1:])

    def from_sequences(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`to_sequences`."""
        return x.flatten(0, 1).index_select(0, self._sequence_rows)

    @functools.cached_property
    def sequence_mask(self) -> Tensor:
        """(num_sequences, 1, 1, max_seqlen) bool, True on real tokens: the mask that transformers' sdpa attention takes."""
        positions = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return (positions < self.cu_seqlens.diff().unsqueeze(1))[:, None, None, :]

    @functools.cached_property
    def _sequence_rows(self) -> Tensor:
        starts = self.cu_seqlens[:-1].long()
        sequences = torch.arange(self.num_sequences, device=starts.device)
        owner = torch.repeat_interleave(sequences, self.cu_seqlens.diff().long())
        positions = torch.arange(owner.numel(), device=starts.device) - starts[owner]
        return owner * self.max_seqlen + positions
