"""Checks of a model's inputs: what is wrong, where, and what would be right, before any work is done."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ops.registration import check_ids


def check_inputs(
    model: Any,
    *,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    past_key_values: Any,
    kwargs: dict[str, Any],
) -> None:
    """Raises ValueError for what does not fit ``model``; on a GPU it reads no data, so it never waits for one."""
    config = model.config
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None and input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (batch, length)")
    if inputs_embeds is not None:
        width = getattr(config, "embedding_size", config.hidden_size)
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width:
            raise ValueError(f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (batch, length, {width})")
    tokens = inputs_embeds if input_ids is None else input_ids
    batch, length = tokens.shape[:2]
    if kwargs.get("cu_seq_lens_q") is not None:
        _check_packed(model, tokens, attention_mask, position_ids, kwargs)
    elif kwargs.get("cu_seq_lens_k") is not None:
        raise ValueError("cu_seq_lens_k is given without cu_seq_lens_q: packed inputs need both, or cu_seq_lens_q alone")
    elif position_ids is None and model.first_position == 0 and length > config.max_position_embeddings:
        raise ValueError(
            f"the sequences have {length} tokens, the model has positions for {config.max_position_embeddings} "
            "(config.max_position_embeddings); truncate them, e.g. tokenizer(..., truncation=True)"
        )
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape != (batch, length):
        covers_cache = config.is_decoder or past_key_values is not None  # PEFT's prefixes are a cache for an encoder
        if not covers_cache:
            _check_same_shape("attention_mask", attention_mask, batch, length)
    if token_type_ids is not None and token_type_ids.shape != (1, length):  # which transformers takes for all sequences
        _check_same_shape("token_type_ids", token_type_ids, batch, length)
    if position_ids is not None and (
        position_ids.dim() != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch)
    ):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, expected ({batch}, {length}) like the tokens, or (1, {length})"
        )


def _check_same_shape(name: str, tensor: Tensor, batch: int, length: int) -> None:
    if tuple(tensor.shape) != (batch, length):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({batch}, {length}) like the tokens")


def _check_packed(
    model: Any, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, kwargs: dict[str, Any]
) -> None:
    cu_seqlens, keys, max_length = (kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"))
    batch, total = tokens.shape[:2]
    if batch != 1:
        raise ValueError(f"packed inputs (cu_seq_lens_q) hold all sequences in one row, but the batch size is {batch}; expected 1")
    if getattr(model, "_is_replica", False):
        raise ValueError(
            "packed inputs (cu_seq_lens_q) in torch.nn.DataParallel, which cuts them like a batch of rows (transformers' Trainer "
            "takes it where one process sees several GPUs); use one GPU (CUDA_VISIBLE_DEVICES=0), or DistributedDataParallel, with "
            "a process for each GPU (torchrun)"
        )
    if attention_mask is not None:
        raise ValueError("packed inputs (cu_seq_lens_q) have no padding: pass attention_mask=None")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seq_lens_q has shape {tuple(cu_seqlens.shape)}, expected (num_sequences + 1,): 0 and the sums of the lengths "
            "(accelerate's dispatch_batches=True would cut it like a batch of rows)"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seq_lens_q is {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.device != tokens.device:
        raise ValueError(f"cu_seq_lens_q is on {cu_seqlens.device}, expected {tokens.device} like the tokens")
    if keys is not None and keys.shape != cu_seqlens.shape:
        raise ValueError(_OTHER_KEYS)
    if torch.compiler.is_compiling():  # nothing can be read, and max_length may be a loose bound
        return
    longest = max_length
    if cu_seqlens.device.type == "cpu":
        longest = _check_boundaries(cu_seqlens.tolist(), total, max_length)
        if keys is not None and keys is not cu_seqlens and keys.tolist() != cu_seqlens.tolist():
            raise ValueError(_OTHER_KEYS)
    limit = model.config.max_position_embeddings - model.first_position
    if longest is not None and longest > limit and position_ids is None:
        raise ValueError(
            f"the longest packed sequence has {longest} tokens, the model has positions for {limit} "
            f"(config.max_position_embeddings); truncate them, e.g. tokenizer(..., truncation=True)"
        )


_OTHER_KEYS = "cu_seq_lens_k differs from cu_seq_lens_q: in self-attention keys and queries are the same tokens"


def _check_boundaries(boundaries: list[int], total: int, max_length: int | None) -> int:
    """The longest of the sequences between ``boundaries``; empty ones are allowed."""
    if boundaries[0] != 0:
        raise ValueError(f"cu_seq_lens_q starts at {boundaries[0]}, expected 0, where the first sequence starts")
    if boundaries[-1] != total:
        raise ValueError(f"cu_seq_lens_q ends at {boundaries[-1]}, expected {total}, the number of tokens in the row")
    for index, (start, end) in enumerate(pairwise(boundaries)):
        if end < start:
            raise ValueError(f"cu_seq_lens_q falls from {start} to {end} at index {index + 1}, expected sums that never fall")
    longest = max(end - start for start, end in pairwise(boundaries))
    if max_length is not None and max_length < longest:
        raise ValueError(f"max_length_q is {int(max_length)}, but the longest sequence between cu_seq_lens_q has {longest} tokens")
    return longest


def warn_of_first_position(model: Any, position_ids: Tensor) -> None:
    """Warns where a packed row's positions are not counted as ``model`` counts them: legal, but hardly what was meant.

    A model that counts from 0 is not asked. Looking waits for a GPU, but numbers from 0 would go unseen on it.
    """
    if model.first_position == 0 or torch.compiler.is_compiling() or not position_ids.numel():
        return
    first = int(position_ids[0, 0])
    if first < model.first_position:
        warnings.warn(
            f"position_ids start at {first}, but {type(model).__name__} counts from {model.first_position}, after its padding "
            f"token's id: collators take position_ids_start={model.first_position} for it",
            stacklevel=2,
        )


def check_token_ids(
    model: Any, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, *, unpadded: bool
) -> None:
    """Raises ValueError for ids outside their embedding tables, RuntimeError for ids on the meta device in a model that is not.

    On a GPU a wrong id ends the process in a device-side assert, but looking costs a synchronisation: it is done there only
    where padding has just been removed, which has waited for the device anyway.
    """
    if torch.compiler.is_compiling():
        return
    embeddings = model.embeddings
    for name, ids, table, limit_name in (
        ("input_ids", input_ids, embeddings.word_embeddings, "config.vocab_size"),
        ("token_type_ids", token_type_ids, embeddings.token_type_embeddings, "config.type_vocab_size"),
        ("position_ids", position_ids, embeddings.position_embeddings, "config.max_position_embeddings"),
    ):
        if ids is not None and ids.is_meta and not table.weight.is_meta:  # of which a table makes rows that hold anything
            raise RuntimeError(f"{name} is on the meta device, without data, and the model is on {table.weight.device}")
        if ids is None or not (ids.device.type == "cpu" or (unpadded and ids.device.type == "cuda")):
            continue
        num_ids = getattr(table, "num_embeddings", None)
        if num_ids is not None:
            check_ids(name, ids, num_ids, limit_name)


def check_labels(labels: Tensor, expected: tuple[int, ...], name: str = "labels") -> None:
    """Raises ValueError where labels do not lie beside the tokens they label."""
    if tuple(labels.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}, expected {expected}")
