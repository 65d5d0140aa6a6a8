"""Documents out of text files, JSON lines, Parquet files and Hugging Face datasets; without any, out of the installation.

Every line and row is checked on the way: a corpus that is damaged in one place ends the reading with a ``CorpusError`` that
names the place, and no text is skipped without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.data.documents import CorpusReport, Document
from fastbert.data.embedded import embedded_documents
from fastbert.data.errors import CorpusError
from fastbert.data.lines import read_lines
from fastbert.data.sources import DATASET_NAME

__all__ = ["CorpusError", "CorpusReport", "Document", "embedded_documents", "read_documents"]

FILE_TYPES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_ROWS = 1024


def read_documents(sources: Sequence[str | Path], *, text_column: str = "text") -> Iterator[Document]:
    """Yields the documents of all sources, in the order given.

    A source is
    - a ``.txt`` or ``.txt.gz`` file: UTF-8, a paragraph per line; a blank line or the file's end closes a document;
    - a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file: a row is a document, ``text_column`` holds its text, a newline in
      the text separates paragraphs, and a row without text is no document;
    - a folder: all files of these types in it and below it, sorted by path, hidden ones (``.name``) left out;
    - else the name of a Hugging Face dataset, ``name`` or ``name:config``, whose train split is streamed.

    Lines and rows are counted from 1. Raises CorpusError for a missing, unreadable or damaged file, bad UTF-8 or JSON, a
    missing or non-string text column, a dataset that cannot be loaded, and, once everything is read, for a corpus
    of fewer than two documents: next sentence prediction takes its negatives from another document.
    """
    if isinstance(sources, (str, Path)):
        raise TypeError(f"sources must be a sequence of paths or dataset names, not the single {sources!r}")
    documents = 0
    for source in sources:
        for document in _read_source(source, text_column):
            documents += 1
            yield document
    if documents < 2:
        names = ", ".join(str(source) for source in sources) or "no source was given"
        found = "only one document" if documents else "no text"
        raise CorpusError(
            f"the corpus has {found} ({names}): next sentence prediction needs at least two documents; "
            "in text files a blank line or the file's end closes a document, elsewhere a row is a document"
        )


def _read_source(source: str | Path, text_column: str) -> Iterator[Document]:
    path = Path(source)
    if path.is_dir():
        for file in _files_in(path):
            yield from _read_file(file, text_column)
    elif path.is_file():
        yield from _read_file(path, text_column)
    else:
        dataset = None
        if isinstance(source, str) and not source.lower().endswith(FILE_TYPES):
            dataset = DATASET_NAME.fullmatch(source)
        if dataset is None:
            raise CorpusError(f"{source}: no such file or folder")
        yield from _read_dataset(dataset["name"], dataset["config"], text_column)


def _files_in(folder: Path) -> list[Path]:
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.name.lower().endswith(FILE_TYPES) and not hidden and path.is_file():
            files.append(path)
    if not files:
        raise CorpusError(f"{folder}: the folder holds no file of a known type ({', '.join(FILE_TYPES)})")
    return files


def _read_file(path: Path, text_column: str) -> Iterator[Document]:
    name = path.name.lower()
    if name.endswith((".txt", ".txt.gz")):
        return _read_text(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path, text_column)
    if name.endswith(".parquet"):
        return _read_parquet(path, text_column)
    raise CorpusError(f"{path}: unknown file type; a corpus is made of {', '.join(FILE_TYPES)}")


def _read_text(path: Path) -> Iterator[Document]:
    paragraphs: list[str] = []
    for _, line in read_lines(path, CorpusError):
        paragraph = line.strip()
        if paragraph:
            paragraphs.append(paragraph)
        elif paragraphs:
            yield Document(str(path), paragraphs)
            paragraphs = []
    if paragraphs:
        yield Document(str(path), paragraphs)


def _read_jsonl(path: Path, text_column: str) -> Iterator[Document]:
    for number, line in read_lines(path, CorpusError):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: expected a JSON object with {text_column!r}, found {type(row).__name__}")
        paragraphs = _row_paragraphs(row, text_column, where)
        if paragraphs:
            yield Document(str(path), paragraphs)


def _read_parquet(path: Path, text_column: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(f"{path}: reading Parquet needs pyarrow: pip install 'fastbert[train]'") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise CorpusError(f"{path}: no column {text_column!r}; it has {_listed(names)}")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_column]):
                for value in batch.column(text_column):
                    row += 1
                    paragraphs = _row_paragraphs({text_column: value.as_py()}, text_column, f"{path}, row {row}")
                    if paragraphs:
                        yield Document(str(path), paragraphs)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}, row {row}: column {text_column!r} is not UTF-8 ({error.reason})") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}, row {row + 1}: not a readable Parquet file ({error})") from error


def _read_dataset(name: str, config: str | None, text_column: str) -> Iterator[Document]:
    label = f"{name}:{config}" if config else name
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"{label}: no such file or folder; for a Hugging Face dataset of this name: pip install 'fastbert[train]'"
        ) from error
    row = 0
    try:
        for row, values in enumerate(datasets.load_dataset(name, config, split="train", streaming=True), 1):
            paragraphs = _row_paragraphs(values, text_column, f"{label}, row {row}")
            if paragraphs:
                yield Document(label, paragraphs)
    except CorpusError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        place = f"{label}, row {row + 1}: reading" if row else f"{label}: no such file or folder, and loading"
        raise CorpusError(f"{place} the Hugging Face dataset failed ({type(error).__name__}: {error})") from error


def _row_paragraphs(row: Mapping[str, Any], text_column: str, where: str) -> list[str]:
    if text_column not in row:
        raise CorpusError(f"{where}: no column {text_column!r}; it has {_listed(row)}")
    text = row[text_column]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: column {text_column!r} must hold a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON's \ud800 makes a string that is no Unicode text
        raise CorpusError(f"{where}: column {text_column!r} holds a lone surrogate, which no UTF-8 text has") from error
    return [paragraph for line in text.split("\n") if (paragraph := line.strip())]


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names) or "no columns"
