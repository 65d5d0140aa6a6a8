"""Every op, forward and backward, beside what torch, flash-attn and Liger-Kernel have for it, each beside the machine's ceiling.

    python -m benchmarks.ops [--op attention ...] [--dtype bfloat16 float32] [--peers torch-eager sdpa ...] [--scale full]
                             [--device cuda] [--rounds 30] [--limit 300] [--threads 2] [--save FOLDER]

65,536 tokens on a GPU, 4,096 on a CPU (``op_contenders.SCALES``). Every contender's output and gradients are compared with the
reference in float32 before it is timed: a wrong result is reported and never timed. The contenders of a case take turns, A B C
A B C; a forward pass keeps what its backward pass needs. Every figure ends in its share of the matmul rate and of the ceiling, the
time that a machine with this run's matmul rate and copy bandwidth would take. That bandwidth is memory's: on a CPU an op whose
tensors are still in the caches from the round before can reach more than 100% of it. Liger's losses make their gradients in the
forward pass: what compares with them is both directions together. torch.compile comes last, where the time limit leaves room, and
on a CPU only where it is asked for. ``fastbert bench --suite ops`` is the same. The last line of stdout is one JSON document; exit
code 1 where a result of fastbert is wrong or fails.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastbert.runs import Say

from .ceilings import ceilings
from .harness import Keep, first_line, interleaved_kernels, paired_ratio, summary, synchronize, unfinished_results, write_results
from .machine import machine
from .op_cases import OPS, SCALES, Case, Contender, Scale, cases
from .op_contenders import PEERS, Offer
from .work import DIRECTIONS, Work, floor_seconds, work

DTYPES = ("float32", "bfloat16")
DEFAULT_SCALES = {"cpu": "cpu", "cuda": "full"}
# Of the norm of the reference's result. bfloat16 rounds to 0.4%; what computes something else is far beyond 2%. On a CPU torch adds
# the gradients of parameters in bfloat16, one row to the next, which is as good as it gets there.
LARGEST_ERROR = {"bfloat16": 0.02, "float32": 1e-4}
LARGEST_ERROR_OF_PEERS = {"bfloat16": 0.15, "float32": 1e-4}
BOTH = "both"  # directions, one after the other
_COMPILED, _COMPILE_PEER = PEERS["torch-compile"], "torch-compile"
_REFUSALS = ("No available kernel", "No viable backend")  # of torch's scaled_dot_product_attention
_SECONDS = 0.1  # of a contender, after which 3 rounds are enough


@dataclass(frozen=True)
class Options:
    """peers: names in PEERS, None for all (torch.compile not on a CPU, where it takes minutes); scale: a name in SCALES, None for
    the device's own; rounds: of a case, fewer where they take long; limit_s: of the whole run, after which nothing new begins."""

    ops: tuple[str, ...] = OPS
    dtypes: tuple[str, ...] = DTYPES
    peers: tuple[str, ...] | None = None
    device: str = "cpu"
    scale: str | None = None
    rounds: int = 30
    limit_s: float = 300.0

    @property
    def scale_name(self) -> str:
        return self.scale or DEFAULT_SCALES[self.device]

    @property
    def chosen_peers(self) -> tuple[str, ...]:
        if self.peers is not None:
            return self.peers
        return tuple(peer for peer in PEERS if peer != _COMPILE_PEER or self.scale_name != "cpu")


@dataclass
class Entrant:
    """A contender of a case: its record as far as it is known, and itself where it is to be timed."""

    record: dict[str, Any]
    contender: Contender | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--scale", choices=SCALES, help="default: full on a GPU, cpu on a CPU")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all, on a CPU without torch.compile; none may be named")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=Options.limit_s, metavar="SECONDS", help="begin nothing new after this time")
    parser.add_argument("--rounds", type=int, default=Options.rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    peers = None if given.peers is None else tuple(given.peers)
    options = Options(
        ops=tuple(given.op), dtypes=tuple(given.dtype), peers=peers, device=given.device, scale=given.scale,
        rounds=given.rounds, limit_s=given.limit,
    )  # fmt: skip
    with unfinished_results("ops", given.save) as keep:
        document = run(options, print, keep)
        write_results("ops", document, given.save)
    for name, reason in document["failed"].items():
        print(f"{name}: {reason}", file=sys.stderr)
    sys.exit(1 if document["failed"] else 0)


def run(options: Options, say: Say, keep: Keep) -> dict[str, Any]:
    """Measures and says the tables; returns the document, which is kept after each case. ``results``: a record for each contender
    and direction, or one with the reason why there is none (``not_supported``, ``not_run``, ``failed``); ``failed``: those of
    fastbert's by name."""
    device, deadline = options.device, time.monotonic() + options.limit_s
    rates = dict.fromkeys((*options.dtypes, *(["int8"] if "int8_linear" in options.ops else [])))
    limits = {dtype: ceilings(device, getattr(torch, dtype)) for dtype in rates}
    say(f"ops on {device}, {torch.get_num_threads()} threads, in ms; ceilings of this run:")
    for dtype, limit in limits.items():
        say(f"  {dtype:<10}matmul {limit['matmul_flops'] / 1e12:,.2f} TFLOP/s, copies {limit['copy_bytes'] / 1e9:,.0f} GB/s")
    left_out = [peer for peer in PEERS if peer not in options.chosen_peers]
    if left_out:
        say(f"not asked for: {', '.join(left_out)} (--peers)")
    if device == "cpu":
        say("copies go to memory; an op whose tensors the caches still hold can reach more than 100% of that ceiling")
    document: dict[str, Any] = {
        "machine": machine(device), "dtypes": list(options.dtypes), "scale": options.scale_name, "ceilings": limits,
        "not_asked_for": left_out, "failed": {}, "results": [],
    }  # fmt: skip
    said: set[tuple[str, ...]] = set()
    for with_compile in (False, True)[: 1 + (_COMPILE_PEER in options.chosen_peers)]:
        for op in options.ops:
            for dtype in options.dtypes:
                torch.manual_seed(0)
                for case, smaller in cases_and_smaller(op, SCALES[options.scale_name], device, getattr(torch, dtype)):
                    offers = compiled_offers(case, device) if with_compile else chosen_offers(case, options)
                    measured = measure(case, offers, device, limits, options.rounds, deadline, smaller)
                    if with_compile:  # fastbert's has its record from the first time
                        measured = [record for record in measured if record["contender"] == _COMPILED]
                    if measured:
                        show(measured, say, said)
                    document["results"] += measured
                    document["failed"] |= {
                        f"{label(record)}: {record['contender']}": record["failed"]
                        for record in measured
                        if record["contender"].startswith("fastbert") and "failed" in record
                    }
                    keep(document)
    return document


def cases_and_smaller(op: str, scale: Scale, device: str, dtype: torch.dtype) -> Iterator[tuple[Case, Case | None]]:
    """Each case with the one of fewer tokens that it is checked on, None where that is itself."""
    if scale.checked_tokens is None:
        yield from ((case, None) for case in cases(op, scale, device, dtype))
        return
    fewer = cases(op, replace(scale, tokens=scale.checked_tokens), device, dtype)
    for case, smaller in zip(cases(op, scale, device, dtype), fewer, strict=True):
        yield case, smaller if case.dropout_p else None


def chosen_offers(case: Case, options: Options) -> dict[str, Offer]:
    """Fastbert's and those of the peers that are asked for, without torch.compile."""
    beginnings = ("fastbert", *(PEERS[peer] for peer in options.chosen_peers))
    return {name: offer for name, offer in case.contenders(options.device) if name.startswith(beginnings)}


def compiled_offers(case: Case, device: str) -> dict[str, Offer]:
    """torch.compile of the case's peer and, to take turns with it, fastbert's. A compilation takes seconds: only BERT-base's
    width, and for the ops with dropout the case with it."""
    has_dropout = "dropout" in case.shape
    if case.compiled is None or case.hidden not in (768, 64) or (case.dropout_p > 0) != has_dropout:
        return {}
    offers = dict(case.contenders(device))
    make, picked = case.peers[case.compiled], case.picked(device)

    def compile_contender() -> Contender:
        contender = make()
        contender.run = torch.compile(contender.run, dynamic=False)
        return contender

    return {picked: offers[picked], _COMPILED: compile_contender}


def measure(
    case: Case,
    offers: Mapping[str, Offer],
    device: str,
    limits: Mapping[str, Any],
    rounds: int,
    deadline: float,
    smaller: Case | None = None,
) -> list[dict[str, Any]]:
    """The records of a case: for each contender one for each direction and, where there are two, for both, or one with the reason
    why there is none. ``fastbert_ratio``: how many times as fast fastbert's own choice was in the same rounds. smaller: the case
    that contenders of these names are checked on."""
    described = {"op": case.op, "case": case.name, "hidden": case.hidden, "dropout_p": case.dropout_p, "dtype": case.dtype}
    described["sizes"] = case.sizes
    entrants = {name: Entrant({**described, "contender": name}) for name in offers}
    smaller_offers = dict(smaller.contenders(device)) if smaller is not None else {}
    truth = None
    for name, offer in offers.items():
        record = entrants[name].record
        if isinstance(offer, str):
            record["not_supported"] = offer
        elif time.monotonic() > deadline:
            record["not_run"] = "the time limit is reached"
        else:
            try:
                truth = reference(smaller or case) if truth is None else truth
                checked = check(smaller_offers.get(name, offer), case.dtype, truth, record)
                if checked is not None:
                    entrants[name].contender = offer() if smaller is not None else checked
                    record["extra_bytes"] = extra_bytes(entrants[name].contender, device)
            except Exception as error:  # a peer that refuses, lacks memory or is not in this torch must not end the run
                record["failed"] = first_line(error)
                if device == "cuda":
                    torch.cuda.empty_cache()
    race([entrant for entrant in entrants.values() if entrant.contender is not None], device, rounds, smaller is not None)
    records = []
    for entrant in entrants.values():
        if entrant.contender is None or "failed" in entrant.record:
            records.append(entrant.record)
            continue
        for direction, seconds in entrant.seconds.items():
            figures = rated(case, direction, summary(seconds), limits)
            record = {**entrant.record, "direction": direction, **figures}
            picked = entrants.get(picked_in(case, device, direction))
            if picked not in (None, entrant) and "failed" not in picked.record and direction in picked.seconds:
                ratio = paired_ratio(seconds, picked.seconds[direction])
                record["fastbert_ratio"] = {"of": picked.record["contender"], **ratio}
            records.append(record)
    return records


def picked_in(case: Case, device: str, direction: str) -> str | None:
    """The contender that a user gets in this direction, None for both where each has its own."""
    names = {case.picked(device, one) for one in (DIRECTIONS if direction == BOTH else (direction,))}
    return names.pop() if len(names) == 1 else None


def check(make: Callable[[], Contender], dtype: str, truth: list[Tensor], record: dict[str, Any]) -> Contender | None:
    """The contender where it computes what it should; else None, with the reason in its record."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            contender = make()
            error = largest_error(contender, truth)
        except RuntimeError as refusal:
            if not any(said_no in str(refusal) for said_no in _REFUSALS):
                raise
            # torch's attention says in warnings which of its conditions were not met.
            reasons = [str(warning.message).split(" (Triggered internally")[0] for warning in said]
            record["not_supported"] = " ".join(reason for reason in reasons if "not used because" not in reason) or str(refusal)
            return None
    if error is not None and not error <= allowed_error(record["contender"], contender, dtype):
        record["failed"] = f"wrong by {error:.1%} of the reference's norm: not timed"
        return None
    record["error"] = error
    return contender


def allowed_error(name: str, contender: Contender, dtype: str) -> float:
    of_dtype = LARGEST_ERROR if name.startswith("fastbert") else LARGEST_ERROR_OF_PEERS
    return contender.largest_error or of_dtype[dtype]


def forward_and_backward(contender: Contender) -> list[Tensor]:
    out = contender.run(*contender.leaves)
    if contender.dout is None:
        return contender.restore(out, [])
    grads = torch.autograd.grad(out, contender.leaves, contender.dout.to(out.dtype))
    return contender.restore(out.detach(), grads)


def reference(case: Case) -> list[Tensor]:
    """[output, gradients...] of the reference in float32 on the same values."""
    leaves = [leaf.detach().float().requires_grad_(leaf.requires_grad) for leaf in case.leaves]
    run = case.ours("reference") if case.chooses else case.peers["torch eager"]().run
    return forward_and_backward(Contender(run, leaves, case.dout))


def largest_error(contender: Contender, truth: list[Tensor]) -> float | None:
    """The largest of output and gradients, relative in the norm; None where there is nothing to compare with."""
    results = forward_and_backward(contender)
    if not contender.comparable:
        return None
    # NaN is an error: max() would lose it.
    errors = torch.stack([(a.float() - b).norm() / b.norm() for a, b in zip(results, truth, strict=True)])
    return errors.max().item()


def extra_bytes(contender: Contender, device: str) -> int | None:
    """Peak memory of all passes beyond inputs, output and the inputs' gradients; None on a CPU."""
    if device != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = forward_and_backward(Contender(contender.run, contender.leaves, contender.dout))
    kept = sum(t.numel() * t.element_size() for t in results)
    return torch.cuda.max_memory_allocated() - before - kept


def steps_of(contender: Contender) -> list[Callable[..., Any]]:
    """The forward pass, then the backward pass of what that returned."""

    def forward() -> Tensor:
        return contender.run(*contender.leaves)

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, contender.leaves, contender.dout.to(out.dtype))

    return [forward, backward][: len(contender.directions)]


def race(entrants: list[Entrant], device: str, rounds: int, fresh: bool) -> None:
    """Times the contenders, A B C A B C; one that fails says so in its record and leaves the race. fresh: they have not run yet."""

    def guarded(entrant: Entrant, step: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any) -> Any:
            if "failed" in entrant.record:
                return None
            try:
                return step(*arguments)
            except Exception as error:
                entrant.record["failed"] = f"while it was timed: {first_line(error)}"
                return None

        return attempt

    turns = {e.record["contender"]: [guarded(e, step) for step in steps_of(e.contender)] for e in entrants}
    uncounted = 1 if fresh or device == "cuda" else 0
    seconds = interleaved_kernels(turns, device, rounds, _SECONDS * len(turns), uncounted)
    for entrant in entrants:
        of_steps = seconds[entrant.record["contender"]]
        entrant.seconds = dict(zip(entrant.contender.directions, of_steps, strict=True))
        if len(of_steps) == 2:
            entrant.seconds[BOTH] = [sum(of_round) for of_round in zip(*of_steps, strict=True)]


def rated(case: Case, direction: str, seconds: dict[str, float], limits: Mapping[str, Any]) -> dict[str, float]:
    """Seconds with what they mean: rates, and shares of the matmul rate and of the ceiling, that of both directions for both."""
    limit = limits[case.matmul_dtype or case.dtype]
    size = case.leaves[0].element_size()
    directions = ("forward", "backward") if direction == BOTH else (direction,)
    required: Iterable[Work] = [work(case.op, one, **case.shape, element_size=size) for one in directions]
    median, flops = seconds["median_s"], sum(one.flops for one in required)
    return {
        **seconds,
        "flops_per_s": flops / median,
        "bytes_per_s": sum(one.bytes for one in required) / median,
        "share_of_matmul_rate": flops / median / limit["matmul_flops"],
        "share_of_ceiling": sum(floor_seconds(one, limit) for one in required) / median,
    }


def label(record: Mapping[str, Any]) -> str:
    dropout = f", p {record['dropout_p']}" if record["dropout_p"] else ""
    return f"{record['op']} {record['case']}, {record['hidden']}{dropout}, {record['dtype']}"


def show(records: list[dict[str, Any]], say: Say, said: set[tuple[str, ...]]) -> None:
    """A line for each contender: milliseconds and share of the ceiling in each direction and in both; of the last of these MFU and
    how many times as fast fastbert is, with quartiles. said: (op, contender, reason) of who is missing, which are said once."""
    heads = "".join(f"{direction:>10}{'ceiling':>8}" for direction in ("forward", "backward", BOTH))
    say(f"\n{label(records[0]):<54}{heads}{'MFU':>6}{'fastbert':>9}")
    for name in dict.fromkeys(record["contender"] for record in records):
        of_name = {record.get("direction"): record for record in records if record["contender"] == name}
        last = list(of_name.values())[-1]
        reasons = [f"{key.replace('_', ' ')}: {last[key]}" for key in ("not_supported", "not_run", "failed") if key in last]
        if reasons:
            missing = (last["op"], name, reasons[0])
            if missing not in said:
                say(f"  {name:<52}  {reasons[0]}")
                said.add(missing)
            continue
        columns = [
            f"{of_name[d]['median_s'] * 1e3:>10.3f}{of_name[d]['share_of_ceiling']:>8.0%}" if d in of_name else f"{'':>18}"
            for d in ("forward", "backward", BOTH)
        ]
        mfu = f"{last['share_of_matmul_rate']:.0%}" if last["flops_per_s"] else ""
        ratio = last.get("fastbert_ratio")
        times = f"{ratio['median']:>8.2f}x ({ratio['q25']:.2f}-{ratio['q75']:.2f})" if ratio else ""
        say(f"  {name:<52}{''.join(columns)}{mfu:>6}{times}")


if __name__ == "__main__":
    main()
