"""Batches for Trainer (or any DataLoader) without padding: all sequences in one row, with their boundaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fastbert.data.batches import boundary_arguments, positions_within
from fastbert.data.masking import mask_tokens

_LABELS = ("labels", "label", "label_ids")
_TOKENS = ("input_ids", "token_type_ids", "attention_mask", "special_tokens_mask")
_SPANS = ("start_positions", "end_positions")
_KNOWN = (*_TOKENS, *_LABELS, *_SPANS, "next_sentence_label")

Columns = dict[str, list[NDArray]]


class DataCollatorWithPacking:
    """Makes one row of the features of n texts, for a fastbert model, where DataCollatorWithPadding would make n rows.

    A feature maps input_ids and, if wanted, token_type_ids, attention_mask (tokens where it is 0 are left out), labels (or label,
    or label_ids), start_positions and end_positions, next_sentence_label to lists, arrays or tensors. The batch:

    - input_ids, token_type_ids: (1, total) int64; position_ids: the same, from ``position_ids_start`` in every sequence (2 for
      RoBERTa and its relatives, which count from their padding token's id + 1);
    - cu_seq_lens_q, cu_seq_lens_k: (n + 1,) int32, from 0 to total; max_length_q, max_length_k: int, the longest sequence;
    - labels: (1, total) int64 where a feature has a list of int, one per token; else (n,) int64 or float32, or, where it has a
      list of float (multi-label), (n, k) float32;
    - start_positions, end_positions (within each sequence), next_sentence_label: (n,) int64.

    With ``mlm_probability`` that share of each sequence is masked as in pretraining (:func:`fastbert.data.masking.mask_tokens`) and
    labels are made. The tokenizer's special tokens, or those of special_tokens_mask, are never chosen. Masks are drawn from torch's
    default generator; as with transformers' DataCollatorForLanguageModeling, a run that was resumed draws others.

    With transformers' Trainer, predictions and labels of sequences (classification, regression, next sentence) come out as with
    padding. Those of tokens come out as one row per batch, (batches, longest row, ...), with -100 behind shorter rows: metrics of
    tokens are right, but evaluate with a padding collator where a metric must tell sequences apart (entities, answers), or where
    several processes evaluate: the sequences that fill up their last batches then count twice. An IterableDataset needs
    ``accelerator_config={"dispatch_batches": False}``: dispatching slices all tensors by their first dimension, as
    torch.nn.DataParallel does (both end in an error; DistributedDataParallel is fine). Labels of a causal language model must be
    -100 at the first token of each sequence, which is no target, or Trainer counts it: transformers' DataCollatorWithFlattening
    does that.

    Raises ValueError for features that do not fit each other or themselves.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        mlm_probability: float | None = None,
        position_ids_start: int = 0,
    ) -> None:
        if mlm_probability is not None:
            if tokenizer is None or tokenizer.mask_token_id is None:
                raise ValueError("mlm_probability needs a tokenizer that has a mask token")
            if not 0.0 < mlm_probability <= 1.0:
                raise ValueError(f"mlm_probability must be above 0 and at most 1, not {mlm_probability}")
        self.tokenizer = tokenizer
        self.mlm_probability = mlm_probability
        self.position_ids_start = position_ids_start

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The packed row of ``features``; see the class."""
        columns = _columns(features)
        label_key = next((key for key in _LABELS if key in columns), None)
        if label_key is not None and self.mlm_probability is not None:
            raise ValueError(f"features have {label_key}, but mlm_probability asks for labels of the masked language model")
        per_token = {key for key in _TOKENS if key in columns}
        if label_key is not None and columns[label_key][0].ndim and columns[label_key][0].dtype.kind != "f":
            per_token.add(label_key)
        _check_lengths(columns, per_token)

        masks = columns.pop("attention_mask", None)
        real = [mask != 0 for mask in masks] if masks else [np.ones(len(ids), bool) for ids in columns["input_ids"]]
        cu_seqlens = np.cumsum([0, *(mask.sum() for mask in real)])
        rows, others = {}, {}
        for key, values in columns.items():
            name = "labels" if key == label_key else key
            if key in per_token:
                rows[name] = np.concatenate([x[mask] for x, mask in zip(values, real, strict=True)]).astype(np.int64)
            elif key in _SPANS:
                others[name] = np.array([_among_real(int(x), mask) for x, mask in zip(values, real, strict=True)])
            else:
                stacked = np.stack(values)
                others[name] = stacked.astype(np.float32 if stacked.dtype.kind == "f" else np.int64)
        special = rows.pop("special_tokens_mask", None)
        if self.mlm_probability is not None:
            rows["input_ids"], rows["labels"] = self._masked(rows["input_ids"], special, cu_seqlens)
        rows["position_ids"] = positions_within(cu_seqlens) + self.position_ids_start
        return {
            **{name: torch.from_numpy(row).unsqueeze(0) for name, row in rows.items()},
            **{name: torch.from_numpy(values) for name, values in others.items()},
            **boundary_arguments(torch.from_numpy(cu_seqlens.astype(np.int32)), int(np.diff(cu_seqlens).max())),
        }

    def _masked(self, ids: NDArray, special: NDArray | None, cu_seqlens: NDArray) -> tuple[NDArray, NDArray]:
        """(ids, labels) of the masked language model, each (total,)."""
        special_ids = self.tokenizer.all_special_ids
        return mask_tokens(
            ids,
            np.isin(ids, special_ids) if special is None else special != 0,
            cu_seqlens=cu_seqlens,
            rng=np.random.default_rng(int(torch.randint(2**62, ()))),
            vocab_size=len(self.tokenizer),
            mask_id=self.tokenizer.mask_token_id,
            special_ids=special_ids,
            probability=self.mlm_probability,
        )


def _columns(features: Sequence[Mapping[str, Any]]) -> Columns:
    """One list of arrays, as long as ``features``, for each of their keys; what is None is not there."""
    if not features:
        raise ValueError("there are no features to pack")
    present = [{key: value for key, value in feature.items() if value is not None} for feature in features]
    keys = list(present[0])
    if unknown := sorted(set(keys) - set(_KNOWN)):
        raise ValueError(f"features have {', '.join(unknown)}, which nobody packs; known are {', '.join(_KNOWN)}")
    if "input_ids" not in keys:
        raise ValueError(f"features need input_ids; they have {', '.join(keys) or 'nothing'}")
    if len(labels := [key for key in _LABELS if key in keys]) > 1:
        raise ValueError(f"features have {' and '.join(labels)}, expected one of them")
    for index, feature in enumerate(present):
        if feature.keys() != present[0].keys():
            raise ValueError(f"feature {index} has {', '.join(feature)}; feature 0 has {', '.join(keys)}")
    columns = {key: [np.asarray(feature[key]) for feature in present] for key in keys}
    for key, values in columns.items():
        for index, value in enumerate(values):
            if value.size and value.dtype.kind not in "biuf":
                raise ValueError(f"{key} of feature {index} holds {value.ravel().tolist()[0]!r}, expected numbers")
    return columns


def _check_lengths(columns: Columns, per_token: set[str]) -> None:
    """Raises ValueError where a feature has not one value per token, or another shape than the first feature."""
    for key, values in columns.items():
        for index, value in enumerate(values):
            tokens = columns["input_ids"][index]
            if key not in per_token:
                expected = () if key not in _LABELS else values[0].shape
                if value.shape != expected or value.ndim > 1:
                    raise ValueError(f"{key} of feature {index} has shape {value.shape}, expected {expected}")
            elif value.ndim != 1:
                raise ValueError(f"{key} of feature {index} has shape {value.shape}, expected (length,)")
            elif len(value) != len(tokens):
                hint = "; labels of a sequence (multi-label) must be float" if key in _LABELS else ""
                raise ValueError(f"{key} of feature {index} has {len(value)} values for {len(tokens)} tokens{hint}")


def _among_real(position: int, real: NDArray[np.bool_]) -> int:
    """A position counted without padding; one outside of the sequence stays outside."""
    if position < 0:
        return position
    inside = position < len(real) and real[position]
    return int(real[:position].sum()) if inside else max(position, int(real.sum()))
