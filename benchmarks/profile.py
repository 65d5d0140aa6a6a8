"""Where the time of a run goes: matmuls, attention, the rest of the arithmetic, and what lies outside of all kernels.

torch.profiler names every operator; :data:`CATEGORIES` says what each is. Times are those of an operator without the operators
that it calls, so nothing counts twice. A whole encoder layer in one native call is no operator: it counts its own time.
``outside`` is what is left of the time that a run takes without the profiler: Python, dispatch, threads that wait, and whatever
nobody accounts for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastbert.ops import native, native_encoder

from .harness import quiet

GEMM, ATTENTION, REST, OPTIMIZER, OUTSIDE = "gemm", "attention", "rest", "optimizer", "outside"
PARTS = (GEMM, ATTENTION, REST, OPTIMIZER)
# The encoder layer's own counters (fastbert.ops.native_encoder.work_seconds).
_COUNTERS = {"linear": GEMM, "attention": ATTENTION, "rest": REST}
OWN_MATMUL = "fastbert::matmul"
# By name, without what an operator calls inside of it: around a matmul there is only dispatch. What nothing names is arithmetic.
_GEMM_OPERATORS = "mkldnn::_linear_pointwise mkl::_mkl_linear aten::addmm aten::addmm_ aten::mm aten::bmm aten::_int_mm"
_AROUND_GEMMS = "fastbert::linear aten::linear aten::matmul"
_VIEWS = "view reshape _unsafe_view as_strided slice select t transpose expand unsqueeze squeeze detach flatten unbind chunk split"
_NEW_MEMORY = "empty empty_like empty_strided new_empty resize_ item _local_scalar_dense resolve_conj resolve_neg"
CATEGORIES = {
    **dict.fromkeys(_GEMM_OPERATORS.split(), GEMM),
    **dict.fromkeys(_AROUND_GEMMS.split(), OUTSIDE),
    **dict.fromkeys((f"aten::{name}" for name in f"{_VIEWS} {_NEW_MEMORY}".split()), OUTSIDE),
    OWN_MATMUL: GEMM,
    "aten::_fused_adamw_": OPTIMIZER,
}
CATEGORIES_BY_PREFIX = {
    "fastbert::encoder_layer": OUTSIDE,  # its counters say what happens inside of it
    "fastbert::attention": ATTENTION,
    "aten::scaled_dot_product": ATTENTION,
    "aten::_scaled_dot_product": ATTENTION,
    "onednn::qlinear": GEMM,
    "autograd::": OUTSIDE,
}


def category(operator: str) -> str:
    if "::" not in operator:  # a node of autograd or an annotation around operators
        return OUTSIDE
    if operator in CATEGORIES:
        return CATEGORIES[operator]
    return next((name for prefix, name in CATEGORIES_BY_PREFIX.items() if operator.startswith(prefix)), REST)


def shares(run: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Of the fastest of ``rounds`` runs on the CPU: ``seconds`` without the profiler, ``shares`` of them by category, and
    ``operators``, the ten that take longest under the profiler, with their share."""
    plain, profiled = [], []
    for _ in range(rounds):
        before, start = _layer_seconds(), time.perf_counter()
        run()
        plain.append((time.perf_counter() - start, {part: after - before[part] for part, after in _layer_seconds().items()}))
        with quiet(), _named_matmul(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            run()
        profiled.append({event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()})
    seconds, counted = min(plain, key=lambda timed: timed[0])
    operators = min(profiled, key=lambda times: sum(times.values()))
    parts = {part: counted.get(part, 0.0) for part in PARTS}
    for operator, spent in operators.items():
        if (kind := category(operator)) != OUTSIDE:
            parts[kind] += spent
    of_run = {part: spent / seconds for part, spent in parts.items()}
    longest = sorted(operators, key=operators.__getitem__, reverse=True)[:10]
    return {
        "seconds": seconds,
        "shares": {**of_run, OUTSIDE: max(0.0, 1.0 - sum(of_run.values()))},
        "operators": {operator: operators[operator] / seconds for operator in longest},
    }


@contextlib.contextmanager
def _named_matmul() -> Iterator[None]:
    """fastbert's own matmul is called from inside of operators, backward passes too, and is none itself: here it gets a name."""
    matmul = native.matmul

    def named(*operands, **options):
        with record_function(OWN_MATMUL):
            return matmul(*operands, **options)

    native.matmul = named
    try:
        yield
    finally:
        native.matmul = matmul


def _layer_seconds() -> dict[str, float]:
    """By category, what the native encoder layers have counted so far: thread-seconds, spread over the threads evenly."""
    counted = native_encoder.work_seconds()
    return {part: counted[name] / torch.get_num_threads() for name, part in _COUNTERS.items()}


def line(shares_of_run: dict[str, float]) -> str:
    """The shares as text; categories that the run does not have are left out."""
    return ", ".join(f"{name} {share:.1%}" for name, share in shares_of_run.items() if share >= 0.0005 or name == OUTSIDE)
