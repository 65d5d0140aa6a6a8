"""A step of AdamW and of LAMB over all parameters of a model, the clipping of their gradients with it: fastbert's beside torch's.

    python -m benchmarks.optimizers [--model base] [--device cuda] [--rounds 30] [--limit 20] [--save FOLDER]

"cuda" is fastbert's kernels, which clip the gradients while they read them; "torch" is torch's clip_grad_norm_ and its fused AdamW
or, since torch has none, the LAMB of its foreach functions (``fastbert.train.lamb``). A step waits for memory and for nothing else,
so each figure ends in its share of the copy bandwidth, by the bytes per parameter that ``fastbert.train.optimizer`` counts; and
torch's in how many times as fast fastbert's was in the same rounds. The two have taken the same steps before they are timed: one
that differs is reported and never timed. LAMB by torch is thousands of launches, for which a GPU may wait for the host: that is in
its time, as it is in a user's. The last line of stdout is one JSON document; exit code 1 where a contender is wrong or fails.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import fastbert
from fastbert.runs import Say
from fastbert.train.multi_tensor import MultiTensorOptimizer, not_supported_reason
from fastbert.train.optimizer import build_lamb, build_optimizer

from .ceilings import copy_bytes
from .harness import first_line, interleaved_kernels, paired_ratio, summary, write_results
from .machine import machine
from .workloads import SIZES, config_for

BUILDERS = {"adamw": build_optimizer, "lamb": build_lamb}
OURS, THEIRS = "cuda", "torch"
# Moved by a step per parameter, gradients and their clipping included.
BYTES_PER_PARAMETER = {("adamw", OURS): 32, ("adamw", THEIRS): 40, ("lamb", OURS): 44, ("lamb", THEIRS): 136}
MAX_NORM, LEARNING_RATE, WEIGHT_DECAY = 1.0, 1e-4, 0.01
# Of the norm of what torch's first two steps change; both compute in float32.
LARGEST_DIFFERENCE = 1e-3


class ClippedStep:
    """A copy of a model and an optimizer, which have taken two steps: called, it clips its gradients and takes another one."""

    def __init__(self, model: nn.Module, optimizer: str, backend: str) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = BUILDERS[optimizer](self.model, LEARNING_RATE, WEIGHT_DECAY, backend)
        # Adam's first step is the same however long the gradient is. After a second one without clipping, nothing would be.
        for length in (1.0, 0.5):
            for parameter, original in zip(self.model.parameters(), model.parameters(), strict=True):
                parameter.grad = length * original.grad
            self()

    def __call__(self) -> None:
        if isinstance(self.optimizer, MultiTensorOptimizer):
            self.optimizer.clip_grad_norm(MAX_NORM)
        else:
            clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()

    def difference(self, other: ClippedStep, start: nn.Module) -> float:
        """To what ``other`` has made of the weights of ``start``, relative to what it changed."""
        triples = zip(self.model.parameters(), other.model.parameters(), start.parameters(), strict=True)
        sums = sum(
            torch.stack([(ours - theirs).double().square().sum(), (theirs - was).double().square().sum()])
            for ours, theirs, was in triples
        )
        apart, changed = sums.sqrt().tolist()
        return apart / changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--limit", type=float, default=20.0, metavar="SECONDS", help="of the timing, after 3 rounds")
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()
    document = run(given.model, given.device, given.rounds, given.limit, print)
    write_results("optimizers", document, given.save)
    for name, reason in document["failed"].items():
        print(f"{name}: {reason}", file=sys.stderr)
    sys.exit(1 if document["failed"] else 0)


def run(size: str, device: str, rounds: int, limit_s: float, say: Say) -> dict[str, Any]:
    """Measures and says the table; returns the document. ``results``: a record for each optimizer and contender."""
    torch.manual_seed(0)
    model = fastbert.BertForPreTraining(config_for(size)).to(device)
    parameters, bandwidth = sum(p.numel() for p in model.parameters()), copy_bytes(device)
    records = measure(model, device, rounds, limit_s, bandwidth)
    say(f"a step on {parameters:,} parameters ({size}) with clipping on {device}; copies {bandwidth / 1e9:,.0f} GB/s in this run")
    for record in records:
        say(line(record))
    return {
        "machine": machine(device), "model": size, "parameters": parameters, "ceilings": {"copy_bytes": bandwidth},
        "failed": {record["contender"]: record["failed"] for record in records if "failed" in record}, "results": records,
    }  # fmt: skip


def measure(model: nn.Module, device: str, rounds: int, limit_s: float, bandwidth: float) -> list[dict[str, Any]]:
    """The records of all contenders on the parameters of ``model``, or the reasons why there is none of one. bandwidth: in B/s."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    records, steps = [], {}
    for (optimizer, backend), moved in BYTES_PER_PARAMETER.items():
        record = {"optimizer": optimizer, "contender": f"{optimizer} {backend}", "bytes_per_parameter": moved}
        records.append(record)
        if backend == OURS and (reason := not_supported_reason(torch.device(device))):
            record["not_supported"] = reason
            continue
        try:
            steps[record["contender"]] = ClippedStep(model, optimizer, backend)
        except Exception as error:
            record["failed"] = first_line(error)
    for optimizer in BUILDERS:
        ours, theirs = (steps.get(f"{optimizer} {backend}") for backend in (OURS, THEIRS))
        if ours and theirs and not (apart := ours.difference(theirs, model)) <= LARGEST_DIFFERENCE:
            del steps[f"{optimizer} {OURS}"]
            record = next(record for record in records if record["contender"] == f"{optimizer} {OURS}")
            record["failed"] = f"its steps differ by {apart:.1e} of torch's: not timed"
    parameters = sum(p.numel() for p in model.parameters())
    seconds = interleaved_kernels({name: [step] for name, step in steps.items()}, device, rounds, limit_s)
    for record in records:
        if record["contender"] in seconds:
            (times,) = seconds[record["contender"]]
            rate = record["bytes_per_parameter"] * parameters / summary(times)["median_s"]
            record |= {**summary(times), "bytes_per_s": rate, "share_of_ceiling": rate / bandwidth}
            ours = f"{record['optimizer']} {OURS}"
            if ours in seconds and ours != record["contender"]:
                record["fastbert_ratio"] = {"of": ours, **paired_ratio(times, seconds[ours][0])}
    return records


def line(record: dict[str, Any]) -> str:
    start = f"  {record['contender']:<14}{record['bytes_per_parameter']:>4} B per parameter"
    reasons = [f"{key.replace('_', ' ')}: {record[key]}" for key in ("not_supported", "failed") if key in record]
    if reasons:
        return f"{start}  {reasons[0]}"
    ratio = record.get("fastbert_ratio")
    times = f"; {ratio['of']} is {ratio['median']:.2f}x as fast ({ratio['q25']:.2f}-{ratio['q75']:.2f})" if ratio else ""
    return f"{start}{record['median_s'] * 1e3:>10.3f} ms{record['share_of_ceiling']:>6.0%} of the bandwidth{times}"


if __name__ == "__main__":
    main()
