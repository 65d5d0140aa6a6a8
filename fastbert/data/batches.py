"""Packed batches under a token budget: sequences stand one behind the other, without padding, with their boundaries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from fastbert.data.blocks import BLOCK_TOKENS, CorpusBlocks
from fastbert.data.masking import IGNORE_INDEX, mask_options, mask_tokens, most_labels
from fastbert.data.packing import pack
from fastbert.data.pairs import make_pairs
from fastbert.data.passages import fill_gaps, make_passages
from fastbert.data.sequences import SHORTEST_SEQUENCE, Sequences
from fastbert.data.streams import LARGEST_SEED, Stream, generator
from fastbert.data.tokens import TokenizedCorpus

OBJECTIVES = ("mlm-nsp", "mlm")
_LABELS_MULTIPLE = 8  # matmuls of bfloat16 on a GPU want their rows in eights


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences [CLS] A [SEP] B [SEP] without padding; ``total`` is the number of their tokens, ``batch`` of sequences.

    input_ids, token_type_ids (0 up to A's [SEP], then 1), position_ids (from 0 in every sequence) and labels (-100 where
    nothing is predicted): (total,) int64; cu_seqlens: (batch + 1,) int32 from 0 to total; max_seqlen: the longest
    sequence, or more; next_sentence_label: (batch,) int64, 0 where B follows A; None where sequences are [CLS] A [SEP].
    labelled_rows: None, or (cap,) int64: the tokens with a label in rising order, and behind them, if it is longer than that, one
    without a label again and again.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    next_sentence_label: Tensor | None = None
    labelled_rows: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=non_blocking)
        return PackedBatch(**values)

    def with_labelled_rows(self) -> PackedBatch:
        """The batch with its ``labelled_rows``, those alone, so that no model has to wait for a GPU to find them."""
        return replace(self, labelled_rows=_labelled_rows(self.labels))

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a fastbert model: the packed tokens as one row (1, total) with the sequences' boundaries."""
        return {
            "input_ids": self.input_ids.unsqueeze(0),
            "token_type_ids": self.token_type_ids.unsqueeze(0),
            "position_ids": self.position_ids.unsqueeze(0),
            "labels": self.labels.unsqueeze(0),
            **self._sequence_labels(),
            **({} if self.labelled_rows is None else {"labelled_rows": self.labelled_rows}),
            **boundary_arguments(self.cu_seqlens, self.max_seqlen),
        }

    def padded(self, pad_id: int) -> dict[str, Tensor]:
        """Keyword arguments of a transformers model: (batch, max_seqlen) tensors, next_sentence_label (batch,).

        Padding is ``pad_id`` in input_ids, 0 in attention_mask and token_type_ids, -100 in labels.
        """
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        rows = torch.repeat_interleave(torch.arange(self.num_sequences, device=starts.device), lengths)
        columns = torch.arange(self.num_tokens, device=starts.device) - starts[rows]

        def pad(values: Tensor, fill: int) -> Tensor:
            padded = values.new_full((self.num_sequences, self.max_seqlen), fill)
            padded[rows, columns] = values
            return padded

        return {
            "input_ids": pad(self.input_ids, pad_id),
            "attention_mask": pad(torch.ones_like(self.input_ids), 0),
            "token_type_ids": pad(self.token_type_ids, 0),
            "labels": pad(self.labels, IGNORE_INDEX),
            **self._sequence_labels(),
        }

    def with_shape(
        self, num_tokens: int, num_sequences: int, *, max_seqlen: int, pad_id: int, num_labels: int | None = None
    ) -> PackedBatch:
        """The batch with padding in sequences of its own behind the others, so that it has exactly that many tokens and sequences.

        Every label of the padding is -100: loss and gradients are those of this batch. Where there are more sequences to add than
        tokens for them, they are empty. ``num_labels``: the length of ``labelled_rows``. A CUDA graph, which is recorded once for
        one shape, can then be used for all batches.

        Raises ValueError where the batch is larger than that, or the padding needs more sequences of ``max_seqlen`` tokens, and
        where more than ``num_labels`` tokens have a label, or none is without.
        """
        tokens, sequences = num_tokens - self.num_tokens, num_sequences - self.num_sequences
        if not 0 <= tokens <= sequences * max_seqlen or sequences < 0 or max_seqlen < self.max_seqlen:
            raise ValueError(
                f"a batch of {self.num_tokens} tokens in {self.num_sequences} sequences of at most {self.max_seqlen} cannot be "
                f"filled up to {num_tokens} tokens in {num_sequences} sequences of at most {max_seqlen}"
            )
        next_sentence_label = self.next_sentence_label
        if next_sentence_label is not None:
            next_sentence_label = F.pad(next_sentence_label, (0, sequences), value=IGNORE_INDEX)
        labels = F.pad(self.labels, (0, tokens), value=IGNORE_INDEX)
        ends = self.num_tokens + max_seqlen * torch.arange(1, sequences + 1, dtype=torch.int32)
        return PackedBatch(
            input_ids=F.pad(self.input_ids, (0, tokens), value=pad_id),
            token_type_ids=F.pad(self.token_type_ids, (0, tokens)),
            position_ids=torch.cat([self.position_ids, torch.arange(tokens) % max_seqlen]),
            labels=labels,
            cu_seqlens=torch.cat([self.cu_seqlens, ends.clamp(max=num_tokens)]),
            max_seqlen=max_seqlen,
            next_sentence_label=next_sentence_label,
            labelled_rows=None if num_labels is None else _labelled_rows(labels, num_labels),
        )

    def _sequence_labels(self) -> dict[str, Tensor]:
        return {} if self.next_sentence_label is None else {"next_sentence_label": self.next_sentence_label}


def _labelled_rows(labels: Tensor, cap: int | None = None) -> Tensor:
    """(cap,), or without filler (n,): see :class:`PackedBatch`."""
    is_labelled = labels != IGNORE_INDEX
    rows = is_labelled.nonzero().squeeze(1)
    if cap is None or len(rows) == cap:
        return rows
    if len(rows) > cap or len(rows) == len(labels):
        raise ValueError(
            f"{len(rows)} of {len(labels)} tokens have a label, which cannot be filled up to {cap} with one that has none"
        )
    return F.pad(rows, (0, cap - len(rows)), value=int((~is_labelled).nonzero()[0]))


def boundary_arguments(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    """How transformers' and fastbert's models are told where the sequences of a packed row are; in self-attention k is q."""
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": max_seqlen, "max_length_k": max_seqlen}


def positions_within(cu_seqlens: NDArray[np.integer]) -> NDArray[np.int64]:
    """(total,): each token's position, counted from 0 in its own sequence."""
    return np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))


@dataclass(frozen=True, eq=False)
class _Plan:
    """The sequences of a block in training order; batch i holds sequences[bounds[i] : bounds[i + 1]]."""

    sequences: Sequences
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1


class PretrainingBatches:
    """The batches of a run: in every epoch new pairs, in a new order, under new masks.

    ``corpus``: one tokenized corpus, or a sequence of them (the shards of a prepared one). An epoch goes through all shards, a
    block of at most ``block_tokens`` at a time (:class:`fastbert.data.blocks.CorpusBlocks`); pairs are made, shuffled and packed
    within a block, and each of them stands in exactly one batch. A batch has at most ``tokens_per_batch`` tokens; only a block's
    last one may be small.

    ``objective``: "mlm-nsp" (sentence pairs, :func:`fastbert.data.pairs.make_pairs`) or "mlm"
    (:func:`fastbert.data.passages.make_passages`, of which a few are divided to fill the gaps of the others' batches:
    :func:`fastbert.data.passages.fill_gaps`). ``static_pairs``: every epoch has the pairs of epoch 0. ``masking`` and
    ``mlm_probability``: :func:`fastbert.data.masking.mask_tokens`.

    A batch depends on these arguments and its place (epoch, block, number in the block) alone: it is the same whether or not those
    before it were made. The plan of one block is kept in memory.

    Raises ValueError where max_seq_length is below 8 or above the tokenizer's limit, tokens_per_batch below max_seq_length,
    the seed outside 0 .. 2**64 - 1, where the tokenizer does not tell the words that ``masking`` needs, or the corpus holds ids
    that the tokenizer does not have (of shards, the first is looked at here and the others when their turn comes); CorpusError for
    pairs of fewer than two documents.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus | Sequence[TokenizedCorpus],
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_seq_length: int,
        tokens_per_batch: int,
        seed: int,
        objective: str = "mlm-nsp",
        masking: str = "token",
        mlm_probability: float = 0.15,
        static_pairs: bool = False,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        if max_seq_length < SHORTEST_SEQUENCE:
            raise ValueError(f"max_seq_length must be at least {SHORTEST_SEQUENCE}, not {max_seq_length}")
        if max_seq_length > tokenizer.model_max_length:
            raise ValueError(
                f"max_seq_length {max_seq_length} is above the {tokenizer.model_max_length} tokens that the tokenizer "
                "allows (its model_max_length)"
            )
        if tokens_per_batch < max_seq_length:
            raise ValueError(
                f"tokens_per_batch {tokens_per_batch} is below max_seq_length {max_seq_length}: a batch must hold a whole sequence"
            )
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seed must lie between 0 and {LARGEST_SEED}, it is {seed}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective is {objective!r}, expected one of {', '.join(OBJECTIVES)}")
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.objective = objective
        self.blocks = CorpusBlocks(
            corpus,
            seed=seed,
            block_tokens=block_tokens,
            least_documents=2 if objective == "mlm-nsp" else 1,
            fixed=static_pairs,
        )
        self._mask_options = mask_options(tokenizer, masking, mlm_probability)
        # Three times as many sequences as there are likely to be: a batch of short ones is full before it has them.
        likely = min(max_seq_length, self.blocks.mean_document_tokens)
        self._max_sequences = math.ceil(3 * tokens_per_batch / likely)
        self._planned: tuple[int, int, _Plan] | None = None
        self._check_ids(corpus if isinstance(corpus, TokenizedCorpus) else corpus[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, sequences) that every batch can be filled up to: see :meth:`PackedBatch.with_shape`."""
        padding = math.ceil(self.tokens_per_batch / self.max_seq_length)
        return self.tokens_per_batch, self._max_sequences + padding

    @property
    def most_labels(self) -> int:
        """The labels that a batch has at most with masking "token", and hardly ever more of with the others."""
        options = self._mask_options
        labels = most_labels(
            self.tokens_per_batch,
            self._max_sequences,
            special_tokens=2 if self.objective == "mlm" else 3,
            probability=options["probability"],
            masking=options["masking"],
        )
        return min(self.tokens_per_batch, math.ceil(labels / _LABELS_MULTIPLE) * _LABELS_MULTIPLE)

    def filled(self, batch: PackedBatch) -> PackedBatch | None:
        """One of these batches in the one shape that all have then: :attr:`shape` and :attr:`most_labels`.

        None where it has more labels than that (masking "whole-word" or "span"), or no token without one.
        """
        labels = int((batch.labels != IGNORE_INDEX).sum())
        if labels > self.most_labels or labels == batch.num_tokens:
            return None
        return batch.with_shape(
            *self.shape, max_seqlen=self.max_seq_length, pad_id=self.tokenizer.pad_token_id, num_labels=self.most_labels
        )

    def num_blocks(self, epoch: int = 0) -> int:
        """Blocks in an epoch; it differs a little between epochs."""
        return self.blocks.count(epoch)

    def num_batches(self, epoch: int = 0) -> int:
        """Batches in an epoch, which is planned for it block by block; it differs a little between epochs."""
        return sum(self.num_batches_in_block(epoch, block) for block in range(self.num_blocks(epoch)))

    def num_batches_in_block(self, epoch: int, block: int) -> int:
        return len(self._plan(epoch, block))

    def fill(self, epoch: int = 0) -> float:
        """The share of the token budget that the epoch's batches use, each block's last one left out where there are more."""
        used = batches = 0
        for block in range(self.num_blocks(epoch)):
            plan = self._plan(epoch, block)
            tokens = np.diff(plan.sequences.offsets[plan.bounds])
            full = tokens[: max(1, len(tokens) - 1)]
            used, batches = used + int(full.sum()), batches + len(full)
        return used / (batches * self.tokens_per_batch)

    def batch(self, epoch: int, block: int, number: int) -> PackedBatch:
        """Batch ``number`` of a block of an epoch."""
        plan = self._plan(epoch, block)
        return self._batch(
            plan.sequences, *plan.bounds[number : number + 2].tolist(), generator(self.seed, Stream.MASKS, epoch, block, number)
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PackedBatch]:
        """The batches of an epoch, from number ``start`` on; blocks that are skipped are planned."""
        for block in range(self.num_blocks(epoch)):
            count = self.num_batches_in_block(epoch, block)
            for number in range(start, count):
                yield self.batch(epoch, block, number)
            start = max(0, start - count)

    def _plan(self, epoch: int, block: int) -> _Plan:
        """The plan of a block; the last one is kept."""
        if self._planned is None or self._planned[:2] != (epoch, block):
            self._planned = None  # or two blocks would be in memory
            corpus = self.blocks.load(epoch, block)
            self._check_ids(corpus)
            if self.objective == "mlm":
                sequences = make_passages(corpus, self.max_seq_length)
            else:
                rng = generator(self.seed, Stream.SEQUENCES, *self.blocks.place(epoch, block))
                sequences = make_pairs(corpus, self.max_seq_length, rng)
            shuffled = generator(self.seed, Stream.ORDER, epoch, block).permutation(len(sequences))
            order, bounds = pack(sequences.lengths[shuffled], self.tokens_per_batch, max_sequences=self._max_sequences)
            sequences = sequences.take(shuffled[order])
            if self.objective == "mlm":
                sequences, bounds = fill_gaps(
                    sequences,
                    bounds,
                    tokens_per_batch=self.tokens_per_batch,
                    max_seq_length=self.max_seq_length,
                    max_sequences=self._max_sequences,
                )
            self._planned = epoch, block, _Plan(sequences, bounds)
        return self._planned[2]

    def _check_ids(self, corpus: TokenizedCorpus) -> None:
        largest = int(corpus.ids.max(initial=0))
        if largest >= len(self.tokenizer):
            raise ValueError(
                f"the corpus holds token id {largest}, the tokenizer has {len(self.tokenizer)} tokens: "
                "the corpus was made with another tokenizer"
            )

    def _batch(self, sequences: Sequences, first: int, last: int, rng: np.random.Generator) -> PackedBatch:
        cls_id, sep_id = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        ids = sequences.assemble(first, last, cls_id=cls_id, sep_id=sep_id)
        cu_seqlens = sequences.offsets[first : last + 1] - sequences.offsets[first]
        lengths = np.diff(cu_seqlens)
        position_ids = positions_within(cu_seqlens)
        first_segment = np.repeat(sequences.a_lengths[first:last] + 2, lengths)
        special = (ids == cls_id) | (ids == sep_id)
        masked, labels = mask_tokens(ids, special, cu_seqlens=cu_seqlens, rng=rng, **self._mask_options)
        next_sentence = sequences.next_sentence_label
        return PackedBatch(
            input_ids=torch.from_numpy(masked),
            token_type_ids=torch.from_numpy((position_ids >= first_segment).astype(np.int64)),
            position_ids=torch.from_numpy(position_ids),
            labels=torch.from_numpy(labels),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=int(lengths.max()),
            next_sentence_label=None if next_sentence is None else torch.from_numpy(next_sentence[first:last].copy()),
        )
