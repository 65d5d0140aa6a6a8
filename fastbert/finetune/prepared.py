"""Before the first step: all splits of a task read, checked and made into model inputs."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastbert.data.sources import Source
from fastbert.runs import Say
from fastbert.runs.errors import SettingsError
from fastbert.tasks import metrics
from fastbert.tasks.examples import Examples
from fastbert.tasks.model import check_length, load_config, load_task_tokenizer, longest_sequence
from fastbert.tasks.task import Features, Task

from .modes import check_config
from .settings import FinetuneSettings

TRAIN, DEV = "train", "dev"
# What a task takes where nobody says: windows of questions as in Devlin et al. (2019).
_DEFAULT_LENGTHS = {"questions": 384}


@dataclass(frozen=True)
class Split:
    """``labelled``: whether its labels are known, so that it can be scored."""

    name: str
    examples: Examples
    features: Features
    labelled: bool

    @cached_property
    def tokens(self) -> int:
        return sum(_tokens(row["input_ids"]) for row in self.features.rows)

    def facts(self, task: Task) -> dict[str, Any]:
        """Counts, JSON-ready."""
        return {
            "labels": task.label_counts(self.examples) if self.labelled else {},
            "source": self.examples.source,
            "examples": len(self.examples),
            "rows": len(self.features.rows),
            "tokens": self.tokens,
            "truncated": self.features.truncated,
            "notices": self.features.notices,
            "labelled": self.labelled,
        }


@dataclass(frozen=True)
class PreparedTask:
    """``splits``: train and dev, and what else there was (test, dev_mismatched, ...)."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    splits: dict[str, Split]

    @property
    def train(self) -> Split:
        return self.splits[TRAIN]

    @property
    def dev(self) -> Split:
        return self.splits[DEV]


def prepare_task(task: Task, sources: dict[str, Source], settings: FinetuneSettings, say: Say) -> PreparedTask:
    """Reads and checks everything, so that bad data end a run before it begins.

    Raises DataError naming file, row and column, and SettingsError for a length that the model does not take, for what its
    configuration refuses and for packages that are missing.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise SettingsError("transformers' Trainer needs accelerate: pip install 'fastbert[train]'")
    config = load_config(settings.model)
    check_config(config, settings)
    tokenizer = load_task_tokenizer(settings.model, config, task)
    longest = longest_sequence(config, tokenizer)
    max_seq_length = settings.max_seq_length or min(longest, _DEFAULT_LENGTHS.get(task.family, longest))
    check_length(max_seq_length, longest, settings.model)

    examples = {name: task.read(source) for name, source in sources.items()}
    for split in examples.values():
        for note in split.notes:
            say(note)
    # Of all training data: a label that is only in the part held out, or that --limit leaves out, is a known one.
    task = task.with_labels_of(examples[TRAIN])
    for module in task.score_modules:
        metrics.optional(module)  # to be missed now, and not when the first epoch has ended
    if DEV not in examples:
        examples[TRAIN], examples[DEV] = held_out(examples[TRAIN], settings.dev_fraction)
        say(f"No dev data: {len(examples[DEV]):,} of the training examples are held out for it, the same in every run")
    elif all(getattr(example, "label", None) == () for example in examples[DEV]):
        raise examples[DEV].error(None, "label", f"names no label in {len(examples[DEV])} rows: there is nothing to score")
    labelled = {name: name in (TRAIN, DEV) or _has_labels(split) for name, split in examples.items()}
    if settings.limit is not None:
        examples = {name: drawn(split, settings.limit) for name, split in examples.items()}
    for name, split in examples.items():
        task.check(split, labelled=labelled[name])
    splits = {}
    for name, split in examples.items():
        features = task.features(split, tokenizer, max_seq_length, labelled=labelled[name])
        splits[name] = Split(name, split, features, labelled[name])
        say(_line(splits[name].facts(task), name, max_seq_length))
    if task.labels:
        say(f"Labels ({len(task.labels)}): {', '.join(task.labels[:20])}{', ...' if len(task.labels) > 20 else ''}")
    return PreparedTask(task, tokenizer, max_seq_length, splits)


def held_out(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    """(the rest, ``fraction`` of the examples): a draw that depends on the examples alone, the same in every run. Questions
    about the same context stay together. Raises DataError where that leaves nothing for one side."""
    groups: dict[Any, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(getattr(example, "context", number), []).append(number)
    if len(groups) < 2:
        shared = " about one context" if len(examples) > 1 else ""
        problem = f"holds {len(examples)} examples{shared}, and none can be held out for dev; --dev names a file"
        raise examples.error(None, None, problem)
    order = list(groups.values())
    random.Random(0).shuffle(order)
    wanted = max(1, round(fraction * len(examples)))
    chosen: set[int] = set()
    for group in order[:-1]:
        if len(chosen) < wanted:
            chosen.update(group)
    parts: tuple[list[Any], list[Any]] = ([], [])
    for number, example in enumerate(examples):
        parts[number in chosen].append(example)
    return replace(examples, items=parts[0]), replace(examples, items=parts[1])


def drawn(examples: Examples, count: int) -> Examples:
    """At most ``count`` of the examples, in their order: a draw that depends on their number alone (files may be sorted)."""
    if len(examples) <= count:
        return examples
    chosen = sorted(random.Random(0).sample(range(len(examples)), count))
    return replace(examples, items=[examples.items[number] for number in chosen])


def _has_labels(examples: Examples) -> bool:
    """Whether any example has: where some have, all must. No label of several in all of them is how those of a test set are held
    back; no answer in the context (SQuAD 2.0) is known."""
    absent = {"label": (None, ()), "tags": (None,), "answers": (None,)}
    return any(getattr(example, field, None) not in values for example in examples for field, values in absent.items())


def _line(facts: dict[str, Any], name: str, max_seq_length: int) -> str:
    line = f"{name}: {facts['examples']:,} examples, {facts['tokens']:,} tokens ({facts['source']})"
    if facts["rows"] != facts["examples"]:
        line += f", in {facts['rows']:,} rows of at most {max_seq_length} tokens"
    if facts["truncated"]:
        line += f"; {facts['truncated']:,} are longer than {max_seq_length} tokens and were cut"
    return "; ".join([line, *facts["notices"]])


def _tokens(ids: list[Any]) -> int:
    return sum(map(_tokens, ids)) if ids and isinstance(ids[0], list) else len(ids)
