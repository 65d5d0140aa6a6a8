"""Training steps (forward, backward, AdamW) of one model class in both libraries, on the same weights and batches.

What ``pretrain`` and ``finetune`` share. The models hold float32 weights; bfloat16 means autocast, as a user of transformers
trains. On CPUs transformers also runs as a careful user runs it: batches padded to their own longest sequence, float32 matmuls
by oneDNN; and on top of that in micro-batches of similar lengths, whose gradients are accumulated. Before anything is timed the
losses are computed without dropout and must agree. Contenders take turns; one that fails (out of memory, a compiler's error) is
reported and leaves the others in the race.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers

import fastbert
from fastbert.train.optimizer import build_optimizer

from . import profile
from .ceilings import ceilings
from .cpu_goals import PADDED_TO_LONGEST
from .harness import interleaved, paired_ratio, summary, write_results
from .machine import machine
from .memory import peak_bytes
from .peers import TOKEN_BUDGET, onednn_float32_matmul, token_budget_groups
from .workloads import REAL_LENGTHS, SIZES, config_for, packed_batch, padded_batch, training_batches, training_flops

# bfloat16 keeps 8 bits: the losses of two right implementations differ in the third digit.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
THEIRS, COMPILED, OURS, PACKED = "transformers", "transformers compiled", "fastbert", "fastbert packed"
SORTED = "transformers sorted in micro-batches, oneDNN"
CONTENDERS = (THEIRS, COMPILED, PADDED_TO_LONGEST, SORTED, OURS, PACKED)
Batch = Mapping[str, Any]
Parts = tuple[tuple[float, Batch], ...]  # micro-batches of a step, each with its loss's weight
Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """model: the class in both libraries; with_labels adds labels to a padded batch; labelled: the masked-LM share of rows, 0
    where the loss is the mean over sequences."""

    name: str
    model: str
    with_labels: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    labelled: float = 0.0


@dataclass(frozen=True)
class Options:
    """lengths, tokens: see :func:`training_batches`; limit_s: of each batch, after 3 rounds; packed, compiled, sorted: what
    takes part beside the two libraries on padded batches (sorted: both of transformers' without padding to a fixed length)."""

    size: str
    tokens: int
    dtype: str = "float32"
    lengths: tuple[str, ...] = ("128", "mnli")
    rounds: int = 5
    limit_s: float = float("inf")
    packed: bool = False
    compiled: bool = False
    sorted: bool = False
    device: str = "cpu"


def main(task: Task, description: str, size: str, tokens: int) -> None:
    """The command line of a task's module; size and tokens are its defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default=size)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--lengths", nargs="+", choices=["128", "512", *REAL_LENGTHS], default=["128", "mnli"])
    parser.add_argument("--tokens", type=int, default=tokens, help=f"of a batch, with its padding (default {tokens})")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="of each batch, after 3 rounds")
    parser.add_argument("--packed", action="store_true", help="fastbert on packed rows too, where batches have padding")
    parser.add_argument("--compile", action="store_true", help="transformers with torch.compile too: a minute per batch shape")
    parser.add_argument("--sorted", action="store_true", help="transformers without fixed padding, with oneDNN's matmul, too (CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()
    options = Options(
        given.size, given.tokens, given.dtype, tuple(given.lengths), given.rounds, given.limit, given.packed, given.compile,
        given.sorted, given.device,
    )  # fmt: skip
    write_results(task.name, run(task, options, print), given.save)


def run(task: Task, options: Options, say: Say) -> dict[str, Any]:
    """Measures, says the table, returns the document; on CPUs with the profile of fastbert's step."""
    device, dtype = options.device, getattr(torch, options.dtype)
    limits = ceilings(device, dtype)
    config = config_for(options.size)
    torch.manual_seed(0)
    theirs = getattr(transformers, task.model)(config).to(device)
    ours = getattr(fastbert, task.model)(config).to(device)
    steps = {THEIRS: TrainingStep(theirs, device, dtype), OURS: TrainingStep(ours, device, dtype)}
    if options.compiled:
        steps[COMPILED] = steps[THEIRS].called_by(torch.compile(theirs, dynamic=False))
    if options.sorted:
        steps[PADDED_TO_LONGEST] = steps[SORTED] = steps[THEIRS].under(onednn_float32_matmul)

    say(f"\n{task.name}, bert-{options.size}, {options.dtype}; matmul {limits['matmul_flops'] / 1e9:,.0f} GFLOP/s in this run")
    say(f"{'batch':<30}{'contender':<46}{'ms':>9}{'real tokens/s':>14}{'ratio':>8}{'of matmul rate':>16}{'memory':>10}")
    results, profiles = {}, {}
    for name, (lengths, padded_to) in training_batches(list(options.lengths), options.tokens).items():
        batch = task.with_labels(padded_batch(lengths, padded_to, device))
        batches = batches_of(batch, task, padded=min(lengths) < padded_to)
        contenders = {key: (steps[key.removesuffix(" packed")], parts) for key, parts in batches.items()
                      if key in steps or (key == PACKED and options.packed)}  # fmt: skip
        ours.load_state_dict(theirs.state_dict())
        difference = loss_difference({key: contender for key, contender in contenders.items() if key != COMPILED}, dtype)
        flops = training_flops(config, lengths, task.labelled)
        measured = measure(contenders, lengths, flops, limits, options.rounds, options.limit_s, device)
        results[name] = {"sequences": len(lengths), "tokens": sum(lengths), "relative_loss_difference": difference, **measured}
        show(name, measured, say)
        if device == "cpu" and OURS in measured:
            step, parts = contenders[OURS]
            profiles[name] = profile.shares(lambda step=step, parts=parts: step(parts), rounds=2)
            say(f"{'':<30}where fastbert's time goes: {profile.line(profiles[name]['shares'])}")
    document = {"machine": machine(device, dtype), "size": options.size, "dtype": options.dtype, "ceilings": limits}
    return {**document, "results": results, "profile": profiles}


def batches_of(batch: dict[str, torch.Tensor], task: Task, padded: bool) -> dict[str, Parts]:
    """By contender, the same sequences as each takes them; ``padded``: whether the batch has padding."""
    whole: Parts = ((1.0, batch),)
    batches = dict.fromkeys((THEIRS, COMPILED, OURS), whole)
    lengths, order = batch["attention_mask"].sum(1).sort()
    batches[PADDED_TO_LONGEST] = ((1.0, selected(batch, slice(None), int(lengths[-1]))),)
    if padded:
        batches[PACKED] = ((1.0, packed_batch(batch)),)
        if not task.labelled:  # a mean over tokens would need the micro-batches' numbers of labels for weights
            groups = token_budget_groups(lengths.tolist(), TOKEN_BUDGET)
            batches[SORTED] = tuple(
                (len(order[group]) / len(order), selected(batch, order[group], int(lengths[group][-1]))) for group in groups
            )
    return batches


def selected(batch: dict[str, torch.Tensor], sequences: Any, longest: int) -> Batch:
    """Some sequences of a padded batch, cut to ``longest`` tokens."""
    width = batch["input_ids"].shape[1]
    return {
        key: (value[sequences, :longest] if value.dim() == 2 and value.shape[1] == width else value[sequences]).contiguous()
        for key, value in batch.items()
    }


class TrainingStep:
    """step(parts) -> one optimizer step of ``model`` on the gradients of all parts."""

    def __init__(self, model: torch.nn.Module, device: str, dtype: torch.dtype) -> None:
        self.model, self.called = model.train(), cast(Callable[..., Any], model)
        self.autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        self.optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.01)
        self.context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def called_by(self, called: Callable[..., Any]) -> TrainingStep:
        """The same step, with ``called`` (the compiled model) for what computes the loss."""
        step = copy.copy(self)
        step.called = called
        return step

    def under(self, context: Callable[[], contextlib.AbstractContextManager]) -> TrainingStep:
        """The same step inside of a context manager."""
        step = copy.copy(self)
        step.context = context
        return step

    def __call__(self, parts: Parts) -> None:
        with self.context():
            for weight, batch in parts:
                with self.autocast:
                    loss = self.called(**batch).loss
                (loss * weight if weight != 1.0 else loss).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def loss_without_dropout(self, parts: Parts) -> float:
        self.model.eval()
        with torch.no_grad(), self.context(), self.autocast:
            loss = sum(weight * self.model(**batch).loss.item() for weight, batch in parts)
        self.model.train()
        return loss


def loss_difference(contenders: Mapping[str, tuple[TrainingStep, Parts]], dtype: torch.dtype) -> float:
    """The largest, relative to transformers'. Raises RuntimeError where the contenders do not compute the same."""
    losses = {key: step.loss_without_dropout(parts) for key, (step, parts) in contenders.items()}
    difference = max(abs(loss - losses[THEIRS]) for loss in losses.values()) / abs(losses[THEIRS])
    if not difference <= LOSS_TOLERANCE[dtype]:
        raise RuntimeError(
            f"losses differ by {difference:.1e}, more than {LOSS_TOLERANCE[dtype]:.0e}: nothing is measured: {losses}"
        )
    return difference


def measure(
    contenders: Mapping[str, tuple[TrainingStep, Parts]],
    lengths: tuple[int, ...],
    flops: float,
    limits: Mapping[str, float],
    rounds: int,
    limit_s: float,
    device: str,
) -> dict[str, Any]:
    """By contender: seconds, rates and ``step_bytes``, the peak memory of a step beyond weights, their optimizer's state and the
    batch; ``failed``: the others' reasons; ``ratio`` of transformers to fastbert, and with
    the others' names as ``ratios``: how many times each is as fast as transformers."""
    memory, failed, running = {}, {}, {}
    for key, (step, parts) in contenders.items():
        try:
            step(parts)  # the first one compiles, and makes the optimizer's state
            memory[key] = peak_bytes(lambda step=step, parts=parts: step(parts), device)
            running[key] = lambda step=step, parts=parts: step(parts)
        except Exception as error:
            failed[key] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            step.optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.empty_cache()
    seconds = interleaved(running, rounds, device, limit_s, uncounted_rounds=0 if device == "cpu" else 1)
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


def show(name: str, measured: Mapping[str, Any], say: Say) -> None:
    for key in CONTENDERS:
        if key in measured["failed"]:
            say(f"{name:<30}{key:<46}failed: {measured['failed'][key][:80]}")
        if key in measured:
            figures, ratio = measured[key], measured["ratios"].get(key)
            share = f"{figures['share_of_matmul_rate']:>16.0%}"
            memory = f"{figures['step_bytes'] / 1e9:>7.2f} GB" if figures["step_bytes"] is not None else ""
            times = f"{ratio['median']:>7.2f}x" if ratio else f"{'':>8}"
            say(f"{name:<30}{key:<46}{figures['median_s'] * 1e3:>9,.1f}{figures['tokens_per_s']:>14,.0f}{times}{share}{memory}")
