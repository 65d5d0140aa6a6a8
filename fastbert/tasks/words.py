"""Sentences in words out of CoNLL files and of tables whose cells are lists."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastbert.data.conll import Sentence, read_conll, to_bio
from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.tables import Table, file_kind, read_table

from .examples import Examples, WordsExample

_TABLES = (".jsonl", ".json", ".parquet")
# What published data sets call them, the first that is there wins.
_WORDS = ("tokens", "words", "text")
_TAGS = ("ner_tags", "pos_tags", "tags", "upos", "labels")
_ANY_ENTITY_TAG = re.compile(r"O|[BIESLU]-.+")


def read_words(
    source: Source, words: str | None, tags: str | None, entities: bool | None, *, labelled: bool = True
) -> Examples[WordsExample]:
    """The sentences of a CoNLL or CoNLL-U file, or of a table or dataset with lists of words and of tags.

    ``words``, ``tags``: columns, by number or name. ``entities``: whether tags are brought to BIO; None where all of them look like
    it. Raises DataError naming file, line and column.
    """
    if source.path is None or file_kind(source.path) in _TABLES:
        sentences, words, tags = _from_table(read_table(source), words, tags, labelled)
    else:
        sentences = read_conll(source, word_column=_column(words), tag_column=_column(tags), labelled=labelled)
    if labelled and entities is not False and (entities or _look_like_entities(sentences)):
        sentences = to_bio(sentences, str(source))
    items = [WordsExample(sentence.place, sentence.words, sentence.tags) for sentence in sentences]
    return Examples(str(source), items, {field: name for field, name in (("words", words), ("tags", tags)) if name is not None})


def _from_table(table: Table, words: str | None, tags: str | None, labelled: bool) -> tuple[list[Sentence], str, str | None]:
    words = _found(table, words, _WORDS, "--text-column names the one with the lists of words")
    if labelled or tags in table.columns:
        tags = _found(table, tags, _TAGS, "--label-column names the one with the lists of tags")
    sentences = []
    for row, (cells, place) in enumerate(zip(table.rows, table.places, strict=True)):
        for column in (words, tags) if labelled else (words,):
            if not isinstance(cells[column], (list, tuple)):
                raise table.error(row, column, f"holds {cells[column]!r}, expected a list with an entry for each word")
        if labelled and len(cells[words]) != len(cells[tags]):
            raise table.error(row, tags, f"has {len(cells[tags])} tags for the {len(cells[words])} words of column {words!r}")
        found = tuple(map(str, cells[tags])) if labelled else None
        sentences.append(Sentence(tuple(map(str, cells[words])), found, place, (row + 1,) * len(cells[words])))
    return sentences, words, tags


def _found(table: Table, given: str | None, known: Sequence[str], hint: str) -> str:
    column = given or next((name for name in known if name in table.columns), None)
    if column is None or column not in table.columns:
        listed = ", ".join(map(repr, table.columns))
        problem = f"has no column {given!r}; it has {listed}" if given else f"has the columns {listed}; {hint}"
        raise DataError.at(table.source, None, None, problem)
    return column


def _column(name: str | None) -> int | str | None:
    return int(name) if name is not None and name.lstrip("-").isdigit() else name


def _look_like_entities(sentences: Sequence[Sentence]) -> bool:
    return all(_ANY_ENTITY_TAG.fullmatch(tag) for sentence in sentences for tag in sentence.tags or ())
