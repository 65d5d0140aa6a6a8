"""Training steps (forward, backward, AdamW) of one model class in both libraries, on the same weights and batches.

What ``pretrain`` and ``finetune`` share. The models hold float32 weights; bfloat16 means autocast, as a user of transformers
trains. On CPUs transformers also runs as a careful user runs it: batches padded to their own longest sequence, float32 matmuls
by oneDNN; and on top of that in micro-batches of similar lengths, whose gradients are accumulated. Before anything is timed the
losses are computed without dropout and must agree; but for torch.compile's, which would compile once more for that. Contenders
take turns; one that fails (out of memory, a compiler's error) is reported and leaves the others in the race. Every figure ends in
its share of the matmul rate and of the limit (``model_work``).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import transformers

import fastbert
from fastbert.runs import Say
from fastbert.train.optimizer import build_optimizer

from . import model_work, profile
from .ceilings import ceilings
from .cpu_goals import PADDED_TO_LONGEST
from .energy import Meter, meter
from .graphed import GRAPHED, RecordedPlainStep, RecordedStep, graphed_batch
from .harness import Keep, first_line, interleaved, paired_ratio, summary, unfinished_results, write_results
from .machine import machine
from .memory import peak_bytes
from .peers import TOKEN_BUDGET, NotAvailable, token_budget_groups
from .peers.steps import COMPILED, DEFAULT_PEERS, PEERS, SORTED, THEIRS, WHOLE_BATCHES, described
from .reports.profile_plot import profile_table
from .work import Work
from .workloads import SIZES, Workload, config_for, model_title, packed_batch, padded_batch, workloads

# bfloat16 keeps 8 bits: the losses of two right implementations differ in the third digit.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
OURS, PACKED = "fastbert", "fastbert packed"
CONTENDERS = (*WHOLE_BATCHES, PADDED_TO_LONGEST, SORTED, OURS, PACKED, GRAPHED)
Batch = Mapping[str, Any]
Parts = tuple[tuple[float, Batch], ...]  # micro-batches of a step, each with its loss's weight


@dataclass(frozen=True)
class Task:
    """model: the class in both libraries; with_labels adds labels to a padded batch; labelled: the masked-LM share of rows, 0
    where the loss is the mean over sequences; config: what the head adds to the model's."""

    name: str
    model: str
    with_labels: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    labelled: float = 0.0
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """model, batches: see ``workloads``; limit_s: of each batch, after 3 rounds; peers: names in PEERS, whose first takes part
    unasked; packed: fastbert on packed rows too, where batches have padding; graphed: fastbert's step as a CUDA graph, too."""

    model: str
    batches: tuple[Workload, ...]
    dtype: str = "float32"
    rounds: int = 5
    limit_s: float = float("inf")
    peers: tuple[str, ...] = DEFAULT_PEERS
    packed: bool = False
    device: str = "cpu"
    graphed: bool = False


def main(task: Task, description: str, batches: tuple[str, ...]) -> None:
    """The command line of a task's module; ``batches`` are its default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help=f"{', '.join(SIZES)}, or a checkpoint (folder or Hub name)")
    parser.add_argument("--batches", nargs="+", default=list(batches), help="see benchmarks.workloads")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="of each batch, after 3 rounds")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[THEIRS])
    parser.add_argument("--packed", action="store_true", help="fastbert on packed rows too, where batches have padding")
    parser.add_argument("--graphed", action="store_true", help="fastbert's step as a CUDA graph, too, on packed rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="where the time goes, part by part: benchmarks.profile")
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()
    options = Options(
        given.model, workloads(given.batches), given.dtype, given.rounds, given.limit, tuple(given.peers), given.packed,
        given.device, given.graphed,
    )  # fmt: skip
    with unfinished_results(task.name, given.save) as keep:
        document = run(task, options, print, keep)
        if given.profile:
            document |= profiles(task, options, document["ceilings"], print)
        write_results(task.name, document, given.save)


def run(task: Task, options: Options, say: Say, keep: Keep) -> dict[str, Any]:
    """Measures, says the table, returns the document, which is kept after each batch."""
    device, dtype = options.device, getattr(torch, options.dtype)
    limits, energy = ceilings(device, dtype), meter(device)
    config = config_for(options.model, **task.config)
    torch.manual_seed(0)
    theirs = model_of(task, transformers, options.model, config).to(device)
    ours = model_of(task, fastbert, options.model, config).to(device)
    steps, not_run = make_steps(theirs, ours, options, say, task.labelled)
    weights = sum(p.numel() for p in ours.parameters())

    title = f"{task.name}, {model_title(options.model)}, {options.dtype}"
    say(f"\n{title}; matmul {limits['matmul_flops'] / 1e9:,.0f} GFLOP/s, copies {limits['copy_bytes'] / 1e9:,.0f} GB/s in this run")
    say(
        f"{'batch':<30}{'contender':<46}{'ms':>9}{'real tokens/s':>14}{'vs transformers':>24}{'memory':>10}{'MFU':>7}"
        f"{'of limit':>10}"
    )
    results: dict[str, Any] = {}
    document = {
        "machine": machine(device, dtype), "model": options.model, "dtype": options.dtype, "ceilings": limits,
        "energy": energy.described(), "peers": described(options.peers), "not_run": not_run, "results": results,
    }  # fmt: skip
    for workload in options.batches:
        batch = task.with_labels(padded_batch(workload, config.vocab_size, device))
        batches = batches_of(batch, task, padded=workload.has_padding)
        contenders = {key: (steps[key.removesuffix(" packed")], parts) for key, parts in batches.items()
                      if key in steps or (key == PACKED and options.packed)}  # fmt: skip
        for model in {step.model for step in steps.values()} - {theirs}:
            model.load_state_dict(theirs.state_dict())
        difference, failed = loss_difference({key: c for key, c in contenders.items() if key != COMPILED}, dtype)
        contenders = {key: contender for key, contender in contenders.items() if key not in failed}
        required = model_work.training_step(config, workload, options.dtype, task.labelled, weights)
        measured = measure(contenders, workload, required, limits, options.rounds, options.limit_s, device, energy)
        measured["failed"] |= failed
        results[workload.name] = {
            **workload.described(), "work": required._asdict(), "relative_loss_difference": difference, **measured
        }  # fmt: skip
        show(workload.name, measured, say)
        keep(document)
    return document


def profiles(task: Task, options: Options, limits: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Says and returns what ``profile`` describes, of a step of transformers (sdpa) and of fastbert, on models made anew: the
    profiler runs when all timing is over. limits: the ceilings of ``options.dtype``."""
    document: dict[str, Any] = {"profile": {}, "floors": {}}
    config = config_for(options.model, **task.config)
    theirs, ours = (model_of(task, library, options.model, config).to(options.device) for library in (transformers, fastbert))
    steps, _ = make_steps(theirs, ours, replace(options, peers=()), say, task.labelled)
    weights = sum(p.numel() for p in ours.parameters())
    for workload in options.batches:
        batches = batches_of(task.with_labels(padded_batch(workload, config.vocab_size, options.device)), task, padded=False)
        runs = {key: (lambda step=step, parts=batches[key]: step(parts), options.dtype) for key, step in steps.items()}
        document["profile"][workload.name] = profile.profiles(runs, options.device, say)
        required = model_work.parts(config, workload, options.dtype, task.labelled, weights)
        document["floors"][workload.name] = {options.dtype: model_work.floors(required, limits)}
    say(f"\nwhere the time goes\n\n{profile_table(document)}")
    return document


def model_of(task: Task, library: Any, model: str, config: transformers.BertConfig) -> torch.nn.Module:
    """Of the task's class in ``library``, in float32: a checkpoint's weights (with a new head where the checkpoint's has another
    number of labels), or random ones for the name of a size."""
    made = getattr(library, task.model)
    if model in SIZES:
        return made(config)
    return made.from_pretrained(model, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)


def make_steps(
    theirs: torch.nn.Module, ours: torch.nn.Module, options: Options, say: Say, labelled: float = 0.0
) -> tuple[dict[str, TrainingStep | RecordedStep | RecordedPlainStep], dict[str, str]]:
    """By contender; those of transformers that compute the same ops share a model and its optimizer. And by title, the reasons of
    the peers that cannot take part."""
    device, dtype = options.device, getattr(torch, options.dtype)
    step = TrainingStep(theirs, device, dtype)
    steps: dict[str, Any] = {THEIRS: step, OURS: TrainingStep(ours, device, dtype)}
    not_run: dict[str, str] = {}
    for name in PEERS:
        if name == THEIRS or name not in options.peers:
            continue
        peer = PEERS[name]
        reason = peer.why_not_on(device) or peer.why_not_in(options.dtype, device, named=True)
        try:
            if reason is not None:
                raise NotAvailable(reason)
            steps |= peer.make(step)
        except NotAvailable as error:
            not_run[peer.title] = str(error)
        except Exception as error:  # of somebody else's library: the others go on
            not_run[peer.title] = first_line(error)
    if options.graphed:
        try:
            steps[GRAPHED] = RecordedStep(steps[OURS], options.dtype) if labelled else RecordedPlainStep(steps[OURS])
        except NotAvailable as error:
            not_run[GRAPHED] = str(error)
    for title, reason in not_run.items():
        say(f"not run: {title}: {reason}")
    return steps, not_run


def batches_of(batch: dict[str, torch.Tensor], task: Task, padded: bool) -> dict[str, Parts]:
    """By contender, the same sequences as each takes them; ``padded``: whether the batch has padding."""
    whole: Parts = ((1.0, batch),)
    batches = dict.fromkeys((*WHOLE_BATCHES, OURS), whole)
    lengths, order = batch["attention_mask"].sum(1).sort()
    batches[PADDED_TO_LONGEST] = ((1.0, selected(batch, slice(None), int(lengths[-1]))),)
    batches[GRAPHED] = ((1.0, graphed_batch(batch, task.labelled)),)
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

    LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01

    def __init__(self, model: torch.nn.Module, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.model, self.called = model.train(), cast(Callable[..., Any], model)
        self.autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        self.optimizer = build_optimizer(model, self.LEARNING_RATE, self.WEIGHT_DECAY)
        self.context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def of(self, model: torch.nn.Module) -> TrainingStep:
        """A step of another model, on the same device and in the same dtype, with an optimizer of its own."""
        return TrainingStep(model, self.device, self.dtype)

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

    def peak_bytes(self, parts: Parts) -> int | None:
        """What a step needs at its peak."""
        return peak_bytes(lambda: self(parts), self.device)

    def loss_without_dropout(self, parts: Parts) -> float:
        self.model.eval()
        try:
            with torch.no_grad(), self.context(), self.autocast:
                return sum(weight * self.model(**batch).loss.item() for weight, batch in parts)
        finally:
            self.model.train()


def loss_difference(contenders: Mapping[str, tuple[TrainingStep, Parts]], dtype: torch.dtype) -> tuple[float, dict[str, str]]:
    """The largest of those that compute the same, relative to transformers', which must compute at all; and by contender, why the
    others failed."""
    losses, differences, failed = {}, {}, {}
    for key, (step, parts) in contenders.items():
        try:
            losses[key] = step.loss_without_dropout(parts)
            differences[key] = abs(losses[key] - losses[THEIRS]) / abs(losses[THEIRS])
            if not differences[key] <= LOSS_TOLERANCE[dtype]:
                raise RuntimeError(
                    f"losses differ by {differences.pop(key):.1e}, more than {LOSS_TOLERANCE[dtype]:.0e}: not timed: {losses}"
                )
        except Exception as error:
            if key == THEIRS:
                raise
            failed[key] = first_line(error)
    return max(differences.values()), failed


def measure(
    contenders: Mapping[str, tuple[TrainingStep, Parts]],
    workload: Workload,
    required: Work,
    limits: Mapping[str, Any],
    rounds: int,
    limit_s: float,
    device: str,
    energy: Meter,
) -> dict[str, Any]:
    """By contender: seconds, rates, ``peak_bytes`` of a step beyond weights, their optimizer's state and the batch, and its
    ``joules`` (None where the machine tells neither); ``failed``: the others' reasons; ``ratio`` of transformers to fastbert, and
    with the others' names as ``ratios``: how many times each is as fast as transformers; ``times_faster``: how many times
    fastbert is as fast as each of the others."""
    memory, joules, failed, running = {}, {}, {}, {}
    for key, (step, parts) in contenders.items():
        try:
            step(parts)  # the first one compiles, and makes the optimizer's state
            run = lambda step=step, parts=parts: step(parts)  # noqa: E731
            memory[key], joules[key] = step.peak_bytes(parts), energy.per_run(run, device)
            running[key] = run
        except Exception as error:
            failed[key] = first_line(error)
            step.optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.empty_cache()
    seconds = interleaved(running, rounds, device, limit_s, uncounted_rounds=0 if device == "cpu" else 1)
    measured: dict[str, Any] = {"failed": failed, "ratios": {}, "times_faster": {}}
    for key, times in seconds.items():
        median = summary(times)["median_s"]
        measured[key] = {
            **summary(times),
            "tokens_per_s": workload.tokens / median,
            "sequences_per_s": len(workload.lengths) / median,
            **model_work.rated(required, median, limits),
            "peak_bytes": memory[key],
            "joules": joules[key],
        }
        if THEIRS in seconds and key != THEIRS:
            measured["ratios"][key] = paired_ratio(seconds[THEIRS], times)
        if OURS in seconds and not key.startswith(OURS):
            measured["times_faster"][key] = paired_ratio(times, seconds[OURS])
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
            memory = f"{figures['peak_bytes'] / 1e9:>7.2f} GB" if figures["peak_bytes"] is not None else ""
            times = f"{ratio['median']:.2f}x ({ratio['q25']:.2f}-{ratio['q75']:.2f})" if ratio else ""
            joules = f"{figures['joules']:>9.1f} J" if figures["joules"] is not None else ""
            say(
                f"{name:<30}{key:<46}{figures['median_s'] * 1e3:>9,.1f}{figures['tokens_per_s']:>14,.0f}{times:>24}{memory:>10}"
                f"{figures['share_of_matmul_rate']:>7.0%}{figures['share_of_limit']:>10.0%}{joules}"
            )
