"""Text classification: one label of several, several of many, or a number, for a text or a pair of texts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.tables import Table, file_kind, read_table

from . import metrics
from .columns import find_label_columns, find_text_columns
from .examples import Examples, TextExample
from .task import Features, Outputs, Task, labels_config, unnamed

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
_METRICS = {SINGLE: metrics.CLASSIFICATION, MULTI: metrics.MULTI_LABEL, REGRESSION: metrics.REGRESSION}
_LABELS_SHOWN = 12
_NUMBER = re.compile("-?[0-9]+")
_LARGEST = math.sqrt(np.finfo(np.float32).max)  # of a number that is learned by its squared error
_FALSE, _TRUE = ("", "0", "0.0", "false", "no"), ("1", "1.0", "true", "yes")


@dataclass(frozen=True)
class TextClassification(Task):
    """``problem``: transformers' problem_type. ``columns``: of the fields text, text_pair and label; several label columns
    (``"a,b,c"``) are a label each, with 0 or 1 in it. ``label_separator``: between the labels of a text (multi-label). ``header``:
    the columns of files that have no header line. ``metric``: the main one, where not the problem's usual. ``pairs``: whether an
    example has two texts, None before the training data have shown it."""

    problem: str = SINGLE
    label_separator: str = ","
    header: tuple[str, ...] | None = None
    metric: str | None = None
    pairs: bool | None = None

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    family: ClassVar[str] = "text"

    @property
    def main_metric(self) -> str:
        return self.metric or self.metric_names[0]

    @property
    def metric_names(self) -> tuple[str, ...]:
        return _METRICS[self.problem]

    @property
    def score_modules(self) -> tuple[str, ...]:
        return ("scipy.stats" if self.problem == REGRESSION else "sklearn.metrics",)

    def read(self, source: Source) -> Examples[TextExample]:
        table = read_table(source, header=self.header)
        return self._examples(table, find_label_columns(table, self.columns))

    def read_unlabelled(self, source: Source) -> Examples[TextExample]:
        """As :meth:`read`, without a look at the labels; a .txt file has a text in each line, whatever the columns are called."""
        if source.path is not None and file_kind(source.path) == ".txt":
            table = read_table(source)
            items = [TextExample(place, row["text"]) for place, row in zip(table.places, table.rows, strict=True)]
            return Examples(table.source, items, {})
        return self._examples(read_table(source, header=self.header), [])

    def _examples(self, table: Table, names: list[str]) -> Examples[TextExample]:
        text, pair = find_text_columns(table, self.columns)
        columns = {"text": text, **({"text_pair": pair} if pair else {}), **({"label": ", ".join(names)} if names else {})}
        examples = Examples(table.source, [], columns, table.columns, tuple(names) if len(names) > 1 else ())
        label = self._label_reader(table, names, examples)
        for number, (place, row) in enumerate(zip(table.places, table.rows, strict=True)):
            example = TextExample(place, _text(table, number, text), _text(table, number, pair) if pair else None)
            examples.items.append(replace(example, label=label(example, row)))
        return examples

    def _label_reader(
        self, table: Table, names: list[str], examples: Examples
    ) -> Callable[[TextExample, dict[str, Any]], str | float | tuple[str, ...] | None]:
        if not names:
            return lambda example, row: None
        if len(names) > 1 and self.problem != MULTI:
            problem = f"{len(names)} label columns are for --task multi-label-classification; --task {self.name} reads one"
            raise examples.error(None, None, problem)
        if len(names) > 1:
            return lambda example, row: tuple(name for name in names if _is_true(row[name], name, example, examples))
        (name,) = names
        if self.problem == REGRESSION:
            return lambda example, row: _number(row[name], example, examples)
        if self.problem == MULTI:
            return lambda example, row: self._several(row[name], example, examples)
        return lambda example, row: _one_class(row[name], example, examples)

    def _several(self, value: Any, example: TextExample, examples: Examples) -> tuple[str, ...]:
        if isinstance(value, (list, tuple)):
            found = [_label(item, example, examples) for item in value]
        else:
            found = [] if value is None else _label(value, example, examples).split(self.label_separator)
        return tuple(dict.fromkeys(label for item in found if (label := item.strip())))

    def examples_from(self, inputs: Sequence[Any]) -> Examples[TextExample]:
        """inputs: texts, or pairs of texts."""
        items = []
        for number, value in enumerate(inputs, 1):
            pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(text, str) for text in value)
            if not pair and not isinstance(value, str):
                raise DataError.at("inputs", f"input {number}", None, f"holds {value!r}, expected a text or a pair of texts")
            items.append(TextExample(f"input {number}", *(value if pair else (value,))))
        return Examples("inputs", items, {})

    def with_labels_of(self, train: Examples[TextExample]) -> TextClassification:
        self.check_present(train)
        pairs = train.items[0].text_pair is not None
        if self.labels:
            counts = self.label_counts(train)
            if len(counts) == 1 and set(counts.values()) == {len(train)}:
                raise _never_changes(train, next(iter(counts)))
            return replace(self, pairs=pairs)
        if self.problem == REGRESSION:
            if len({example.label for example in train}) == 1:
                raise _never_changes(train, train.items[0].label)
            return replace(self, pairs=pairs)
        labels = train.label_columns or tuple(sorted(self.label_counts(train), key=_order))
        self._check_learnable(train, labels)
        return replace(self, labels=labels, pairs=pairs)

    def _check_learnable(self, train: Examples[TextExample], labels: tuple[str, ...]) -> None:
        """Raises DataError for a label that never changes, for none at all, and for a column of 0 and 1 that names none."""
        if not labels:
            raise train.error(None, "label", f"names no label in {len(train)} rows: there is nothing to learn")
        counts = self.label_counts(train)
        for label in labels:
            if (count := counts.get(label, 0)) in (0, len(train)):
                if train.label_columns:
                    problem = f"holds {'1' if count else '0'} in all {len(train)} rows: there is nothing to learn"
                    raise DataError.at(train.source, None, label, problem)
                raise _never_changes(train, label)
        alone = self.problem == MULTI and not any(len(example.label) > 1 for example in train)
        if alone and not train.label_columns and {label.lower() for label in labels} <= {*_FALSE, *_TRUE}:
            held = " or ".join(map(repr, labels))
            problem = f"holds {held}, expected names of labels; a single column of 0 and 1 is for --task text-classification"
            raise train.error(None, "label", problem)

    def check(self, examples: Examples[TextExample], *, labelled: bool) -> None:
        self.check_pairs(examples)
        for example in examples:
            for field in ("text", "text_pair"):
                value = getattr(example, field)
                if value is not None and not value.strip():
                    raise examples.error(example, field, "is empty")
        if labelled:
            self.check_present(examples)
            self._check_known(examples)

    def check_pairs(self, examples: Examples[TextExample]) -> None:
        """Raises DataError for an example that has one text where the model reads two, or the other way round."""
        for example in examples:
            if self.pairs is not None and self.pairs != (example.text_pair is not None):
                problem = "has no second text" if self.pairs else "has a second text"
                expected = "pairs of texts" if self.pairs else "single texts"
                raise examples.error(example, None, f"{problem}, but the training data are {expected}")

    def check_present(self, examples: Examples[TextExample]) -> None:
        """Raises DataError for no examples, and for one without a label."""
        if not len(examples):
            raise examples.error(None, None, "holds no examples")
        if "label" not in examples.columns:
            wanted = self.columns.get("label", "label")
            known = f", it has {', '.join(map(repr, examples.available))}" if examples.available else ""
            raise examples.error(None, None, f"has no column {wanted!r}{known}; --label-column names the column of the labels")
        for example in examples:
            if example.label is None:
                raise examples.error(example, "label", "is empty")

    def _check_known(self, examples: Examples[TextExample]) -> None:
        if self.problem == REGRESSION:
            return
        known = set(self.labels)
        for example in examples:
            for label in example.label if isinstance(example.label, tuple) else (example.label,):
                if label not in known:
                    shown = ", ".join(map(repr, self.labels[:_LABELS_SHOWN])) + (", ..." if len(known) > _LABELS_SHOWN else "")
                    raise examples.error(example, "label", f"holds {label!r}; the training data have {shown}")

    def config(self) -> dict[str, Any]:
        if self.problem == REGRESSION:
            return labels_config(unnamed(1), REGRESSION)
        return labels_config(self.labels, self.problem)

    def features(
        self, examples: Examples[TextExample], tokenizer: PreTrainedTokenizerBase, max_seq_length: int, *, labelled: bool
    ) -> Features:
        if not len(examples):
            return Features([], [])
        texts = [example.text for example in examples]
        pairs = [example.text_pair for example in examples] if examples.items[0].text_pair is not None else None
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_seq_length, return_attention_mask=False)
        self.check_tokens(examples, encoded.encodings)
        rows = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
        if labelled:
            for row, example in zip(rows, examples, strict=True):
                row["labels"] = self._target(example)
        truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        return Features(rows, list(range(len(rows))), truncated=truncated)

    def check_tokens(self, examples: Examples[TextExample], encodings: Sequence[Encoding]) -> None:
        """Raises DataError for a text of which the tokenizer keeps nothing (control characters alone, ...)."""
        for example, encoding in zip(examples, encodings, strict=True):
            kept = set(encoding.sequence_ids)
            for number, (field, text) in enumerate((("text", example.text), ("text_pair", example.text_pair))):
                if text is not None and number not in kept:
                    raise examples.error(example, field, f"holds {text!a}, of which the tokenizer keeps nothing")

    def _target(self, example: TextExample) -> int | float | list[float]:
        if self.problem == REGRESSION:
            return float(example.label)
        if self.problem == SINGLE:
            return self._numbers[example.label]
        return [float(label in example.label) for label in self.labels]

    @cached_property
    def _numbers(self) -> dict[Any, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def scores(self, outputs: Outputs, features: Features, examples: Examples[TextExample]) -> dict[str, float]:
        logits = np.stack(outputs)
        targets = np.array([self._target(example) for example in examples])
        if self.problem == REGRESSION:
            return metrics.regression_scores(logits[:, 0], targets)
        if self.problem == MULTI:
            return metrics.multi_label_scores(logits > 0, targets > 0)
        return metrics.classification_scores(logits.argmax(1), targets, len(self.labels))

    def label_counts(self, examples: Examples[TextExample]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        if self.problem != REGRESSION:
            for example in examples:
                counts.update(example.label if isinstance(example.label, tuple) else (example.label,))
        return dict(counts)

    def confusion(
        self, predictions: Sequence[dict[str, Any]], examples: Examples[TextExample]
    ) -> tuple[list[str], list[str]] | None:
        if self.problem != SINGLE:
            return None
        return [str(example.label) for example in examples], [prediction["label"] for prediction in predictions]

    def predictions(self, outputs: Outputs, features: Features, examples: Examples[TextExample]) -> list[dict[str, Any]]:
        """``label`` (or ``labels``, ``score`` in regression) and ``probabilities`` by label."""
        return [self._prediction(np.asarray(logits, np.float64)) for logits in outputs]

    def _prediction(self, logits: np.ndarray) -> dict[str, Any]:
        if self.problem == REGRESSION:
            return {"score": float(logits[0])}
        if self.problem == MULTI:
            probabilities = np.exp(-np.logaddexp(0, -logits))
            chosen = [label for label, logit in zip(self.labels, logits, strict=True) if logit > 0]
            return {"labels": chosen, "probabilities": dict(zip(self.labels, probabilities.tolist(), strict=True))}
        probabilities = np.exp(logits - np.logaddexp.reduce(logits))
        best = int(logits.argmax())
        return {
            "label": self.labels[best],
            "probability": float(probabilities[best]),
            "probabilities": dict(zip(self.labels, probabilities.tolist(), strict=True)),
        }


def _order(label: str) -> tuple[bool, float, str]:
    """Numbers by their size, in front of words in alphabetical order."""
    return (False, float(label), label) if _NUMBER.fullmatch(label) else (True, 0.0, label)


def _text(table: Table, number: int, column: str) -> str:
    value = table.rows[number][column]
    if value is None:
        return ""
    if (found := _without_text(value)) is not None:
        raise table.error(number, column, f"expected a text, found {found}")
    return str(value)


def _without_text(value: Any) -> str | None:
    """What a cell holds, in words, where that is neither a text nor a number to write as one."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {type(None): "null", bytes: "bytes", list: "a list", dict: "an object"}.get(type(value))


def _never_changes(train: Examples, label: Any) -> DataError:
    return train.error(None, "label", f"holds {label!r} in all {len(train)} rows: there is nothing to learn")


def _label(value: Any, example: TextExample, examples: Examples) -> str:
    """A class by its name; a whole number is 1 in all files of a data set, though it is 1.0 in columns of floats."""
    if (found := _without_text(value)) is not None:
        hint = "; lists are for multi-label-classification" if found == "a list" else ""
        raise examples.error(example, "label", f"expected one label, found {found}{hint}")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _is_true(value: Any, column: str, example: TextExample, examples: Examples) -> bool:
    """Of a column that is a label of its own; null is no."""
    text = "" if value is None else str(value).strip().lower()
    if text not in (*_FALSE, *_TRUE):
        raise DataError.at(examples.source, example.place, column, f"holds {value!r}, expected 0 or 1")
    return text in _TRUE


def _one_class(value: Any, example: TextExample, examples: Examples) -> str | None:
    """None for a label that is held back, as those of test sets are."""
    return None if value is None else _label(value, example, examples) or None


def _number(value: Any, example: TextExample, examples: Examples) -> float | None:
    """None for a number that is held back."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise examples.error(example, "label", f"holds {value!r}, expected a number") from None
    if not math.isfinite(number):
        raise examples.error(example, "label", f"holds {value!r}, expected a finite number")
    if abs(number) > _LARGEST:
        problem = f"holds {value!r}, expected a number up to {_LARGEST:.1e}: the square of its error would be no float32"
        raise examples.error(example, "label", problem)
    return number
