"""``--compare``: Hugging Face's BertForPreTraining trained next to ours, from the same weights on the same batches.

Both run without dropout in float32, each with an optimizer of its own; theirs gets the batch padded to its longest sequence
and sdpa attention, transformers' default. Step by step one runs after the other, in turns, so that a machine that slows down
slows both. Timed are forward, backward and optimizer; data, padding and the copy to the device are not.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import BertForPreTraining, PreTrainedModel

from fastbert.data.batches import PackedBatch
from fastbert.data.masking import IGNORE_INDEX
from fastbert.ops.matmul_rate import synchronize
from fastbert.runs.errors import TrainingError

from .checkpoint import Snapshot
from .evaluate import evaluate
from .learner import Learner, MicroBatch
from .metrics import BatchScores, scores_tensor
from .settings import PretrainSettings

# Two float32 computations of one formula drift apart as the weights do; until here they must not be told apart.
AGREEMENT_STEPS = 20
AGREEMENT_TOLERANCE = 1e-4
LEARNER_FOLDER = "transformers"


@dataclass(frozen=True)
class ComparedStep:
    """One training step of both models: losses in nats before the step, seconds of the step, real tokens of the batch."""

    step: int
    tokens: int
    loss: float
    transformers_loss: float
    seconds: float
    transformers_seconds: float

    @property
    def relative_difference(self) -> float:
        return abs(self.loss - self.transformers_loss) / abs(self.transformers_loss)


class Comparison:
    """Trains transformers' model beside ours for ``last_step`` steps and keeps what both did.

    ``model`` is ours with its initial weights; theirs is made from its configuration and starts as a copy of them.
    """

    def __init__(self, model: PreTrainedModel, settings: PretrainSettings, pad_token_id: int, start_step: int = 0):
        theirs = transformers_copy(model)
        self.learner = Learner(theirs.to(model.device).train(), settings, start_step, scores=_loss_only)
        self.pad_token_id = pad_token_id
        self.last_step = settings.effective_compare_steps
        self.steps: list[ComparedStep] = []
        self.held_out: dict[str, dict[str, float]] | None = None

    def step(self, step: int, batch: PackedBatch, ours: Learner) -> torch.Tensor:
        """Takes step number ``step`` (from 1) with both models on ``batch``, which is on their device.

        Returns what ``ours.step`` does. Raises :class:`TrainingError` where the loss of transformers' model is not finite.
        """
        device = ours.model.device
        runs = {"ours": (ours, batch.model_inputs()), "theirs": (self.learner, batch.padded(self.pad_token_id))}
        order = ("ours", "theirs") if step % 2 else ("theirs", "ours")
        results, seconds = {}, {}
        for name in order:
            learner, inputs = runs[name]
            synchronize(device)
            started = time.perf_counter()
            results[name] = learner.step([MicroBatch(inputs)])
            synchronize(device)
            seconds[name] = time.perf_counter() - started
        loss, transformers_loss = (BatchScores(*results[name].tolist()).loss for name in ("ours", "theirs"))
        if not math.isfinite(transformers_loss):
            raise TrainingError(f"the loss of transformers' model is {transformers_loss} at step {step}")
        self.steps.append(
            ComparedStep(
                step=step,
                tokens=batch.num_tokens,
                loss=loss,
                transformers_loss=transformers_loss,
                seconds=seconds["ours"],
                transformers_seconds=seconds["theirs"],
            )
        )
        return results["ours"]

    def measure_held_out(self, ours: PreTrainedModel, batches: list[PackedBatch]) -> None:
        """Scores both models on the held-out ``batches`` as they stand now."""
        self.held_out = {
            "fastbert": evaluate(ours, batches),
            "transformers": evaluate(self.learner.model, batches, transformers_scores(self.pad_token_id)),
        }

    def report(self) -> ComparisonReport:
        return ComparisonReport(self.steps, self.held_out)

    def state(self) -> dict[str, Any]:
        """JSON-ready; weights and optimizer are those of :meth:`snapshot`."""
        return self.report().state()

    def snapshot(self) -> Snapshot:
        """See ``Learner.snapshot``; in a folder of its own, so that the names do not meet those of our model."""
        theirs = self.learner.snapshot()

        def write(folder: Path) -> None:
            (folder / LEARNER_FOLDER).mkdir()
            theirs.write(folder / LEARNER_FOLDER)

        return Snapshot(write, theirs.nbytes)

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        self.learner.load(folder / LEARNER_FOLDER)
        self.steps = ComparisonReport.from_state(state).steps


def transformers_copy(model: PreTrainedModel) -> BertForPreTraining:
    """transformers' model with the configuration and the weights of ours, with sdpa attention, on the CPU."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    theirs = BertForPreTraining(config)
    theirs.load_state_dict(model.state_dict())
    return theirs


def transformers_scores(pad_token_id: int) -> Callable[[PreTrainedModel, PackedBatch], torch.Tensor]:
    """What ``evaluate`` takes to score a model of transformers: batches are padded, logits made for all tokens."""

    def scores(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
        inputs = batch.padded(pad_token_id)
        labels, next_sentence_label = inputs.pop("labels"), inputs.pop("next_sentence_label")
        outputs = model(**inputs)
        masked = labels != IGNORE_INDEX
        logits, targets = outputs.prediction_logits[masked].float(), labels[masked]
        sentence_logits = outputs.seq_relationship_logits.float()
        return scores_tensor(
            mlm_loss=F.cross_entropy(logits, targets),
            mlm_correct=(logits.argmax(dim=-1) == targets).sum(),
            mlm_count=targets.numel(),
            nsp_loss=F.cross_entropy(sentence_logits, next_sentence_label),
            nsp_correct=(sentence_logits.argmax(dim=-1) == next_sentence_label).sum(),
            nsp_count=next_sentence_label.numel(),
        )

    return scores


def _loss_only(outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """In training the loss of transformers' model is compared, and nothing else."""
    return scores_tensor(mlm_loss=outputs.loss, mlm_correct=0, mlm_count=0)


@dataclass(frozen=True)
class ComparisonReport:
    """What a comparison found; ``held_out`` is None until both models have been measured."""

    steps: list[ComparedStep]
    held_out: dict[str, dict[str, float]] | None

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ComparisonReport:
        return cls([ComparedStep(**values) for values in state["steps"]], state["held_out"])

    def state(self) -> dict[str, Any]:
        return {"steps": [asdict(step) for step in self.steps], "held_out": self.held_out}

    @property
    def largest_difference(self) -> float:
        """The largest relative difference of the losses in the first :data:`AGREEMENT_STEPS` steps."""
        return max(step.relative_difference for step in self.steps[:AGREEMENT_STEPS])

    @property
    def agree(self) -> bool:
        return self.largest_difference <= AGREEMENT_TOLERANCE

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of fastbert, the median over the steps."""
        return statistics.median(step.tokens / step.seconds for step in self.steps)

    @property
    def transformers_tokens_per_second(self) -> float:
        return statistics.median(step.tokens / step.transformers_seconds for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the summary, and every step with its relative difference."""
        return {
            **self.summary(),
            "steps": [{**asdict(step), "relative_difference": step.relative_difference} for step in self.steps],
        }

    def summary(self) -> dict[str, Any]:
        return {
            "compared_steps": len(self.steps),
            "agree": self.agree,
            "agreement_steps": min(AGREEMENT_STEPS, len(self.steps)),
            "agreement_tolerance": AGREEMENT_TOLERANCE,
            "largest_relative_difference": self.largest_difference,
            "tokens_per_second": self.tokens_per_second,
            "transformers_tokens_per_second": self.transformers_tokens_per_second,
            "speedup": self.tokens_per_second / self.transformers_tokens_per_second,
            "held_out": self.held_out,
        }

    def lines(self) -> list[str]:
        """The summary as text: speed, losses at a few of the steps, held-out scores, and whether the losses agree."""
        ours, theirs = self.tokens_per_second, self.transformers_tokens_per_second
        lines = [
            f"Compared with transformers' BertForPreTraining (sdpa, float32, dropout 0) over {len(self.steps)} steps:",
            f"  {'':<28}{'fastbert':>12}{'transformers':>14}{'ratio':>10}",
            f"  {'tokens/s (median, real)':<28}{ours:>12,.0f}{theirs:>14,.0f}{ours / theirs:>9.2f}x",
        ]
        if self.held_out:
            for name, label in _HELD_OUT_LABELS.items():
                values = (self.held_out["fastbert"][name], self.held_out["transformers"][name])
                lines.append(f"  {'held-out ' + label:<28}{values[0]:>12.4f}{values[1]:>14.4f}")
        lines.append(f"  {'loss at step':<28}{'':>12}{'':>14}{'rel. difference':>18}")
        lines += [
            f"  {step.step:>24}    {step.loss:>12.6f}{step.transformers_loss:>14.6f}{step.relative_difference:>18.1e}"
            for step in self._shown_steps()
        ]
        verdict = "agree" if self.agree else "DISAGREE"
        lines.append(
            f"  losses of the first {min(AGREEMENT_STEPS, len(self.steps))} steps {verdict}: "
            f"largest relative difference {self.largest_difference:.1e}, allowed {AGREEMENT_TOLERANCE:.0e}"
        )
        return lines

    def _shown_steps(self) -> list[ComparedStep]:
        """Steps 1, 5, 10 and 20, then five spread over the rest, the last among them."""
        count = len(self.steps)
        later = (AGREEMENT_STEPS + (count - AGREEMENT_STEPS) * part // 5 for part in range(1, 6))
        numbers = {1, 5, 10, AGREEMENT_STEPS, *(later if count > AGREEMENT_STEPS else ()), count}
        return [self.steps[number - 1] for number in sorted(numbers) if number <= count]


_HELD_OUT_LABELS = {"mlm_loss": "MLM loss", "mlm_accuracy": "MLM accuracy", "nsp_accuracy": "NSP accuracy"}
