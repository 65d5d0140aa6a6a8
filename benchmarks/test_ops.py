"""The ops on a CPU by pytest-benchmark: each op x contender x direction, checked against the reference before it is timed.

    pytest benchmarks/test_ops.py --benchmark-group-by=param:op,param:dtype,param:direction [-k "attention and forward"]

Runs only when it is asked for by this path. ``extra_info`` has what the suite's records have: rates, and the shares of the matmul
rate and of the ceiling. pytest-benchmark times one contender after the other; ``fastbert bench --suite ops`` lets them take turns,
and has the paired ratios. ``--benchmark-compare`` sets two saved runs side by side.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fastbert.ops import backends

from . import ops
from .ceilings import ceilings
from .op_cases import OPS, SCALES, Case, Contender, cases

ROUNDS = 10
BY_BACKEND = ("fastbert native", "fastbert reference", "torch eager")
CHOOSING = ("fastbert", "torch eager")  # the ops that take no backend by name
PAIRS = [(op, name) for op in OPS for name in (BY_BACKEND if op in (*backends.OPS, *backends.INFERENCE_OPS) else CHOOSING)]


@functools.lru_cache(maxsize=1)
def case_of(op: str, dtype: str, scale: str) -> Case:
    """The op's first: BERT-base's width, no dropout. Only the last one is kept, they are large."""
    torch.manual_seed(0)
    case = next(iter(cases(op, SCALES[scale], "cpu", getattr(torch, dtype))), None)
    return case or pytest.skip(f"{op} has no case in {dtype}")


@functools.lru_cache(maxsize=1)
def truth_of(op: str, dtype: str, scale: str) -> list[torch.Tensor]:
    return ops.reference(case_of(op, dtype, scale))


@functools.cache
def limits_of(dtype: str) -> dict[str, Any]:
    return ceilings("cpu", getattr(torch, dtype))


def contender_of(case: Case, name: str) -> Contender:
    """Skips where there is none."""
    if name == "fastbert reference":  # where it is not what "auto" picks, it takes no part in the suite
        return Contender(case.ours("reference"), case.leaves, case.dout)
    offer = dict(case.contenders("cpu"))[name]
    if isinstance(offer, str):
        pytest.skip(offer)
    return offer()


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("op", "contender_name"), PAIRS)
def test_op(benchmark, pytestconfig, op, contender_name, dtype, direction):
    scale = pytestconfig.getoption("--scale")
    case = case_of(op, dtype, scale)
    contender = contender_of(case, contender_name)
    if direction not in contender.directions:
        pytest.skip(f"{op} has no backward pass")
    error = ops.largest_error(contender, truth_of(op, dtype, scale))
    assert error <= ops.allowed_error(contender_name, contender, dtype)
    forward, *backward = ops.steps_of(contender)
    run, setup = (forward, tuple) if direction == "forward" else (backward[0], lambda: (forward(),))
    benchmark.pedantic(run, setup=lambda: (setup(), {}), rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["error"] = error
    if benchmark.enabled:
        limits = {name: limits_of(name) for name in {case.matmul_dtype or dtype}}
        benchmark.extra_info |= ops.rated(case, direction, {"median_s": benchmark.stats.stats.median}, limits)
