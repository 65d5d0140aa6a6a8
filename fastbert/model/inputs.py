"""Checks of a model's inputs: what is wrong, where, and what would be right, before any work is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.registration import check_ids


def check_inputs(
    config: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Raises ValueError for shapes that do not fit; reads no data, so it never waits for a GPU."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None and input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (batch, length)")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size):
        raise ValueError(f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (batch, length, {config.hidden_size})")
    batch, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        _check_packed(config, batch, length, attention_mask, cu_seqlens, kwargs)
    elif length > config.max_position_embeddings and position_ids is None:
        raise ValueError(
            f"the sequences have {length} tokens, the model has positions for {config.max_position_embeddings} "
            "(config.max_position_embeddings); truncate them, e.g. tokenizer(..., truncation=True)"
        )
    if attention_mask is not None and attention_mask.dim() == 2 and not config.is_decoder:  # a decoder's also covers its cache
        _check_same_shape("attention_mask", attention_mask, batch, length)
    if token_type_ids is not None:
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


def _check_packed(config, batch, length, attention_mask, cu_seqlens, kwargs) -> None:
    if batch != 1:
        raise ValueError(f"packed inputs (cu_seq_lens_q) hold all sequences in one row, but the batch size is {batch}; expected 1")
    if attention_mask is not None:
        raise ValueError("packed inputs (cu_seq_lens_q) have no padding: pass attention_mask=None")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seq_lens_q has shape {tuple(cu_seqlens.shape)}, expected (num_sequences + 1,)")
    keys = kwargs.get("cu_seq_lens_k")
    if keys is not None and keys.shape != cu_seqlens.shape:
        raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q: in self-attention keys and queries are the same tokens")
    longest = kwargs.get("max_length_q")
    if longest is not None and longest > config.max_position_embeddings:
        raise ValueError(
            f"max_length_q is {longest}, the model has positions for {config.max_position_embeddings} tokens "
            "(config.max_position_embeddings)"
        )


def check_token_ids(
    model: Any, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, *, unpadded: bool
) -> None:
    """Raises ValueError for ids outside their embedding tables.

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
        if ids is None or not (ids.device.type == "cpu" or (unpadded and ids.device.type == "cuda")):
            continue
        num_ids = getattr(table, "num_embeddings", None)
        if num_ids is not None:
            check_ids(name, ids, num_ids, limit_name)


def check_labels(labels: Tensor, expected: tuple[int, ...], name: str = "labels") -> None:
    """Raises ValueError where labels do not lie beside the tokens they label."""
    if tuple(labels.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}, expected {expected}")
