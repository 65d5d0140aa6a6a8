"""The numbers of a run: scores of batches, their averages, and ``metrics.jsonl``, which never repeats a step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fastbert.data.masking import IGNORE_INDEX
from fastbert.runs.errors import TrainingError
from fastbert.runs.whole_file import whole_file

MLM_LOSS, NSP_LOSS = 0, 3  # where they are among the scores


def batch_scores(outputs: Any, inputs: dict[str, Any]) -> Tensor:
    """What a batch says about the model: float64 (6,), on the device, in the order of :class:`BatchScores`.

    ``outputs``: of ``fastbert.BertForPreTraining`` for ``inputs`` with labels, or of ``fastbert.BertForMaskedLM`` for inputs
    without ``next_sentence_label``. The prediction logits are not read, and nothing waits for the device.
    """
    next_sentence_label = inputs.get("next_sentence_label")
    if next_sentence_label is None:
        return scores_tensor(mlm_loss=outputs.loss, mlm_correct=outputs.mlm_correct, mlm_count=outputs.mlm_count)
    predicted = outputs.seq_relationship_logits.detach().argmax(dim=-1)
    return scores_tensor(
        mlm_loss=outputs.mlm_loss,
        mlm_correct=outputs.mlm_correct,
        mlm_count=outputs.mlm_count,
        nsp_loss=outputs.next_sentence_loss,
        nsp_correct=(predicted == next_sentence_label).sum(),
        nsp_count=(next_sentence_label != IGNORE_INDEX).sum(),
    )


def scores_tensor(
    *,
    mlm_loss: Tensor,
    mlm_correct: Tensor | int,
    mlm_count: Tensor | int,
    nsp_loss: Tensor | float = 0.0,
    nsp_correct: Tensor | int = 0,
    nsp_count: Tensor | int = 0,
) -> Tensor:
    """Six 0-d values as one float64 tensor (6,) on the device of ``mlm_loss``."""
    values = (mlm_loss, mlm_correct, mlm_count, nsp_loss, nsp_correct, nsp_count)
    # torch.full, because a number that is copied to a GPU is waited for.
    return torch.stack(
        [
            v.detach().double() if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=mlm_loss.device)
            for v in values
        ]
    )


@dataclass(frozen=True)
class BatchScores:
    """The values of :func:`scores_tensor` on the host; losses are means over their counts, in nats.

    Of a training step also the gradient's norm before clipping, the limit of its loss, and 1 where it was left out.
    """

    mlm_loss: float
    mlm_correct: float
    mlm_count: float
    nsp_loss: float
    nsp_correct: float
    nsp_count: float
    grad_norm: float = 0.0
    loss_limit: float = math.inf
    left_out: float = 0.0

    @property
    def loss(self) -> float:
        return self.mlm_loss + self.nsp_loss

    @property
    def reason(self) -> str | None:
        """Why the step was left out; None where it was not."""
        if not self.left_out:
            return None
        for name, value in (("loss", self.loss), ("gradient norm", self.grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        return f"the loss is {self.loss:.4g}, above {self.loss_limit:.4g}"


STEP_SCORES = len(fields(BatchScores))


@dataclass
class ScoreSums:
    """Sums over batches, so that every masked token and every sentence pair weighs the same in the means."""

    mlm_loss: float = 0.0
    mlm_correct: float = 0.0
    mlm_count: float = 0.0
    nsp_loss: float = 0.0
    nsp_correct: float = 0.0
    nsp_count: float = 0.0

    def add(self, scores: BatchScores) -> None:
        self.mlm_loss += scores.mlm_loss * scores.mlm_count
        self.mlm_correct += scores.mlm_correct
        self.mlm_count += scores.mlm_count
        self.nsp_loss += scores.nsp_loss * scores.nsp_count
        self.nsp_correct += scores.nsp_correct
        self.nsp_count += scores.nsp_count

    def means(self) -> dict[str, float]:
        """loss, mlm_loss, nsp_loss (nats), mlm_accuracy, nsp_accuracy (0 to 1). Needs at least one batch.

        Without sentence pairs those of the next sentence are left out.
        """
        mlm_loss = self.mlm_loss / self.mlm_count
        if not self.nsp_count:
            return {"loss": mlm_loss, "mlm_loss": mlm_loss, "mlm_accuracy": self.mlm_correct / self.mlm_count}
        nsp_loss = self.nsp_loss / self.nsp_count
        return {
            "loss": mlm_loss + nsp_loss,
            "mlm_loss": mlm_loss,
            "nsp_loss": nsp_loss,
            "mlm_accuracy": self.mlm_correct / self.mlm_count,
            "nsp_accuracy": self.nsp_correct / self.nsp_count,
        }


@dataclass
class Window:
    """What is logged together: the sums since the last line of ``metrics.jsonl``. A checkpoint keeps it.

    ``steps``, ``tokens`` and ``flops`` (see ``telemetry``) are of steps that were not left out; ``seconds`` are of all of them, and
    those ``waited`` for batches are among them.
    """

    sums: ScoreSums
    grad_norm: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    flops: float = 0.0
    waited: float = 0.0

    @classmethod
    def empty(cls) -> Window:
        return cls(ScoreSums())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Window:
        return cls(**{**values, "sums": ScoreSums(**values["sums"])})

    def add(self, scores: BatchScores, tokens: int, flops: float) -> None:
        self.sums.add(scores)
        self.grad_norm = max(self.grad_norm, scores.grad_norm)
        self.tokens += tokens
        self.flops += flops
        self.steps += 1

    def row(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Of a line of ``metrics.jsonl``: means over the window, the largest gradient norm in it, real tokens per second,
        ``loader_wait``: the share of the seconds in which the training process waited for batches.
        """
        return {
            "step": step,
            **self.sums.means(),
            "grad_norm": self.grad_norm,
            "learning_rate": learning_rate,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "loader_wait": self.waited / self.seconds if self.seconds else 0.0,
        }


class MetricsFile:
    """Appends rows to a JSON Lines file, each flushed at once; ``listener`` gets them, too.

    Opened with ``resume_step`` None it starts anew; otherwise what the continued run will write again is dropped first: rows
    after that step, held-out scores of that step (measured after its checkpoint), and a last line that a crash cut short.
    """

    def __init__(self, path: Path, resume_step: int | None = None, listener: Callable[[dict[str, Any]], None] | None = None):
        self._listener = listener
        if resume_step is None:
            path.write_text("", encoding="utf-8")
        elif path.exists():
            kept = [row for row in read_metrics(path) if row["step"] + ("held_out" in row) <= resume_step]
            with whole_file(path) as beside:
                beside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close or the with statement)

    def write(self, row: dict[str, Any]) -> None:
        with self._errors_that_name_it():
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        if self._listener is not None:
            self._listener(row)

    def close(self) -> None:
        with self._errors_that_name_it():  # it tries once more to write what a full disk has refused
            self._file.close()

    @contextmanager
    def _errors_that_name_it(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a last line without its line end is no row yet.

    Raises :class:`TrainingError` naming the line that is none.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            raise TrainingError(f"{path}, line {number}: no row of metrics ({error}); delete the line") from error
        rows.append(row)
    return rows
