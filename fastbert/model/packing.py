"""Padded batches <-> packed rows: padding is taken out once at the model's boundary and put back once at its end."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import native
from ..ops.native.inference import are_readable_ids, read_mask
from ..ops.registration import dispatch_mode_is_on


class InHalf(NamedTuple):
    """The parameters of a layer's matmuls as autocast has them, and what they were made of: where it was, and its versions."""

    tensors: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    made_of: list[tuple[int, int]]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> InHalf:
        return cls(tuple(tensors), tuple(sources), [(source.data_ptr(), source._version) for source in sources])


def begins_with_padding(mask: Tensor | None) -> bool:
    """Whether a sequence of a padding mask (batch, length) has tokens, of which none stands in the first column.

    transformers pools that column all the same: there the padding token has looked at the others, of which packed rows know
    nothing. Waits for a GPU.
    """
    if mask is None or mask.dim() != 2 or mask.shape[1] == 0:
        return False
    first = mask[:, 0] != 0
    return not first.all() and bool((~first & (mask != 0).any(1)).any())


class Packing:
    """Where the rows of a packed batch (total, ...) come from, and what their sequences are.

    cu_seqlens: (num_sequences + 1,) int32, the running sum of the sequence lengths; max_seqlen: the longest one.
    shape: (batch, length) of the tensors that the caller passed and gets back. indices: (total,) int64, the flat position of
    each row in that shape, or None where nothing was padding and rows and positions are the same.

    No dataclass: torch's sharding takes those apart to cast the tensors in them, and gives each layer another copy.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, shape: tuple[int, int], indices: Tensor | None = None) -> None:
        self.cu_seqlens, self.max_seqlen, self.shape, self.indices = cu_seqlens, max_seqlen, shape, indices
        self.layer_index: int | None = None
        self._seeds: list[Tensor] = []  # the one, once it is drawn
        self._dropout_p: dict[int, float] = {}
        self._padding_mask: Tensor | None = None
        self.in_half: dict[Any, InHalf] = {}
        self._rows: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Packing:
        """The real tokens of a padded batch: those where ``mask`` (batch, length) is not 0; all of them where it is None."""
        batch, length = shape
        natively = mask is not None and native.AVAILABLE and not (torch.compiler.is_compiling() or dispatch_mode_is_on())
        if natively and are_readable_ids(mask):
            cu_seqlens, longest, indices = read_mask(mask)
            return cls(cu_seqlens, longest, shape, None if indices.numel() == batch * length else indices)
        if mask is not None and not (mask.device.type == "cpu" and mask.all()):
            mask = mask != 0
            lengths = mask.sum(1, dtype=torch.int32)
            indices = mask.flatten().nonzero().squeeze(1)
            if indices.numel() != batch * length:
                cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
                return cls(cu_seqlens, int(lengths.max()) if batch else 0, shape, indices)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return cls(cu_seqlens, length, shape)

    @classmethod
    def from_positions(cls, position_ids: Tensor, shape: tuple[int, int]) -> Packing | None:
        """The sequences of one row whose ``position_ids`` (1, length) say where each starts; None where they say nothing.

        A packed row's positions begin somewhere (0 in BERT, after the padding token's id in RoBERTa), rise by one, and begin again
        there at least once: what transformers' DataCollatorWithFlattening makes. Positions that never rise are those of one
        sequence. Looking waits for a GPU. Compiled code cannot know the number of sequences: there such a row is an error when it
        runs.
        """
        batch, length = shape
        if batch != 1 or length < 2 or position_ids.shape != shape:
            return None
        positions = position_ids[0]
        starts = positions == positions[0]
        rises = positions[1:] == positions[:-1] + 1
        starts = starts & (starts[1:] | rises).all() & rises.any()
        if torch.compiler.is_compiling():
            message = "position_ids start again within the row: compiled code needs cu_seq_lens_q and max_length_q, too"
            torch._assert_async(~starts[1:].any(), message)
            return None
        starts = starts.nonzero().squeeze(1)
        if starts.numel() < 2:
            return None
        cu_seqlens = F.pad(starts.to(torch.int32), (0, 1), value=length)
        return cls(cu_seqlens, int(cu_seqlens.diff().max()), shape)

    def seed_for(self, dropout_p: float) -> Tensor | None:
        """(1,) int64, the one that every dropout mask of this forward pass is drawn from; None without dropout.

        Drawn when it is first asked for, because a dropout module may be active in a model that is not (Monte Carlo dropout),
        and kept, because recomputed layers must draw the same masks.
        """
        if dropout_p == 0.0:
            return None
        if not self._seeds:
            self._seeds.append(torch.randint(2**62, (1,), device=self.cu_seqlens.device))
        return self._seeds[0]

    def for_layer(self, index: int) -> Packing:
        """This packing for the layer that is called as number ``index``: copies of a layer, or one that is called twice, have one
        ``layer_idx``, and each call needs dropout masks of its own."""
        own = copy.copy(self)
        own.layer_index = index
        return own

    def dropout_of(self, p: float, stream: int) -> dict[str, Any]:
        """The arguments of an op with dropout: ``p`` as it was when this stream was first asked for, the seed, and the stream.

        A layer that is run again, when its model may be in another mode, must drop what it has dropped. What runs again of a
        compiled layer has p as a constant, and torch.compile lets a checkpointed layer change nothing outside of itself.
        """
        if not torch.compiler.is_compiling():
            p = self._dropout_p.setdefault(stream, p)
        return {"dropout_p": p, "seed": self.seed_for(p), "stream": stream}

    def take_in_half(self, layer: Any, dtype: torch.dtype | None) -> tuple[Tensor, ...] | None:
        """What :mod:`.in_half` made of the layer's parameters in this forward pass, once; None where it did not, or for another
        dtype, or where they have changed since."""
        made = self.in_half.pop(layer, None)
        if made is None or made.tensors[0].dtype != dtype:
            return None
        same = made.made_of == [(source.data_ptr(), source._version) for source in made.sources]
        return made.tensors if same else None

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

        0 of empty sequences. Others begin with a token: see :func:`begins_with_padding`.
        """
        if x.shape[0] == 0:
            return x.new_zeros(self.num_sequences, *x.shape[1:])
        if self.indices is None and self._is_batch:
            return x[:: self.shape[1]]
        rows, exists = self.first_rows(x.shape[0])
        first = x.index_select(0, rows)
        return first if exists is None else first.masked_fill(~exists.unsqueeze(-1), 0.0)

    def first_rows(self, total: int) -> tuple[Tensor, Tensor | None]:
        """(num_sequences,) each: the row of ``total`` > 0 at each first position, and whether there is one (None: everywhere)."""
        rows = self.cu_seqlens[:-1]
        if self.indices is None and self._is_batch:
            return rows, None
        return rows.clamp(max=total - 1), self.cu_seqlens.diff() > 0

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    # What cannot run packed gets padded rows, one sequence each: the caller's own layout, or, of a packed row, one made for it.

    @property
    def padded_shape(self) -> tuple[int, int]:
        """(batch, length) of :meth:`to_sequences`."""
        return self.shape if self._is_batch else (self.num_sequences, self.max_seqlen)

    @property
    def _is_batch(self) -> bool:
        return self.shape[0] == self.num_sequences

    def to_sequences(self, x: Tensor) -> Tensor:
        """(total, ...) -> (*padded_shape, ...), zeros where there is no token."""
        if self._is_batch:
            return self.pad(x)
        padded = x.new_zeros(self.num_sequences * self.max_seqlen, *x.shape[1:]).index_copy(0, self._sequence_rows, x)
        return padded.view(*self.padded_shape, *x.shape[1:])

    def from_sequences(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`to_sequences`."""
        return self.unpad(x) if self._is_batch else x.flatten(0, 1).index_select(0, self._sequence_rows)

    # Not functools.cached_property: before Python 3.12 it takes a lock, which torch.compile cannot trace.

    @property
    def padding_mask(self) -> Tensor:
        """padded_shape int64, 1 on real tokens: the attention_mask of transformers' models."""
        if self._padding_mask is None:
            total = self.shape[0] * self.shape[1] if self.indices is None else self.indices.numel()
            mask = self.to_sequences(torch.ones(total, dtype=torch.int64, device=self.cu_seqlens.device))
            if torch.compiler.is_compiling():  # a checkpointed layer may change nothing outside of itself then
                return mask
            self._padding_mask = mask
        return self._padding_mask

    @property
    def _sequence_rows(self) -> Tensor:
        """(total,) int64, where each token of a packed row stands in its padded, flattened form."""
        if self._rows is None:
            starts = self.cu_seqlens[:-1].long()
            sequences = torch.arange(self.num_sequences, device=starts.device)
            owner = torch.repeat_interleave(sequences, self.cu_seqlens.diff().long(), output_size=self.shape[1])
            rows = owner * self.max_seqlen + torch.arange(owner.numel(), device=starts.device) - starts[owner]
            if torch.compiler.is_compiling():
                return rows
            self._rows = rows
        return self._rows
