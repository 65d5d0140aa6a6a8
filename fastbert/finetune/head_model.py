"""The head of a model on outputs of its encoder that are there already: the same modules, so training them trains the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fastbert.model.encoder import PackedEncoder
from fastbert.runs import Say
from fastbert.runs.errors import SettingsError
from fastbert.tasks.model import TaskModel

from .head_features import encoder_states

# Families whose head reads every token; the others read the first one of each sequence.
_PER_TOKEN = ("words", "questions")


class GivenStates(nn.Module):
    """Stands where the encoder was: its last hidden states are the ``inputs_embeds`` (batch, length, hidden) of the call.

    Everything above is transformers' and fastbert's own head, with its losses. The pooler is the encoder's own module.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.config = encoder.config
        self.pooler = getattr(encoder, "pooler", None)

    def forward(self, input_ids: None = None, *, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        pooled = None if self.pooler is None else self.pooler(inputs_embeds)
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)


def head_model(loaded: TaskModel, family: str) -> TaskModel:
    """The head of ``loaded``, which takes rows of :func:`rows_of_states`; its parameters are those of ``loaded``."""
    model = loaded.model
    head = copy.copy(model)
    # A copy of the table alone: the modules in it are shared, all but the encoder.
    head._modules = {**model._modules, model.base_model_prefix: GivenStates(model.base_model)}
    head.main_input_name = "inputs_embeds"
    # Answers are sought in each sequence by itself, which needs padded rows; tags are not.
    return replace(loaded, model=head, packed=family != "questions", collate=StatesCollator(family))


def rows_of_states(
    model: PreTrainedModel, rows: Sequence[dict[str, Any]], family: str, autocast: torch.dtype | None, title: str, say: Say
) -> list[dict[str, Any]]:
    """``rows`` with ``states``, float32: (length, hidden) where the head of ``family`` reads every token, else (num_sequences,
    hidden). Raises SettingsError where the encoder is not fastbert's."""
    if not isinstance(model.base_model, PackedEncoder):
        raise SettingsError(f"--mode head needs an encoder that fastbert runs on packed rows; {type(model).__name__} has none")
    states = encoder_states(model, rows, per_token=family in _PER_TOKEN, autocast=autocast, title=title, say=say)
    return [{**row, "states": vectors} for row, vectors in zip(rows, states, strict=True)]


class StatesCollator:
    """Makes a batch of rows of :func:`rows_of_states`. Of family

    - "text": inputs_embeds (n, 1, hidden), labels (n,) or (n, num_labels);
    - "choices": inputs_embeds (n, num_choices, 1, hidden), labels (n,);
    - "words": inputs_embeds (1, total, hidden), labels (1, total);
    - "questions": inputs_embeds (n, longest, hidden) and their attention_mask, start_positions and end_positions (n,).
    """

    def __init__(self, family: str) -> None:
        self.family = family

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        states = [row["states"] for row in rows]
        packed = torch.from_numpy(np.concatenate(states))
        targets = {name: [row[name] for row in rows] for name in ("labels", "start_positions", "end_positions") if name in rows[0]}
        if self.family == "words":
            labels = {name: torch.tensor([list(chain.from_iterable(of_rows))]) for name, of_rows in targets.items()}
            return {"inputs_embeds": packed.unsqueeze(0), **labels}
        batch = {name: torch.tensor(values) for name, values in targets.items()}
        if self.family == "questions":
            lengths = torch.tensor([len(vectors) for vectors in states])
            real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
            padded = packed.new_zeros(*real.shape, packed.shape[1])
            padded[real] = packed
            return {"inputs_embeds": padded, "attention_mask": real.long(), **batch}
        choices = (len(states[0]),) if self.family == "choices" else ()
        return {"inputs_embeds": packed.view(len(rows), *choices, 1, packed.shape[1]), **batch}
