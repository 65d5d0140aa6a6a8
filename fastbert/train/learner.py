"""A model in training: forward, backward, clipping, optimizer and schedule of a step, and their way to and from a folder.

A step may have several batches, whose gradients add up to that of one large batch, however they were divided.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from fastbert.runs.errors import TrainingError
from fastbert.runs.folder import write_json

from .checkpoint import Snapshot
from .distributed import ALONE, Processes
from .guard import Guard
from .metrics import MLM_LOSS, NSP_LOSS, batch_scores
from .multi_tensor import MultiTensorOptimizer
from .optimizer import build_lamb, build_optimizer, load_optimizer_tensors, optimizer_tensors
from .schedules import Schedule
from .settings import PretrainSettings

MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
GUARD_NAME = "guard.json"


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """``inputs``: the model's keyword arguments, with labels; the batch's shares of the masked tokens and of the sentence pairs of
    its step, over all processes (0-d tensors on the device where there are several); the seed of its dropout, None to go on with
    the generator as it is. A step of one batch has both shares whole.
    """

    inputs: dict[str, Any]
    mlm_share: float | Tensor = 1.0
    nsp_share: float | Tensor = 1.0
    seed: int | None = None

    @property
    def is_whole_step(self) -> bool:
        return isinstance(self.mlm_share, float) and self.mlm_share == self.nsp_share == 1.0


class Learner:
    """``model`` (already on its device) with an optimizer and a schedule of its own, as it stands after ``start_step`` steps.

    ``scores``: what a batch's outputs and inputs say about the model, in the order of ``metrics.BatchScores``; ``processes``: those
    that train it together, each on its own batches of a step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: PretrainSettings,
        start_step: int = 0,
        scores: Callable[[Any, dict[str, Any]], Tensor] = batch_scores,
        processes: Processes = ALONE,
    ):
        if settings.gradient_checkpointing:
            # The second name is that of older versions of transformers.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.model = model
        self._processes = processes
        self._module = processes.parallel(model)
        self.max_grad_norm = settings.max_grad_norm
        build = build_lamb if settings.optimizer == "lamb" else build_optimizer
        self.optimizer = build(model, settings.learning_rate, settings.weight_decay, settings.optimizer_backend)
        self.schedule = Schedule(self.optimizer, settings, start_step)
        self.guard = Guard(settings.loss_spike, model.device)
        self._dtype = settings.dtype
        self._scores = scores

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.schedule.learning_rate

    def step(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Trains on the gradient of the mean over all masked tokens plus the mean over all sentence pairs of ``batches``.

        A step that the guard leaves out changes neither weights nor optimizer; the schedule goes on. Returns the values of
        ``metrics.BatchScores`` (9,) for the whole step, float64 on the device, not waited for.
        """
        *others, last = batches
        with self._processes.accumulating(self._module):
            scores = [self._seeded_backward(batch) for batch in others]
        values = self.update(sum(scores, self._seeded_backward(last)))
        self.schedule.step()
        return values

    def _seeded_backward(self, batch: MicroBatch) -> Tensor:
        if batch.seed is not None:
            torch.manual_seed(batch.seed)
        return self.backward(batch)

    # What a step does on the device: it can be recorded (``graphed.GraphedStep``), because nothing of it waits for a result.

    def update(self, scores: Tensor) -> Tensor:
        """Clips the gradients, takes the optimizer's step and lets go of them. ``scores``: (6,), of this process's batches.

        Returns what :meth:`step` does.
        """
        scores = self._processes.sum(scores)
        grad_norm = self._clip_gradients()
        left_out, loss_limit = self.guard.check(scores[MLM_LOSS] + scores[NSP_LOSS], grad_norm)
        self._optimizer_step(left_out)
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([*scores, grad_norm.double(), loss_limit, left_out.double()])

    def backward(self, batch: MicroBatch) -> Tensor:
        """Adds the batch's gradients; returns its scores (6,), the losses times its shares of the step."""
        with autocast(self.model.device, self._dtype):
            outputs = self._module(**batch.inputs)
        loss = outputs.loss
        if not batch.is_whole_step:
            loss = loss * batch.mlm_share
            if "next_sentence_label" in batch.inputs:  # outputs.loss is the sum of both means
                logits, labels = outputs.seq_relationship_logits, batch.inputs["next_sentence_label"]
                loss = loss + (batch.nsp_share - batch.mlm_share) * cross_entropy(logits.float(), labels)
        # Processes together take the mean of their gradients; the shares make a sum of it.
        (loss * self._processes.count).backward()
        scores = self._scores(outputs, batch.inputs)
        scores[MLM_LOSS] *= batch.mlm_share
        scores[NSP_LOSS] *= batch.nsp_share
        return scores

    def _clip_gradients(self) -> Tensor:
        """Returns their norm before."""
        if isinstance(self.optimizer, MultiTensorOptimizer):  # its step clips them, and nobody reads them after that
            return self.optimizer.clip_grad_norm(self.max_grad_norm)
        return clip_grad_norm_(self.model.parameters(), self.max_grad_norm)

    def _optimizer_step(self, left_out: Tensor) -> None:
        if self.optimizer.defaults.get("fused", True):  # LAMB, which has no such option, looks at found_inf as well
            self.optimizer.found_inf = left_out.float()
        elif left_out:
            return
        self.optimizer.step()

    def snapshot(self) -> Snapshot:
        """Copies on the host of weights and optimizer, to be written as config.json, model.safetensors (one file),
        optimizer.safetensors and guard.json.
        """
        weights = _host_copies(self.model.state_dict())
        moments = _host_copies(optimizer_tensors(self.model, self.optimizer))
        guard = self.guard.state()

        def write(folder: Path) -> None:
            save_model(self.model, folder, weights)
            with os_errors(folder / OPTIMIZER_NAME):
                save_file(moments, folder / OPTIMIZER_NAME)
            write_json(folder / GUARD_NAME, guard)

        copies = {id(tensor): tensor.nbytes for tensor in (*weights.values(), *moments.values())}
        return Snapshot(write, sum(copies.values()))

    def load(self, folder: Path) -> None:
        """Reads what a :meth:`snapshot` wrote. Raises :class:`TrainingError` where it is of another model."""
        try:
            load_model(self.model, folder / MODEL_NAME)
            load_optimizer_tensors(self.model, self.optimizer, load_file(folder / OPTIMIZER_NAME))
            self.guard.load_state(json.loads((folder / GUARD_NAME).read_text(encoding="utf-8")))
        except (RuntimeError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise TrainingError(f"{folder} does not fit the model of this run: {error}") from error


def _host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in memory of their own, waited for; tensors that are one (tied weights) stay one."""
    copies: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
    for tensor in tensors.values():
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if key not in copies:
            copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return {name: copies[tensor.data_ptr(), tensor.shape, tensor.dtype] for name, tensor in tensors.items()}


def save_model(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Writes config.json and model.safetensors (one file, whatever the size), without transformers' progress bar.

    ``weights``: the ``state_dict`` to write instead of that of the ``model``.
    """
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with os_errors(folder / MODEL_NAME):
            largest = sum(parameter.nbytes for parameter in model.parameters()) + 1
            model.save_pretrained(folder, state_dict=None if weights is None else dict(weights), max_shard_size=largest)
    finally:
        if shown:
            enable_progress_bar()


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """safetensors reports a full disk as an error of its own; here it is an ``OSError`` that names ``path``, like any other."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The forward pass in ``dtype``, on weights that stay float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
