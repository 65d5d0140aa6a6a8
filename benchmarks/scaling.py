"""Data-parallel training on this machine beside what ``scaling_model`` predicts from its parts: processes of one thread over gloo.

    python -m benchmarks.scaling [--steps mini:1024 medium:512 ...] [--processes 2] [--rounds 7] [--save FOLDER]

Measured are the parts (an all-reduce by size; a step's compute in one process alone, and in all at once without communication) and
the whole (steps under DistributedDataParallel, as ``fastbert pretrain`` takes them under torchrun). The parts give two predictions:
with gradients reduced while backward goes on, and after it. Processes on one machine reduce with the cores that compute, so that
nothing can be hidden unless there are more cores than threads: the second is the one that must hold there, and the first says what
a network card of its own would give. Also measured: batches made per second and checkpoint bytes written per second, which
docs/scaling.md sets beside what GPUs need.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import fastbert
from fastbert.data.batches import PretrainingBatches
from fastbert.data.corpus import embedded_documents
from fastbert.data.tokenizer import train_wordpiece
from fastbert.data.tokens import tokenize_documents
from fastbert.runs.memory import keep_freed_memory
from fastbert.train.checkpoint import write_checkpoint
from fastbert.train.learner import Learner
from fastbert.train.optimizer import build_optimizer
from fastbert.train.settings import MODEL_PRESETS, PretrainSettings

from .harness import summary, write_results
from .machine import machine
from .scaling_model import Load, StepTime, model, step_time
from .scaling_tables import CHECKPOINT_BYTES, checkpoint_table, input_table
from .workloads import config_for

ALL_REDUCE_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 25, 1 << 26)
LENGTH = 128
STEPS = (("mini", 1024), ("mini", 4096), ("medium", 512), ("medium", 2048))
CHECKPOINT_SIZE = "medium"
LOADER_BATCHES, LOADER_TOKENS = 24, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=_size_and_tokens, nargs="+", default=STEPS, metavar="SIZE:TOKENS", help="of a process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--characters", type=int, default=12_000_000, help="of the text whose batches are timed")
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_measure, (given, folder), nprocs=given.processes)
        measured = torch.load(Path(folder) / "0.pt")
        loader = {length: loader_rate(length, given.characters) for length in (128, 512)}
        disk = checkpoint_rate(Path(folder))
    steps = [compare_with_model(size, tokens, measured) for size, tokens in given.steps]
    print("\n".join(table(steps, given.processes)), end="\n\n")
    print("\n".join(input_table(loader.__getitem__)), end="\n\n")
    print("\n".join(checkpoint_table(disk)), end="\n\n")
    document = {
        "machine": {**machine(), "threads": 1},
        "processes": given.processes,
        "all_reduce": {str(size): summary(seconds) for size, seconds in measured["all_reduce"].items()},
        "steps": steps,
        "loader_tokens_per_s": {str(length): rate for length, rate in loader.items()},
        "checkpoint_bytes_per_s": disk,
    }
    write_results("scaling", document, given.save)


def _size_and_tokens(text: str) -> tuple[str, int]:
    size, tokens = text.split(":")
    if size not in MODEL_PRESETS or int(tokens) % LENGTH:
        raise ValueError(f"expected one of {', '.join(MODEL_PRESETS)}, a colon and a multiple of {LENGTH}")
    return size, int(tokens)


def _measure(rank: int, given: argparse.Namespace, folder: str) -> None:
    """One process: all parts in turns, in the same order everywhere. Process 0 writes what it measured."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=given.processes)
    try:
        found = {
            "all_reduce": {size: _all_reduce(size, given.rounds) for size in ALL_REDUCE_BYTES},
            "steps": {step: _steps(*step, given.rounds, rank) for step in given.steps},
        }
        if rank == 0:
            torch.save(found, Path(folder) / "0.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _all_reduce(size: int, rounds: int) -> list[float]:
    values = torch.ones(size // 4)
    return [_timed(lambda: dist.all_reduce(values)) for _ in range(rounds + 1)][1:]


def _timed(run: Callable[[], Any]) -> float:
    """Seconds, counted from the moment when all processes are there."""
    dist.barrier()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _steps(size: str, tokens: int, rounds: int, rank: int) -> dict[str, list[float]]:
    """Seconds of gradients alone (one process works, then all at once), with their reduction, and of clipping and optimizer."""
    torch.manual_seed(0)
    alone = fastbert.BertForPreTraining(config_for(size)).train()
    together = DistributedDataParallel(alone, gradient_as_bucket_view=True)
    optimizer = build_optimizer(alone, 1e-4, 0.01)
    batch = _batch(tokens, rank)
    seconds: dict[str, list[float]] = {"alone": [], "at once": [], "reduced": [], "optimizer": []}

    def gradients(module: torch.nn.Module) -> None:
        module(**batch).loss.backward()

    def update() -> None:
        clip_grad_norm_(alone.parameters(), 1.0)
        optimizer.step()

    for number in range(rounds + 2):
        parts: dict[str, Callable[[], Any]] = {
            "alone": lambda: gradients(alone) if rank == 0 else None,
            "at once": lambda: gradients(alone),
            "reduced": lambda: gradients(together),
            "optimizer": update,
        }
        for name, run in parts.items():
            taken = _timed(run)
            if number > 1:  # DistributedDataParallel makes its buckets anew after the first step
                seconds[name].append(taken)
            if name != "reduced":
                optimizer.zero_grad(set_to_none=name == "optimizer")
    return seconds


def _batch(tokens: int, rank: int) -> dict[str, Any]:
    """Full sequences of random words, packed, a seventh of them labelled."""
    generator = torch.Generator().manual_seed(rank)
    sequences = tokens // LENGTH
    ids = torch.randint(1000, 30522, (1, tokens), generator=generator)
    bounds = torch.arange(0, tokens + 1, LENGTH, dtype=torch.int32)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(tokens)[None] % LENGTH,
        "labels": torch.where(torch.rand(1, tokens, generator=generator) < 0.15, ids, -100),
        "next_sentence_label": torch.randint(0, 2, (sequences,), generator=generator),
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": LENGTH, "max_length_k": LENGTH,
    }  # fmt: skip


def compare_with_model(size: str, tokens: int, measured: dict[str, Any]) -> dict[str, Any]:
    """The measured step beside the model's, whose compute is that of all processes at once: they share the memory's bandwidth."""
    seconds = {name: statistics.median(values) for name, values in measured["steps"][size, tokens].items()}
    sizes = sorted(measured["all_reduce"])
    medians = [statistics.median(measured["all_reduce"][size]) for size in sizes]

    def all_reduce_seconds(wanted: float) -> float:
        """Between the measured sizes a straight line, beyond the last its rate."""
        return float(np.interp(wanted, sizes, medians)) if wanted <= sizes[-1] else medians[-1] * wanted / sizes[-1]

    def predicted(overlap: bool) -> StepTime:
        load = Load(tokens / seconds["at once"], tokens, optimizer_seconds=seconds["optimizer"])
        return step_time(all_reduce_seconds, model(size), load, overlap)

    whole = seconds["reduced"] + seconds["optimizer"]
    single = seconds["alone"] + seconds["optimizer"]
    return {
        "size": size,
        "tokens": tokens,
        "seconds": {name: summary(values) for name, values in measured["steps"][size, tokens].items()},
        "step_s": whole,
        "one_process_s": single,
        "predicted_s": predicted(overlap=False).seconds,
        "predicted_with_overlap_s": predicted(overlap=True).seconds,
        "communication_s": predicted(overlap=False).communication,
        "efficiency": single / whole,
    }


def loader_rate(length: int, characters: int) -> float:
    """Tokens per second of one process that makes masked batches out of tokens; the plan of the epoch is made before."""
    documents, _ = embedded_documents(characters)
    texts = (paragraph for document in documents[:200] for paragraph in document.paragraphs)
    tokenizer = train_wordpiece(texts, 8000, lowercase=True)
    corpus = tokenize_documents(documents, tokenizer)
    batches = PretrainingBatches(corpus, tokenizer, max_seq_length=length, tokens_per_batch=LOADER_TOKENS, seed=0)
    batches.num_batches()
    made = batches.epoch(0)
    next(made)
    start = time.perf_counter()
    tokens = sum(batch.num_tokens for batch in islice(made, LOADER_BATCHES))
    return tokens / (time.perf_counter() - start)


def checkpoint_rate(folder: Path) -> float:
    """Bytes per second of a checkpoint's way to the disk: written, summed (SHA-256) and flushed."""
    learner = Learner(fastbert.BertForPreTraining(config_for(CHECKPOINT_SIZE)), PretrainSettings(model=CHECKPOINT_SIZE))
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    snapshot = learner.snapshot()
    start = time.perf_counter()
    write_checkpoint(folder, 1, snapshot.write, keep=1)
    return CHECKPOINT_BYTES * model(CHECKPOINT_SIZE).parameters / (time.perf_counter() - start)


def table(steps: list[dict[str, Any]], processes: int) -> list[str]:
    lines = [
        f"| model, tokens per process | 1 process, ms | {processes} processes, ms | predicted, nothing hidden | "
        "predicted, hidden | all-reduce, ms | tokens/s beside 1 process |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in steps:
        ms = [
            1e3 * step[name] for name in ("one_process_s", "step_s", "predicted_s", "predicted_with_overlap_s", "communication_s")
        ]
        lines.append(
            f"| {step['size']}, {step['tokens']:,} | {ms[0]:,.0f} | {ms[1]:,.0f} | {ms[2]:,.0f} | {ms[3]:,.0f} | {ms[4]:,.0f} | "
            f"{processes * step['efficiency']:.2f}x |"
        )
    return lines


if __name__ == "__main__":
    main()
