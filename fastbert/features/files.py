"""The output of ``fastbert embed``, put together from the chunks of a run and moved to its name when it is whole.

- ``.npy``: (rows, dim) float32; at level "token" beside it ``OUT.offsets.npy``, (texts + 1,) int64: text i has the rows
  offsets[i] to offsets[i + 1].
- ``.parquet``: row (the number of the text among all inputs, from 0), text, at level "token" position (of the row in its text,
  from 0) and token (or word), embedding (a list of fixed size, float32). A row group per chunk.
- ``.jsonl``: the same fields, an object per line, with nine digits, which is all that float32 has.

With a second text: text_pair behind text. One chunk at a time is in memory.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.errors import DataError
from fastbert.runs.whole_file import whole_file

from .embedder import Embedded
from .parts import Parts
from .settings import offsets_of
from .texts import Texts


def check_format(output: Path) -> None:
    """Raises DataError where a package is missing that the format of ``output`` needs."""
    if output.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise DataError(f"{output}: writing Parquet needs pyarrow: pip install 'fastbert[train]'") from error


def write_output(files: list[Path], parts: Parts, bounds: list[int], texts: Texts, *, dim: int, by_token: bool) -> None:
    """Writes the output, ``files[0]``, and the file of the offsets where there is a second.

    bounds: where the chunks begin among the texts, and the last one ends.
    """
    output, kind = files[0], files[0].suffix.lower()
    if kind == ".npy":
        return _write_npy(files, parts, dim)
    chunks = ((parts.read(index), bounds[index]) for index in range(parts.count))
    write = _write_parquet if kind == ".parquet" else _write_jsonl
    with whole_file(output, on_disk=True) as beside:
        write(beside, chunks, texts, dim, by_token)


def has_offsets(output: Path) -> bool:
    """Whether beside ``output`` is the file of its offsets, and not another one of that name."""
    if output.suffix.lower() != ".npy":
        return False
    try:
        rows, offsets = np.load(output, mmap_mode="r"), np.load(offsets_of(output), mmap_mode="r")
        return offsets.dtype == np.int64 and offsets.ndim == 1 and int(offsets[-1]) == len(rows)
    except (OSError, ValueError, IndexError, TypeError):
        return False


def _write_npy(files: list[Path], parts: Parts, dim: int) -> None:
    offsets = np.cumsum(np.concatenate([[0], *(parts.counts(index) for index in range(parts.count))]), dtype=np.int64)
    with contextlib.ExitStack() as names:  # which both get at the end: neither belongs to the other's older version
        beside = [names.enter_context(whole_file(path, on_disk=True)) for path in files]
        for path in beside[1:]:
            with path.open("wb") as file:
                np.save(file, offsets)
        with beside[0].open("wb") as file:
            header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (int(offsets[-1]), dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for index in range(parts.count):
                file.write(parts.read(index).rows.data)


def _write_parquet(path: Path, chunks: Iterator[tuple[Embedded, int]], texts: Texts, dim: int, by_token: bool) -> None:
    import pyarrow
    import pyarrow.parquet

    fields = [("row", pyarrow.int64()), ("text", pyarrow.string())]
    if texts.pairs is not None:
        fields.append(("text_pair", pyarrow.string()))
    if by_token:
        fields += [("position", pyarrow.int32()), ("token", pyarrow.string())]
    schema = pyarrow.schema([*fields, ("embedding", pyarrow.list_(pyarrow.float32(), dim))])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for chunk, first in chunks:
            columns: dict[str, list] = {name: [] for name, _ in fields}
            for record in _records(chunk, first, texts, by_token):
                for name, value in record.items():
                    columns[name].append(value)
            embedding = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(chunk.rows.ravel()), dim)
            writer.write_table(pyarrow.table({**columns, "embedding": embedding}, schema=schema))


def _write_jsonl(path: Path, chunks: Iterator[tuple[Embedded, int]], texts: Texts, dim: int, by_token: bool) -> None:
    number: Callable[[float], str] = "{:.9g}".format
    with path.open("w", encoding="utf-8") as file:
        for chunk, first in chunks:
            for record, row in zip(_records(chunk, first, texts, by_token), chunk.rows):
                fields = json.dumps(record, ensure_ascii=False).removesuffix("}")
                file.write(f'{fields}, "embedding": [{", ".join(map(number, row.tolist()))}]}}\n')


def _records(chunk: Embedded, first: int, texts: Texts, by_token: bool) -> Iterator[dict[str, Any]]:
    """What stands beside each row of a chunk whose first text has the number ``first``."""
    row = 0
    for index, count in enumerate(chunk.counts.tolist(), first):
        text = texts.texts[index]
        record: dict[str, Any] = {"row": index, "text": text if isinstance(text, str) else " ".join(text)}
        if texts.pairs is not None:
            record["text_pair"] = texts.pairs[index]
        if not by_token:
            yield record
            continue
        for position, token in enumerate(chunk.names[row : row + count]):
            yield {**record, "position": position, "token": token}
        row += count
