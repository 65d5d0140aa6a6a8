"""Which matmul library is the fastest on this machine: measured once, kept in the user's cache folder.

torch carries several matmuls for CPUs, and a fixed rule is wrong somewhere: MKL reaches 40% of an AMD Zen 5 where oneDNN reaches
85%, and on Intel they are neck and neck. So the candidates of ``linear.py`` are timed when a kind of product is first needed:
dtype x product (forward, dx, dweight) x few or many rows, each within about a second. The answers go to one small JSON
file per machine, build of the extension and thread count, ``$XDG_CACHE_HOME/fastbert/matmul-<key>.json`` (``~/.cache`` by
default), so that every later process computes the same. A file that cannot be read is measured anew, a folder that cannot be
written keeps the answers in memory only.

FASTBERT_CALIBRATION=off: nothing is measured or read, the first candidate of each kind is taken. So it is with torch's
deterministic algorithms, where two runs must not differ by a stopwatch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .. import __version__
from ..fork_safe import lock
from ..user_cache import user_cache_folder

PREFERENCE = 0.03
_ROUNDS = 3
_BUDGET_S = 0.15  # of one kind; a candidate's first run is never left out
HOPELESS = 1.5  # a candidate that took this many times the best has no second run
_CACHE_BYTES = 1 << 26  # more than the last level of most
_lock = lock()
_known: dict[int, dict[str, dict[str, float]]] = {}  # number of threads -> kind -> candidate -> FLOP/s, best first


def _check_setting() -> None:
    wanted = os.environ.get("FASTBERT_CALIBRATION") or "on"
    if wanted not in ("on", "off"):
        raise ValueError(f"FASTBERT_CALIBRATION={wanted}: expected off, or on, which is the default")


_check_setting()


def is_on() -> bool:
    """Whether anything may be measured or read."""
    return os.environ.get("FASTBERT_CALIBRATION") != "off" and not torch.are_deterministic_algorithms_enabled()


def fastest(
    kind: str,
    candidates: Mapping[str, Callable[..., object]],
    operands: Callable[[], tuple],
    flops: float,
    preferred: str | None = None,
) -> str:
    """The name of the fastest candidate for ``kind`` at torch's present number of threads.

    kind: what the answer is kept under; candidates: name -> function of the operands, the default first; operands: makes them,
    called only where there is something to measure; flops: of one call; preferred: the candidate that is taken unless another one
    is more than ``PREFERENCE`` faster.
    """
    rates = _rates_of(candidates, known().get(kind)) or _calibrate(kind, candidates, operands, flops)
    best = next(iter(rates))
    return preferred if preferred is not None and rates.get(preferred, 0.0) * (1 + PREFERENCE) >= rates[best] else best


def is_known(kind: str, candidates: Mapping[str, Callable[..., object]]) -> bool:
    """Whether :func:`fastest` has its answer for these candidates already, from this process or the file."""
    with _lock:
        return _rates_of(candidates, _of_threads().get(kind)) is not None


def known() -> dict[str, dict[str, float]]:
    """kind -> candidate -> FLOP/s, fastest first, of what has been needed so far at this number of threads."""
    return _known.get(torch.get_num_threads(), {})


def _calibrate(
    kind: str, candidates: Mapping[str, Callable[..., object]], operands: Callable[[], tuple], flops: float
) -> dict[str, float]:
    with _lock:
        of_threads = _of_threads()
        rates = _rates_of(candidates, of_threads.get(kind))
        if rates is None:
            rates = of_threads[kind] = _measure(candidates, operands, flops)
            _write(cache_file(), of_threads)
        return rates


def _rates_of(candidates: Mapping[str, Callable[..., object]], rates: dict[str, float] | None) -> dict[str, float] | None:
    """``rates`` where they are of these candidates."""
    return rates if rates is not None and rates.keys() == candidates.keys() else None


def _of_threads() -> dict[str, dict[str, float]]:
    """kind -> candidate -> FLOP/s at this number of threads, with what the file has. To be asked by who has the lock."""
    threads = torch.get_num_threads()
    if threads not in _known:
        _known[threads] = _read(cache_file())
    return _known[threads]


def _measure(candidates: Mapping[str, Callable[..., object]], operands: Callable[[], tuple], flops: float) -> dict[str, float]:
    """Candidates take turns; the best time of each counts, since whatever else the machine does only adds to it.

    Each begins with caches that hold something else, as in a model, whose layers do not fit into them: the libraries differ more
    in how they read memory than in their arithmetic.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        arguments = operands()
        others = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cpu")
        seconds = {}

        def timed(run: Callable[..., object]) -> float:
            others.fill_(0)
            start = time.perf_counter()
            run(*arguments)
            return max(time.perf_counter() - start, 1e-9)

        for name, run in candidates.items():
            run(*arguments)  # compiles
            seconds[name] = timed(run)
        start = time.perf_counter()
        for _ in range(_ROUNDS - 1):
            for name, run in candidates.items():
                if time.perf_counter() - start < _BUDGET_S and seconds[name] < HOPELESS * min(seconds.values()):
                    seconds[name] = min(seconds[name], timed(run))
    return {name: flops / seconds[name] for name in sorted(seconds, key=seconds.__getitem__)}


# --- the file ------------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where the answers for this machine and number of threads are kept."""
    isa = os.environ.get("FASTBERT_CPU_ISA")
    key = json.dumps([_processor(), isa, torch.get_num_threads(), torch.__version__, __version__, _extension()])
    return user_cache_folder() / f"matmul-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


@functools.cache
def _processor() -> list[str]:
    """The CPU's model and features, which virtual machines may change from one start to the next."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return [fields.get("model name") or platform.processor(), fields.get("flags") or fields.get("Features") or platform.machine()]


@functools.cache
def _extension() -> list[int] | None:
    """Size and time of the extension: one that is built anew may be faster than what has been measured."""
    spec = importlib.util.find_spec("fastbert._cpu")
    if spec is None or spec.origin is None:
        return None
    facts = os.stat(spec.origin)
    return [facts.st_size, facts.st_mtime_ns]


def _read(path: Path) -> dict[str, dict[str, float]]:
    """What the file holds, fastest first; nothing where it is missing, unreadable or no such file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kinds = {kind: {name: float(rate) for name, rate in rates.items()} for kind, rates in document["flops_per_s"].items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}
    return {kind: dict(sorted(rates.items(), key=lambda item: -item[1])) for kind, rates in kinds.items() if rates}


def _write(path: Path, kinds: dict[str, dict[str, float]]) -> None:
    """Whoever reads the file finds an old one or a new one, never a part; a folder that cannot be written costs the next start."""
    document = {
        "cpu": _processor()[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastbert": __version__,
        "flops_per_s": _read(path) | kinds,  # another process may have measured other kinds
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
