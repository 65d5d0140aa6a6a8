"""Packed batches under a token budget: sequences stand one behind the other, without padding, with their boundaries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastbert.data.masking import IGNORE_INDEX, mask_tokens
from fastbert.data.pairs import SHORTEST_SEQUENCE, SentencePairs, make_pairs
from fastbert.data.tokens import TokenizedCorpus

_MASKS_STREAM = 1


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences [CLS] A [SEP] B [SEP] without padding; ``total`` is the number of their tokens, ``batch`` of sequences.

    input_ids, token_type_ids (0 up to A's [SEP], then 1), position_ids (from 0 in every sequence) and labels (-100 where
    nothing is predicted): (total,) int64; cu_seqlens: (batch + 1,) int32 from 0 to total; max_seqlen: the longest
    sequence; next_sentence_label: (batch,) int64, 0 where B follows A.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    next_sentence_label: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.next_sentence_label)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=non_blocking)
        return PackedBatch(**values)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a fastbert model: the packed tokens as one row (1, total) with the sequences' boundaries."""
        return {
            "input_ids": self.input_ids.unsqueeze(0),
            "token_type_ids": self.token_type_ids.unsqueeze(0),
            "position_ids": self.position_ids.unsqueeze(0),
            "labels": self.labels.unsqueeze(0),
            "next_sentence_label": self.next_sentence_label,
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
            "next_sentence_label": self.next_sentence_label,
        }


def boundary_arguments(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    """How transformers' and fastbert's models are told where the sequences of a packed row are; in self-attention k is q."""
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": max_seqlen, "max_length_k": max_seqlen}


def positions_within(cu_seqlens: NDArray[np.integer]) -> NDArray[np.int64]:
    """(total,): each token's position, counted from 0 in its own sequence."""
    return np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))


class PretrainingBatches:
    """The batches of a run: in every epoch new pairs, in a new order, under new masks.

    A batch takes sequences in the order of the epoch's pairs until the next one would exceed ``tokens_per_batch``. It
    depends on the corpus, the arguments and its number alone: batch k of ``steps()`` is the same whether or not the k
    before it were made. An epoch's last batch may be small.

    Raises ValueError where max_seq_length is below 8 or above the tokenizer's limit, tokens_per_batch below max_seq_length,
    the seed negative, or the corpus holds ids that the tokenizer does not have.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_seq_length: int,
        tokens_per_batch: int,
        seed: int,
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
        if seed < 0:
            raise ValueError(f"seed must not be negative, it is {seed}")
        largest = int(corpus.ids.max(initial=0))
        if largest >= len(tokenizer):
            raise ValueError(
                f"the corpus holds token id {largest}, the tokenizer has {len(tokenizer)} tokens: "
                "the corpus was made with another tokenizer"
            )
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self._vocab_size = len(tokenizer)
        self._special_ids = list(tokenizer.all_special_ids)
        self._planned: tuple[int, SentencePairs, NDArray[np.int64]] | None = None

    def num_batches(self, epoch: int = 0) -> int:
        """Batches in an epoch; it differs a little between epochs."""
        return len(self._plan(epoch)[1]) - 1

    def fill(self, epoch: int = 0) -> float:
        """The share of the token budget that the epoch's batches use, the last one left out where there are more."""
        pairs, bounds = self._plan(epoch)
        tokens = np.diff(pairs.offsets[bounds])
        return float(tokens[: max(1, len(tokens) - 1)].mean() / self.tokens_per_batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PackedBatch]:
        """The batches of an epoch, from number ``start`` on."""
        pairs, bounds = self._plan(epoch)
        for index in range(start, len(bounds) - 1):
            yield self._batch(pairs, int(bounds[index]), int(bounds[index + 1]), epoch, index)

    def steps(self, start_step: int = 0) -> Iterator[PackedBatch]:
        """Endless batches, epoch after epoch, from number ``start_step`` on; skipped epochs are planned but not made."""
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, it is {start_step}")
        epoch, skipped = 0, start_step
        while skipped >= self.num_batches(epoch):
            skipped -= self.num_batches(epoch)
            epoch += 1
        while True:
            yield from self.epoch(epoch, skipped)
            epoch, skipped = epoch + 1, 0

    def _plan(self, epoch: int) -> tuple[SentencePairs, NDArray[np.int64]]:
        """The epoch's pairs and the bounds (num_batches + 1,) of its batches among them; the last plan is kept."""
        if self._planned is None or self._planned[0] != epoch:
            pairs = make_pairs(
                self.corpus,
                self.max_seq_length,
                seed=self.seed,
                epoch=epoch,
                cls_id=self.tokenizer.cls_token_id,
                sep_id=self.tokenizer.sep_token_id,
            )
            bounds = [0]
            while bounds[-1] < len(pairs):
                limit = pairs.offsets[bounds[-1]] + self.tokens_per_batch
                bounds.append(int(np.searchsorted(pairs.offsets, limit, side="right")) - 1)
            self._planned = epoch, pairs, np.asarray(bounds)
        return self._planned[1:]

    def _batch(self, pairs: SentencePairs, first: int, last: int, epoch: int, index: int) -> PackedBatch:
        ids = pairs.assemble(first, last)
        cu_seqlens = pairs.offsets[first : last + 1] - pairs.offsets[first]
        lengths = np.diff(cu_seqlens)
        position_ids = positions_within(cu_seqlens)
        first_segment = np.repeat(pairs.segment_a_lengths[first:last] + 2, lengths)
        masked, labels = mask_tokens(
            ids,
            (ids == pairs.cls_id) | (ids == pairs.sep_id),
            cu_seqlens=cu_seqlens,
            rng=np.random.default_rng([self.seed, epoch, _MASKS_STREAM, index]),
            vocab_size=self._vocab_size,
            mask_id=self.tokenizer.mask_token_id,
            special_ids=self._special_ids,
        )
        return PackedBatch(
            input_ids=torch.from_numpy(masked),
            token_type_ids=torch.from_numpy((position_ids >= first_segment).astype(np.int64)),
            position_ids=torch.from_numpy(position_ids),
            labels=torch.from_numpy(labels),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=int(lengths.max()),
            next_sentence_label=torch.from_numpy(pairs.next_sentence_label[first:last].copy()),
        )


def held_out_batches(
    corpus: TokenizedCorpus,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_seq_length: int,
    tokens_per_batch: int,
    seed: int,
    max_batches: int | None = None,
) -> list[PackedBatch]:
    """A fixed set of batches for evaluation: the first ``max_batches`` (all for None) of epoch 0, pairs and masks included.

    Raises as PretrainingBatches does.
    """
    batches = PretrainingBatches(corpus, tokenizer, max_seq_length=max_seq_length, tokens_per_batch=tokens_per_batch, seed=seed)
    return list(islice(batches.epoch(0), max_batches))
