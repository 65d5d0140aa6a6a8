"""A model in training: forward, backward, clipping, optimizer and schedule of a step, and their way to and from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from .errors import TrainingError
from .optimizer import build_optimizer, build_schedule, load_optimizer_tensors, optimizer_tensors
from .settings import PretrainSettings

MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"


class Learner:
    """``model`` (already on its device) with an AdamW and a schedule of its own, as it stands after ``start_step`` steps."""

    def __init__(self, model: PreTrainedModel, settings: PretrainSettings, start_step: int = 0):
        self.model = model
        self.max_grad_norm = settings.max_grad_norm
        self.optimizer = build_optimizer(model, settings.learning_rate, settings.weight_decay)
        self.schedule = build_schedule(self.optimizer, settings.effective_warmup_steps, settings.steps, start_step=start_step)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.schedule.get_last_lr()[0]

    def step(self, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Trains on one batch; ``inputs`` are the model's keyword arguments, with labels.

        Returns the model's output and the gradient's norm before clipping (0-d), neither waited for.
        """
        outputs = self.model(**inputs)
        outputs.loss.backward()
        grad_norm = clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return outputs, grad_norm

    def save(self, folder: Path) -> None:
        """Writes config.json, model.safetensors (one file) and optimizer.safetensors."""
        save_model(self.model, folder)
        tensors = {name: tensor.contiguous() for name, tensor in optimizer_tensors(self.model, self.optimizer).items()}
        with os_errors(folder):
            save_file(tensors, folder / OPTIMIZER_NAME)

    def load(self, folder: Path) -> None:
        """Reads what :meth:`save` wrote. Raises :class:`TrainingError` where it is of another model."""
        try:
            load_model(self.model, folder / MODEL_NAME)
            load_optimizer_tensors(self.model, self.optimizer, load_file(folder / OPTIMIZER_NAME))
        except (RuntimeError, ValueError) as error:
            raise TrainingError(f"{folder} does not fit the model of this run: {error}") from error


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes config.json and model.safetensors (one file, whatever the size), without transformers' progress bar."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with os_errors(folder):
            model.save_pretrained(folder, max_shard_size=sum(parameter.nbytes for parameter in model.parameters()) + 1)
    finally:
        if shown:
            enable_progress_bar()


@contextmanager
def os_errors(folder: Path) -> Iterator[None]:
    """safetensors reports a full disk as an error of its own; here it is an ``OSError`` that names ``folder``, like any other."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write to {folder}: {error}") from error


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
