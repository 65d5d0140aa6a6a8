"""Training steps (forward, backward, AdamW) of one model class in both libraries, on the same weights and batches.

What ``pretrain`` and ``finetune`` share. The models hold float32 weights; bfloat16 means autocast, as a user of transformers
trains. Before anything is timed the losses are computed without dropout and must agree. Contenders take turns; one that fails
(out of memory, a compiler's error) is reported and leaves the others in the race.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import fastbert
from fastbert.train.optimizer import build_optimizer

from .harness import interleaved, paired_ratio, summary, synchronize, write_results
from .machine import ceilings, machine
from .workloads import REAL_LENGTHS, SIZES, config_for, packed_batch, padded_batch, training_batches, training_flops

# bfloat16 keeps 8 bits: the losses of two right implementations differ in the third digit.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
THEIRS, COMPILED, OURS, PACKED = "transformers", "transformers compiled", "fastbert", "fastbert packed"
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """model: the class in both libraries; with_labels adds labels to a padded batch; labelled: the masked-LM share of rows."""

    name: str
    model: str
    with_labels: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    labelled: float = 0.0


def argument_parser(description: str, size: str, tokens: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default=size)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--lengths", nargs="+", choices=["128", "512", *REAL_LENGTHS], default=["128", "mnli"])
    parser.add_argument("--tokens", type=int, default=tokens, help=f"of a batch, with its padding (default {tokens})")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="of each batch, after 3 rounds")
    parser.add_argument("--packed", action="store_true", help="fastbert on packed rows too, where batches have padding")
    parser.add_argument("--compile", action="store_true", help="transformers with torch.compile too: a minute per batch shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", metavar="FOLDER")
    return parser


def run(task: Task, arguments: argparse.Namespace) -> None:
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    limits = ceilings(device, dtype)
    config = config_for(arguments.size)
    torch.manual_seed(0)
    theirs = getattr(transformers, task.model)(config).to(device)
    ours = getattr(fastbert, task.model)(config).to(device)
    steps = {THEIRS: TrainingStep(theirs, device, dtype), OURS: TrainingStep(ours, device, dtype)}
    if arguments.compile:
        steps[COMPILED] = TrainingStep(theirs, device, dtype, torch.compile(theirs, dynamic=False))

    print(f"bert-{arguments.size}, {arguments.dtype}; matmul {limits['matmul_flops'] / 1e9:,.0f} GFLOP/s in this run")
    print(f"{'batch':<34}{'contender':<23}{'real tokens/s':>14}{'ratio':>8}{'of matmul rate':>16}{'memory':>10}")
    results = {}
    for name, (lengths, padded_to) in training_batches(arguments.lengths, arguments.tokens).items():
        batch = task.with_labels(padded_batch(lengths, padded_to, device))
        contenders = {key: (step, batch) for key, step in steps.items()}
        if arguments.packed and min(lengths) < padded_to:
            contenders[PACKED] = (steps[OURS], packed_batch(batch))
        ours.load_state_dict(theirs.state_dict())
        difference = loss_difference({key: contender for key, contender in contenders.items() if key != COMPILED}, dtype)
        flops = training_flops(config, lengths, task.labelled)
        measured = measure(contenders, lengths, flops, limits, arguments.rounds, arguments.limit, device)
        results[name] = {"sequences": len(lengths), "tokens": sum(lengths), "relative_loss_difference": difference, **measured}
        show(name, measured)
    document = {"machine": machine(device, dtype), "size": arguments.size, "dtype": arguments.dtype, "ceilings": limits}
    write_results(task.name, {**document, "results": results}, arguments.save)


class TrainingStep:
    """step(batch) -> one optimizer step of ``model``; ``called`` is what computes the loss, the model or its compiled form."""

    def __init__(self, model: torch.nn.Module, device: str, dtype: torch.dtype, called: Callable[..., Any] | None = None) -> None:
        self.model, self.called = model.train(), model if called is None else called
        self.autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        self.optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.01)

    def __call__(self, batch: Batch) -> None:
        with self.autocast:
            loss = self.called(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss_without_dropout(self, batch: Batch) -> float:
        self.model.eval()
        with torch.no_grad(), self.autocast:
            loss = self.model(**batch).loss.item()
        self.model.train()
        return loss


def loss_difference(contenders: Mapping[str, tuple[TrainingStep, Batch]], dtype: torch.dtype) -> float:
    """The largest, relative to transformers'. Raises RuntimeError where the contenders do not compute the same."""
    losses = {key: step.loss_without_dropout(batch) for key, (step, batch) in contenders.items()}
    difference = max(abs(loss - losses[THEIRS]) for loss in losses.values()) / abs(losses[THEIRS])
    if not difference <= LOSS_TOLERANCE[dtype]:
        raise RuntimeError(
            f"losses differ by {difference:.1e}, more than {LOSS_TOLERANCE[dtype]:.0e}: nothing is measured: {losses}"
        )
    return difference


def measure(
    contenders: Mapping[str, tuple[TrainingStep, Batch]],
    lengths: tuple[int, ...],
    flops: float,
    limits: Mapping[str, float],
    rounds: int,
    limit_s: float,
    device: str,
) -> dict[str, Any]:
    """By contender: seconds, rates and memory; ``failed``: the others' reasons; ``ratio`` of transformers to fastbert, and with
    the others' names as ``ratios``: how many times each is as fast as transformers."""
    memory, failed, running = {}, {}, {}
    for key, (step, batch) in contenders.items():
        try:
            memory[key] = step_bytes(step, batch, device)
            running[key] = lambda step=step, batch=batch: step(batch)
        except Exception as error:
            failed[key] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            step.optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.empty_cache()
    seconds = interleaved(running, rounds, device, limit_s)
    measured: dict[str, Any] = {"failed": failed, "ratios": {}}
    for key, times in seconds.items():
        median = summary(times)["median_s"]
        measured[key] = {
            **summary(times),
            "tokens_per_s": sum(lengths) / median,
            "sequences_per_s": len(lengths) / median,
            "share_of_matmul_rate": flops / median / limits["matmul_flops"],
            "step_bytes": memory[key],
        }
        if THEIRS in seconds and key != THEIRS:
            measured["ratios"][key] = paired_ratio(seconds[THEIRS], times)
    if OURS in seconds:
        measured["ratio"] = measured["ratios"].get(OURS)
        measured["share_of_matmul_rate"] = measured[OURS]["share_of_matmul_rate"]
    return measured


def step_bytes(step: TrainingStep, batch: Batch, device: str) -> int | None:
    """Peak memory of a step beyond weights, their optimizer's state and the batch. The first step, which compiles, is none."""
    step(batch)
    if device != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(batch)
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def show(name: str, measured: Mapping[str, Any]) -> None:
    for key in (THEIRS, COMPILED, OURS, PACKED):
        if key in measured["failed"]:
            print(f"{name:<34}{key:<23}failed: {measured['failed'][key][:80]}", flush=True)
        if key in measured:
            figures, ratio = measured[key], measured["ratios"].get(key)
            share = f"{figures['share_of_matmul_rate']:>16.0%}"
            memory = f"{figures['step_bytes'] / 1e9:>7.1f} GB" if figures["step_bytes"] is not None else ""
            times = f"{ratio['median']:>7.2f}x" if ratio else f"{'':>8}"
            print(f"{name:<34}{key:<23}{figures['tokens_per_s']:>14,.0f}{times}{share}{memory}", flush=True)
