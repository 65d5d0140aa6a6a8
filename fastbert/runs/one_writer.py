"""One process at a time writes to an output: a second one is refused before it has read or deleted anything, and so is an output
that not everybody could write to."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from fastbert.user_cache import user_cache_folder

from .errors import SettingsError
from .torchrun import launch

R = TypeVar("R")


def one_writer(run: Callable[..., R]) -> Callable[..., R]:
    """``run(settings, ...)`` while this process alone writes to ``settings.output``, a file or a folder.

    The lock is an empty file in the user's cache folder, so that none lies about beside the output; the system frees it when the
    process ends, however it does. Of processes that torchrun has started together the first one writes, and holds it. Raises
    :class:`SettingsError` where another process holds it, and where the name is no text.
    """

    @functools.wraps(run)
    def locked(settings: Any, *others: Any, **named: Any) -> R:
        with writing_to(settings.output):
            return run(settings, *others, **named)

    return locked


def writing_to(output: str | Path) -> contextlib.AbstractContextManager:
    """This process alone writes to ``output`` from here on until the end; see :func:`one_writer`."""
    _check_is_text(output)
    started = launch()
    return _lock(output) if started is None or started.is_main else contextlib.nullcontext()


def _check_is_text(output: str | Path) -> None:
    """Tokenizer and weights are written by libraries that take no other names, when the training is done."""
    try:
        str(Path(output).resolve()).encode()
    except UnicodeEncodeError:
        raise SettingsError(
            f"--output {ascii(str(output))}: the path is no text in {sys.getfilesystemencoding()}, the encoding of file names "
            "here; choose another name, or set PYTHONUTF8=1 where it is one in UTF-8"
        ) from None


def _lock(output: str | Path) -> contextlib.AbstractContextManager:
    """Held from here on; nothing where the cache folder cannot be written to."""
    name = hashlib.sha256(str(Path(output).resolve()).encode()).hexdigest()[:16]
    path = user_cache_folder() / "locks" / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path, timeout=0).acquire()
    except Timeout:
        raise SettingsError(
            f"another process is writing to {output} (it holds {path}): wait for its end, or choose another --output"
        ) from None
    except OSError:
        return contextlib.nullcontext()
