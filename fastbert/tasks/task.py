"""What every family of tasks can do; fine-tuning, prediction and GLUE know nothing else about a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fastbert.data.sources import Source

from .examples import Examples

Outputs = Sequence[NDArray]


@dataclass(frozen=True)
class Features:
    """Model inputs. ``rows``: what transformers' and fastbert's collators take (input_ids, token_type_ids, labels, ...);
    ``example_of``: for each row the number of its example (a long one makes several rows); ``notes``: for each row what the task
    needs to read its outputs (where its words are, ...); ``truncated``: examples that were cut to the longest sequence;
    ``notices``: what else was done to them, in words."""

    rows: list[dict[str, Any]]
    example_of: list[int]
    notes: list[Any] = field(default_factory=list)
    truncated: int = 0
    notices: list[str] = field(default_factory=list)


def unnamed(count: int) -> tuple[str, ...]:
    """What transformers calls the classes of a head whose outputs have no names."""
    return tuple(f"LABEL_{number}" for number in range(count))


def labels_config(labels: Sequence[str], problem: str | None = None) -> dict[str, Any]:
    """What a configuration says of a head with these labels: all of it, or names that a checkpoint's head had would stay."""
    id2label = dict(enumerate(labels))
    return {
        "num_labels": len(labels),
        "id2label": id2label,
        "label2id": {label: number for number, label in id2label.items()},
        "problem_type": problem,
    }


@dataclass(frozen=True)
class Task(ABC):
    """``name``: as ``--task`` gives it; ``labels``: names of the classes by their number, empty before they are known or where
    there are none; ``columns``: which columns of a table hold which field of an example, where the user said so."""

    name: str
    labels: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)

    auto_class: ClassVar[str]  # of transformers: "AutoModelForSequenceClassification"
    family: ClassVar[str]  # "text", "words", "questions", "choices"
    pads: ClassVar[bool] = False  # True: the model takes no packed rows

    @property
    def main_metric(self) -> str:
        """The score that chooses the best checkpoint where nobody says."""
        return self.metric_names[0]

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """The scores of :meth:`scores` that are better when higher."""

    @property
    def score_modules(self) -> tuple[str, ...]:
        """Modules of optional packages that :meth:`scores` needs."""
        return ()

    @abstractmethod
    def read(self, source: Source) -> Examples:
        """One split. Raises DataError naming file, row and column."""

    def read_unlabelled(self, source: Source) -> Examples:
        """What is to be predicted; labels, where there are some, need not be right."""
        return self.read(source)

    @abstractmethod
    def examples_from(self, inputs: Sequence[Any]) -> Examples:
        """Examples without labels out of what a caller has: texts, pairs, lists of words, dicts with question and context."""

    @abstractmethod
    def with_labels_of(self, train: Examples) -> Task:
        """The same task with the labels that the training data have. Raises DataError where they cannot be learned (one class)."""

    @abstractmethod
    def check(self, examples: Examples, *, labelled: bool) -> None:
        """Raises DataError for an example that fits not: an unknown label, an empty text, labels that are missing."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What the model's configuration must say: num_labels, id2label, label2id, problem_type."""

    @abstractmethod
    def features(self, examples: Examples, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, *, labelled: bool) -> Features:
        """The model's inputs, with labels (``labelled``) or without."""

    @abstractmethod
    def scores(self, outputs: Outputs, features: Features, examples: Examples) -> dict[str, float]:
        """Metrics from 0 to 1 (correlations from -1); ``outputs``: for each row of features its logits, float32: (num_labels,) of a
        sequence, (length, num_labels) of tokens, (length, 2) of start and end, (num_choices,)."""

    def label_counts(self, examples: Examples) -> dict[str, int]:
        """How often each label stands in labelled ``examples``, where the task has labels."""
        return {}

    def confusion(self, predictions: Sequence[dict[str, Any]], examples: Examples) -> tuple[list[str], list[str]] | None:
        """(true labels, predicted ones) of all that has exactly one label, in equal order; None where a task has no such thing."""
        return None

    @abstractmethod
    def predictions(self, outputs: Outputs, features: Features, examples: Examples) -> list[dict[str, Any]]:
        """For each example what a user wants to read, JSON-ready: label and probabilities, entities, answer, ..."""
