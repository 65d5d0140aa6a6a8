"""The training step as a CUDA graph: recorded once, then started as one piece of work instead of a thousand kernels one by one.

A small model, or a small batch, keeps a fast GPU waiting for the host, which needs a few microseconds for each of a step's kernels.
A recorded step has no host in it: forward pass, loss, backward pass, clipping, guard and optimizer run again with the arguments
that they had, on memory that they had. So every batch must have the same shape (``PretrainingBatches.filled``), and what changes
from step to step is written to fixed places on the device before: the batch, the learning rate, and the state of torch's random
generator, which the recorded ``torch.randint`` reads (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Seeds
are therefore the same as in steps that are not recorded, and so are the masks of dropout.

The first steps of a phase are real ones that run as usual, on another stream than the default one: libraries set themselves up in
them, Triton compiles, and the optimizer makes its state. Memory: what the recorded step has allocated (activations, gradients) is
its own as long as it is kept, between steps, too.

Without a GPU the tests record with a stand-in that repeats torch's operators on the same memory. Several batches a step are not
recorded: they would need two recordings and gradients that stay, and are for batches that keep the device busy anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastbert.model.fallback import model_fallback_reasons
from fastbert.ops.backends import not_supported_reasons
from fastbert.runs import Say

from .distributed import Processes
from .learner import Learner, MicroBatch
from .metrics import STEP_SCORES
from .settings import PretrainSettings

# torch's documentation warms up with three.
WARMUP_STEPS = 3


class Recorder(Protocol):
    """How the work that a function gives to the device is recorded. ``run``: calls it; ``record``: calls it without anything being
    computed, and returns what does its work.
    """

    def run(self, function: Callable[[], None]) -> None: ...

    def record(self, function: Callable[[], None]) -> Callable[[], None]: ...


class CudaRecorder:
    """On a stream of its own of ``device``; ``say`` is told of the memory, ``kept_bytes``."""

    kept_bytes = 0

    def __init__(self, device: torch.device, say: Say) -> None:
        self._device, self._say = device, say
        self._stream = torch.cuda.Stream(device)

    def run(self, function: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        with torch.cuda.graph(graph, stream=self._stream):
            function()
        self.kept_bytes = torch.cuda.memory_reserved(self._device) - before
        kept = f"{self.kept_bytes / 2**20:,.0f} MiB"
        self._say(f"The training step is recorded as a CUDA graph, which keeps {kept} of the GPU's memory")
        return graph.replay


def not_recorded_reasons(settings: PretrainSettings, learner: Learner, processes: Processes) -> list[str]:
    """Why the steps of a run cannot be recorded as a CUDA graph; empty where they can."""
    reasons = []
    if (device := learner.model.device).type != "cuda":
        reasons.append(f"the run is on {device}")
    if processes.count > 1:
        reasons.append("several processes train, whose sums of gradients are not recorded")
    if settings.batches_per_step > 1:
        reasons.append(f"a step has several batches (--batches-per-step {settings.batches_per_step}); a larger one can be recorded")
    if settings.gradient_checkpointing:
        reasons.append("--gradient-checkpointing reads the state of the random generator on the host")
    if settings.schedule == "one-cycle":
        reasons.append("--schedule one-cycle changes Adam's first beta, a number that is recorded, in every step")
    if settings.compare:
        reasons.append("--compare takes each step beside transformers'")
    config, dtype = learner.model.config, getattr(torch, settings.dtype)
    head_dim = config.hidden_size // config.num_attention_heads
    if slow := not_supported_reasons("triton", "attention", "cuda", dtype, head_dim):
        reasons.append(f"attention in plain torch reads the sequences' lengths on the host; the kernel: {'; '.join(slow)}")
    if theirs := model_fallback_reasons(learner.model.base_model):
        reasons.append(f"the encoder runs transformers' forward pass: {'; '.join(theirs)}")
    return reasons


class GraphedStep:
    """Takes ``learner``'s steps of one batch, as :meth:`Learner.step` does, most of them by repeating one that was recorded.

    ``num_labels``: the length of ``labelled_rows`` in batches that were filled up, which must have one shape. A batch of another
    length (it has more labels than fit) is a step that runs as usual. Recorded or not, the learning rate is a float32 on the
    device, so both round alike.
    """

    def __init__(self, learner: Learner, num_labels: int, recorder: Recorder) -> None:
        self._learner, self._num_labels, self._recorder = learner, num_labels, recorder
        self._rate = torch.zeros((), dtype=torch.float32, device=learner.model.device)
        self._inputs: dict[str, Any] | None = None
        self._values = torch.zeros(STEP_SCORES, dtype=torch.float64, device=learner.model.device)
        self._warmed_up = 0
        self._repeat: Callable[[], None] | None = None

    def step(self, batches: Sequence[MicroBatch]) -> Tensor:
        """See :meth:`Learner.step`. Raises ValueError for several batches and for one of another shape than those before."""
        if len(batches) != 1 or not batches[0].is_whole_step:
            raise ValueError(f"a recorded step has one batch, not {len(batches)}")
        (batch,) = batches
        self._rate.fill_(self._learner.learning_rate)
        if batch.inputs["labelled_rows"].numel() != self._num_labels:
            self._seed(batch)
            self._recorder.run(lambda: self._take(batch.inputs))
        else:
            self._copy(batch.inputs)
            if self._repeat is None and self._warmed_up == WARMUP_STEPS:
                with self._capturable():
                    self._repeat = self._recorder.record(self._take_fixed)
            self._seed(batch)
            if self._repeat is None:
                self._recorder.run(self._take_fixed)
                self._warmed_up += 1
            else:
                self._repeat()
        self._learner.schedule.step()
        return self._values.clone()

    @staticmethod
    def _seed(batch: MicroBatch) -> None:
        if batch.seed is not None:
            torch.manual_seed(batch.seed)

    def _copy(self, inputs: dict[str, Any]) -> None:
        """Into the tensors that the recorded step reads. What is one tensor under two names stays one."""
        if self._inputs is None:
            copies = {id(value): value.clone() for value in inputs.values() if isinstance(value, Tensor)}
            self._inputs = {name: copies.get(id(value), value) for name, value in inputs.items()}
            return
        if (found := _shapes(inputs)) != (expected := _shapes(self._inputs)):
            raise ValueError(f"the recorded step takes inputs of {expected}, not of {found}")
        copied = set()
        for name, value in inputs.items():
            if isinstance(value, Tensor) and id(value) not in copied:
                self._inputs[name].copy_(value, non_blocking=True)
                copied.add(id(value))

    def _take_fixed(self) -> None:
        self._take(self._inputs)

    def _take(self, inputs: dict[str, Any]) -> None:
        groups = self._learner.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = self._rate
        try:
            values = self._learner.update(self._learner.backward(MicroBatch(inputs)))
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate  # the schedule's, on the host
        self._values.copy_(values)

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        """torch's AdamW wants to be told that it is recorded; fused it does the same in both cases."""
        groups = [group for group in self._learner.optimizer.param_groups if "capturable" in group]
        for group in groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in groups:
                group["capturable"] = False


def _shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in inputs.items()}
