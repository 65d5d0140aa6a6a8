"""Timing that can be trusted on a noisy machine: contenders take turns, medians and paired ratios are quoted. The machine's own
ceilings, which every figure is set beside, are in ``machine``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.runs.whole_file import whole_file

RESULTS = Path(__file__).parent / "results"
PARTIAL = ".partial.json"  # in place of .json: the document of a run that has not come to its end
Keep = Callable[[dict[str, Any]], None]


# Engines have threads of their own, which spin for some milliseconds after their work: not into the next one's time. They are at
# rest when the process uses a tenth of a core at most.
_SETTLE_S, _AT_REST, _LONGEST_SETTLE_S = 0.005, 0.1, 1.0


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _settle() -> None:
    deadline = time.monotonic() + _LONGEST_SETTLE_S
    while True:
        start, used = time.monotonic(), time.process_time()
        time.sleep(_SETTLE_S)
        used, now = time.process_time() - used, time.monotonic()
        if used <= _AT_REST * (now - start) or now > deadline:
            return


def order_of_round(names: list[str], round_number: int) -> list[str]:
    """Begins with another one each time, forwards for two rounds and backwards for two: nobody always follows the same one, whose
    caches and heat it would inherit, and of two both begin as often."""
    first = round_number % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if round_number // 2 % 2 else order


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    limit_s: float = math.inf,
    uncounted_rounds: int = 1,
    own_clock: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after the rounds that are not counted.

    A round has all contenders once, in the order of :func:`order_of_round`. ``own_clock``: they return the seconds that count.

    Stops after fewer rounds, but never fewer than 3, once ``limit_s`` seconds have been measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(1 - uncounted_rounds, rounds + 1):
        if round_number > 3 and sum(map(sum, seconds.values())) > limit_s:
            break
        for name in order_of_round(list(contenders), round_number):
            _settle()
            synchronize(device)
            start = time.perf_counter()
            measured = contenders[name]()
            synchronize(device)
            if round_number > 0:
                seconds[name].append(measured if own_clock else time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what libraries, their native parts included, write to stdout and stderr (progress, warnings) from the tables."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    with open(os.devnull, "w") as nowhere:
        for stream, _ in kept:
            os.dup2(nowhere.fileno(), stream)
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            for stream, copy in kept:
                os.dup2(copy, stream)
                os.close(copy)


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in seconds."""
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return {"median_s": float(median), "q25_s": float(low), "q75_s": float(high), "rounds": len(seconds)}


def first_line(error: Exception) -> str:
    """An exception as a reason in a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def paired_ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """How many times ``faster`` beats ``slower``: the median and quartiles of the ratios of each round."""
    low, median, high = np.quantile([a / b for a, b in zip(slower, faster, strict=True)], [0.25, 0.5, 0.75])
    return {"median": float(median), "q25": float(low), "q75": float(high)}


Steps = Sequence[Callable[..., Any]]  # each is given what the one before has returned, the first one nothing


# 256 MB is more than any GPU's L2 cache; a GPU's clock is about 2 GHz; its queue holds about 1,000 launches.
_COLD_BYTES, _CYCLES_PER_SECOND, _QUEUED_STEPS, _LONGEST_SLEEP = 1 << 28, 2e9, 20, 0.1


def kernel_seconds(run: Callable[[], Any], device: str, rounds: int) -> list[float]:
    """Seconds of ``rounds`` runs, as :func:`interleaved_kernels` takes them."""
    ((seconds,),) = interleaved_kernels({"": [run]}, device, rounds).values()
    return seconds


def interleaved_kernels(
    contenders: Mapping[str, Steps], device: str, rounds: int, limit_s: float = math.inf, uncounted_rounds: int = 1
) -> dict[str, list[list[float]]]:
    """For each step of each contender its seconds in up to ``rounds`` rounds, A B C A B C ...; 3 where ``limit_s`` is spent.

    On a GPU they are the GPU's own (events around each step, the L2 cache overwritten before it): the GPU sleeps while Python
    queues steps, so that what Python costs is not measured. triton.testing.do_bench has no such head start and measures the
    host wherever a kernel is shorter than its launch.
    """
    for _ in range(uncounted_rounds):
        for steps in contenders.values():
            _take_turn(steps)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in steps] for name, steps in contenders.items()}
    if not contenders:
        return seconds
    if device == "cuda":
        for name, step, before, after in _queued_rounds(contenders, rounds, limit_s):
            seconds[name][step].append(before.elapsed_time(after) / 1e3)
        return seconds
    done, spent = 0, 0.0
    while done < rounds and (done < 3 or spent < limit_s):
        for name, steps in contenders.items():
            result: tuple = ()
            for step, run in enumerate(steps):
                start = time.perf_counter()
                result = (run(*result),)
                seconds[name][step].append(time.perf_counter() - start)
                spent += seconds[name][step][-1]
        done += 1
    return seconds


def _take_turn(steps: Steps) -> None:
    result: tuple = ()
    for run in steps:
        result = (run(*result),)


def _queued_rounds(contenders: Mapping[str, Steps], rounds: int, limit_s: float) -> Iterator[tuple[str, int, Any, Any]]:
    """(contender, step, event before, event after) of every step of every round, once the GPU is done with them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for steps in contenders.values():
        _take_turn(steps)
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    rounds = int(min(rounds, max(3, limit_s / (time.perf_counter() - start))))
    at_once = max(1, _QUEUED_STEPS // sum(map(len, contenders.values())))  # rounds
    cold = torch.empty(_COLD_BYTES, dtype=torch.int8, device="cuda")
    for first in range(0, rounds, at_once):
        events = []
        torch.cuda._sleep(int(min(queued * at_once, _LONGEST_SLEEP) * _CYCLES_PER_SECOND))
        for _ in range(min(at_once, rounds - first)):
            for name, steps in contenders.items():
                result: tuple = ()
                for step, run in enumerate(steps):
                    cold.zero_()
                    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    before.record()
                    result = (run(*result),)
                    after.record()
                    events.append((name, step, before, after))
        torch.cuda.synchronize()
        yield from events


def write_results(name: str, document: dict[str, Any], folder: str | None) -> None:
    """Prints the document as the last line of stdout, and keeps it as ``results/<folder>/<name>.json`` where one is named."""
    document = {**_origin(name), **document}
    save_results(name, document, folder)
    print(json.dumps(document))


def unfinished_results(name: str, folder: str | None) -> contextlib.AbstractContextManager[Keep]:
    """:func:`unfinished`, until :func:`write_results` is given the same name and folder."""
    return unfinished([] if folder is None else [RESULTS / folder / f"{name}.json"], _origin(name))


def _origin(name: str) -> dict[str, str]:
    return {"benchmark": name, "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]])}


def save_results(name: str, document: dict[str, Any], folder: str | None) -> None:
    """Keeps the document as ``results/<folder>/<name>.json`` where a folder is named."""
    if folder is not None:
        path = RESULTS / folder / f"{name}.json"
        write_complete(path, document)
        print(f"written to {path}", file=sys.stderr)


@contextlib.contextmanager
def unfinished(paths: Sequence[Path], origin: Mapping[str, str]) -> Iterator[Keep]:
    """keep(document): what is measured so far, beside the documents that are to be written to ``paths`` (:func:`write_complete`).
    It is on the disk from then on, however the run ends, and the document of an earlier run stays as it is."""
    kept: list[Path] = []

    def keep(document: dict[str, Any]) -> None:
        for path in map(partial_path, paths):
            write_json(path, {**origin, **document, "unfinished": True})
        kept[:] = map(partial_path, paths)

    try:
        yield keep
    except BaseException:
        for path in kept:
            if path.exists():
                print(f"what was measured until then: {path}", file=sys.stderr)
        raise


def partial_path(path: Path) -> Path:
    return path.with_suffix(PARTIAL)


def write_complete(path: Path, document: Any) -> None:
    """What was kept of the run before its end (:func:`unfinished`), or of one that never came to its end, goes."""
    write_json(path, document)
    partial_path(path).unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Whoever reads the file finds the old document or the new one, never a part of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as beside:
        beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
