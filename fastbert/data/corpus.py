"""Documents out of text files, JSON lines, Parquet files and Hugging Face datasets; without any, out of the installation.

Every line and row is checked on the way: a corpus that is damaged in one place ends the reading with a ``CorpusError`` that
names the place, and no text is skipped or cut without a word: :class:`Reading` says whether it may be, and counts it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.data.documents import CorpusReport, Document
from fastbert.data.embedded import embedded_documents
from fastbert.data.errors import CorpusError, why_too_few
from fastbert.data.hub import no_waiting_for_the_hub
from fastbert.data.lines import decode_line, read_raw_lines
from fastbert.data.sentences import cut_text
from fastbert.data.sources import DATASET_NAME

__all__ = [
    "BadTextError",
    "CorpusError",
    "CorpusPart",
    "CorpusReport",
    "Document",
    "Reading",
    "corpus_parts",
    "embedded_documents",
    "read_documents",
    "read_part",
]

FILE_TYPES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_ROWS = 1024
# The datasets of BERT's paper under the names that everybody knows them by: where they are today as Parquet files (their old
# places hold scripts, which the datasets library no longer runs), the configuration, and the rows that make a document. A row of
# BookCorpus is a sentence, and nothing tells where a book begins.
_KNOWN_DATASETS = {"wikipedia": ("wikimedia/wikipedia", "20231101.en", 1), "bookcorpus": ("SamuelYang/bookcorpus", None, 1000)}


class BadTextError(CorpusError):
    """A line or row is no text; a corpus may be read without it (:class:`Reading`)."""


@dataclass(frozen=True)
class CorpusPart:
    """A file, or the train split of a Hugging Face dataset. source: what it was asked for as; rows_per_document: its own."""

    source: str
    path: Path | None = None
    dataset: str | None = None
    config: str | None = None
    rows_per_document: int = 1

    def __str__(self) -> str:
        return str(self.path or (f"{self.dataset}:{self.config}" if self.config else self.dataset))


@dataclass
class Reading:
    """How a corpus is read, and what was left out or cut on the way (``left_out``: counts by name, which reading adds to).

    rows_per_document: consecutive rows that make a document, None for the part's own; skip_bad_text: leave out the document around
    a line or row that is no text, instead of raising; longest_line, longest_document: in bytes or characters, what is longer is
    divided at white space or between paragraphs; None for no limit.

    Counted are ``empty`` (rows without text, where a row is a document), ``bad_text`` (documents), ``cut_lines`` and
    ``cut_documents`` (divided once or more often).
    """

    text_column: str = "text"
    rows_per_document: int | None = None
    skip_bad_text: bool = False
    longest_line: int | None = None
    longest_document: int | None = None
    left_out: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("empty", "bad_text", "cut_lines", "cut_documents"), 0))

    def bad_text(self, error: CorpusError) -> None:
        """Raises BadTextError unless bad text is to be left out; the caller counts the document, once."""
        if not self.skip_bad_text:
            raise BadTextError(str(error)) from error


def read_documents(sources: Sequence[str | Path], *, text_column: str = "text", least_documents: int = 2) -> Iterator[Document]:
    """Yields the documents of all sources, in the order given.

    A source is
    - a ``.txt`` or ``.txt.gz`` file: UTF-8, a paragraph per line; a blank line or the file's end closes a document;
    - a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file: a row is a document, ``text_column`` holds its text, a newline in
      the text separates paragraphs, and a row without text is no document;
    - a folder: all files of these types in it and below it, sorted by path, hidden ones (``.name``) left out; symbolic links are
      followed;
    - else the name of a Hugging Face dataset, ``name`` or ``name:config``, whose train split is streamed; ``wikipedia`` and
      ``bookcorpus`` stand for the datasets that hold them today.

    Lines and rows are counted from 1. Raises CorpusError for a missing, unreadable or damaged file, bad UTF-8 or JSON, a
    missing or non-string text column, a dataset that cannot be loaded, and, once everything is read, for a corpus
    of fewer than ``least_documents``: next sentence prediction takes its negatives from another document.
    """
    documents = 0
    for part in list(corpus_parts(sources)):  # a name that stands for nothing is found before anything is read
        for document in read_part(part, Reading(text_column)):
            documents += 1
            yield document
    check_enough(documents, sources, least_documents)


def check_enough(documents: int, sources: Sequence[str | Path], least: int = 2, *, duplicates: int = 0) -> None:
    """Raises CorpusError for fewer than ``least`` documents, one or two. ``duplicates``: of these, which were left out."""
    if documents < least:
        names = ", ".join(str(source) for source in sources) or "no source was given"
        found = "only one document" if documents else "no text"
        if documents and duplicates:
            found += f" and {duplicates:,} copies of it, which are left out (--keep-duplicates)"
        raise CorpusError(
            f"the corpus has {found} ({names}): {why_too_few(least)}; "
            "in text files a blank line or the file's end closes a document, elsewhere a row is a document"
        )


def corpus_parts(sources: Sequence[str | Path]) -> Iterator[CorpusPart]:
    """The files and datasets that the sources stand for, in their order.

    Raises CorpusError for what is not there, and for a file of an unknown type.
    """
    if isinstance(sources, (str, Path)):
        raise TypeError(f"sources must be a sequence of paths or dataset names, not the single {sources!r}")
    for source in sources:
        path = Path(source)
        if path.is_dir():
            for file in _files_in(path):
                yield CorpusPart(str(source), file)
        elif path.is_file():
            if not path.name.lower().endswith(FILE_TYPES):
                raise CorpusError(f"{path}: unknown file type; a corpus is made of {', '.join(FILE_TYPES)}")
            yield CorpusPart(str(source), path)
        else:
            yield _dataset_part(source)


def _dataset_part(source: str | Path) -> CorpusPart:
    named = None
    if isinstance(source, str) and not source.lower().endswith(FILE_TYPES):
        named = DATASET_NAME.fullmatch(source)
    if named is None:
        raise CorpusError(f"{source}: no such file or folder")
    name, config, rows = _KNOWN_DATASETS.get(named["name"], (named["name"], None, 1))
    return CorpusPart(source, None, name, named["config"] or config, rows)


def read_part(part: CorpusPart, reading: Reading) -> Iterator[Document]:
    """The documents of one file or dataset. Raises CorpusError as :func:`read_documents` does."""
    rows_per_document = reading.rows_per_document or part.rows_per_document
    if part.path is None:
        return _documents_of(_dataset_rows(part, reading), str(part), reading, rows_per_document)
    name = part.path.name.lower()
    if name.endswith((".txt", ".txt.gz")):
        return _read_text(part.path, reading)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _documents_of(_jsonl_rows(part.path, reading), str(part), reading, rows_per_document)
    return _documents_of(_parquet_rows(part.path, reading), str(part), reading, rows_per_document)


class _OpenDocument:
    """A document that is being read; its parts come out as they are full, if there is a limit."""

    def __init__(self, source: str, reading: Reading) -> None:
        self._source, self._reading = source, reading
        self._start(is_cut=False)

    def _start(self, *, is_cut: bool) -> None:
        self._paragraphs: list[str] = []
        self._characters, self._is_cut = 0, is_cut

    def add(self, paragraph: str) -> Iterator[Document]:
        limit = self._reading.longest_document
        if limit is not None and self._paragraphs and self._characters + len(paragraph) > limit:
            self._reading.left_out["cut_documents"] += not self._is_cut
            yield Document(self._source, self._paragraphs)
            self._start(is_cut=True)
        self._paragraphs.append(paragraph)
        self._characters += len(paragraph)

    def close(self) -> Iterator[Document]:
        if self._paragraphs:
            yield Document(self._source, self._paragraphs)
        self._start(is_cut=False)

    def drop(self) -> None:
        self._reading.left_out["bad_text"] += 1
        self._start(is_cut=False)


def _files_in(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: the folder cannot be read ({error.strerror})") from error

    files = []
    for place, below, names in os.walk(folder, onerror=fail, followlinks=True):
        above = [Path(place), *Path(place).parents]
        # A link to a folder that it is in would be followed for ever.
        below[:] = [name for name in below if not name.startswith(".") and not any(map(Path(place, name).samefile, above))]
        files += [Path(place, name) for name in names if name.lower().endswith(FILE_TYPES) and not name.startswith(".")]
    if not files:
        raise CorpusError(f"{folder}: the folder holds no file of a known type ({', '.join(FILE_TYPES)})")
    for file in files:
        if not file.exists():
            raise CorpusError(f"{file}: a symbolic link to a file that is not there")
    return sorted(file for file in files if file.is_file())


def _read_text(path: Path, reading: Reading) -> Iterator[Document]:
    document = _OpenDocument(str(path), reading)
    is_bad, number, cut = False, 0, 0
    for line_number, raw in read_raw_lines(path, CorpusError, longest=reading.longest_line):
        goes_on, number = line_number == number, line_number
        if goes_on and cut != number:
            cut = number
            reading.left_out["cut_lines"] += 1
        try:
            paragraph = decode_line(path, number, raw, CorpusError).strip()
        except CorpusError as error:
            reading.bad_text(error)
            is_bad = True
            continue
        if paragraph and not is_bad:
            yield from document.add(paragraph)
        elif not paragraph and not goes_on and raw.endswith(b"\n"):
            if is_bad:
                document.drop()
            yield from document.close()
            is_bad = False
    if is_bad:
        document.drop()
    yield from document.close()


def _documents_of(rows: Iterator[list[str] | None], source: str, reading: Reading, rows_per_document: int) -> Iterator[Document]:
    """Documents of consecutive rows; a row is its paragraphs, or None for one that is no text."""
    document = _OpenDocument(source, reading)
    is_bad, in_document = False, 0
    for paragraphs in rows:
        in_document += 1
        is_bad |= paragraphs is None
        for paragraph in paragraphs or ():
            for piece in _pieces(paragraph, reading):
                yield from document.add(piece)
        if paragraphs == [] and rows_per_document == 1:
            reading.left_out["empty"] += 1
        if in_document == rows_per_document:
            if is_bad:
                document.drop()
            yield from document.close()
            is_bad, in_document = False, 0
    if is_bad:
        document.drop()
    yield from document.close()


def _pieces(paragraph: str, reading: Reading) -> Iterator[str]:
    if reading.longest_line is None or len(paragraph) <= reading.longest_line:
        yield paragraph
        return
    reading.left_out["cut_lines"] += 1
    yield from cut_text(paragraph, reading.longest_line)


def _jsonl_rows(path: Path, reading: Reading) -> Iterator[list[str] | None]:
    for number, raw in read_raw_lines(path, CorpusError):
        where = f"{path}, line {number}"
        try:
            line = decode_line(path, number, raw, CorpusError)
            if line.strip():
                yield _row_paragraphs(_json_row(line, reading.text_column, where), reading.text_column, where)
        except CorpusError as error:
            reading.bad_text(error)
            yield None


def _json_row(line: str, text_column: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of more digits, or brackets in more brackets, than Python reads
        raise CorpusError(f"{where}: JSON that Python cannot read ({error})") from error
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: expected a JSON object with {text_column!r}, found {type(row).__name__}")
    return row


def _parquet_rows(path: Path, reading: Reading) -> Iterator[list[str] | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(f"{path}: reading Parquet needs pyarrow: pip install 'fastbert[train]'") from error
    text_column, row = reading.text_column, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise CorpusError(f"{path}: no column {text_column!r}; it has {_listed(names)}")
            if names.count(text_column) > 1:
                raise CorpusError(f"{path}: {names.count(text_column)} columns are called {text_column!r}, expected one")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_column]):
                for value in batch.column(text_column):
                    row += 1
                    where = f"{path}, row {row}"
                    try:
                        yield _row_paragraphs({text_column: _python_value(value, text_column, where)}, text_column, where)
                    except CorpusError as error:
                        reading.bad_text(error)
                        yield None
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}, row {row + 1}: not a readable Parquet file ({error})") from error


def _python_value(scalar: Any, text_column: str, where: str) -> Any:
    """The value of a pyarrow scalar."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: column {text_column!r} is not UTF-8 ({error.reason})") from error
    except (OverflowError, ValueError) as error:  # a date that Python's calendar does not have
        raise CorpusError(f"{where}: column {text_column!r} holds no text ({scalar.type}: {error})") from error


def _dataset_rows(part: CorpusPart, reading: Reading) -> Iterator[list[str] | None]:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"{part}: no such file or folder; for a Hugging Face dataset of this name: pip install 'fastbert[train]'"
        ) from error
    row = 0
    try:
        with no_waiting_for_the_hub(part.dataset):
            rows = datasets.load_dataset(part.dataset, part.config, split="train", streaming=True)
        for row, values in enumerate(rows, 1):
            if reading.text_column not in values:
                raise CorpusError(_no_column(values, reading.text_column, f"{part}, row {row}"))
            try:
                yield _row_paragraphs(values, reading.text_column, f"{part}, row {row}")
            except CorpusError as error:
                reading.bad_text(error)
                yield None
    except CorpusError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        place = f"{part}, row {row + 1}: reading" if row else f"{part}: no such file or folder, and loading"
        raise CorpusError(f"{place} the Hugging Face dataset failed ({type(error).__name__}: {error})") from error


def _row_paragraphs(row: Mapping[str, Any], text_column: str, where: str) -> list[str]:
    if text_column not in row:
        raise CorpusError(_no_column(row, text_column, where))
    text = row[text_column]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: column {text_column!r} must hold a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON's \ud800 makes a string that is no Unicode text
        raise CorpusError(f"{where}: column {text_column!r} holds a lone surrogate, which no UTF-8 text has") from error
    return [paragraph for line in text.split("\n") if (paragraph := line.strip())]


def _no_column(row: Mapping[str, Any], text_column: str, where: str) -> str:
    return f"{where}: no column {text_column!r}; it has {_listed(row)}"


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names) or "no columns"
