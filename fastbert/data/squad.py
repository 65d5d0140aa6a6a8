"""Questions whose answers are spans of a context: SQuAD 1.1 and 2.0, as JSON or as a table of Hugging Face's form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastbert.data.errors import DataError
from fastbert.data.lines import read_lines
from fastbert.data.sources import Source
from fastbert.data.tables import Table, check_unicode, file_kind, parse_json, read_table

_SHOWN = 60  # characters of a text in a message


@dataclass(frozen=True, slots=True)
class Question:
    """``answers``: text and start (in characters of the context) of each; None where they are not known, empty where the context
    has none (SQuAD 2.0); ``place``: "question '5725b33f'" in SQuAD's JSON, "row 12" or "line 12" in a table."""

    place: str
    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None


def read_squad(source: Source, *, labelled: bool = True) -> list[Question]:
    """All questions, in the order of the file; without ``labelled`` answers are neither read nor checked.

    - ``.json``, ``.json.gz``: SQuAD's form, data -> paragraphs -> context and qas (id, question, answers, is_impossible);
    - else a table (:func:`fastbert.data.tables.read_table`) with the columns question, context and, if known, id and answers,
      {"text": [...], "answer_start": [...]}, as Hugging Face's datasets squad and squad_v2 have them.

    Raises DataError, naming the question, for what is missing or of a wrong kind, for an empty question or context, an answer that
    does not stand in the context where answer_start says, an id that comes twice, and for no question at all.
    """
    if source.path is not None and file_kind(source.path) == ".json":
        questions = list(_json_questions(source, labelled))
    else:
        questions = list(_table_questions(read_table(source), labelled))
    if not questions:
        raise DataError(f"{source}: there are no questions")
    places: dict[str, str] = {}
    for question in questions:
        if question.id in places:
            raise DataError.at(str(source), question.place, "id", f"{question.id!r} comes twice, first at {places[question.id]}")
        places[question.id] = question.place
    return questions


# --- SQuAD's JSON ----------------------------------------------------------------------------------------------------------


def _json_questions(source: Source, labelled: bool) -> Iterator[Question]:
    assert source.path is not None
    name = str(source)
    document = parse_json("".join(line for _, line in read_lines(source.path)), name, None)
    for article_number, article in enumerate(_part(name, None, document, "data", list), 1):
        article_place = f"article {article_number}"
        for paragraph_number, paragraph in enumerate(_part(name, article_place, article, "paragraphs", list), 1):
            place = f"{article_place}, paragraph {paragraph_number}"
            context = _part(name, place, paragraph, "context", str)
            for number, entry in enumerate(_part(name, place, paragraph, "qas", list), 1):
                identifier = _part(name, f"{place}, question {number}", entry, "id", (str, int))
                question_place = f"question {str(identifier)!r}"
                question = _part(name, question_place, entry, "question", str)
                answers = _json_answers(name, question_place, entry) if labelled else None
                yield _checked(name, Question(question_place, str(identifier), question, context, answers))


def _json_answers(name: str, place: str, entry: dict[str, Any]) -> tuple[tuple[str, int], ...] | None:
    impossible = _part(name, place, entry, "is_impossible", bool) if "is_impossible" in entry else False
    if "answers" not in entry:
        return () if impossible else None
    answers = tuple(
        (_part(name, place, answer, "text", str), _part(name, place, answer, "answer_start", int))
        for answer in _part(name, place, entry, "answers", list)
    )
    if impossible and answers:
        raise DataError.at(name, place, "answers", f"{answers[0][0]!r}, but is_impossible says that there is none")
    if not impossible and not answers:
        problem = "an empty list; where there is no answer is_impossible is true, where it is not known there are no answers"
        raise DataError.at(name, place, "answers", problem)
    return answers


def _part(name: str, place: str | None, value: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """``value[key]``, which must be there and of a kind."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, dict):
        raise DataError.at(name, place, None, f"expected an object with {key!r}, found {type(value).__name__}")
    if key not in value:
        raise DataError.at(name, place, key, f"is not there; there are {', '.join(map(repr, value)) or 'no entries'}")
    if type(value[key]) not in kinds:  # a bool is no int here
        expected = " or ".join(known.__name__ for known in kinds)
        raise DataError.at(name, place, key, f"expected {expected}, found {type(value[key]).__name__}")
    return value[key]


# --- tables ----------------------------------------------------------------------------------------------------------------


def _table_questions(table: Table, labelled: bool) -> Iterator[Question]:
    for column in ("question", "context"):
        if column not in table.columns:
            raise table.error(None, column, f"is not there; there are {', '.join(map(repr, table.columns))}")
    for number, (row, place) in enumerate(zip(table.rows, table.places)):
        identifier = row["id"] if row.get("id") is not None else number + 1
        question = _part(table.source, place, row, "question", str)
        context = _part(table.source, place, row, "context", str)
        answers = _table_answers(table, number) if labelled and row.get("answers") is not None else None
        yield _checked(table.source, Question(place, str(identifier), question, context, answers))


def _table_answers(table: Table, number: int) -> tuple[tuple[str, int], ...]:
    place = table.places[number]
    answers = _part(table.source, place, table.rows[number], "answers", dict)
    texts = _part(table.source, place, answers, "text", list)
    starts = _part(table.source, place, answers, "answer_start", list)
    if len(texts) != len(starts):
        raise table.error(number, "answers", f"{len(texts)} texts and {len(starts)} answer_start; each answer has both")
    pairs = [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
    return tuple((_part(table.source, place, p, "text", str), _part(table.source, place, p, "answer_start", int)) for p in pairs)


# --- both ------------------------------------------------------------------------------------------------------------------


def _checked(name: str, question: Question) -> Question:
    for column in ("question", "context"):
        check_unicode(getattr(question, column), name, question.place, column)
        if not getattr(question, column).strip():
            raise DataError.at(name, question.place, column, "is empty")
    for text, start in question.answers or ():
        if not text.strip():
            raise DataError.at(name, question.place, "answers", "an answer is empty")
        found = question.context[start : start + len(text)] if start >= 0 else ""
        if found != text:
            problem = f"answer_start {start}: expected {text[:_SHOWN]!r}, found {found[:_SHOWN]!r} in the context"
            elsewhere = question.context.find(text)
            problem += "; it is nowhere in it" if elsewhere < 0 else f"; it first stands at {elsewhere}"
            raise DataError.at(name, question.place, "answers", problem)
    return question
