"""Files that appear whole: whoever looks for one finds the old file or the new one, never a part of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path, *, on_disk: bool = False) -> Iterator[Path]:
    """A name beside ``path`` to write to, which becomes ``path`` at the end; where the writing fails nothing is left of it.

    A link leads to the new file as it did to the old one, which passes its permissions on. on_disk: what was written is on the disk
    before it gets its name, for files that others are deleted for.
    """
    path = path.resolve()
    beside = path.with_name(f".{path.name}.new")
    try:
        yield beside
        if on_disk:
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            beside.chmod(path.stat().st_mode)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
