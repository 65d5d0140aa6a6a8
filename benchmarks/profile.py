"""Where the time of a step goes, by the parts of ``benchmarks.parts``: ``fastbert bench --profile``.

The document of a suite, or of each of its dtypes where they have one each, then has

    "profile": {batch: {contender: {"dtype": "float32", "seconds": 0.1, "profiler_seconds": 0.12,
                                    "parts": {"linear": 0.06, ..., "outside": 0.01}, "operators": {"aten::addmm": 0.06, ...}}}}
    "floors":  {batch: {dtype: {"linear": 0.05, ...}}}

``seconds`` are those of a run without the profiler, and what ``parts`` add up to; ``operators`` are the ten that take longest, in
seconds of their own; a part that has no floor needs nothing at the least (``model_work.parts``).

On a CPU the time of a part is that of its operators without the operators that they call, so nothing counts twice. A whole encoder
layer of fastbert's in one native call is no operator: it counts its own time, the GELU with the linear layers, in which it
happens, and int8's conversions with the layer norms: such a sum is a part of its own, ``linear + gelu``. On a GPU it is the time
of the kernels, by the operators that launched them. ``outside`` is the rest of the run: Python, dispatch, threads that wait; on a
GPU the time in which it waits for the host.

On a GPU the profiler has run, but not beside a recorded step.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastbert.ops import backends, native
from fastbert.ops.native import encoder_layer, inference

from .harness import first_line, quiet, synchronize
from .parts import (
    ATTENTION,
    COPIES,
    GELU,
    LAYER_NORM,
    LINEAR,
    OTHER,
    OUTSIDE,
    OWN_EMBEDDINGS,
    OWN_MATMUL,
    OWN_MATMUL_AND_GELU,
    creators_of,
    fused,
    in_order,
    operator_of,
    part_of,
    work_of,
)

# Turns without and with the profiler: at least so many, and more of a short run.
_FEWEST, _MOST, _LIMIT_S = 2, 20, 2.0
_OPERATORS = 10  # that a document names
_MICROSECOND = 1e-6
Spent = tuple[defaultdict[str, float], defaultdict[str, float]]  # seconds by part, and by operator


def profiles(runs: Mapping[str, tuple[Callable[[], Any], str]], device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """By contender what the module describes; runs: a run and its dtype. One that fails (out of memory) is said and left out."""
    found = {}
    for name, (run, dtype) in runs.items():
        try:
            found[name] = profiled(run, device, dtype)
        except Exception as error:
            say(f"not profiled: {name}: {first_line(error)}")
    return found


def profiled(run: Callable[[], Any], device: str, dtype: str) -> dict[str, Any]:
    """Of the fastest of several runs, without and with the profiler in turns, what the module describes.

    Where the operators take longer under the profiler than the run without it, which is noise, all of them are scaled to it.
    """
    run()  # what a first call makes is none of the steps'
    plain: list[float] = []
    traced: list[tuple[float, Spent]] = []
    while len(plain) < _FEWEST or (len(plain) < _MOST and sum(plain) < _LIMIT_S):
        plain.append(_seconds(run, device))
        traced.append(_traced(run, device, dtype))
    seconds = min(plain)
    profiler_seconds, (parts, operators) = min(traced, key=lambda trace: trace[0])
    longest = sorted(operators, key=operators.__getitem__, reverse=True)[:_OPERATORS]
    return {
        "dtype": dtype,
        "seconds": seconds,
        "profiler_seconds": profiler_seconds,
        "parts": of_run(parts, seconds),
        "operators": {operator: operators[operator] for operator in longest},
    }


def of_run(parts: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Parts that together are ``seconds``, what is left over :data:`OUTSIDE`."""
    inside = sum(parts.values())
    scale = min(1.0, seconds / inside) if inside else 1.0
    found = {part: parts[part] * scale for part in in_order(parts) if parts[part] > 0.0}
    return {**found, OUTSIDE: max(0.0, seconds - sum(found.values()))}


def _seconds(run: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _traced(run: Callable[[], Any], device: str, dtype: str) -> tuple[float, Spent]:
    """Seconds of a run under the profiler, and where they went without what is outside."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with quiet(), _named_calls(), encoder_layer.work_counted() as work, profile(activities=activities) as profiler:
        seconds = _seconds(run, device)
    parts, operators = (device_times if device == "cuda" else cpu_times)(profiler.events())
    for part, layer_seconds in _layer_seconds(work, dtype).items():
        parts[part] += layer_seconds
    parts.pop(OUTSIDE, None)
    return seconds, (parts, operators)


def cpu_times(events: Iterable[Any]) -> Spent:
    """Seconds of the operators among torch's profiler events, each without those of the operators that it calls."""
    events = [event for event in events if event.device_type == DeviceType.CPU and not event.is_async]
    creators = creators_of(events)
    parts, operators = defaultdict[str, float](float), defaultdict[str, float](float)
    for event in events:
        spent = event.self_cpu_time_total * _MICROSECOND
        parts[part_of(event, creators)] += spent
        operators[operator_of(event)] += spent
    return parts, operators


def device_times(events: Iterable[Any]) -> Spent:
    """Seconds of a GPU's kernels and copies, by the operators that launched them."""
    events = list(events)
    launching = [event for event in events if event.device_type == DeviceType.CPU and not event.is_user_annotation]
    creators = creators_of(launching)
    parts, operators = defaultdict[str, float](float), defaultdict[str, float](float)
    for event in launching:
        for kernel in event.kernels:
            part = work_of(event, creators)
            parts[OTHER if part == OUTSIDE else part] += kernel.duration * _MICROSECOND
            operators[operator_of(event)] += kernel.duration * _MICROSECOND
    # An annotation is shown on the GPU, too, as long as all that was launched in it. Kernels that no operator launched count, too.
    everything = sum(
        event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    parts[OTHER] += max(0.0, everything * _MICROSECOND - sum(parts.values()))
    return parts, operators


# What fastbert calls natively from inside of operators and backward passes, or past all of them: none of it is an operator itself.
_NATIVE_CALLS = (
    (native, "matmul", OWN_MATMUL),
    (native, "matmul_and_row_sums", OWN_MATMUL),
    (native, "matmul_gelu", OWN_MATMUL_AND_GELU),
    (native, "matmul_gelu_gradient", OWN_MATMUL_AND_GELU),
    (inference.PackedDense, "__call__", OWN_MATMUL),
    (inference.EmbeddingTables, "embed", OWN_EMBEDDINGS),
    (native, "feed_forward_backward", "fastbert::feed_forward_backward"),
)


def _calls() -> list[tuple[Any, str, str]]:
    """Of those and of every backend's kernels, which a layer in training calls past torch's dispatcher, the names of their ops."""
    found = list(_NATIVE_CALLS)
    for op, backend in itertools.product((*backends.OPS, *backends.MIXED_OPS), backends.BACKENDS):
        if backends.unavailable_reason(backend):
            continue
        module = backends.implementation(op, backend)
        for direction, ending in (("forward", ""), ("backward", "_backward")):
            if hasattr(module, f"{op}_{direction}"):
                found.append((module, f"{op}_{direction}", f"fastbert::{op}{ending}"))
    return found


@contextlib.contextmanager
def _named_calls() -> Iterator[None]:
    """Gives fastbert's native calls names among the profiler's events."""

    def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*operands: Any, **options: Any) -> Any:
            with record_function(name):
                return function(*operands, **options)

        return run

    calls = _calls()
    functions = [getattr(owner, attribute) for owner, attribute, _ in calls]
    for (owner, attribute, name), function in zip(calls, functions, strict=True):
        setattr(owner, attribute, named(function, name))
    try:
        yield
    finally:
        for (owner, attribute, _), function in zip(calls, functions, strict=True):
            setattr(owner, attribute, function)


def _layer_seconds(work: Mapping[str, float], dtype: str) -> dict[str, float]:
    """By part, what the native encoder layers have counted: thread-seconds, spread over the threads evenly."""
    rest = fused(LAYER_NORM, COPIES) if dtype == "int8" else LAYER_NORM
    names = {"linear": fused(LINEAR, GELU), "attention": ATTENTION, "rest": rest}
    return {part: work[name] / torch.get_num_threads() for name, part in names.items()}
