"""What torchrun tells a process by its environment. Nothing here imports torch, so that the command line can ask at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass

from .errors import SettingsError


@dataclass(frozen=True)
class Launch:
    """This process is ``rank`` of ``world_size``, and ``local_rank`` on its machine; ``restarts``: how often torchrun has started
    all of them anew because one had failed; ``may_restart``: whether it would (``--max-restarts``).
    """

    rank: int
    world_size: int
    local_rank: int
    restarts: int = 0
    may_restart: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"process {self.rank} of {self.world_size}"


def launch() -> Launch | None:
    """How this process was started; None where it was by itself.

    Raises :class:`SettingsError` where the environment names a rank but not how the processes find each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SettingsError(
            f"RANK and WORLD_SIZE are set but {', '.join(missing)} are not: start the processes with torchrun, or unset RANK"
        )
    return Launch(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        may_restart=int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0,
    )


def refuse_several_processes(command: str) -> None:
    """Raises :class:`SettingsError` where torchrun has started several processes for a command that is none for several: each of
    them would do all of the work, and write it to the same place."""
    started = launch()
    if started is not None and started.world_size > 1:
        raise SettingsError(
            f"fastbert {command} runs in one process, torchrun has started {started.world_size}, each of which would write all of "
            f"its output: start it without torchrun, as in fastbert {command} ... (fastbert pretrain is for several processes)"
        )


@contextmanager
def only_main_speaks() -> Iterator[None]:
    """In all processes but the first, what Python prints (messages, bars, warnings) goes nowhere; ``sys.__stderr__`` is left."""
    try:
        started = launch()
    except SettingsError:
        started = None  # the command is about to say so
    if started is None or started.is_main:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
