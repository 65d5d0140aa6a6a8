"""transformers' Trainer, with scores of whole examples: several rows may be one example, and packed rows are several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastbert.runs import Say
from fastbert.runs.errors import TrainingError
from fastbert.runs.full_disk import write_errors
from fastbert.tasks.model import TaskModel

from .settings import FinetuneSettings

Score = Callable[[], dict[str, float]]


class FineTuning(Trainer):
    """``score``: the dev scores of the model as it is; what chooses the best checkpoint and stops early is among them.

    ``start``: where training began; ``aside_seconds``: spent on evaluation and checkpoints, so that what is left is training.
    """

    def __init__(self, *args: Any, score: Score, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.score = score
        self.start = Start()
        self.add_callback(self.start)
        self.aside_seconds = 0.0

    def finish_from(self, checkpoint: Path) -> bool:
        """Takes the state and the best model of a training that ended with ``checkpoint``, by its steps or by early stopping, as
        :meth:`train` leaves them; False, with nothing done, where it had not ended. ``train`` would take a step too many."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if not state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            return False
        # By its number, since the folder may have been moved.
        state.best_model_checkpoint = str(checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"))
        self.state, self.start.epoch = state, float(state.epoch or 0)
        self._load_best_model()
        return True

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Raises TrainingError for a loss or a gradient that is not finite: no later step would mend it."""
        for name, value in (("loss", logs.get("loss")), ("gradient's norm", logs.get("grad_norm"))):
            if value is not None and not math.isfinite(float(value)):
                where = f"the {name} is {float(value)} at step {self.state.global_step:,}"
                raise TrainingError(f"{where}: training diverged; a lower --learning-rate helps")
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        started = time.perf_counter()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.score().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.aside_seconds += time.perf_counter() - started
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Raises TrainingError where it cannot be written."""
        started = time.perf_counter()
        with write_errors(Path(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)
        self.aside_seconds += time.perf_counter() - started


class Start(TrainerCallback):
    """Where a training begins: in ``epoch`` 0, or in that of the checkpoint that it goes on from."""

    def __init__(self) -> None:
        self.epoch = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = float(state.epoch or 0)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, which goes on counting where the checkpoint's left off: a resumed run ends where it would have ended."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if saved := state.stateful_callbacks.get(type(self).__name__):
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]


class Lines(TrainerCallback):
    """Says the scores of each evaluation, in place of transformers' dictionaries on stdout; with a progress bar on a terminal."""

    def __init__(self, say: Say, metric: str) -> None:
        self.say, self.metric = say, metric
        self.loss: float | None = None  # before the first is logged
        self.bar = tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        shown = None if state.is_world_process_zero else True  # None: where stderr is a terminal
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=shown, leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        score = logs.get(f"eval_{self.metric}")
        if score is not None and state.is_world_process_zero:
            others = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
            rest = "".join(f", {key} {value:.4f}" for key, value in others.items() if key != self.metric)
            self.bar.clear()
            loss = "" if self.loss is None else f"loss {self.loss:.4f}, "
            self.say(f"  step {state.global_step:,}: {loss}dev {self.metric} {score:.4f}{rest}")


def build_trainer(
    loaded: TaskModel,
    rows: list[dict[str, Any]],
    settings: FinetuneSettings,
    seed: int,
    *,
    metric: str,
    score: Score,
    folder: Path,
    say: Say,
    **changes: Any,
) -> FineTuning:
    """A Trainer of ``loaded`` on the features ``rows``; checkpoints go to ``folder``. ``metric``: of ``score`` the one, the
    higher the better, that the best checkpoint has; ``changes``: to transformers' TrainingArguments."""
    by_steps = settings.eval_steps is not None
    steps_in_epoch = -(-len(rows) // (settings.batch_size * settings.gradient_accumulation_steps))
    arguments: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.effective_learning_rate,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        eval_strategy="steps" if by_steps else "epoch",
        eval_steps=settings.eval_steps,
        save_strategy="steps" if by_steps else "epoch",
        save_steps=settings.eval_steps or 500,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        logging_nan_inf_filter=False,  # which would show a mean of other steps in place of NaN
        logging_steps=max(1, min(50, steps_in_epoch // 10)),
        seed=seed,
        bf16=settings.dtype == "bfloat16",
        use_cpu=loaded.model.device.type == "cpu",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    arguments = TrainingArguments(**(arguments | changes))
    callbacks: list[TrainerCallback] = [Lines(say, metric)]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStopping(settings.early_stopping))
    trainer = FineTuning(
        loaded.model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows[:1],  # Trainer wants one; ``score`` has its own
        data_collator=loaded.collate,
        processing_class=loaded.tokenizer,
        callbacks=callbacks,
        score=score,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
