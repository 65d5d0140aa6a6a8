"""Checkpoints are written while training goes on: by a thread, from a snapshot, one at a time.

The loop is held up for the copies of a snapshot alone. safetensors, SHA-256 and fsync leave Python's lock to the training thread.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from fastbert.runs.errors import TrainingError

from .checkpoint import Snapshot, checkpoint_path, sync_path, write_checkpoint


class CheckpointWriter:
    """Writes checkpoints to ``output`` and keeps the ``keep`` newest; a context manager that ends when nothing is being written.

    ``log``: a file of lines that were appended before a checkpoint; they become durable before it does.
    """

    def __init__(self, output: Path, *, keep: int, log: Path):
        self.output = output
        self.keep = keep
        self.log = log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None

    def start(self, step: int, snapshot: Snapshot) -> Path:
        """Begins to write ``checkpoint-<step>`` and returns the path that it will have; waits for the one before it.

        Raises as :meth:`wait` does, for the one before it.
        """
        self.wait()
        self._job = self._thread.submit(self._write, step, snapshot)
        return checkpoint_path(self.output, step)

    def raise_error(self) -> None:
        """Raises :class:`TrainingError` where the last checkpoint could not be written, without waiting for it."""
        if self._job is not None and self._job.done():
            job, self._job = self._job, None
            job.result()

    def wait(self) -> None:
        """Until nothing is being written. Raises :class:`TrainingError` where the last checkpoint could not be written."""
        if self._job is not None:
            wait([self._job])
            self.raise_error()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            # After an error, which is the one to be told: nobody may read the folder while it changes.
            self._thread.shutdown()

    def _write(self, step: int, snapshot: Snapshot) -> None:
        def write(folder: Path) -> None:
            snapshot.write(folder)
            if self.log.exists():
                sync_path(self.log)

        try:
            write_checkpoint(self.output, step, write, keep=self.keep)
        except OSError as error:
            free = shutil.disk_usage(self.output).free
            raise TrainingError(
                f"{checkpoint_path(self.output, step)} could not be written: {error} (it takes {snapshot.nbytes / 1e6:,.1f} MB and "
                f"{free / 1e6:,.1f} MB are free there; the checkpoints before it are as they were)"
            ) from error
