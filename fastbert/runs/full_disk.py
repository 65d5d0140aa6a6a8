"""The errors of a disk that is full while weights are written to it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import TrainingError, first_line

# torch.save raises a RuntimeError where it cannot write, which only the name of torch's source file in it tells from others.
_TORCH_CANNOT_WRITE = "inline_container"


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """What weights are written to ``folder`` in: a full disk, of which safetensors and torch have errors of their own, is a
    TrainingError that names the folder and how much is free there. Other errors stay as they are."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _TORCH_CANNOT_WRITE not in str(error):
            raise
        free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
        raise TrainingError(
            f"{folder} cannot be written to: {first_line(error)} ({free / 1e6:,.1f} MB are free there); what is done stays, and "
            "--resume goes on from it"
        ) from error
