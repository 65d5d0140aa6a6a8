"""The training loop: steps, the numbers about them, checkpoints, and an orderly stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastbert.data.loader import Position, step_batches
from fastbert.ops.matmul_rate import synchronize
from fastbert.runs import Say
from fastbert.runs.errors import TrainingInterrupted

from .background import CheckpointWriter
from .checkpoint import checkpoint_path
from .compare import Comparison
from .distributed import Processes, dropout_seed
from .graphed import CudaRecorder, GraphedStep, not_recorded_reasons
from .guard import check_skipped, skipped_text
from .inputs import PreparedData
from .interrupt import StopRequest
from .learner import Learner, MicroBatch
from .metrics import BatchScores, MetricsFile, Window
from .prefetch import DeviceStep, device_steps
from .run_folder import METRICS_NAME
from .run_state import RunState, snapshot_run
from .settings import Phase, PretrainSettings
from .telemetry import Telemetry, counting_waits, peak_memory

SECONDS_BETWEEN_LINES = 10.0
MASKED, SEQUENCES, TOKENS, FLOPS, STOPS = range(5)  # where they are among a step's totals
TOTALS = 5
# The numbers first: tqdm gives the bar what is left of a narrow terminal.
BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


class Stopwatch:
    """Seconds of training: the device is waited for before the clock is read, and pauses do not count."""

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds = 0.0
        self._started = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        synchronize(self._device)
        now = time.perf_counter()
        seconds = self._seconds + now - self._started
        self._seconds, self._started = 0.0, now
        return seconds

    def add(self, seconds: float) -> None:
        self._seconds += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._seconds = self.lap()
        try:
            yield
        finally:
            synchronize(self._device)
            self._started = time.perf_counter()


@dataclass(frozen=True, eq=False)
class TakenStep:
    """A step whose ``scores`` (see ``Learner.step``) and ``totals`` (see ``_totals``) are still on the device; ``position``: of its
    first batch.
    """

    number: int
    position: dict[str, int]
    totals: Tensor
    scores: Tensor


class TrainingLoop:
    """Takes ``learner`` from ``state.step`` to ``settings.steps``; ``state`` is kept up to date and saved to ``output``.

    ``comparison`` is trained beside it while it lasts, and let go of (its numbers stay in ``state.comparison``) once done.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        state: RunState,
        learner: Learner,
        data: PreparedData,
        comparison: Comparison | None,
        metrics: MetricsFile,
        telemetry: Telemetry,
        say: Say,
        processes: Processes,
    ):
        self.settings = settings
        self.output = Path(settings.output)
        self.state = state
        self.learner = learner
        self.data = data
        self.comparison = comparison
        self.metrics = metrics
        self.telemetry = telemetry
        self.say = say
        self.processes = processes
        # Of the first process alone: it writes for all.
        self.writer = CheckpointWriter(self.output, keep=settings.keep_checkpoints, log=self.output / METRICS_NAME)
        self._records = settings.cuda_graph and not self._reasons_against_recording()
        self._step: Callable[[Sequence[MicroBatch]], Tensor] = learner.step
        self._stop = StopRequest()
        self._stop_agreed = False
        self._pending: list[TakenStep] = []
        self._clock = Stopwatch(learner.model.device)
        self._last_line = time.monotonic()

    def run(self, stop: StopRequest) -> None:
        """Trains through all phases.

        Raises :class:`TrainingInterrupted` when ``stop`` was requested, after the step and a checkpoint, and
        :class:`~fastbert.runs.errors.TrainingError` once more steps than allowed were left out, or a checkpoint could not be
        written; checkpoints of earlier steps stay as they are. However it ends, no checkpoint is still being written.
        """
        settings, state = self.settings, self.state
        self._stop = stop
        self.learner.model.train()
        with (
            stop.deferred(),
            self.writer,
            tqdm(total=settings.steps, initial=state.step, desc="pretrain", bar_format=BAR_FORMAT, disable=None) as bar,
        ):
            self._clock.lap()
            for phase in settings.phases:
                if state.step < phase.last_step:
                    self._run_phase(phase, bar)

    def _reasons_against_recording(self) -> list[str]:
        """Said, so that nobody takes what they asked for for given."""
        reasons = not_recorded_reasons(self.settings, self.learner, self.processes)
        if reasons:
            self.say(f"The training step is not recorded as a CUDA graph (--cuda-graph): {'; '.join(reasons)}")
        return reasons

    def _run_phase(self, phase: Phase, bar: tqdm) -> None:
        state, device = self.state, self.learner.model.device
        if phase.number > 1 and state.step == phase.first_step:
            # With an epoch of its own: the text that comes first is not that which came first before.
            state.position = asdict(Position(epoch=state.position["epoch"] + 1))
            self.learner.guard.reset()
            self.say(f"From step {phase.first_step + 1:,} on: sequences of at most {phase.max_seq_length} tokens")
        batches = self.data.batches[phase.number]
        if self._records:
            self._step = self.learner.step  # lets go of the memory of a step that was recorded for another length
            self._step = GraphedStep(self.learner, batches.most_labels, CudaRecorder(device, self.say)).step
        if self.settings.workers:
            self.writer.wait()  # a process that is forked while a thread holds a lock would wait for it for ever
        steps = step_batches(
            batches,
            Position(**state.position),
            batches_per_step=self.settings.batches_per_step,
            rank=self.processes.rank,
            world_size=self.processes.count,
            workers=self.settings.workers,
        )
        with closing(device_steps(steps, device, batches.filled if self._records else None)) as steps_on_device:
            arriving = counting_waits(steps_on_device, state)
            while state.step < phase.last_step:
                self._run_step(next(arriving), bar)

    def _run_step(self, batches: DeviceStep, bar: tqdm) -> None:
        """Takes a step and does what is due after it."""
        self.writer.raise_error()
        settings, state = self.settings, self.state
        learning_rate = self.learner.learning_rate
        self._take_step(batches)
        bar.update()
        last = state.step == settings.steps
        # Several processes stop when all know that one of them was asked to: once they have read the step's totals.
        stops = self._stop.requested and self.processes.count == 1
        saves = stops or state.step % settings.save_steps == 0 or last
        logs = state.step % settings.log_steps == 0 or last
        if saves or logs or self.comparison is not None or self.learner.model.device.type == "cpu":
            self._read_scores()
            self._show_progress(bar)
            stops = stops or self._stop_agreed
        if logs:
            self._log(learning_rate, bar)
        if self.comparison is not None and state.step == self.comparison.last_step:
            self._finish_comparison()
        if saves or stops:
            checkpoint = self._save()
            if stops:
                self.writer.wait()
                raise TrainingInterrupted(state.step, checkpoint)

    def _take_step(self, step: DeviceStep) -> None:
        number = self.state.step + 1
        totals = self._totals(step)
        if self.comparison is None:
            scores = self._step(self._micro_batches(step, totals))
        else:
            with self._clock.paused():
                scores = self.comparison.step(number, step.batches[0], self.learner)
            self._clock.add(self.comparison.steps[-1].seconds)
        self._pending.append(TakenStep(number, self.state.position, totals, scores))
        self.state.step, self.state.position = number, asdict(step.position)

    def _totals(self, step: DeviceStep) -> Tensor:
        """Of the step in all processes: masked tokens, sequences, tokens, model FLOPs; how many were asked to stop. float64 (5,).

        On the device, so that nobody waits for anybody before the gradients are summed.
        """
        own = (
            sum(step.masked),
            sum(step.sequences),
            sum(step.tokens),
            self.telemetry.flops(step),
            self._stop.requested,
        )
        totals = torch.tensor(own, dtype=torch.float64)
        return self.processes.sum(totals.to(self.learner.model.device, non_blocking=True))

    def _micro_batches(self, step: DeviceStep, totals: Tensor) -> list[MicroBatch]:
        """The step's batches with their shares of its masked tokens and sentences."""
        if self.processes.count == 1:
            all_masked, all_sequences = sum(step.masked), sum(step.sequences)
        else:
            all_masked, all_sequences = totals[MASKED], totals[SEQUENCES]
        batches = []
        for number, (batch, masked) in enumerate(zip(step.batches, step.masked, strict=True)):
            nsp_share = mlm_share = _share(masked, all_masked)
            if self.settings.objective == "mlm-nsp":
                nsp_share = _share(step.sequences[number], all_sequences)
            in_step = number * self.processes.count + self.processes.rank
            seed = dropout_seed(self.settings.seed, self.state.step + 1, in_step)
            batches.append(MicroBatch(batch.model_inputs(), mlm_share, nsp_share, seed))
        return batches

    def _read_scores(self) -> None:
        """Brings the scores of the last steps to the host in one transfer."""
        values = torch.stack([torch.cat([step.scores, step.totals]) for step in self._pending]).tolist()
        for step, row in zip(self._pending, values, strict=True):
            scores, totals = BatchScores(*row[:-TOTALS]), row[-TOTALS:]
            tokens = int(totals[TOKENS])
            self._stop_agreed = self._stop_agreed or (self.processes.count > 1 and totals[STOPS] > 0)
            if scores.reason is not None:
                self._note_skipped(step, scores.reason)
                continue
            self.state.window.add(scores, tokens, totals[FLOPS])
            self.state.tokens += tokens
        self._pending.clear()
        seconds = self._clock.lap()
        self.state.window.seconds += seconds
        self.state.seconds += seconds
        check_skipped(self.state.skipped, self.settings.max_skipped_steps)

    def _note_skipped(self, step: TakenStep, reason: str) -> None:
        skipped = {"step": step.number, **step.position, "reason": reason}
        self.state.skipped.append(skipped)
        self.metrics.write({"step": step.number, "skipped": skipped})
        self.say(f"left out {skipped_text(skipped)}")

    def _show_progress(self, bar: tqdm) -> None:
        if self.state.window.steps:
            bar.set_postfix_str(_progress_text(self.telemetry.row(self.state, 0.0)), refresh=False)

    def _log(self, learning_rate: float, bar: tqdm) -> None:
        if not self.state.window.steps:
            return
        row = {**self.telemetry.row(self.state, learning_rate), **peak_memory(self.learner.model.device)}
        self.metrics.write(row)
        self.state.window = Window.empty()
        # Where the output is no terminal there is no bar: a line now and then instead.
        if bar.disable and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self.say(f"step {self.state.step:,} of {self.settings.steps:,}: {_progress_text(row)}")
            self._last_line = time.monotonic()

    def _finish_comparison(self) -> None:
        with self._clock.paused():
            self.comparison.measure_held_out(self.learner.model, self.data.held_out)
        self.state.comparison = self.comparison.state()
        self.comparison = None

    def _save(self) -> Path:
        with self._clock.paused():
            if self.comparison is not None:
                self.state.comparison = self.comparison.state()
            if not self.processes.is_main:
                return checkpoint_path(self.output, self.state.step)
            self.writer.wait()  # before the copies: there is memory for those of one checkpoint
            return self.writer.start(self.state.step, snapshot_run(self.state, self.learner, self.data.tokenizer, self.comparison))


def _share(count: int, total: int | Tensor) -> float | Tensor:
    """In the precision of the loss, also where the total is on the device."""
    share = count / total
    return share.float() if isinstance(share, Tensor) else share


def _progress_text(row: dict[str, float]) -> str:
    accuracies = [f"{label} {row[name]:.1%}" for label, name in (("MLM", "mlm_accuracy"), ("NSP", "nsp_accuracy")) if name in row]
    text = f"loss {row['loss']:.3f}, accuracy {' '.join(accuracies)}, {row['tokens_per_second']:,.0f} tokens/s"
    return f"{text}, MFU {row['mfu']:.0%}" if "mfu" in row else text
