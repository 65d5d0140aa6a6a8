"""A fine-tuned folder on new inputs.

from fastbert import Predictor

predict = Predictor.from_pretrained("runs/finetune")
predict(["A fine film.", "A dull one."])  # [{"label": ..., "probability": ..., "probabilities": {...}}, ...]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.tables import check_unicode
from fastbert.runs.errors import SettingsError
from fastbert.runs.model import pick_device

from .examples import Examples
from .model import TaskModel, check_length, load_config, load_model, longest_sequence, quantized, stays_int8
from .outputs import TOKENS_PER_BATCH, model_outputs
from .registry import load_task
from .task import Task

DTYPES = ("float32", "bfloat16", "int8")


class Predictor:
    """Predictions of a folder that ``fastbert finetune`` wrote; what they look like is said by the task's ``predictions``.

    ``predictor(inputs)`` takes, by task: texts or pairs of texts; texts or lists of words (tags, entities); dicts with ``question``
    and ``context``; dicts with ``context`` and ``choices``.
    """

    def __init__(self, task: Task, loaded: TaskModel, max_seq_length: int, tokens_per_batch: int = TOKENS_PER_BATCH) -> None:
        self.task, self.loaded = task, loaded
        self.max_seq_length, self.tokens_per_batch = max_seq_length, tokens_per_batch

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: str | None = None,
        device: str = "auto",
        max_seq_length: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> Predictor:
        """``dtype``: of the arithmetic, float32 unless given; int8 (CPU only) quantizes the encoder's matmuls, and what was saved
        in int8 stays so. Raises DataError for a folder without a task, SettingsError for what cannot work."""
        if dtype not in (None, *DTYPES):
            raise SettingsError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        for option, value, least in (("max-seq-length", max_seq_length, 8), ("tokens-per-batch", tokens_per_batch, 1)):
            if value is not None and value < least:
                raise SettingsError(f"--{option} is {value}; it must be at least {least}")
        task, trained_length = load_task(Path(folder))
        config = load_config(str(folder))
        in_int8 = stays_int8(str(folder), config, dtype)
        loaded = load_model(str(folder), task)
        if loaded.new:
            raise DataError(f"{folder}: the model lacks weights ({', '.join(loaded.new)}), which training would have saved")
        model = loaded.model.eval()
        if dtype == "bfloat16":
            model.bfloat16()
        if dtype == "int8" and not in_int8:
            quantized(model)
        model.to(pick_device(device))
        if max_seq_length is not None:
            check_length(max_seq_length, longest_sequence(config, loaded.tokenizer), str(folder))
        return cls(task, loaded, max_seq_length or trained_length, tokens_per_batch)

    def __call__(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """One prediction for each input. Raises DataError naming an input that cannot be used, before anything is computed."""
        if isinstance(inputs, (str, bytes, Mapping)):
            raise TypeError(f"expected a list of inputs, not a single {type(inputs).__name__}")
        inputs = list(inputs)
        for number, value in enumerate(inputs, 1):
            check_unicode(value, "inputs", f"input {number}", None)
        return self.predict(self.task.examples_from(inputs))

    def read(self, path: str | Path, *, text_column: str | None = None, text_pair_column: str | None = None) -> Examples:
        """The examples of a file, whose labels, if it has some, play no part; the columns are those of training unless named here.

        Raises DataError for the file, SettingsError for columns that the task does not take.
        """
        named = {"words" if self.task.family == "words" else "text": text_column, "text_pair": text_pair_column}
        columns = {field: name for field, name in named.items() if name is not None}
        task = replace(self.task, columns={**self.task.columns, **columns}) if columns else self.task
        return task.read_unlabelled(Source(Path(path)))

    def predict(
        self, examples: Examples, *, progress: str | None = None, say: Callable[[str], None] = lambda line: None
    ) -> list[dict[str, Any]]:
        """``progress``: the title of a progress bar on stderr; ``say`` gets a line on what the model does not see as it is, rows
        that were left out of a file among it."""
        self.task.check(examples, labelled=False)
        features = self.task.features(examples, self.loaded.tokenizer, self.max_seq_length, labelled=False)
        if features.truncated:
            say(f"{features.truncated:,} of {len(examples):,} inputs are longer than {self.max_seq_length} tokens and were cut")
        for notice in (*examples.notes, *features.notices):
            say(notice)
        outputs = model_outputs(
            self.loaded,
            features.rows,
            family=self.task.family,
            tokens_per_batch=self.tokens_per_batch,
            progress=progress,
        )
        return self.task.predictions(outputs, features, examples)
