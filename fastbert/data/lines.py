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
    for number, line in read_raw_lines(path, error_class):
        yield number, decode_line(path, number, line, error_class)


def read_raw_lines(
    path: Path, error_class: type[DataError] = DataError, *, longest: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """As :func:`read_lines`, the bytes as they are, for :func:`decode_line`.

    A line of more than ``longest`` bytes comes in several pieces, all with its number, of up to twice as many bytes: divided behind
    white space where there is any, between two characters else.
    """
    zipped = path.name.lower().endswith(".gz")
    number = 0
    try:
        if zipped and path.stat().st_size == 0:
            raise EOFError
        with gzip.open(path) if zipped else path.open("rb") as file:
            lines = io.BufferedReader(file)
            for number, line in enumerate(lines, 1) if longest is None else _pieces(lines, longest):
                yield number, line
    except EOFError as error:
        raise error_class(f"{path}, line {number + 1}: the gzip data end too early (a truncated file)") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise error_class(f"{path}, line {number + 1}: damaged gzip data ({error})") from error
    except FileNotFoundError as error:
        raise error_class(f"{path}: no such file") from error
    except OSError as error:
        raise error_class(f"{path}, line {number + 1}: cannot be read ({error.strerror or error})") from error


def decode_line(path: Path, number: int, line: bytes, error_class: type[DataError] = DataError) -> str:
    """Raises ``error_class`` for bytes that are no UTF-8."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise error_class(
            f"{path}, line {number}: not UTF-8 (byte 0x{byte:02x} at byte {error.start + 1} of the line, {error.reason})"
        ) from error


def _pieces(lines: io.BufferedReader, longest: int) -> Iterator[tuple[int, bytes]]:
    number, rest = 1, b""
    while piece := rest + lines.readline(longest):
        rest = b""
        if len(piece) >= longest and not piece.endswith(b"\n"):
            piece, rest = _divided(piece)
        yield number, piece
        number += piece.endswith(b"\n")


def _divided(piece: bytes) -> tuple[bytes, bytes]:
    end = max(piece.rfind(b" "), piece.rfind(b"\t")) + 1
    if end == 0:
        end = len(piece)
        # A character's first byte is none of 10xxxxxx, and it has at most three of those behind it.
        for start in range(end - 1, max(0, end - 4), -1):
            if piece[start] & 0b1100_0000 != 0b1000_0000:
                end = start
                break
    return piece[:end], piece[end:]


def without_line_end(line: str) -> str:
    """A line without its "\\n" or "\\r\\n"; other white space is text and stays."""
    return line.removesuffix("\n").removesuffix("\r")
