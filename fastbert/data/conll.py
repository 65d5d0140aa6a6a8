"""Sentences whose words carry tags: CoNLL columns, numbered ``.iob2`` files and CoNLL-U; and entity tags of any scheme as BIO."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastbert.data.errors import DataError
from fastbert.data.lines import read_lines, without_line_end
from fastbert.data.sources import Source
from fastbert.data.tables import Table, file_kind, read_table

CONLLU_COLUMNS = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")
_TABLES = (".jsonl", ".json", ".parquet")
_WORD_COLUMNS = ("tokens", "words")
_TAG_COLUMNS = {
    True: ("ner_tags", "tags", "labels"),
    False: ("pos_tags", "upos", "tags", "labels"),
    None: ("ner_tags", "pos_tags", "upos", "tags", "labels"),
}
_ID = re.compile(r"\d+([-.]\d+)?")  # 3; 3-4, a token of several words; 8.1, a word that is not in the text
_ENTITY_TAG = re.compile(r"([BIESLU])-(.+)")


@dataclass(frozen=True, slots=True)
class Sentence:
    """``tags``: one per word, None where they were not asked for; ``place``: "line 12", of its first word, or "row 12" of a table;
    ``lines``: of each word, from 1, none in a table."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    place: str
    lines: tuple[int, ...] = ()

    def place_of(self, word: int) -> str:
        """ "line 14" or "row 12, word 3" of the word with this index, for messages."""
        return f"line {self.lines[word]}" if self.lines else f"{self.place}, word {word + 1}"


@dataclass(frozen=True)
class _Line:
    number: int
    text: str


@dataclass(frozen=True)
class _Format:
    """Which columns hold the word, the tag and, from 0, how many there are; ``numbered``: the first counts the words."""

    tabs: bool
    columns: int
    numbered: bool
    word: int
    tag: int | None
    missing: str  # what stands where there is no tag

    def fields(self, text: str) -> list[str]:
        return text.split("\t") if self.tabs else re.split("[ \t]+", text.strip(" \t"))


def read_conll(
    source: Source, *, word_column: int | str | None = None, tag_column: int | str | None = None, labelled: bool | None = True
) -> list[Sentence]:
    """The sentences of a file, plain or ``.gz``: a word per line, a blank line (or one of blanks only) between sentences.

    - ``.conllu``: ten columns; the tag is UPOS, or the one that ``tag_column`` names (XPOS); lines whose ID is 3-4 or 8.1 carry no
      word of their own and are skipped;
    - numbered columns, as in Universal NER's ``.iob2``: TAB, three or more columns, the first counts the words from 1 in every
      sentence; the second is the word, the third the tag;
    - else columns split by TAB where most lines have one, by blanks otherwise: the first is the word, the last the tag.
      CoNLL-2003's ``-DOCSTART-`` lines are skipped.

    Columns are counted from 0, negative ones from the last. Lines that begin with ``# `` are comments where words are numbered;
    elsewhere (``#`` is a word, too) only ahead of a sentence and where they have another number of columns than the words.
    ``labelled=False`` reads no tags, and needs none; None reads them where there are any: a second column, and in CoNLL-U not a
    ``_`` everywhere.

    Raises DataError, with the line: another number of columns than the file's other lines, an empty word, a tag that is missing, a
    column that is not there, words that are not counted 1, 2, 3; and for damaged files and those without a sentence.
    """
    path = _conll_path(source)
    lines = [_Line(number, without_line_end(line)) for number, line in read_lines(path)]
    if file_kind(path) == ".conllu":
        layout = _conllu_format(str(path), lines, word_column, tag_column, labelled)
    else:
        layout = _detected_format(str(path), lines, word_column, tag_column, labelled)
    sentences: list[Sentence] = []
    words: list[tuple[str, str, int]] = []
    count = 0  # words of the sentence so far, those without a tag of their own left out
    for line in [*lines, _Line(len(lines) + 1, "")]:
        if _is_blank(line.text):
            if words:
                sentences.append(_sentence(words, layout.tag is not None))
            words, count = [], 0
            continue
        if _is_comment(line.text, layout, first=not words):
            continue
        word = _read_word(str(path), line, layout, count)
        if word is not None:
            words.append((*word, line.number))
            count += 1
    if not sentences:
        raise DataError(f"{path}: there are no sentences")
    return sentences


def read_sentences(
    source: Source,
    *,
    word_column: str | None = None,
    tag_column: str | None = None,
    entities: bool | None = None,
    labelled: bool | None = None,
) -> list[Sentence]:
    """The sentences of a file of :func:`read_conll`, or of a table (``.jsonl``, ``.json``, ``.parquet``, a dataset) whose rows are
    sentences, with lists of words and of tags. ``labelled``: as there; None reads the tags that the source has, if any.

    Columns are numbers or names in CoNLL files, names in tables; left out, those of a table are the ones that published data sets
    have (tokens or words; tags, ner_tags, pos_tags, ...). ``entities``: True makes the tags BIO (:func:`to_bio`), False leaves
    them as they are, None makes BIO of those of which all are O or a prefix and a type.

    Raises DataError as read_conll and to_bio do, and for a column of a table that is not there, or no list of words, or for which
    there are several candidates; tags that are not as many as the words.
    """
    if source.path is not None and file_kind(source.path) not in _TABLES:
        sentences = read_conll(source, word_column=word_column, tag_column=tag_column, labelled=labelled)
    else:
        sentences = _table_sentences(read_table(source), word_column, tag_column, entities, labelled)
    if entities is None:
        tags = {tag for sentence in sentences for tag in sentence.tags or ()}
        entities = all(tag == "O" or _ENTITY_TAG.fullmatch(tag) for tag in tags)
    return to_bio(sentences, str(source)) if entities else sentences


def to_bio(sentences: Sequence[Sentence], source: str) -> list[Sentence]:
    """The sentences with their entity tags as BIO (IOB2); ``source`` names the file in messages.

    The scheme is that of all sentences together, by the prefixes they use: E and S make it BIOES, L and U BILOU, and without
    them it is BIO or IOB1. E and L become I, S and U become B. In all of them an I (E, L) that no entity of its type leads up to
    begins one and becomes B: that is IOB1, and it is how conlleval and seqeval read BIO with such an I.

    Raises DataError with the line for a tag that is neither O nor a prefix and a type, and for BIOES and BILOU in one file.
    """
    first: dict[str, str] = {}  # prefix: where it stands first
    for sentence in sentences:
        for word, tag in enumerate(sentence.tags or ()):
            if tag == "O":
                continue
            match = _ENTITY_TAG.fullmatch(tag)
            if match is None:
                problem = f"the tag {tag!r} fits no scheme; expected O, or B-, I- (or E-, S-; L-, U-) and a type, such as B-LOC"
                raise DataError.at(source, sentence.place_of(word), None, problem)
            first.setdefault(match[1], sentence.place_of(word))
    for one, other in (("E", "L"), ("E", "U"), ("S", "L"), ("S", "U")):
        if one in first and other in first:
            problem = f"a tag with {other}- (BILOU), but one with {one}- (BIOES) at {first[one]}; a file has one scheme"
            raise DataError.at(source, first[other], None, problem)
    return [sentence if sentence.tags is None else replace(sentence, tags=_bio(sentence.tags)) for sentence in sentences]


def _bio(tags: Sequence[str]) -> tuple[str, ...]:
    made = []
    inside = None  # the type of an entity that may go on
    for tag in tags:
        if tag == "O":
            made.append(tag)
            inside = None
            continue
        prefix, kind = tag[0], tag[2:]
        made.append(f"{'I' if prefix in 'IEL' and kind == inside else 'B'}-{kind}")
        inside = kind if prefix in "BI" else None
    return tuple(made)


# --- tables ----------------------------------------------------------------------------------------------------------------


def _table_sentences(
    table: Table, word_column: str | None, tag_column: str | None, entities: bool | None, labelled: bool | None
) -> list[Sentence]:
    words_in = _table_column(table, word_column, _WORD_COLUMNS)
    if words_in is None:
        raise DataError(f"{table.source}: no column of words ({', '.join(_WORD_COLUMNS)}); it has {', '.join(table.columns)}")
    tags_in = None
    if labelled is not False:
        known = _TAG_COLUMNS[entities]
        tags_in = _table_column(table, tag_column, known)
        if labelled and tags_in is None:
            raise DataError(f"{table.source}: no column of tags ({', '.join(known)}); it has {', '.join(table.columns)}")
    sentences = []
    for number, (row, place) in enumerate(zip(table.rows, table.places)):
        words, tags = row[words_in], None if tags_in is None else row[tags_in]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise table.error(number, words_in, f"holds {words!r}, expected a list of words")
        if tags is not None:
            if not isinstance(tags, list) or any(tag is None for tag in tags):
                raise table.error(number, tags_in, f"holds {tags!r}, expected a list of tags")
            if len(tags) != len(words):
                raise table.error(number, tags_in, f"has {len(tags)} tags for the {len(words)} words of column {words_in!r}")
            tags = tuple(map(str, tags))
        sentences.append(Sentence(tuple(words), tags, place))
    return sentences


def _table_column(table: Table, column: str | None, known: Sequence[str]) -> str | None:
    """The column of this name or, without one, the only one of the known that is there; None where none is."""
    if column is not None:
        if column not in table.columns:
            raise DataError(f"{table.source}: no column {column!r}; it has {', '.join(table.columns)}")
        return column
    found = [name for name in known if name in table.columns]
    if len(found) > 1:
        raise DataError(f"{table.source}: {' and '.join(found)} could both be meant; name the column")
    return found[0] if found else None


# --- the file --------------------------------------------------------------------------------------------------------------


def _conll_path(source: Source) -> Path:
    if source.path is None:
        raise DataError(f"{source}: CoNLL columns are read from files, not from a dataset")
    if file_kind(source.path) in (*_TABLES, ".csv"):
        raise DataError(f"{source}: a table, expected CoNLL columns, a word per line (.conll, .conllu, .iob2, .tsv, .txt)")
    if source.path.is_dir():
        raise DataError(f"{source}: a folder, expected a file")
    return source.path


def _conllu_format(
    source: str, lines: Sequence[_Line], word_column: int | str | None, tag_column: int | str | None, labelled: bool | None
) -> _Format:
    word = _column(source, "FORM" if word_column is None else word_column, len(CONLLU_COLUMNS), CONLLU_COLUMNS)
    tag = _column(source, "UPOS" if tag_column is None else tag_column, len(CONLLU_COLUMNS), CONLLU_COLUMNS)
    if labelled is None:
        rows = (line.text.split("\t") for line in lines if not line.text.startswith("#"))
        labelled = any(fields[tag] not in ("", "_") for fields in rows if len(fields) == len(CONLLU_COLUMNS))
    return _Format(True, len(CONLLU_COLUMNS), True, word, tag if labelled else None, "_")


def _detected_format(
    source: str, lines: Sequence[_Line], word_column: int | str | None, tag_column: int | str | None, labelled: bool | None
) -> _Format:
    """See :func:`read_conll`; what most lines of a file have is what it is meant to have."""
    texts = [line.text for line in lines if not _is_blank(line.text) and not _is_document_start(line.text)]
    if not texts:
        raise DataError(f"{source}: there are no sentences")
    likely = [text for text in texts if not text.startswith("# ")] or texts
    tabs = sum("\t" in text for text in likely) * 2 > len(likely)
    plain = _Format(tabs, 0, False, 0, None, "")
    counts = Counter(len(plain.fields(text)) for text in likely)
    columns = counts.most_common(1)[0][0]
    numbered = tabs and columns >= 3 and _counts_words(lines)
    word = _column(source, (1 if numbered else 0) if word_column is None else word_column, columns, ())
    if labelled is False or (labelled is None and columns == 1):
        return _Format(tabs, columns, numbered, word, None, "")
    if tag_column is None and columns == 1:
        raise DataError(f"{source}: there is one column, expected a word and its tag")
    tag = _column(source, (2 if numbered else columns - 1) if tag_column is None else tag_column, columns, ())
    return _Format(tabs, columns, numbered, word, tag, "")


def _counts_words(lines: Sequence[_Line]) -> bool:
    """Whether every line begins with an ID, and every sentence with that of its first word."""
    first = True
    for line in lines:
        if _is_blank(line.text):
            first = True
        elif not line.text.startswith("#"):
            identifier = line.text.partition("\t")[0]
            if _ID.fullmatch(identifier) is None or (first and re.split("[-.]", identifier)[0] not in ("0", "1")):
                return False
            first = False
    return True


def _column(source: str, column: int | str, columns: int, names: Sequence[str]) -> int:
    """The number of a column, from 0."""
    if isinstance(column, str) and re.fullmatch(r"-?\d+", column):
        column = int(column)
    if isinstance(column, str):
        if column.upper() not in names:
            known = f"it has {', '.join(names)}" if names else f"its {columns} columns have numbers, from 0"
            raise DataError(f"{source}: no column {column!r}; {known}")
        return names.index(column.upper())
    if not -columns <= column < columns:
        raise DataError(f"{source}: no column {column}; there are {columns}, counted from 0")
    return column % columns


def _is_blank(text: str) -> bool:
    return not text.strip(" \t")


def _is_document_start(text: str) -> bool:
    return text.startswith("-DOCSTART-")


def _is_comment(text: str, layout: _Format, *, first: bool) -> bool:
    """See :func:`read_conll`; ``first``: no word of the sentence was read yet."""
    if layout.numbered:
        return text.startswith("#")
    return _is_document_start(text) or (first and text.startswith("# ") and len(layout.fields(text)) != layout.columns)


def _read_word(source: str, line: _Line, layout: _Format, count: int) -> tuple[str, str] | None:
    """Word and tag, "" for a tag that is not asked for; None of a line that has none of its own (3-4 and 8.1)."""
    place = f"line {line.number}"
    fields = layout.fields(line.text)
    if len(fields) != layout.columns:
        columns = "1 column" if len(fields) == 1 else f"{len(fields)} columns"
        separator = "TAB" if layout.tabs else "blanks"
        raise DataError.at(source, place, None, f"has {columns} (split by {separator}), expected {layout.columns}")
    if layout.numbered:
        identifier = fields[0]
        if _ID.fullmatch(identifier) is None:
            raise DataError.at(source, place, None, f"expected the number of a word, found {identifier!r}")
        if not identifier.isdigit():
            return None
        if int(identifier) != count + 1:
            raise DataError.at(source, place, None, f"the word has the number {identifier}, expected {count + 1}")
    word = fields[layout.word]
    if not word:
        raise DataError.at(source, place, None, "the word is empty")
    if layout.tag is None:
        return word, ""
    tag = fields[layout.tag].strip()
    if tag in ("", layout.missing):
        raise DataError.at(source, place, None, f"the tag of {word!r} is missing")
    return word, tag


def _sentence(words: Sequence[tuple[str, str, int]], labelled: bool) -> Sentence:
    texts, tags, lines = zip(*words)
    return Sentence(texts, tags if labelled else None, f"line {lines[0]}", lines)
