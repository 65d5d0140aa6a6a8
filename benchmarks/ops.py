"""Every op, forward and backward apart: fastbert's backends beside what torch offers, each beside the machine's ceiling.

    python -m benchmarks.ops [--op attention ...] [--scale full] [--device cuda] [--limit 60] [--no-compile] [--save FOLDER]

bfloat16, 65,536 tokens. Every contender's output and gradients are compared with the reference in float32 before it is timed:
a wrong result is reported and never timed. torch.compile comes last, where the time limit leaves room. The last line of stdout
is one JSON document; exit code 1 where a result of fastbert is wrong or fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.ops import backends

from .ceilings import ceilings
from .harness import kernel_seconds, summary, synchronize, write_results
from .machine import machine
from .op_cases import SCALES, Case, Contender, cases
from .work import floor_seconds, work

# Of the norm of the reference's result. bfloat16 rounds to 0.4%; what computes something else is far beyond 2%.
LARGEST_ERROR = {torch.bfloat16: 0.02, torch.float32: 1e-4}
ROUNDS, SECONDS = 30, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=backends.OPS, default=list(backends.OPS))
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="begin nothing new after this time")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes longest")
    parser.add_argument("--save", metavar="FOLDER")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)

    deadline = time.monotonic() + arguments.limit
    limits = ceilings(device, dtype)
    print(f"{arguments.dtype}; matmul {limits['matmul_flops'] / 1e12:,.1f} TFLOP/s, copy {limits['copy_bytes'] / 1e9:,.0f} GB/s")
    print(f"{'case':<42}{'contender':<24}{'direction':<10}{'ms':>10}{'TFLOP/s':>9}{'GB/s':>8}{'of ceiling':>11}")
    records = []
    for with_compile in (False, True)[: 1 if arguments.no_compile else 2]:
        for op in arguments.op:
            torch.manual_seed(0)
            for case in cases(op, SCALES[arguments.scale], device, dtype):
                for record in measure(case, device, limits, arguments.rounds, deadline, with_compile):
                    records.append(record)
                    show(record)
    document = {"machine": machine(device, dtype), "dtype": arguments.dtype, "scale": arguments.scale, "ceilings": limits}
    write_results("ops", {**document, "results": records}, arguments.save)
    wrong = [r for r in records if r["contender"].startswith("fastbert") and r.get("failed")]
    for record in wrong:
        print(f"{label(record)}: {record['contender']}: {record['failed']}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


def measure(
    case: Case, device: str, limits: dict[str, float], rounds: int, deadline: float, with_compile: bool
) -> Iterator[dict[str, Any]]:
    """A record for each contender and direction, with its figures, or one with the reason why there are none.

    Without ``with_compile`` all but torch.compile's, with it only torch.compile's, at the first width and with dropout only.
    """
    described = {"op": case.op, "case": case.name, "hidden": case.hidden, "dropout_p": case.dropout_p}
    contenders: dict[str, Callable[[], Contender] | str] = dict(case.contenders(device))
    if with_compile:
        contenders = {"torch.compile": compiled(contenders[case.compiled])} if worth_compiling(case) else {}
    truth = None
    for name, make in contenders.items():
        record = {**described, "contender": name}
        if isinstance(make, str):
            yield {**record, "not_supported": make}
            continue
        if time.monotonic() > deadline:
            yield {**record, "not_run": "the time limit is reached"}
            continue
        try:
            truth = reference(case) if truth is None else truth
            contender = make()
            error = largest_error(contender, truth)
            if error is not None and not error <= LARGEST_ERROR[case.leaves[0].dtype]:
                yield {**record, "failed": f"wrong by {error:.1%} of the reference's norm: not timed"}
                continue
            extra = extra_bytes(contender, device)
            for direction, seconds in timed(contender, device, rounds).items():
                figures = rated(case, direction, summary(seconds), limits)
                yield {**record, "direction": direction, **figures, "error": error, "extra_bytes": extra}
        except Exception as error:  # a peer that refuses, lacks memory or is not in this torch must not end the run
            yield {**record, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            if device == "cuda":
                torch.cuda.empty_cache()


def worth_compiling(case: Case) -> bool:
    """A compilation takes seconds: BERT-base's width, and for the ops with dropout the case with it; attention has its peers."""
    has_dropout = "dropout" in case.shape
    return case.op != "attention" and case.hidden in (768, 64) and (case.dropout_p > 0) == has_dropout


def compiled(make: Callable[[], Contender]) -> Callable[[], Contender]:
    def compile_contender() -> Contender:
        contender = make()
        contender.run = torch.compile(contender.run, dynamic=False)
        return contender

    return compile_contender


def forward_and_backward(contender: Contender) -> list[Tensor]:
    out = contender.run(*contender.leaves)
    grads = torch.autograd.grad(out, contender.leaves, contender.dout.to(out.dtype))
    return contender.restore(out.detach(), grads)


def reference(case: Case) -> list[Tensor]:
    """[output, gradients...] of the reference in float32 on the same values."""
    leaves = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
    return forward_and_backward(Contender(case.ours("reference"), leaves, case.dout))


def largest_error(contender: Contender, truth: list[Tensor]) -> float | None:
    """The largest of output and gradients, relative in the norm; None where there is nothing to compare with."""
    results = forward_and_backward(contender)
    if not contender.comparable:
        return None
    # NaN is an error: max() would lose it.
    errors = torch.stack([(a.float() - b).norm() / b.norm() for a, b in zip(results, truth, strict=True)])
    return errors.max().item()


def extra_bytes(contender: Contender, device: str) -> int | None:
    """Peak memory of a forward and backward pass beyond inputs, output and the inputs' gradients."""
    if device != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = contender.run(*contender.leaves)
    grads = torch.autograd.grad(out, contender.leaves, contender.dout.to(out.dtype))
    results = sum(t.numel() * t.element_size() for t in (out, *grads))
    return torch.cuda.max_memory_allocated() - before - results


def timed(contender: Contender, device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of the two directions. The backward pass gets a graph of its own in each round."""

    def forward() -> tuple[Tensor]:
        return (contender.run(*contender.leaves),)

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, contender.leaves, contender.dout.to(out.dtype))

    return {
        "forward": kernel_seconds(forward, device, rounds, SECONDS),
        "backward": kernel_seconds(backward, device, rounds, SECONDS, setup=forward),
    }


def rated(case: Case, direction: str, seconds: dict[str, float], limits: dict[str, float]) -> dict[str, float]:
    required = work(case.op, direction, **case.shape, element_size=case.leaves[0].element_size())
    median = seconds["median_s"]
    return {
        **seconds,
        "flops_per_s": required.flops / median,
        "bytes_per_s": required.bytes / median,
        "share_of_ceiling": floor_seconds(required, limits) / median,
    }


def label(record: dict[str, Any]) -> str:
    dropout = f", p {record['dropout_p']}" if record["dropout_p"] else ""
    return f"{record['op']} {record['case']}, {record['hidden']}{dropout}"


def show(record: dict[str, Any]) -> None:
    reason = next(
        (f"{key.replace('_', ' ')}: {record[key]}" for key in ("not_supported", "not_run", "failed") if key in record), None
    )
    if reason:
        print(f"{label(record):<42}{record['contender']:<24}{reason[:90]}", flush=True)
        return
    rates = f"{record['flops_per_s'] / 1e12:>9,.1f}{record['bytes_per_s'] / 1e9:>8,.0f}{record['share_of_ceiling']:>11.0%}"
    milliseconds = f"{record['median_s'] * 1e3:>10,.3f}"
    print(f"{label(record):<42}{record['contender']:<24}{record['direction']:<10}{milliseconds}{rates}", flush=True)


if __name__ == "__main__":
    main()
