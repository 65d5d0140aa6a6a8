"""Padded batches <-> packed rows: padding is taken out once at the model's boundary and put back once at its end."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Packing:
    """Where the rows of a packed batch (total, ...) come from, and what their sequences are.

    cu_seqlens: (num_sequences + 1,) int32, the running sum of the sequence lengths; max_seqlen: the longest one.
    shape: (batch, length) of the tensors that the caller passed and gets back. indices: (total,) int64, the flat position of
    each row in that shape, or None where nothing was padding and rows and positions are the same.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    shape: tuple[int, int]
    indices: Tensor | None = None
    _seed: Tensor | None = field(default=None, init=False, repr=False)

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

    def seed_for(self, dropout_p: float) -> Tensor | None:
        """(1,) int64, the one that every dropout mask of this forward pass is drawn from; None without dropout.

        Drawn when it is first asked for, because a dropout module may be active in a model that is not (Monte Carlo dropout),
        and kept, because recomputed layers must draw the same masks.
        """
        if dropout_p == 0.0:
            return None
        if self._seed is None:
            self._seed = torch.randint(2**62, (1,), device=self.cu_seqlens.device)
        return self._seed

    @property
    def default_positions(self) -> Tensor:
        """The positions of tokens whose caller names none, (1, length): columns, in a packed row counted from each start."""
        length, device = self.shape[1], self.cu_seqlens.device
        columns = torch.arange(length, device=device).unsqueeze(0)
        if self.shape[0] == self.num_sequences:
            return columns
        starts = self.cu_seqlens[:-1].long().repeat_interleave(self.cu_seqlens.diff().long(), output_size=length)
        return columns - starts

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
