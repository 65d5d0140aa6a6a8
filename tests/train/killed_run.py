"""``fastbert pretrain`` in a process of its own that SIGKILL ends at a chosen moment."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fastbert.train.settings import PretrainSettings

from ..processes import rough_savefig, server

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


@dataclass(frozen=True)
class Moment:
    """Right before the process does ``event`` (a name of Python's audit events) to ``path`` for the ``number``-th time."""

    event: str
    path: str
    number: int


@dataclass(frozen=True)
class Ended:
    """``exit_code``: negative for a signal; ``text``: what was printed; ``moments``: what was done to files of the output."""

    exit_code: int
    text: str
    moments: list[Moment]
    seconds: float


def run(
    settings: PretrainSettings, *, kill: Moment | None = None, kill_after: float | None = None, words: str | None = None
) -> Ended:
    """Runs the command to its end, to the moment ``kill``, or until ``kill_after`` seconds after its first checkpoint is there.

    ``words``: the command line, instead of that of ``settings``.
    """
    output = Path(settings.output)
    log, record = output.with_name(f"{output.name}.log"), output.with_name(f"{output.name}.moments")
    started = time.monotonic()
    command = shlex.split(words or settings.command())[1:]
    process = server().Process(target=_child, args=(command, str(output), str(log), str(record), kill))
    process.start()
    if kill_after is not None:
        while process.is_alive() and not any(output.glob("checkpoint-*")):
            time.sleep(0.002)
        time.sleep(kill_after)
        process.kill()
    process.join()
    moments = [Moment(*line.split("\t")[:2], int(line.split("\t")[2])) for line in record.read_text().splitlines()]
    return Ended(process.exitcode, log.read_text(encoding="utf-8"), moments, time.monotonic() - started)


def _child(command: list[str], output: str, log: str, record: str, kill: Moment | None) -> None:
    import torch
    from matplotlib.figure import Figure

    from fastbert.cli.main import app

    torch.set_num_threads(1)
    Figure.savefig = rough_savefig
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    moments = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    seen: Counter[tuple[str, str]] = Counter()

    def watch(event: str, arguments: tuple) -> None:
        if event not in FILE_EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.fspath(arguments[0])
        if not path.startswith(output + "/"):
            return
        key = (event, os.path.relpath(path, output))
        seen[key] += 1
        if kill == Moment(*key, seen[key]):
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(moments, f"{key[0]}\t{key[1]}\t{seen[key]}\n".encode())

    sys.addaudithook(watch)
    sys.argv = ["fastbert", *command]
    app()
