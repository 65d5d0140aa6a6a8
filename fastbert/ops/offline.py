"""Compiles the Triton kernels that ops launch, for any GPU, without launching and without that GPU.

The ops' own launchers run (``launches.py``) under a driver that names a target instead of having one; each launch ends before
it would reach a device. What is compiled is therefore what would be launched: the same code decides on constants, tiles and
arguments. Triton's disk cache (``TRITON_CACHE_DIR``) is keyed by source, argument types and specialization, constants, options,
compiler version and architecture, not by driver or device: a process that launches finds what was compiled here.

First :func:`kernels_of` lists what a case launches, then :func:`compile_kernel` compiles one of them, in any process. The
alternative, ``triton.compile`` with signatures written by hand, would be a second account of every launch and go out of date.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastbert.gpus import GPUS
from fastbert_kernels import launch

from .launches import Case

# Multiprocessors that a launcher is told of. Any number between the heads of one sequence and those of a large batch will do,
# the two that ``launches`` tries: a launcher that chooses a kernel by it then shows both.
PROCESSORS = 128


def target_of(name: str) -> GPUTarget:
    """Triton's target for one of :data:`fastbert.gpus.GPUS`."""
    gpu = GPUS[name]
    return GPUTarget(gpu.backend, gpu.arch, gpu.warp_size)


def target_name(target: GPUTarget) -> str:
    """``sm_90`` or ``gfx942``."""
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def targets_of_this_machine() -> list[GPUTarget]:
    """The targets of the GPUs that torch sees, each once; empty where it sees none."""
    targets = {}
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            targets[triton.runtime.driver.active.get_current_target()] = None
    return list(targets)


class OfflineDriver:
    """What Triton asks a driver for before it launches. Each target is a device of its own, so that none gets another's code."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@dataclass(frozen=True)
class Kernel:
    """One kernel of one case for one target; ``key``: Triton's name of its specialization, constants and options."""

    case: Case
    target: GPUTarget
    name: str
    key: str


def launched_by(call: Callable[[], Any], target: GPUTarget) -> list[tuple[str, str]]:
    """(name, key) of the different kernels that ``call`` launches, in the order of their first launch.

    Nothing is launched or compiled: what the kernels would have written stays as it was allocated.
    """
    found: dict[tuple[str, str], None] = {}

    def note(name: str, key: str) -> bool:
        found[name, key] = None
        return False

    with _compiling(target, note):
        call()
    return list(found)


def kernels_of(case: Case, target: GPUTarget) -> list[Kernel]:
    """What ``case`` launches on ``target``; takes milliseconds."""
    return [Kernel(case, target, name, key) for name, key in launched_by(case.run, target)]


def compile_kernel(kernel: Kernel) -> tuple[Any, bool]:
    """Triton's compiled kernel, and whether it was found in the disk cache instead of being compiled now.

    Once in a process: a second time Triton would have the kernel in memory and ask nobody.
    """
    with _compiling(kernel.target, lambda name, key: (name, key) == (kernel.name, kernel.key)) as compiled:
        kernel.case.run()
    (result,) = compiled
    return result


@contextmanager
def _compiling(target: GPUTarget, wanted: Callable[[str, str], bool]) -> Iterator[list[tuple[Any, bool]]]:
    """Launches inside compile what is ``wanted`` (name, key) for ``target`` and launch nothing.

    Gives the list of (compiled kernel, found in the cache). What this process has compiled before is not compiled again.
    """
    compiled: list[tuple[Any, bool]] = []
    cache_hits: list[bool] = []
    driver, run = triton.runtime.driver, JITFunction.run

    @functools.wraps(run)
    def compile_only(self, *args, grid, warmup, **kwargs):
        before = len(cache_hits)
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if len(cache_hits) > before:
            compiled.append((kernel, cache_hits[-1]))

    def skip(*, key, fn, **_) -> bool:
        return not wanted(f"{fn.module.rpartition('.')[2]}.{fn.name}", key)

    active, hook, listener = driver._active, knobs.runtime.jit_cache_hook, knobs.compilation.listener
    processors = launch.INTERPRETER_PROCESSORS
    driver.set_active(OfflineDriver(target))
    launch.INTERPRETER_PROCESSORS = PROCESSORS
    knobs.runtime.jit_cache_hook = skip
    knobs.compilation.listener = lambda *, cache_hit, **_: cache_hits.append(cache_hit)
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        knobs.runtime.jit_cache_hook, knobs.compilation.listener = hook, listener
        launch.INTERPRETER_PROCESSORS = processors
        driver.set_active(active)


def in_parallel(function: Callable[[Any], Any], tasks: Iterable[Any], pool: ProcessPoolExecutor) -> Iterator[Any]:
    """Results of ``function`` for each task as they come; when one fails or the caller stops, the rest is not begun."""
    futures = [pool.submit(function, task) for task in tasks]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def compiler_processes(jobs: int) -> ProcessPoolExecutor:
    """Processes that compile: their Triton has the offline driver, that of this process keeps its own.

    They are started anew, since a fork would inherit torch's threads and a GPU's context.
    """
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_process)


def _prepare_process() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # once per process, and the launch says it again
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends them without tracebacks; the parent has the word
