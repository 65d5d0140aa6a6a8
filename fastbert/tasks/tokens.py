"""Token classification: a tag for each word of a sentence. Named entities (BIO tags) and parts of speech."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.tables import file_kind, read_table

from . import metrics
from .examples import Examples, WordsExample
from .task import Features, Outputs, Task, labels_config
from .words import read_words

IGNORED = -100
_ENTITY_TAG = re.compile(r"[BI]-.+")
# Of combining marks, which are no letters to Python's patterns: all are below it, or on the plane behind private use.
_PLANES_OF_MARKS = (range(0x20000), range(0xE0000, 0xF0000))


@dataclass(frozen=True)
class Words:
    """Where the words of a row are. ``first``: the number of its first word in the sentence; ``positions``: (n,) for each word
    the position of its first piece, which carries the word's label and prediction."""

    first: int
    positions: np.ndarray


@dataclass(frozen=True)
class TokenClassification(Task):
    """``columns``: ``words`` and ``tags``, by number in CoNLL files or by name in CoNLL-U and tables. ``entities``: whether tags
    are BIO and scored as entities; None decides by the tags.

    A sentence that is longer than the model takes is cut between words into several rows: no word goes without a tag.
    """

    entities: bool | None = None

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    family: ClassVar[str] = "words"

    @property
    def metric_names(self) -> tuple[str, ...]:
        if self.entities is None:  # the tags will tell which of them
            return tuple(dict.fromkeys((*metrics.TAGS, *metrics.ENTITIES)))
        return metrics.ENTITIES if self.entities else metrics.TAGS

    @property
    def score_modules(self) -> tuple[str, ...]:
        return ("seqeval.metrics" if self.entities else "sklearn.metrics",)

    def read(self, source: Source) -> Examples[WordsExample]:
        return read_words(source, self.columns.get("words"), self.columns.get("tags"), self.entities)

    def read_unlabelled(self, source: Source) -> Examples[WordsExample]:
        """A text in each line of a .txt file; sentences in words elsewhere."""
        if source.path is not None and file_kind(source.path) == ".txt":
            table = read_table(source)
            fields = [words for row in table.rows if (words := row["text"].split())]
            tagged = sum(len(words) > 1 and words[-1] in self.labels for words in fields)
            if 2 * tagged > len(fields):
                raise DataError(
                    f"{source}: {tagged:,} of {len(fields):,} lines end in a tag of the task: these are columns of CoNLL, and in a "
                    ".txt every line is a text; give the file a name that ends in .conll"
                )
            examples = self.examples_from([row["text"] for row in table.rows])
            items = [replace(example, place=place) for example, place in zip(examples, table.places, strict=True)]
            return Examples(table.source, items, {})
        return read_words(source, self.columns.get("words"), self.columns.get("tags"), self.entities, labelled=False)

    def examples_from(self, inputs: Sequence[Any]) -> Examples[WordsExample]:
        """inputs: texts, which are split into words, or lists of words."""
        items = []
        for number, value in enumerate(inputs, 1):
            if isinstance(value, str):
                spans = tuple(match.span() for match in _word().finditer(value))
                words = tuple(value[start:end] for start, end in spans)
                items.append(WordsExample(f"input {number}", words, text=value, spans=spans))
            elif isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
                items.append(WordsExample(f"input {number}", tuple(value)))
            else:
                raise DataError.at("inputs", f"input {number}", None, f"holds {value!r}, expected a text or a list of words")
        return Examples("inputs", items, {})

    def with_labels_of(self, train: Examples[WordsExample]) -> TokenClassification:
        self._check_present(train)
        tags = {tag for example in train for tag in example.tags}
        if len(tags) == 1:
            raise train.error(None, "tags", f"every word has the tag {next(iter(tags))!r}: there is nothing to learn")
        entities = self.entities
        if entities is None:
            entities = all(tag == "O" or _ENTITY_TAG.fullmatch(tag) for tag in tags)
        # I-X without a single B-X would be a label that BIO cannot begin with.
        if entities:
            tags |= {"O"} | {f"{prefix}-{tag[2:]}" for tag in tags if tag != "O" for prefix in "BI"}
        labels = tuple(sorted(tags, key=lambda tag: (tag != "O", tag[2:], tag[:1]) if entities else (True, tag, "")))
        return replace(self, entities=entities, labels=self.labels or labels)

    def check(self, examples: Examples[WordsExample], *, labelled: bool) -> None:
        for example in examples:
            if not example.words:
                raise examples.error(example, "words", "holds no words")
            for number, word in enumerate(example.words, 1):
                if not word.strip():
                    raise examples.error(example, "words", f"word {number} of the sentence is empty")
        if labelled:
            self._check_present(examples)
            for example in examples:
                for number, tag in enumerate(example.tags, 1):
                    if tag not in self._numbers:
                        known = ", ".join(self.labels)
                        raise examples.error(
                            example, "tags", f"word {number} ({example.words[number - 1]!r}) has the tag {tag!r}; known are {known}"
                        )

    def _check_present(self, examples: Examples[WordsExample]) -> None:
        if not len(examples):
            raise examples.error(None, None, "holds no sentences")
        for example in examples:
            if example.tags is None:
                raise examples.error(example, "tags", "has no tags")
            if len(example.tags) != len(example.words):
                raise examples.error(example, "tags", f"has {len(example.tags)} tags for {len(example.words)} words")

    def config(self) -> dict[str, Any]:
        return labels_config(self.labels)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {tag: number for number, tag in enumerate(self.labels)}

    def features(
        self, examples: Examples[WordsExample], tokenizer: PreTrainedTokenizerBase, max_seq_length: int, *, labelled: bool
    ) -> Features:
        """The label of a word stands at its first piece, :data:`IGNORED` everywhere else. A word of which the tokenizer keeps
        nothing (a lone variation selector, ...) is the unknown token: its tag counts as all others do."""
        features = Features([], [])
        if not len(examples):
            return features
        pieces = _pieces_of_words(examples, tokenizer, features.notices)
        head, tail = _special_tokens_around(tokenizer)
        room = max_seq_length - len(head) - len(tail)
        for number, (example, words) in enumerate(zip(examples, pieces, strict=True)):
            for first, end in _cuts([len(word) for word in words], room):
                kept = [word[:room] for word in words[first:end]]
                ids = [*head, *(piece for word in kept for piece in word), *tail]
                positions = len(head) + np.cumsum([0, *(len(word) for word in kept[:-1])])
                row: dict[str, Any] = {"input_ids": ids}
                if "token_type_ids" in tokenizer.model_input_names:
                    row["token_type_ids"] = [0] * len(ids)
                if labelled:
                    labels = np.full(len(ids), IGNORED)
                    labels[positions] = [self._numbers[tag] for tag in example.tags[first:end]]
                    row["labels"] = labels.tolist()
                features.rows.append(row)
                features.example_of.append(number)
                features.notes.append(Words(first, positions))
        return features

    def predicted_tags(self, outputs: Outputs, features: Features, examples: Examples[WordsExample]) -> list[list[str]]:
        """The most probable tag of every word."""
        tags = [["O"] * len(example.words) for example in examples]
        for logits, number, words in zip(outputs, features.example_of, features.notes, strict=True):
            best = logits[words.positions].argmax(1)
            tags[number][words.first : words.first + len(best)] = [self.labels[label] for label in best]
        return tags

    def scores(self, outputs: Outputs, features: Features, examples: Examples[WordsExample]) -> dict[str, float]:
        predicted = self.predicted_tags(outputs, features, examples)
        expected = [example.tags for example in examples]
        if self.entities:
            return metrics.entity_scores(predicted, expected)
        flat = [np.array([self._numbers[tag] for tags in side for tag in tags]) for side in (predicted, expected)]
        scores = metrics.classification_scores(flat[0], flat[1], len(self.labels))
        return {name: scores[name] for name in metrics.TAGS}

    def label_counts(self, examples: Examples[WordsExample]) -> dict[str, int]:
        return dict(Counter(tag for example in examples for tag in example.tags or ()))

    def confusion(
        self, predictions: Sequence[dict[str, Any]], examples: Examples[WordsExample]
    ) -> tuple[list[str], list[str]] | None:
        truth = [tag for example in examples for tag in example.tags or ()]
        return truth, [tag for prediction in predictions for tag in prediction["tags"]]

    def predictions(self, outputs: Outputs, features: Features, examples: Examples[WordsExample]) -> list[dict[str, Any]]:
        """``words``, ``tags``, ``probabilities`` (of each tag) and, of BIO tags, ``entities``: type, text, start and
        end in characters of the text (of the words joined by blanks where they came as words), first and last word, probability
        (the mean of its words')."""
        probabilities = [np.zeros(len(example.words)) for example in examples]
        for logits, number, words in zip(outputs, features.example_of, features.notes, strict=True):
            scores = logits[words.positions].astype(np.float64)
            best = np.exp(scores.max(1) - np.logaddexp.reduce(scores, axis=1))
            probabilities[number][words.first : words.first + len(best)] = best
        tags = self.predicted_tags(outputs, features, examples)
        results = []
        for example, found, probability in zip(examples, tags, probabilities, strict=True):
            result: dict[str, Any] = {"words": list(example.words), "tags": found, "probabilities": probability.tolist()}
            if self.entities:
                result["entities"] = _entities(example, found, probability)
            results.append(result)
        return results


@cache
def _word() -> re.Pattern[str]:
    """What a reader takes for a word: letters and digits with what joins them (don't, www.x.org, 3.5), or a lone other character;
    each with the marks that combine with it: accents that stand apart (NFD), vowel signs (Devanagari, ...), emoji's variants."""
    marks = "".join(chr(n) for plane in _PLANES_OF_MARKS for n in plane if unicodedata.category(chr(n)).startswith("M"))
    letters = rf"\w+(?:[{marks}]+\w*)*"
    return re.compile(rf"{letters}(?:['’.,:/@&-]{letters})*|[^\w\s][{marks}]*")


def _entities(example: WordsExample, tags: list[str], probability: np.ndarray) -> list[dict[str, Any]]:
    text, spans = example.text, example.spans
    if text is None or spans is None:
        text, ends = " ".join(example.words), np.cumsum([len(word) + 1 for word in example.words]) - 1
        spans = tuple((int(end) - len(word), int(end)) for word, end in zip(example.words, ends, strict=True))
    entities = []
    for kind, first, last in _spans_of_tags(tags):
        start, end = spans[first][0], spans[last][1]
        score = float(probability[first : last + 1].mean())
        place = {"start": start, "end": end, "first_word": first, "last_word": last}
        entities.append({"type": kind, "text": text[start:end], **place, "probability": score})
    return entities


def _spans_of_tags(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word) of the entities in BIO tags, as CoNLL's evaluation and seqeval see them: an I- that continues
    nothing of its type begins an entity."""
    spans: list[tuple[str, int, int]] = []
    before = "O"
    for word, tag in enumerate(tags):
        if tag.startswith("I-") and before[2:] == tag[2:]:
            spans[-1] = (*spans[-1][:2], word)
        elif tag != "O":
            spans.append((tag[2:], word, word))
        before = tag
    return spans


def _pieces_of_words(
    examples: Examples[WordsExample], tokenizer: PreTrainedTokenizerBase, notices: list[str]
) -> list[list[list[int]]]:
    """The ids of every word's pieces, at least one a word; ``notices`` gets a line where the tokenizer keeps nothing of some."""
    words_of = [list(example.words) for example in examples]
    # Not verbose: a sentence that is longer than the model takes is cut, of which the tokenizer does not know.
    encoded = tokenizer(words_of, is_split_into_words=True, add_special_tokens=False, verbose=False)
    pieces: list[list[list[int]]] = []
    dropped: list[str] = []
    for example, encoding in zip(examples, encoded.encodings, strict=True):
        words: list[list[int]] = [[] for _ in example.words]
        for piece, word in zip(encoding.ids, encoding.word_ids, strict=True):
            words[word].append(piece)
        dropped += [
            f"sentence at {example.place}, word {n} ({example.words[n - 1]!a})" for n, word in enumerate(words, 1) if not word
        ]
        pieces.append([word or [tokenizer.unk_token_id] for word in words])
    if dropped:
        notices.append(
            f"the tokenizer keeps nothing of {len(dropped):,} words, which stand as {tokenizer.unk_token} (the first: {dropped[0]})"
        )
    return pieces


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids in front of and behind a sentence: [CLS] and [SEP], whatever the tokenizer calls them."""
    encoded = tokenizer(["a"], is_split_into_words=True, return_special_tokens_mask=True)
    first = encoded["special_tokens_mask"].index(0)
    last = len(encoded["special_tokens_mask"]) - encoded["special_tokens_mask"][::-1].index(0)
    return encoded["input_ids"][:first], encoded["input_ids"][last:]


def _cuts(lengths: list[int], room: int) -> list[tuple[int, int]]:
    """(first word, word after the last) of each row, of at most ``room`` pieces; a longer word fills a row of its own."""
    cuts, first, used = [], 0, 0
    for number, length in enumerate(lengths):
        length = min(length, room)
        if used + length > room:
            cuts.append((first, number))
            first, used = number, 0
        used += length
    cuts.append((first, len(lengths)))
    return cuts
