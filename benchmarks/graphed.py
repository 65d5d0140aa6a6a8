"""fastbert's training step as a CUDA graph (``fastbert.train.graphed``), which has no host in it: a contender of ``training``.

It takes packed rows and is told which of them have labels, as ``fastbert pretrain --cuda-graph`` does it. Unlike there nothing is
clipped and nobody watches the loss, because the contenders beside it do neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastbert.data.masking import IGNORE_INDEX
from fastbert.train.distributed import ALONE
from fastbert.train.graphed import WARMUP_STEPS, CudaRecorder, GraphedStep, not_recorded_reasons
from fastbert.train.learner import Learner, MicroBatch
from fastbert.train.metrics import STEP_SCORES
from fastbert.train.settings import PretrainSettings

from .peers import NotAvailable
from .workloads import packed_batch

if TYPE_CHECKING:
    from .training import Parts, TrainingStep

GRAPHED = "fastbert graphed"
_STEPS = 1_000_000  # of the schedule, whose rate is that of its first ones


class UnclippedLearner(Learner):
    """A learner whose step has forward, backward and optimizer alone."""

    def update(self, scores: Tensor) -> Tensor:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return scores.new_zeros(STEP_SCORES)


class RecordedStep:
    """step(parts) -> one optimizer step on the one batch of ``parts``, as ``plain`` takes it with its model, by a CUDA graph.

    recorder: what makes a ``fastbert.train.graphed.Recorder`` that knows how much memory its record keeps. Raises
    :class:`NotAvailable` where such a step cannot be recorded.
    """

    def __init__(self, plain: TrainingStep, dtype: str, recorder: Callable[[], Any] | None = None) -> None:
        options = {"learning_rate": plain.LEARNING_RATE, "weight_decay": plain.WEIGHT_DECAY, "dtype": dtype}
        settings = PretrainSettings(steps=_STEPS, warmup_steps=0, **options)
        self._learner = UnclippedLearner(plain.model, settings)
        if recorder is None:
            if reasons := not_recorded_reasons(settings, self._learner, ALONE):
                raise NotAvailable("; ".join(reasons))
            recorder = lambda: CudaRecorder(plain.model.device, lambda _: None)  # noqa: E731
        self.model, self.optimizer, self.loss_without_dropout = plain.model, self._learner.optimizer, plain.loss_without_dropout
        self._make_recorder = recorder
        self._batch: Mapping[str, Any] | None = None

    def __call__(self, parts: Parts) -> None:
        """The first call on a batch takes the steps, too, that come before a recording."""
        ((_, batch),) = parts
        if batch is not self._batch:
            self._step = None  # before another one needs the memory of the last
            self._recorder = self._make_recorder()
            self._step, self._batch = GraphedStep(self._learner, batch["labelled_rows"].numel(), self._recorder), batch
            for _ in range(WARMUP_STEPS):
                self._step.step([MicroBatch(batch)])
        self._step.step([MicroBatch(batch)])

    def peak_bytes(self, parts: Parts) -> int:
        """What the recorded step keeps, between steps, too."""
        return self._recorder.kept_bytes


class RecordedPlainStep:
    """The same of a step without masked-LM labels: all that ``plain`` does, recorded as it is.

    ``fastbert`` has no command for that; it is what a loop of one's own gets from ``torch.cuda.graph`` on packed rows.
    """

    def __init__(self, plain: TrainingStep) -> None:
        if plain.model.device.type != "cuda":
            raise NotAvailable(f"the run is on {plain.model.device}")
        self.model, self.optimizer, self.loss_without_dropout = plain.model, plain.optimizer, plain.loss_without_dropout
        self._plain, self._parts = plain, ()

    def __call__(self, parts: Parts) -> None:
        """The first call on a batch takes the steps, too, that come before a recording."""
        if parts is not self._parts:
            self._repeat = None  # before another one needs the memory of the last
            self._recorder = CudaRecorder(self.model.device, lambda _: None)
            for group in self.optimizer.param_groups:
                group["capturable"] = True
            for _ in range(WARMUP_STEPS):
                self._recorder.run(lambda: self._plain(parts))
            self._repeat, self._parts = self._recorder.record(lambda: self._plain(parts)), parts
        self._repeat()

    def peak_bytes(self, parts: Parts) -> int:
        """What the recorded step keeps, between steps, too."""
        return self._recorder.kept_bytes


def graphed_batch(batch: dict[str, Tensor], labelled: float) -> dict[str, Any]:
    """A padded batch as a recorded step takes it, with the rows that have masked-LM labels where there are such (``labelled``)."""
    packed = packed_batch(batch)
    if not labelled:
        return packed
    return {**packed, "labelled_rows": (packed["labels"].flatten() != IGNORE_INDEX).nonzero().squeeze(1)}
