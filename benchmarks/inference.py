"""Encoder inference: fastbert beside transformers and the other engines that are installed, on the same weights and batches.

    python -m benchmarks.inference [--model base] [--batches 32x128 mnli ...] [--dtype float32 bfloat16 int8]
                                   [--peers transformers openvino ...] [--device cpu] [--rounds 5] [--limit 60] [--threads 2]
                                   [--profile] [--save FOLDER]

``workloads`` has the names of models and batches. All contenders of all dtypes take turns on each batch, so every ratio is one of
figures from the same minutes; the matmuls of the real tokens alone take their turn with them. Every figure ends in its share of
the matmul rate and of the limit (``model_work``), with the memory of a call and, where the machine tells it, its energy. Outputs
are compared with transformers' in float32 before anything is timed: who computes something else is not timed. ``fastbert bench
--suite inference`` is the same. The last line of stdout is one JSON document; --save keeps it in benchmarks/results/FOLDER.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.runs import Say

from . import cpu_goals, goals, model_work, profile
from .ceilings import GemmsAlone, ceilings
from .energy import Meter, meter
from .harness import Keep, first_line, interleaved, paired_ratio, quiet, summary, unfinished_results, write_results
from .machine import machine
from .memory import held_bytes, peak_bytes
from .peers import OURS, PEERS, Batch, NotAvailable, Peer, Run, Subject
from .reports.profile_plot import profile_table
from .workloads import STANDARD, Workload, config_for, model_title, padded_batch, workloads

DTYPES = ("float32", "bfloat16", "int8")
# Hidden states have elements of size 1: what computes something else is far beyond, with a relative difference of 1.
LARGEST_DIFFERENCE = {"float32": 2e-5, "bfloat16": 0.3, "int8": 0.5}
RELATIVE_DIFFERENCE = 0.1
BASELINE = f"{PEERS['transformers'].title} float32"
FEW_TOKENS = 100  # a batch of fewer gets ten times the rounds


@dataclass(frozen=True)
class Options:
    """model, batches: see ``workloads``. peers: names in PEERS; None: all that are installed. limit_s: of each batch, after 3
    rounds. Short batches get ten times the rounds."""

    model: str = "base"
    batches: tuple[Workload, ...] = workloads(STANDARD)
    dtypes: tuple[str, ...] = DTYPES
    peers: tuple[str, ...] | None = None
    device: str = "cpu"
    rounds: int = 5
    limit_s: float = 60.0


@dataclass
class Contender:
    """in_torch: its memory is torch's; kept_bytes: what it has kept of its calls so far."""

    name: str
    dtype: str
    run: Run
    ours: bool
    in_torch: bool = True
    kept_bytes: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Options.model)
    parser.add_argument("--batches", nargs="+", default=["standard"])
    parser.add_argument("--rounds", type=int, default=Options.rounds)
    parser.add_argument("--limit", type=float, default=Options.limit_s, metavar="SECONDS", help="of each batch, after 3 rounds")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: those that are installed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="where the time goes, part by part: benchmarks.profile")
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = Options(
        model=given.model, batches=workloads(given.batches), dtypes=tuple(given.dtype),
        peers=tuple(given.peers) if given.peers else None, device=given.device, rounds=given.rounds, limit_s=given.limit,
    )  # fmt: skip
    with unfinished_results("inference", given.save) as keep:
        document = run(options, print, keep)
        if given.profile:
            document |= profiles(options, document["ceilings"], print)
        write_results("inference", document, given.save)


def run(options: Options, say: Say, keep: Keep) -> dict[str, Any]:
    """Measures and says the tables; returns the document, which is kept after each batch. ``failed``: fastbert's contenders that
    failed or computed something else, ``not_run``: everybody's reasons for not taking part."""
    device = options.device
    torch.manual_seed(0)
    config = config_for(options.model)
    limits = {dtype: ceilings(device, getattr(torch, dtype)) for dtype in options.dtypes}
    energy = meter(device)
    say(f"{model_title(options.model)} on {device}, {torch.get_num_threads()} threads; matmul rates in this run, in GFLOP/s:")
    for dtype, limit in limits.items():
        rates = ", ".join(f"{library} {rate / 1e9:,.0f}" for library, rate in limit["matmul_flops_by_library"].items())
        say(f"  {dtype:<10}{rates}; copies {limit['copy_bytes'] / 1e9:,.0f} GB/s")
    say(f"energy: {energy.source or 'not measured: ' + str(energy.reason)}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        subject = Subject(config, device, Path(scratch), options.model)
        contenders, not_run = make_contenders(subject, options, say)
        described = {
            "machine": machine(device), "model": options.model, "dtypes": list(options.dtypes), "ceilings": limits,
            "energy": energy.described(), "peers": peers_described(options.peers), "not_run": not_run,
        }  # fmt: skip
        floors = {dtype: GemmsAlone(config, device, getattr(torch, dtype)) for dtype in options.dtypes}
        # The smallest first, so that what engines keep of one batch is no more than the next one needs (see contender_bytes).
        for workload in sorted(options.batches, key=lambda of: len(of.lengths) * of.padded_to):
            batch = padded_batch(workload, config.vocab_size, device)
            many = 10 if workload.tokens < FEW_TOKENS else 1
            alone = {dtype: floor.for_tokens(workload.tokens) for dtype, floor in floors.items()}
            result = measure(contenders, subject, batch, alone, options.rounds * many, options.limit_s, energy)
            required = {dtype: model_work.forward(config, workload, dtype) for dtype in options.dtypes}
            for contender in result["contenders"].values():
                seconds = contender["median_s"]
                contender |= {"tokens_per_s": workload.tokens / seconds, "sequences_per_s": len(workload.lengths) / seconds}
                contender |= model_work.rated(required[contender["dtype"]], seconds, limits[contender["dtype"]])
            result["work"] = {dtype: work._asdict() for dtype, work in required.items()}
            results[workload.name] = {**workload.described(), **result}
            show(workload, result, say)
            keep(described | outcome(options, results))
    document = described | outcome(options, results)
    if rows := document["goals"]:
        say("\n" + goals.table(rows, "goal on a CPU"))
    return document


def outcome(options: Options, results: Mapping[str, Any]) -> dict[str, Any]:
    """Of the batches that are measured, in their order: fastbert's failures, the results and the goals."""
    results = {workload.name: results[workload.name] for workload in options.batches if workload.name in results}
    failed = {f"{name}: {key}": why for name, result in results.items() for key, why in result["failed"].items()}
    failed = {key: why for key, why in failed.items() if key.split(": ")[1].startswith(OURS.title)}
    has_goals = options.device == "cpu" and options.model == "base"
    return {"failed": failed, "results": results, "goals": goals.compare(cpu_goals.INFERENCE_GOALS, results) if has_goals else []}


def peers_described(names: tuple[str, ...] | None) -> dict[str, dict[str, str | None]]:
    """Of fastbert and the peers of those names (None: all): title, version of their packages and how they are run."""
    described = {name: peer.described() for name, peer in PEERS.items() if names is None or name in names}
    return {"fastbert": OURS.described(), **described}


def make_contenders(subject: Subject, options: Options, say: Say) -> tuple[list[Contender], dict[str, str]]:
    """Those that can be made, peers first, and by name the reasons of the others."""
    contenders: list[Contender] = []
    not_run: dict[str, str] = {}

    def left_out(name: str, reason: str) -> None:
        not_run[name] = reason
        say(f"not run: {name}: {reason}")

    for peer, named in asked(options.peers):
        if (reason := peer.why_not_on(subject.device)) is not None:
            left_out(peer.title, reason)
            continue
        for dtype in options.dtypes:
            name = f"{peer.title} {dtype}"
            if (reason := peer.why_not_in(dtype, subject.device, named)) is not None:
                left_out(name, reason)
                continue
            try:
                with quiet():
                    contenders.append(Contender(name, dtype, peer.make(subject, dtype), peer is OURS, peer.in_torch))
            except NotAvailable as error:
                left_out(name, str(error))
            except Exception as error:  # of somebody else's converter or compiler: the others go on
                if peer is OURS:
                    raise
                left_out(name, first_line(error))
    return contenders, not_run


def asked(names: tuple[str, ...] | None) -> list[tuple[Peer, bool]]:
    """The peers of those names (None: all), and fastbert last; of each, whether it was named."""
    return [(peer, names is not None) for name, peer in PEERS.items() if names is None or name in names] + [(OURS, True)]


def measure(
    contenders: list[Contender],
    subject: Subject,
    batch: Batch,
    alone: Mapping[str, Callable[[], None]],
    rounds: int,
    limit_s: float,
    energy: Meter,
) -> dict[str, Any]:
    """``contenders``: by name the seconds, the differences from transformers' float32, ``peak_bytes`` (:func:`contender_bytes`) and
    ``joules`` (None where the machine tells neither); ``ratios``: by name of fastbert's contenders and of another, how many times
    as fast; ``gemms_alone``: by dtype; ``failed``: the reasons of those that were not timed."""
    real = batch["attention_mask"].unsqueeze(-1)
    expected = subject.model(**batch).last_hidden_state * real
    running, differences, failed = [], {}, {}
    gc.collect()
    for contender in contenders:
        held = held_bytes(subject.device)
        try:
            differences[contender.name] = difference(contender, batch, expected, real)
            running.append(contender)
        except Exception as error:
            failed[contender.name] = first_line(error)
        gc.collect()
        if held is not None:
            contender.kept_bytes += max(0, held_bytes(subject.device) - held)
    turns: dict[str, Callable[[], Any]] = {c.name: lambda c=c: c.run(batch) for c in running}
    memory = {c.name: contender_bytes(c, turns[c.name], subject.device) for c in running}
    joules = {name: energy.per_run(run, subject.device) for name, run in turns.items()}
    turns |= {gemms_name(dtype): run for dtype, run in alone.items()}
    seconds = interleaved(turns, rounds, subject.device, limit_s, uncounted_rounds=0 if subject.device == "cpu" else 1)
    measured = {}
    for contender in running:
        times = seconds[contender.name]
        floor = paired_ratio(seconds[gemms_name(contender.dtype)], times)["median"]
        measured[contender.name] = {
            **summary(times), "dtype": contender.dtype, **differences[contender.name], "gemms_alone_share": floor,
            "peak_bytes": memory[contender.name], "joules": joules[contender.name],
        }  # fmt: skip
    others = {c.name: {o.name: paired_ratio(seconds[o.name], seconds[c.name]) for o in running if o is not c} for c in running}
    return {
        "contenders": measured,
        "ratios": {c.name: others[c.name] for c in running if c.ours},
        "baseline_ratios": {c.name: others[c.name][BASELINE] for c in running if BASELINE in others[c.name]},
        "gemms_alone": {dtype: summary(seconds[gemms_name(dtype)]) for dtype in alone},
        "failed": failed,
    }


def contender_bytes(contender: Contender, run: Callable[[], Any], device: str) -> int | None:
    """Memory beyond the weights, in whatever layout they are, which were there when it was made: what it has kept of its first call
    on this batch and on smaller ones (an engine's arena, compiled code), and what another call needs at its peak on top. An engine
    that keeps its memory needs nothing more then, one that frees it all of it again: only the sum compares them. None where the
    system does not tell, as of an engine's memory on a GPU."""
    if device == "cuda" and not contender.in_torch:
        return None
    peak = peak_bytes(run, device)
    return None if peak is None else contender.kept_bytes + peak


def gemms_name(dtype: str) -> str:
    return f"GEMMs alone {dtype}"


def difference(contender: Contender, batch: Batch, expected: Tensor, real: Tensor) -> dict[str, float]:
    """On real tokens, the largest and the relative one (of the norms). Raises RuntimeError where it does not compute the same:
    a benchmark of that would say nothing. This first call also compiles."""
    wrong = contender.run(batch).float() * real - expected
    largest, relative = wrong.abs().max().item(), (wrong.norm() / expected.norm()).item()
    allowed = LARGEST_DIFFERENCE[contender.dtype]
    if not (largest <= allowed and relative <= RELATIVE_DIFFERENCE):
        raise RuntimeError(
            f"outputs differ by {largest:.1e} ({relative:.1e} of their norm), "
            f"more than {allowed:.0e} ({RELATIVE_DIFFERENCE:.0e}): not timed"
        )
    return {"largest_difference": largest, "relative_difference": relative}


def show(workload: Workload, result: Mapping[str, Any], say: Say) -> None:
    heading = f"{workload.name}, {workload.tokens:,} tokens"
    say(
        f"\n{heading:<44}{'ms':>10}{'tokens/s':>10}{'vs their float32':>24}{'GEMMs alone':>13}{'memory':>10}{'error':>9}"
        f"{'MFU':>7}{'of limit':>10}"
    )
    for key, figures in result["contenders"].items():
        ratio = result["baseline_ratios"].get(key)
        times = f"{ratio['median']:.2f}x ({ratio['q25']:.2f}-{ratio['q75']:.2f})" if ratio else ""
        memory = "" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 1e6:,.0f} MB"
        joules = "" if figures["joules"] is None else f"{figures['joules']:>9.2f} J"
        say(
            f"  {key:<42}{figures['median_s'] * 1e3:>10,.1f}{figures['tokens_per_s']:>10,.0f}{times:>24}"
            f"{figures['gemms_alone_share']:>13.0%}{memory:>10}{figures['largest_difference']:>9.0e}"
            f"{figures['share_of_matmul_rate']:>7.0%}{figures['share_of_limit']:>10.0%}{joules}"
        )
    for dtype, figures in result["gemms_alone"].items():
        say(f"  {gemms_name(dtype):<42}{figures['median_s'] * 1e3:>10,.1f}")
    for key, reason in result["failed"].items():
        say(f"  {key:<42}not timed: {reason}")


def profiles(options: Options, limits: Mapping[str, Mapping[str, Any]], say: Say) -> dict[str, Any]:
    """Says and returns what ``profile`` describes, of transformers (sdpa) and fastbert, on models made anew: the profiler runs when
    all timing is over. limits: the ceilings by dtype."""
    document: dict[str, Any] = {"profile": {}, "floors": {}}
    config = config_for(options.model)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        subject = Subject(config, options.device, Path(scratch), options.model)
        contenders, _ = make_contenders(subject, replace(options, peers=("transformers",)), lambda _: None)
        for workload in options.batches:
            batch = padded_batch(workload, config.vocab_size, options.device)
            runs = {c.name: (lambda c=c, batch=batch: c.run(batch), c.dtype) for c in contenders}
            document["profile"][workload.name] = profile.profiles(runs, options.device, say)
            document["floors"][workload.name] = {
                dtype: model_work.floors(model_work.parts(config, workload, dtype), limits[dtype]) for dtype in options.dtypes
            }
    say(f"\nwhere the time goes\n\n{profile_table(document)}")
    return document


if __name__ == "__main__":
    main()
