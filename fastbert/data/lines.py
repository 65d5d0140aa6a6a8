"""The numbered lines of a UTF-8 file, plain or gzip; a damaged file ends the reading with an error that names the line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastbert.data.errors import DataError


def read_lines(path: Path, error_class: type[DataError] = DataError) -> Iterator[tuple[int, str]]:
    """The lines of a file, with their numbers from 1 and their line ends; only "\\n" ends a line, and a UTF-8 BOM is taken off.

    A file whose name ends in ``.gz`` is unzipped. Raises ``error_class`` for a missing, unreadable, truncated or damaged file and
    for bytes that are no UTF-8.
    """
    zipped = path.name.lower().endswith(".gz")
    number = 0
    try:
        if zipped and path.stat().st_size == 0:
            raise EOFError
        with gzip.open(path) if zipped else path.open("rb") as file:
            for number, line in enumerate(io.BufferedReader(file), 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise error_class(
            f"{path}, line {number}: not UTF-8 (byte 0x{byte:02x} at byte {error.start + 1} of the line, {error.reason})"
        ) from error
    except EOFError as error:
        raise error_class(f"{path}, line {number + 1}: the gzip data end too early (a truncated file)") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise error_class(f"{path}, line {number + 1}: damaged gzip data ({error})") from error
    except FileNotFoundError as error:
        raise error_class(f"{path}: no such file") from error
    except OSError as error:
        raise error_class(f"{path}, line {number + 1}: cannot be read ({error.strerror or error})") from error


def without_line_end(line: str) -> str:
    """A line without its "\\n" or "\\r\\n"; other white space is text and stays."""
    return line.removesuffix("\n").removesuffix("\r")
