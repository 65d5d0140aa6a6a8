"""The training loop: steps, the numbers about them, checkpoints, and an orderly stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fastbert.data.batches import PackedBatch

from .compare import Comparison
from .errors import TrainingInterrupted
from .interrupt import StopRequest
from .learner import Learner, synchronize
from .metrics import BatchScores, MetricsFile, Window, batch_scores
from .prepare import Say
from .run_state import RunState, save_run
from .settings import PretrainSettings

SECONDS_BETWEEN_LINES = 10.0
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


class TrainingLoop:
    """Takes ``learner`` from ``state.step`` to ``settings.steps``; ``state`` is kept up to date and saved to ``output``.

    ``comparison`` is trained beside it while it lasts, and let go of (its numbers stay in ``state.comparison``) once done.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        state: RunState,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        held_out_batches: list[PackedBatch],
        comparison: Comparison | None,
        metrics: MetricsFile,
        say: Say,
    ):
        self.settings = settings
        self.output = Path(settings.output)
        self.state = state
        self.learner = learner
        self.tokenizer = tokenizer
        self.held_out_batches = held_out_batches
        self.comparison = comparison
        self.metrics = metrics
        self.say = say
        self._pending: list[tuple[int, int, torch.Tensor]] = []
        self._clock = Stopwatch(learner.model.device)
        self._last_line = time.monotonic()

    def run(self, batches: Iterator[PackedBatch], stop: StopRequest) -> None:
        """Trains on ``batches``, which begin with the batch of step ``state.step + 1``.

        Raises :class:`TrainingInterrupted` when ``stop`` was requested, after the step and a checkpoint, and
        :class:`~fastbert.train.errors.TrainingError` for a loss or gradient that is not finite; checkpoints of earlier steps
        stay as they are.
        """
        settings, state, device = self.settings, self.state, self.learner.model.device
        self.learner.model.train()
        with (
            stop.deferred(),
            tqdm(total=settings.steps, initial=state.step, desc="pretrain", bar_format=BAR_FORMAT, disable=None) as bar,
        ):
            self._clock.lap()
            while state.step < settings.steps:
                learning_rate = self.learner.learning_rate
                self._take_step(next(batches).to(device))
                bar.update()
                saves = stop.requested or state.step % settings.save_steps == 0 or state.step == settings.steps
                logs = state.step % settings.log_steps == 0 or state.step == settings.steps
                if saves or logs or self.comparison is not None or device.type == "cpu":
                    self._read_scores()
                    self._show_progress(bar)
                if logs:
                    self._log(learning_rate, bar)
                if self.comparison is not None and state.step == self.comparison.last_step:
                    self._finish_comparison()
                if saves:
                    checkpoint = self._save()
                    if stop.requested:
                        raise TrainingInterrupted(state.step, checkpoint)

    def _take_step(self, batch: PackedBatch) -> None:
        step = self.state.step + 1
        if self.comparison is None:
            inputs = batch.model_inputs()
            outputs, grad_norm = self.learner.step(inputs)
        else:
            with self._clock.paused():
                inputs = batch.model_inputs()
                outputs, grad_norm = self.comparison.step(step, batch, self.learner)
            self._clock.add(self.comparison.steps[-1].seconds)
        self._pending.append((step, batch.num_tokens, batch_scores(outputs, inputs["next_sentence_label"], grad_norm)))
        self.state.step = step

    def _read_scores(self) -> None:
        """Brings the scores of the last steps to the host in one transfer."""
        values = torch.stack([scores for _, _, scores in self._pending]).tolist()
        for (step, tokens, _), row in zip(self._pending, values, strict=True):
            scores = BatchScores(*row)
            scores.check_finite(step)
            self.state.window.add(scores, tokens)
            self.state.tokens += tokens
        self._pending.clear()
        seconds = self._clock.lap()
        self.state.window.seconds += seconds
        self.state.seconds += seconds

    def _show_progress(self, bar: tqdm) -> None:
        bar.set_postfix_str(_progress_text(self.state.window.row(self.state.step, 0.0)), refresh=False)

    def _log(self, learning_rate: float, bar: tqdm) -> None:
        row = self.state.window.row(self.state.step, learning_rate)
        self.metrics.write(row)
        self.state.window = Window.empty()
        # Where the output is no terminal there is no bar: a line now and then instead.
        if bar.disable and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self.say(f"step {self.state.step:,} of {self.settings.steps:,}: {_progress_text(row)}")
            self._last_line = time.monotonic()

    def _finish_comparison(self) -> None:
        with self._clock.paused():
            self.comparison.measure_held_out(self.learner.model, self.held_out_batches)
        self.state.comparison = self.comparison.state()
        self.comparison = None

    def _save(self) -> Path:
        with self._clock.paused():
            if self.comparison is not None:
                self.state.comparison = self.comparison.state()
            return save_run(self.output, self.state, self.learner, self.tokenizer, self.comparison)


def _progress_text(row: dict[str, float]) -> str:
    return (
        f"loss {row['loss']:.3f}, accuracy MLM {row['mlm_accuracy']:.1%} NSP {row['nsp_accuracy']:.1%}, "
        f"{row['tokens_per_second']:,.0f} tokens/s"
    )
