"""Several processes that train one model: how they find each other, what they sum up, and how they end together.

Every process runs the same program on its share of each step's batches; the first one prints and writes. Gradients are summed by
DistributedDataParallel, which reduces them bucket by bucket while the backward pass of a step's last batch goes on. A process
that fails says so in the store that torchrun keeps for them, before its connections close; the others, whose next sum fails,
read it there and end with its exit code.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastbert.runs.errors import SettingsError, TrainingError, TrainingInterrupted
from fastbert.runs.torchrun import Launch

# How long a process waits for the others: the first may be writing a checkpoint, the last still be reading the corpus.
PATIENCE = timedelta(hours=1)
_FAILURE_KEY = "fastbert failure"
_DROPOUT_STREAM = 2  # of a SeedSequence: the streams of data/streams.py belong to another generator

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Processes:
    """The processes of a run as one of them sees them; where it is alone nothing is communicated. ``store``: for failures."""

    launch: Launch | None = None
    store: dist.Store | None = None

    @property
    def rank(self) -> int:
        return 0 if self.launch is None else self.launch.rank

    @property
    def count(self) -> int:
        return 1 if self.launch is None else self.launch.world_size

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over all processes, in place, not waited for on a GPU."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1))

    def of_main(self, value: Callable[[], T]) -> T:
        """What ``value`` returns (JSON-ready) in the first process, for all of them."""
        if self.count == 1:
            return value()
        text = json.dumps(value()).encode() if self.is_main else b""
        size = torch.tensor([len(text)])
        dist.broadcast(size, src=0)
        letters = torch.tensor(list(text), dtype=torch.uint8) if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(letters, src=0)
        return json.loads(bytes(letters.tolist()))

    def parallel(self, model: nn.Module) -> nn.Module:
        """``model`` as it is called in a training step; its parameters stay where they are."""
        if self.count == 1:
            return model
        with warnings.catch_warnings():
            # broadcast_buffers has another name from torch 2.13 on, which torch 2.11 does not know.
            warnings.simplefilter("ignore", FutureWarning)
            # No buffer of a BERT ever changes, and every parameter has a gradient in every step.
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def accumulating(self, module: nn.Module) -> AbstractContextManager[None]:
        """For every batch of a step but the last: gradients add up in this process, and are summed with the last one's."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


ALONE = Processes()


@contextmanager
def joined(launch: Launch | None) -> Iterator[Processes]:
    """The processes of this run, from the rendezvous that torchrun has arranged to an end that all of them reach.

    An error of one ends all: it raises (and, unless it is the first process, prints) its own error, the others raise a
    :class:`TrainingError`, :class:`SettingsError` or KeyboardInterrupt, as it did, which names the process that failed.
    """
    if launch is None or launch.world_size == 1:
        yield ALONE
        return
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    # torchrun's store lives as long as torchrun: what is in it may be from processes before these.
    store = dist.PrefixStore(f"fastbert {launch.restarts}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=PATIENCE)
    generation = Processes(launch).of_main(lambda: uuid.uuid4().hex)
    processes = Processes(launch, dist.PrefixStore(generation, store))
    try:
        yield processes
        processes.wait()
    except TrainingInterrupted as stop:
        _ignore_signals()
        _let_go(stop)
        # torchrun sends signals to all once one has left with an exit code that is not 0: not before all can bear it.
        processes.wait()
        raise
    except BaseException as error:
        _ignore_signals()
        _let_go(error)
        raise _failure(processes, error) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def local_device(device: torch.device, launch: Launch | None) -> torch.device:
    """``device`` of this process: of a machine's GPUs, the one with the number of the process on it.

    Raises :class:`SettingsError` where a machine has more processes than GPUs, or all are sent to one of them.
    """
    if launch is None or launch.world_size == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise SettingsError(f"--device {device}: every process has a GPU of its own; give --device cuda")
    if launch.local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"{launch} finds {torch.cuda.device_count()} GPUs on its machine, where it is number {launch.local_rank + 1}: start at "
            "most as many as there are with --nproc-per-node"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def check_shares(batches_per_step: int, processes: int) -> None:
    """Raises :class:`SettingsError` where ``processes`` cannot share the batches of a step evenly, naming what they could."""
    if batches_per_step % processes:
        below = batches_per_step // processes * processes
        numbers = f"{below} or {below + processes}" if below else f"{processes}"
        raise SettingsError(
            f"--batches-per-step {batches_per_step} is for all processes together and no multiple of their number, {processes}: "
            f"give {numbers}, or start another number of processes"
        )


def dropout_seed(seed: int, step: int, batch: int) -> int:
    """Of the dropout in batch number ``batch`` of a step: the same whichever process computes it, and however many there are."""
    return int(np.random.SeedSequence([seed, _DROPOUT_STREAM, step, batch]).generate_state(1, np.uint64)[0] >> 1)


def _ignore_signals() -> None:
    """For the rest of a process that is about to end: torchrun asks for it, too, once another one has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _let_go(error: BaseException | None) -> None:
    """Frees what the functions that ``error`` came through still hold.

    DistributedDataParallel must not outlive its group: what it waits for, when it is freed later, may never come.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _failure(processes: Processes, error: BaseException) -> BaseException:
    """What this process raises for ``error``: the error, or where another process failed first, that one's."""
    mine = {"process": str(processes.launch), "kind": _kind(error), "message": _message(error)}
    first = _first_failure(processes, None if _is_consequence(error) else mine)
    if first is None:
        if "timed out" in str(error).lower():
            why = f"has heard nothing from another one for {PATIENCE}, which hangs; torchrun names the first that noticed"
        else:
            why = "has lost contact with another one; torchrun names the one that failed first"
        lost = TrainingError(f"{processes.launch} {why}")
        _print_unless_main(processes, lost)
        return lost
    if first == mine:
        _print_unless_main(processes, f"{processes.launch}: {mine['message']}")
        return error
    text = f"stopped, because {first['process']} failed: {first['message']}"
    if first["kind"] == "interrupted":
        return KeyboardInterrupt()
    return SettingsError(text) if first["kind"] == "usage" else TrainingError(text)


def _first_failure(processes: Processes, mine: dict[str, Any] | None) -> dict[str, Any] | None:
    """The failure that was reported first, ``mine`` where there was none before; None where nobody can say."""
    try:
        if mine is not None:
            return json.loads(processes.store.compare_set(_FAILURE_KEY, "", json.dumps(mine)))
        if processes.store.check([_FAILURE_KEY]):
            return json.loads(processes.store.get(_FAILURE_KEY))
    except (RuntimeError, ValueError):  # the store went with the process or the machine that held it
        return mine
    return None


def _is_consequence(error: BaseException) -> bool:
    """Whether ``error`` may be what another process's end looks like from here: a broken connection."""
    return isinstance(error, (dist.DistError, RuntimeError)) and any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    )


def _kind(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "usage" if isinstance(error, SettingsError) else "failed"


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _print_unless_main(processes: Processes, text: object) -> None:
    """The first process's errors are printed by the command."""
    if not processes.is_main:
        print(f"fastbert pretrain: {text}", file=sys.__stderr__, flush=True)
