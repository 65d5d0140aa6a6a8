"""Labelled data in rows and columns: TSV, CSV, plain lines, JSON, JSON Lines, Parquet and Hugging Face datasets, all read alike.

Everything is checked before a row is used: a table that is damaged in one place is refused with a ``DataError`` that names the
place and the column.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.data.errors import DataError
from fastbert.data.hub import no_waiting_for_the_hub
from fastbert.data.lines import read_lines, without_line_end
from fastbert.data.sources import Source

if TYPE_CHECKING:
    import datasets
    import pyarrow

TABLE_TYPES = (".tsv", ".csv", ".txt", ".jsonl", ".json", ".parquet")
_DELIMITERS = {".tsv": "\t", ".csv": ","}


@dataclass(frozen=True)
class Table:
    """``source``: the file or dataset, for messages; ``rows``: each a value per column, None where the source says null;
    ``places``: for each row "line 12" (of the file, from 1, where the row begins) or "row 12" (from 1)."""

    source: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    places: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def error(self, row: int | None, column: str | None, problem: str) -> DataError:
        """The error of ``problem`` in a row (by its index) and a column, or in all of them."""
        return DataError.at(self.source, None if row is None else self.places[row], column, problem)


def read_table(source: Source, *, header: Sequence[str] | None = None, quoted: bool | None = None) -> Table:
    """A table out of a file, whose name says how it is written, or out of a split of a Hugging Face dataset.

    - ``.tsv``, ``.csv``: a header line and a row per line; all values are strings. In TSV a ``"`` is a character like any other, as
      in the files of GLUE, in CSV it quotes; ``quoted`` says otherwise. ``header`` names the columns of a file without header line;
    - ``.txt``: one column ``text``, a row per line;
    - ``.jsonl``: an object per line; ``.json``: a list of objects, or one object of equally long lists, one per column;
    - ``.parquet`` and datasets: columns of ClassLabel, also in lists, become the names of the labels, and None for -1.

    The text formats also come with ``.gz``. Blank lines at the end of TSV, CSV and text, and everywhere in JSON Lines, are no rows.

    Raises DataError for a missing file, an unknown type, damage (also bad UTF-8 and JSON), a row with more or fewer fields than
    there are columns, columns of different length, duplicate or empty names, strings and numbers in one column, and no rows.
    """
    if source.path is None:
        return _checked(str(source), *_dataset_rows(source))
    path, name = source.path, str(source)
    kind = file_kind(path)
    if not path.is_file():
        raise DataError(f"{name}: {'a folder, expected a file' if path.is_dir() else 'no such file'}")
    if header is not None and kind not in _DELIMITERS:
        raise DataError(f"{name}: only TSV and CSV files can be without a header line; {kind} names its columns")
    if kind in _DELIMITERS:
        quoted = kind == ".csv" if quoted is None else quoted
        records = _quoted_records(path, _DELIMITERS[kind]) if quoted else _plain_records(path, _DELIMITERS[kind])
        columns, rows, places = _rows_of_records(name, records, header)
    elif kind == ".txt":
        columns, rows, places = _rows_of_records(name, _plain_records(path, None), ("text",))
    elif kind == ".jsonl":
        columns, rows, places = _json_lines(path)
    elif kind == ".json":
        columns, rows, places = _json_rows(path)
    elif kind == ".parquet":
        columns, rows, places = _parquet_rows(path)
    else:
        raise DataError(f"{name}: unknown file type; a table is one of {', '.join(TABLE_TYPES)}, the text ones also with .gz")
    return _checked(name, columns, rows, places)


def read_stdin() -> Table:
    """A table as of a ``.txt`` file out of standard input, in UTF-8."""
    name = "standard input"
    if sys.stdin is None:
        raise DataError(f"{name} is closed")
    rows = []
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            rows.append({"text": without_line_end(line.decode("utf-8-sig" if number == 1 else "utf-8"))})
        except UnicodeDecodeError as error:
            raise DataError.at(name, f"line {number}", None, f"not UTF-8 ({error.reason})") from error
    while rows and not rows[-1]["text"].strip():  # as at the end of a file
        rows.pop()
    if not rows:
        raise DataError(f"{name}: there are no lines")
    return Table(name, ("text",), rows, [f"line {number}" for number in range(1, len(rows) + 1)])


def file_kind(path: Path) -> str:
    """The lower-case suffix of a file's name, that before ``.gz`` where it has one: ".tsv" of ``Train.TSV.gz``."""
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    return f"{kind}.gz" if kind == ".parquet" and name.endswith(".gz") else kind


# --- TSV, CSV, text --------------------------------------------------------------------------------------------------------


def _plain_records(path: Path, delimiter: str | None) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of each line, without the blank lines at the end; no delimiter: the line is the only field."""
    blank: list[tuple[int, list[str]]] = []
    for number, line in read_lines(path):
        text = without_line_end(line)
        record = (number, [text] if delimiter is None else text.split(delimiter))
        if text.strip():
            yield from blank
            blank = []
            yield record
        else:
            blank.append(record)


def _quoted_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The same of a file where ``"`` quotes; a record has the number of its first line."""
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # 128 KiB else: less than a long document
    blank: list[tuple[int, list[str]]] = []
    first = 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield from blank
                blank = []
                yield first, fields
            else:
                blank.append((first, fields or [""]))
            first = reader.line_num + 1
    except csv.Error as error:
        problem = "the quotes of a cell are never closed" if "unexpected end" in str(error) else f"not valid CSV ({error})"
        raise DataError.at(str(path), f"line {first}", None, problem) from error
    finally:
        csv.field_size_limit(limit)


def _rows_of_records(
    name: str, records: Iterator[tuple[int, list[str]]], header: Sequence[str] | None
) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """Columns, rows and places; ``header``: the names of the columns where no line has them."""
    first = 0
    if header is None:
        first, header = next(records, (1, []))
        if not header:
            raise DataError(f"{name}: the file is empty; expected a header line and rows")
    columns = list(header)
    _check_columns(name, f"line {first}" if first else None, columns)
    rows, places = [], []
    for line, fields in records:
        if len(fields) != len(columns):
            count = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
            raise DataError.at(name, f"line {line}", None, f"has {count}, the header names {len(columns)} ({_listed(columns)})")
        rows.append(dict(zip(columns, fields)))
        places.append(f"line {line}")
    return columns, rows, places


# --- JSON ------------------------------------------------------------------------------------------------------------------


def _json_lines(path: Path) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    rows, places = [], []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        place = f"line {number}"
        row = parse_json(line, str(path), place)
        if not isinstance(row, dict):
            raise DataError.at(str(path), place, None, f"expected a JSON object, found {_kind(row)}")
        rows.append(row)
        places.append(place)
    return list(rows[0]) if rows else [], rows, places


def _json_rows(path: Path) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    document = parse_json("".join(line for _, line in read_lines(path)), str(path), None)
    if isinstance(document, dict):
        for column, values in document.items():
            if not isinstance(values, list):
                raise DataError.at(str(path), None, column, f"expected a list, one value per row, found {_kind(values)}")
        lengths = {column: len(values) for column, values in document.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{column!r} has {length}" for column, length in lengths.items())
            raise DataError(f"{path}: the columns must be equally long: {listed} values")
        columns = list(document)
        rows = [dict(zip(columns, values)) for values in zip(*document.values())]
    elif isinstance(document, list):
        for number, row in enumerate(document, 1):
            if not isinstance(row, dict):
                raise DataError.at(str(path), f"row {number}", None, f"expected a JSON object, found {_kind(row)}")
        columns, rows = list(document[0]) if document else [], document
    else:
        raise DataError(f"{path}: expected a JSON list of objects, found {_kind(document)}")
    return columns, rows, [f"row {number}" for number in range(1, len(rows) + 1)]


def parse_json(text: str, source: str, place: str | None) -> Any:
    """The document in ``text``. Raises DataError for what is no JSON: also NaN and a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if place is not None else f"line {error.lineno}, column {error.colno}"
        hint = "; a file of JSON Lines is named .jsonl" if place is None and error.msg == "Extra data" else ""
        raise DataError.at(source, place, None, f"not valid JSON ({error.msg}, {where}){hint}") from error
    except (ValueError, RecursionError) as error:
        raise DataError.at(source, place, None, f"not valid JSON ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number; a value that is not known is null")


# --- Parquet and datasets --------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'fastbert[train]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(str(path), None, file.schema_arrow.names)
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    if b"huggingface" in (table.schema.metadata or {}):
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"{path}: a dataset of Hugging Face: pip install 'fastbert[train]'") from error
        return _arrow_rows(str(path), table, datasets.Features.from_arrow_schema(table.schema))
    return _arrow_rows(str(path), table, {})


def _dataset_rows(source: Source) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    name, _, config = (source.dataset or "").partition(":")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: a dataset of Hugging Face needs datasets: pip install 'fastbert[train]'") from error
    try:
        with no_waiting_for_the_hub(name):
            dataset = datasets.load_dataset(name, config or None, split=source.split)
        table = dataset.with_format("arrow")[:]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: loading the Hugging Face dataset failed ({type(error).__name__}: {error})") from error
    return _arrow_rows(str(source), table, dataset.features)


def _arrow_rows(
    name: str, table: pyarrow.Table, features: Mapping[str, datasets.Features]
) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    columns = list(table.column_names)
    values = []
    for column in columns:
        try:
            cells = table[column].to_pylist()
        except UnicodeDecodeError as error:
            raise DataError.at(name, None, column, f"not UTF-8 ({error.reason})") from error
        feature = features.get(column)
        try:
            if names := getattr(feature, "names", None):
                cells = [_label(value, names) for value in cells]
            elif names := getattr(getattr(feature, "feature", None), "names", None):
                cells = [value if value is None else [_label(part, names) for part in value] for value in cells]
        except IndexError as error:
            raise DataError.at(name, None, column, f"a label number has no name; {len(names)} have one") from error
        values.append(cells)
    rows = [dict(zip(columns, cells)) for cells in zip(*values)]
    return columns, rows, [f"row {number}" for number in range(1, len(rows) + 1)]


def _label(number: int | None, names: Sequence[str]) -> str | None:
    """The name of a ClassLabel; -1 is Hugging Face's number for a label that is held back."""
    return None if number is None or number < 0 else names[number]


# --- what every table must be ----------------------------------------------------------------------------------------------


def _checked(name: str, columns: Sequence[str], rows: list[dict[str, Any]], places: list[str]) -> Table:
    """The table, once all its rows have the same columns and each column values of one kind."""
    if not rows:
        ends = "; its lines end in CR alone, expected LF or CRLF" if any("\r" in column for column in columns) else ""
        raise DataError(f"{name}: there are no rows{ends}")
    _check_columns(name, None, columns)
    expected = dict.fromkeys(columns)
    first: dict[str, tuple[str, str]] = {}  # column: its kind, and the place that showed it
    for row, place in zip(rows, places):
        if row.keys() != expected.keys():
            lacks = next((column for column in expected if column not in row), None)
            column = next(column for column in row if column not in expected) if lacks is None else lacks
            problem = "is new" if lacks is None else "is not there"
            raise DataError.at(name, place, column, f"{problem}; the row at {places[0]} has {_listed(columns)}")
        for column, value in row.items():
            if value is None:
                continue
            check_unicode(value, name, place, column)
            kind, where = first.setdefault(column, (_kind(value), place))
            if _kind(value) != kind:
                raise DataError.at(
                    name, place, column, f"holds {_kind(value)}, but {kind} at {where}; one column, one kind of value"
                )
    return Table(name, tuple(columns), rows, places)


def _check_columns(name: str, place: str | None, columns: Sequence[str]) -> None:
    for number, column in enumerate(columns, 1):
        if not column.strip():
            raise DataError.at(name, place, None, f"column {number} has no name ({_listed(columns)})")
        if column in columns[: number - 1]:
            raise DataError.at(name, place, column, f"stands twice in the header ({_listed(columns)})")


def check_unicode(value: Any, name: str, place: str, column: str | None) -> None:
    """Raises DataError for half of a surrogate pair, in a string or in whatever holds one."""
    if isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            check_unicode(part, name, place, column)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON's \ud800 makes a string that is no Unicode text
            raise DataError.at(name, place, column, "holds a lone surrogate, which no UTF-8 text has") from error


def _kind(value: Any) -> str:
    """What a value is, in words; whole and broken numbers are one kind."""
    kinds = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
