"""What trains and what stays as it is: ``--mode`` of ``fastbert finetune``.

full    everything.
top-k   the upper K layers, the pooler and the head; embeddings and the layers below are frozen.
head    the pooler, where the head reads it, and the head; nothing in the encoder changes, so its outputs are computed once
        (:mod:`.head_features`) and the head trains on them (:mod:`.head_model`).
lora    low-rank adapters on the queries' and values' projections (Hu et al., 2021), with the pooler and the head; PEFT's.

What is frozen drops nothing, as in evaluation. Dropout there would be noise in layers that cannot learn to bear it; without it
they run as in inference, one call each on packed weights instead of op by op (6% to 11% of a step less on MiniLM with K = 2), and
give the same outputs in every epoch. Without gradients to compute they keep nothing for the backward pass either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fastbert.model.accelerate import restore
from fastbert.runs import Say
from fastbert.runs.errors import SettingsError
from fastbert.tasks.model import TaskModel, accelerated, stays_int8
from fastbert.tasks.task import Outputs

from .head_model import head_model, rows_of_states
from .settings import FinetuneSettings

ADAPTER = "adapter"
TOP_K_LAYERS = 2
# Rank, scale and dropout of PEFT's own examples on GLUE; the paper has rank 8 for RoBERTa, too.
LORA_R, LORA_ALPHA, LORA_DROPOUT = 8, 16, 0.1
LORA_TARGETS = ("query", "value")
# Not QUESTION_ANS: PEFT's class for it leaves out token_type_ids and position_ids, so that what trains is not what is merged.
_PEFT_TASKS = {"text": "SEQ_CLS", "words": "TOKEN_CLS"}

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Tuning:
    """``trained``: what trains and is scored, on ``rows`` (by split); ``whole``: the model that it is part of; ``outputs``: the
    logits of the splits that were scored at the end."""

    trained: TaskModel
    rows: dict[str, Rows]
    whole: TaskModel
    outputs: Mapping[str, Outputs] = field(default_factory=dict)

    def finish(self, folder: Path) -> TaskModel:
        """The model to save once training has ended. An adapter is written to ``folder``/adapter, as PEFT does, and merged."""
        peft_model = self.trained.model
        if not hasattr(peft_model, "merge_and_unload"):
            return self.whole
        # Where PEFT has no name for the task, the adapter names the model's class: transformers', which everybody has.
        restore(peft_model).save_pretrained(folder / ADAPTER)
        merged = peft_model.merge_and_unload()
        accelerated(merged)
        return replace(self.whole, model=merged)


def autocast_dtype(settings: FinetuneSettings) -> torch.dtype | None:
    """That of matmuls, where it is not the weights'."""
    return torch.bfloat16 if settings.dtype == "bfloat16" else None


def check_packages(mode: str) -> None:
    """Raises SettingsError, before anything is done, where a package is missing that ``mode`` needs."""
    if mode == "lora":
        _import_peft()


def check_config(config: PretrainedConfig, settings: FinetuneSettings) -> None:
    """Raises SettingsError for what the configuration of ``settings.model`` shows without its weights: that they are int8, and that
    it has fewer layers than are to train."""
    if stays_int8(settings.model, config, None):
        raise SettingsError(f"--model {settings.model} holds int8 weights, which cannot train: give the model it was made of")
    layers = _upper_layers(settings)
    if settings.mode == "top-k" and layers > (there := getattr(config, "num_hidden_layers", layers)):
        raise SettingsError(f"--top-k-layers is {layers}; --model {settings.model} has {there} layers, of which 1 to all may train")


def _upper_layers(settings: FinetuneSettings) -> int:
    return settings.top_k_layers or TOP_K_LAYERS


def prepare_mode(loaded: TaskModel, rows: dict[str, Rows], settings: FinetuneSettings, *, family: str, say: Say) -> Tuning:
    """Makes ``loaded`` train what ``settings.mode`` says; ``rows``: the features of all splits; ``family``: the task's.

    Raises SettingsError where the model's encoder is none that fastbert knows, where it has fewer layers than are to train, and
    for int8 weights.
    """
    model = in_mode(loaded.model, settings, family)
    tuning = Tuning(loaded if model is loaded.model else replace(loaded, model=model), rows, loaded)
    if settings.mode == "head":
        autocast = autocast_dtype(settings)
        with_states = {name: rows_of_states(loaded.model, split, family, autocast, name, say) for name, split in rows.items()}
        tuning = Tuning(head_model(loaded, family), with_states, loaded)
    trained, everything = trained_parameters(tuning.trained.model)[0], trained_parameters(loaded.model)[1]
    say(f"  {settings.mode}: {trained:,} of {everything:,} parameters train")
    return tuning


def in_mode(model: PreTrainedModel, settings: FinetuneSettings, family: str) -> nn.Module:
    """``model`` with what does not train frozen, or under its adapters. Raises SettingsError as :func:`prepare_mode` does."""
    check_config(model.config, settings)
    if settings.mode == "lora":
        return with_lora(model, family, settings.lora_r or LORA_R, settings.lora_alpha or LORA_ALPHA)
    if settings.mode == "head":
        freeze_below(model, 0, settings.mode)
    elif settings.mode == "top-k":
        freeze_below(model, _upper_layers(settings), settings.mode)
    return model


def trained_parameters(model: nn.Module) -> tuple[int, int]:
    """(how many numbers train, of how many)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def freeze_below(model: PreTrainedModel, layers: int, mode: str) -> None:
    """Freezes embeddings and all encoder layers but the upper ``layers``, and takes their dropout away: Trainer puts a model into
    training mode at every step, which ``eval()`` would not outlive. The configuration that is saved keeps the dropout.

    Raises SettingsError where there is no such encoder.
    """
    encoder = model.base_model
    stack = getattr(getattr(encoder, "encoder", None), "layer", None)
    if encoder is model or not isinstance(stack, nn.ModuleList):
        raise SettingsError(
            f"--mode {mode} needs an encoder with embeddings and layers like BERT's (RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA); "
            f"{type(model).__name__} has none"
        )
    around = [module for name, module in encoder.named_children() if name not in ("encoder", "pooler")]
    for part in (*around, *stack[: len(stack) - layers]):
        part.requires_grad_(False)
        for module in part.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


def with_lora(model: PreTrainedModel, family: str, r: int, alpha: int) -> nn.Module:
    """PEFT's model around ``model``: adapters of rank ``r``, scaled by ``alpha`` / ``r``, on the projections of queries and values;
    the pooler and the head train whole, on copies of their own.

    Raises SettingsError where PEFT is missing or finds no such projection.
    """
    peft = _import_peft()
    head = [name for name, part in model.named_children() if part is not model.base_model and any(True for _ in part.parameters())]
    pooler = ["pooler"] if getattr(model.base_model, "pooler", None) is not None else []
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=LORA_DROPOUT,
        target_modules=list(LORA_TARGETS),
        modules_to_save=[*pooler, *head],
        task_type=_PEFT_TASKS.get(family),
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise SettingsError(f"--mode lora: {type(model).__name__} has no modules {' and '.join(LORA_TARGETS)} ({error})") from error


def _import_peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise SettingsError("--mode lora needs PEFT: pip install 'fastbert[train]'") from error
    return peft
