"""Which rows a head reads, so that the encoder's last layer goes on with those alone: labelled ones, the first of each sequence.

Behind the last attention every row is on its own: output projection, LayerNorms and feed-forward network, 9 of the 12 hidden^2
matmuls of a layer, of a row that nobody reads add nothing to the loss, and nothing to any gradient; nor does its query, a tenth
matmul and most of attention, which CPUs leave out too (``ops.attention_of_rows``). Dropout behind attention draws by the position
among the rows that are computed: other masks than those of a call that computes all rows, as random as they.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.mlm_loss import IGNORE_INDEX
from .layer import int8_parts, layer_notes
from .packing import Packing
from .plain import is_plain, lends_parameters

# Gathering rows and scattering their gradients costs a few passes over them: not worth it for the last few rows.
_LARGEST_SHARE = 0.9
# A layer that nobody trains runs in one call on packed weights on a CPU, which is faster than its ops one by one on some rows where
# fewer than these are left out.
_FEWEST_LEFT_OUT = 256


class RowSelection:
    """The labelled rows of a packed batch, and with ``first`` the first row of every sequence, for the pooler, behind them.

    total: the batch's rows. labels: (batch, length), ``IGNORE_INDEX`` where there is none; None where no row has one.
    labelled_rows: (cap,) int64, where the caller knows them: every labelled row once, in rising order, and behind them filler, rows
    without a label, so that their number is the same in every batch. The filler is computed behind all others, whose dropout masks
    are then those of a call without it.

    A first row that has a label, too, is there twice, because how often that happens cannot be known without waiting for a GPU;
    both readers take the first of the two, the other one is computed for nothing. Finding the labelled rows, where nobody names
    them, is the one thing here that waits.

    No dataclass, for the reason that :class:`Packing` is none.
    """

    def __init__(
        self, packing: Packing, total: int, labels: Tensor | None, *, first: bool, labelled_rows: Tensor | None = None
    ) -> None:
        self.packing, self.total = packing, total
        self._places = None  # of ``labelled`` in ``rows``, where they are not the first ones
        self._names_all = False  # whether ``labelled`` are all rows, in their order
        if labels is None:
            self._first, self._exists = packing.first_rows(total)
            self.labelled = self.labels = self._first[:0]
            self.rows, self._places_of_first = self._first, torch.arange(self._first.numel(), device=self._first.device)
            return
        row_labels = packing.unpad(labels)
        is_labelled = row_labels != IGNORE_INDEX
        self.labelled = is_labelled.nonzero().squeeze(1) if labelled_rows is None else labelled_rows
        self._names_all = labelled_rows is None and self.labelled.numel() == total
        self.labels = row_labels.index_select(0, self.labelled)
        self._first, self._exists = packing.first_rows(total) if first else (self.labelled[:0], None)
        count = self.labelled.numel()
        if labelled_rows is None or not first:
            self.rows = torch.cat([self.labelled, self._first])
        else:
            filled = torch.arange(count, device=self.labelled.device)
            count = (self.labels != IGNORE_INDEX).sum()
            self._places = torch.where(filled < count, filled, filled + self._first.numel())
            self.rows = self.labelled.new_empty(self.labelled.numel() + self._first.numel())
            self.rows.index_copy_(0, self._places, self.labelled)
        places = count + torch.arange(self._first.numel(), device=self.labelled.device)
        if self._places is not None:
            self.rows.index_copy_(0, places, self._first.long())
        ranks = is_labelled.cumsum(0) - 1
        self._places_of_first = torch.where(is_labelled[self._first], ranks[self._first], places)

    def is_worth_it(self, trained: bool) -> bool:
        """trained: whether the last layer has gradients or dropout in this call."""
        return few_are_worth_it(self.rows.numel(), self.total, trained)

    def labelled_of(self, x: Tensor) -> Tensor:
        """(len(rows), ...) -> (len(labelled), ...): what was computed for the rows of ``labels``."""
        return x[: self.labelled.numel()] if self._places is None else x.index_select(0, self._places)

    def labelled_among_all(self, x: Tensor) -> Tensor:
        """(total, ...) -> (len(labelled), ...): the rows of ``labels``, where all rows were computed."""
        return x if self._names_all else x.index_select(0, self.labelled)

    def first_positions(self, x: Tensor) -> Tensor:
        """(len(rows), ...) -> (num_sequences, ...): :meth:`Packing.first_positions` of what was computed for ``rows``."""
        first = x.index_select(0, self._places_of_first)
        return first if self._exists is None else first.masked_fill(~self._exists.unsqueeze(-1), 0.0)

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """(order, places): every row's index, ``rows`` before the others, and where in ``order`` each row stands.

        Dropout draws by the position among the rows that a layer goes on with: in this order ``rows`` get the masks that they
        had alone.
        """
        places = torch.full((self.total,), -1, device=self.rows.device)
        labelled = torch.arange(self.labelled.numel(), device=self.rows.device) if self._places is None else self._places
        # Filler may be any row without a label: a row that is in ``rows`` once more has its other place.
        places[self.labelled] = labelled
        first, places_of_first = self._first, self._places_of_first
        if self._exists is not None:  # an empty sequence stands for a row of its neighbour, whose own place counts
            first, places_of_first = first[self._exists], places_of_first[self._exists]
        places[first] = places_of_first
        others = (places < 0).nonzero().squeeze(1)
        order = torch.cat([self.rows, others])
        places[others] = torch.arange(self.rows.numel(), order.numel(), device=order.device)
        return order, places


def few_are_worth_it(rows: int, total: int, trained: bool) -> bool:
    """Whether a last layer, ``trained`` or not, should compute so few rows of ``total``."""
    enough = trained or total - rows >= _FEWEST_LEFT_OUT
    return enough and 0 < rows <= _LARGEST_SHARE * total


class SelectedRows:
    """The rows of a selection as the last layer makes them, now, and all rows when somebody asks for them.

    last_layer: index (n,) -> rows (n, hidden).
    """

    def __init__(self, selection: RowSelection, last_layer: Callable[[Tensor], Tensor]) -> None:
        self.selection, self._last_layer = selection, last_layer
        self.rows = last_layer(selection.rows)
        self._all: Tensor | None = None

    def all(self) -> Tensor:
        """(total, hidden)."""
        if self._all is None:
            order, places = self.selection.all_rows()
            self._all = self._last_layer(order).index_select(0, places)
        return self._all


def all_rows_reasons(encoder: nn.Module, hidden_states_wanted: bool = False) -> list[str]:
    """Why the last layer of a packed encoder goes on with all rows, whoever reads them; empty where it need not.

    What is called as a module (LoRA's Linear, say) may not do the same again, should somebody read the other rows after all.
    """
    if hidden_states_wanted:
        return ["output_hidden_states asks for them"]
    layers = encoder.encoder.layer
    if not len(layers):
        return ["there is none"]
    reasons = layer_notes(layers[-1])
    if lends_parameters(layers[-1]):
        reasons.append("its parameters are those of this call alone (torch.func.functional_call)")
    if int8_parts(layers[-1]):
        reasons.append("it multiplies int8, which is for inference")
    if layers[-1]._compiled_call_impl is not None:
        reasons.append("it is compiled, and compiled code cannot know how many rows are read")
    if not reads_first_rows(encoder):
        reasons.append("the pooler is not transformers', or has hooks, and gets all rows")
    return reasons


def reads_first_rows(encoder: nn.Module) -> bool:
    """Whether the pooler, where there is one, reads the first row of each sequence and no others, as transformers' does.

    Of another one nobody knows, nor what a hook looks at.
    """
    pooler = getattr(encoder, "pooler", None)
    theirs = type(pooler).__module__ == encoder.embeddings_class.__module__
    return pooler is None or (theirs and is_plain(pooler))
