"""Extractive question answering (SQuAD): the answer is a span of the context, or, in SQuAD 2.0, there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.squad import read_squad
from fastbert.runs.errors import SettingsError

from .examples import Answer, Examples, QuestionExample
from .squad_metric import squad_scores
from .task import Features, Outputs, Task, labels_config, unnamed

# As in Devlin et al. (2019) and the code that came with it.
N_BEST = 20
MAX_ANSWER_TOKENS = 30
MAX_QUESTION_TOKENS = 64
NO_ANSWER = -1
_QUESTIONS_AT_ONCE = 1000  # encodings of the tokenizer are large


@dataclass(frozen=True)
class Window:
    """The context tokens of a row: from position ``first`` on; ``spans``: (n, 2) int32, their start and end in characters of the
    context."""

    first: int
    spans: NDArray[np.int32]


@dataclass(frozen=True)
class Candidates:
    """The best spans of a question over all its windows, the best first. scores: (k,) float64, sums of two logits; starts, ends:
    (k,) in characters of the context, both :data:`NO_ANSWER` where the candidate is that there is no answer."""

    scores: NDArray[np.float64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """``doc_stride``: tokens that neighbouring windows of a long context share; ``unanswerable``: whether there may be no answer,
    which the training data decide.

    A row is [CLS] question [SEP] window [SEP]. A window that has not the whole answer has its start and end at the first token.
    """

    doc_stride: int = 128
    unanswerable: bool = False

    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    family: ClassVar[str] = "questions"

    def __post_init__(self) -> None:
        if self.doc_stride < 0:
            raise SettingsError(f"doc_stride is {self.doc_stride}; it must not be negative")
        if self.columns:
            named = ", ".join(self.columns.values())
            raise SettingsError(f"--task {self.name} reads columns question, context, answers and id; it takes no others ({named})")

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("f1", "exact_match")

    def read(self, source: Source) -> Examples[QuestionExample]:
        items = []
        for question in read_squad(source):
            answers = None if question.answers is None else tuple(Answer(text, start) for text, start in question.answers)
            items.append(QuestionExample(question.place, question.id, question.question, question.context, answers))
        return Examples(str(source), items, {})

    def read_unlabelled(self, source: Source) -> Examples[QuestionExample]:
        questions = read_squad(source, labelled=False)
        return Examples(str(source), [QuestionExample(q.place, q.id, q.question, q.context) for q in questions], {})

    def examples_from(self, inputs: Sequence[Any]) -> Examples[QuestionExample]:
        """inputs: dicts with question, context and, if wanted, id; or pairs (question, context)."""
        items = []
        for number, value in enumerate(inputs, 1):
            place = f"input {number}"
            if not isinstance(value, dict) and not (isinstance(value, (list, tuple)) and len(value) == 2):
                raise DataError.at("inputs", place, None, "expected a dict with question and context, or a pair of them")
            fields = value if isinstance(value, dict) else dict(zip(("question", "context"), value))
            if missing := [field for field in ("question", "context") if not isinstance(fields.get(field), str)]:
                raise DataError.at("inputs", place, missing[0], "expected a text")
            items.append(QuestionExample(place, str(fields.get("id", number)), fields["question"], fields["context"]))
        return Examples("inputs", items, {})

    def with_labels_of(self, train: Examples[QuestionExample]) -> QuestionAnswering:
        for example in train:
            if example.answers is None:
                raise train.error(example, "answers", "has no answers")
        if not any(example.answers for example in train):
            raise train.error(None, "answers", f"none of {len(train)} questions has an answer: there is nothing to learn")
        return replace(self, unanswerable=any(not example.answers for example in train))

    def check(self, examples: Examples[QuestionExample], *, labelled: bool) -> None:
        for example in examples:
            for field in ("question", "context"):
                if not getattr(example, field).strip():
                    raise examples.error(example, field, "is empty")
            if not labelled:
                continue
            if example.answers is None:
                raise examples.error(example, "answers", "has no answers")
            for answer in example.answers:
                if answer.start < 0 or not answer.text.strip() or not example.context.startswith(answer.text, answer.start):
                    problem = f"{answer.text!r} does not stand in the context at character {answer.start}"
                    raise examples.error(example, "answers", problem)

    def config(self) -> dict[str, Any]:
        return labels_config(unnamed(2))  # logits of start and end

    # --- features ----------------------------------------------------------------------------------------------------------

    def features(
        self, examples: Examples[QuestionExample], tokenizer: PreTrainedTokenizerBase, max_seq_length: int, *, labelled: bool
    ) -> Features:
        """Rows of at most ``max_seq_length`` tokens. A question of more than :data:`MAX_QUESTION_TOKENS` tokens, or of more than
        half the room, is cut there (``truncated`` counts them); windows share at most half of what is left for the context. The
        first answer is the label."""
        room = max_seq_length - tokenizer.num_special_tokens_to_add(pair=True)
        longest = min(MAX_QUESTION_TOKENS, room // 2)
        stride = min(self.doc_stride, (room - longest) // 2)
        features = Features([], [])
        truncated = 0
        for first in range(0, len(examples), _QUESTIONS_AT_ONCE):
            some = examples.items[first : first + _QUESTIONS_AT_ONCE]
            questions = _cut_questions(some, examples, tokenizer, longest)
            truncated += sum(question != example.question for question, example in zip(questions, some))
            encoded = tokenizer(
                questions,
                [example.context for example in some],
                truncation="only_second",
                max_length=max_seq_length,
                stride=stride,
                return_overflowing_tokens=True,
                return_attention_mask=False,
            )
            example_of = encoded.pop("overflow_to_sample_mapping")
            for encoding, number, values in zip(encoded.encodings, example_of, zip(*encoded.values()), strict=True):
                example, window = some[number], _window(encoding)
                if not len(window.spans):
                    shown = f"holds {example.context[:40]!r}, of which the tokenizer keeps nothing"
                    raise examples.error(example, "context", shown)
                row = dict(zip(encoded, values))
                if labelled:
                    row["start_positions"], row["end_positions"] = _positions(example, window)
                features.rows.append(row)
                features.example_of.append(first + number)
                features.notes.append(window)
        return replace(features, truncated=truncated)

    # --- answers -----------------------------------------------------------------------------------------------------------

    def candidates(self, outputs: Outputs, features: Features) -> Iterator[Candidates]:
        """The :data:`N_BEST` best spans of each question: the highest sums of a start and an end logit over all its windows, at
        most :data:`MAX_ANSWER_TOKENS` tokens long. With ``unanswerable`` one of them is that there is no answer: its score is the
        sum at the first token, in the window where that is lowest."""
        rows = zip(features.example_of, outputs, features.notes, strict=True)
        for _, group in groupby(rows, key=lambda row: row[0]):
            windows = [(logits.astype(np.float64), window) for _, logits, window in group]
            scores, starts, ends = (np.concatenate(parts) for parts in zip(*(_best_spans(*window) for window in windows)))
            order = np.argsort(-scores, kind="stable")
            # Windows overlap: of a span that two of them found the better score counts.
            _, kept = np.unique(np.stack((starts, ends), 1)[order], axis=0, return_index=True)
            order = order[np.sort(kept)][:N_BEST]
            scores, starts, ends = scores[order], starts[order], ends[order]
            if self.unanswerable:
                none = min(float(logits[0].sum()) for logits, _ in windows)
                place = int((scores >= none).sum())
                scores = np.insert(scores, place, none)[:N_BEST]
                starts, ends = (np.insert(side, place, NO_ANSWER)[:N_BEST] for side in (starts, ends))
            yield Candidates(scores, starts, ends)

    def scores(self, outputs: Outputs, features: Features, examples: Examples[QuestionExample]) -> dict[str, float]:
        """See :func:`fastbert.tasks.squad_metric.squad_scores`."""
        found = [
            _text(example, int(candidates.starts[0]), int(candidates.ends[0]))
            for example, candidates in zip(examples, self.candidates(outputs, features), strict=True)
        ]
        return squad_scores(found, [[answer.text for answer in example.answers or ()] for example in examples])

    def predictions(self, outputs: Outputs, features: Features, examples: Examples[QuestionExample]) -> list[dict[str, Any]]:
        """``id``, ``answer`` ("" for none), ``start`` and ``end`` in characters of the context (None for none), ``score``, the
        probability among the :data:`N_BEST` best, and ``alternatives``, the others of them, the best first."""
        results = []
        for example, candidates in zip(examples, self.candidates(outputs, features), strict=True):
            probabilities = np.exp(candidates.scores - np.logaddexp.reduce(candidates.scores)).tolist()
            answers = []
            for start, end, score in zip(candidates.starts.tolist(), candidates.ends.tolist(), probabilities):
                place = {"start": None, "end": None} if start == NO_ANSWER else {"start": start, "end": end}
                answers.append({"answer": _text(example, start, end), **place, "score": score})
            results.append({"id": example.id, **answers[0], "alternatives": answers[1:]})
        return results


def _cut_questions(
    some: Sequence[QuestionExample], examples: Examples[QuestionExample], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[str]:
    """The questions, those of more than ``longest`` tokens without the rest."""
    questions = [example.question for example in some]
    encoded = tokenizer(questions, add_special_tokens=False, return_attention_mask=False, verbose=False)
    for number, (example, encoding) in enumerate(zip(some, encoded.encodings, strict=True)):
        if not encoding.ids:
            raise examples.error(example, "question", f"holds {example.question!r}, of which the tokenizer keeps nothing")
        if len(encoding.ids) > longest:
            questions[number] = example.question[: encoding.offsets[longest - 1][1]]
    return questions


def _window(encoding: Any) -> Window:
    sequence_ids = encoding.sequence_ids
    if 1 not in sequence_ids:
        return Window(0, np.zeros((0, 2), np.int32))
    first = sequence_ids.index(1)
    end = len(sequence_ids) - sequence_ids[::-1].index(1)
    return Window(first, np.array(encoding.offsets[first:end], np.int32))


def _positions(example: QuestionExample, window: Window) -> tuple[int, int]:
    """The tokens of a row where the first answer starts and ends; (0, 0) where the window has not all of it."""
    if not example.answers:
        return 0, 0
    answer = example.answers[0]
    start = answer.start + len(answer.text) - len(answer.text.lstrip())
    end = answer.start + len(answer.text.rstrip())
    starts, ends = window.spans.T
    if start < starts[0] or end > ends[-1]:
        return 0, 0
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(starts, end, side="left") - 1
    return (window.first + int(first), window.first + int(last)) if first <= last else (0, 0)


def _best_spans(logits: NDArray[np.float64], window: Window) -> tuple[NDArray, NDArray, NDArray]:
    """(scores, starts, ends), each (k,), of the :data:`N_BEST` best spans of a window, in any order; in characters."""
    count = len(window.spans)
    start, end = logits[window.first : window.first + count].T
    width = min(MAX_ANSWER_TOKENS, count)
    # sums[i, k] is the span of the tokens i to i + k; those that end behind the window are -inf.
    ends_from = np.lib.stride_tricks.sliding_window_view(np.concatenate((end, np.full(width - 1, -np.inf))), width)
    sums = (start[:, None] + ends_from).ravel()
    best = np.argpartition(-sums, N_BEST)[:N_BEST] if len(sums) > N_BEST else np.arange(len(sums))
    best = best[sums[best] > -np.inf]
    first, more = np.divmod(best, width)
    return sums[best], window.spans[first, 0].astype(np.int64), window.spans[first + more, 1].astype(np.int64)


def _text(example: QuestionExample, start: int, end: int) -> str:
    return "" if start == NO_ANSWER else example.context[start:end]
