"""The suites behind ``fastbert bench``: one document of a suite, all dtypes and contenders in it.

inference   benchmarks.inference: all dtypes and engines in one race on each batch
finetune    benchmarks.finetune: sequence classification, a race for each dtype
pretrain    benchmarks.pretrain: masked words and next sentences, a race for each dtype
ops         benchmarks.ops: each op forward and backward, a race for each dtype; it knows no models and no batches
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbert.data.tokenizer import load_tokenizer

from . import cpu_goals, finetune, goals, harness, inference, lengths, op_contenders, ops, pretrain, training
from .machine import machine
from .peers import FLOATS, OURS, PEERS
from .reports.report import write
from .workloads import SIZES, STANDARD, Workload, WorkloadError, config_for, model_title, names_of, set_of, workloads

SUITES = ("inference", "finetune", "pretrain", "ops")
_TASKS = {"finetune": finetune.TASK, "pretrain": pretrain.TASK}
_ROUNDS, _LIMIT_S = 5, 60.0  # of the suites that measure models
# What a suite measures where nobody says: the batches that README's tables have.
_BATCHES = {"inference": STANDARD, "finetune": ("mnli",), "pretrain": ("16x128",)}


@dataclass(frozen=True)
class Options:
    """model, batches: see ``workloads``, None for the suite's own; dtypes, peers: None for all that the suite has, of training's
    peers :data:`training.DEFAULT_PEERS`; data: a folder as ``lengths`` reads it, whose texts are counted with the tokenizer of
    ``tokenizer`` (or of the checkpoint ``model``) in place of the embedded histograms; rounds, limit_s: None for the suite's own;
    threads: None for torch's; ops: of the suite ops, None for all; profile: where the time goes, too, when all timing is over."""

    suite: str
    device: str
    dtypes: tuple[str, ...] | None = None
    model: str = "base"
    batches: tuple[str, ...] | None = None
    data: Path | None = None
    tokenizer: str | None = None
    rounds: int | None = None
    limit_s: float | None = None
    peers: tuple[str, ...] | None = None
    threads: int | None = None
    ops: tuple[str, ...] | None = None
    profile: bool = False

    def problems(self) -> list[str]:
        """What is wrong with them, for the user; empty where nothing is."""
        if self.suite not in SUITES:
            return [f"--suite is {self.suite!r}, expected one of {', '.join(SUITES)}"]
        if self.device not in OURS.dtypes:
            return [f"--device is {self.device!r}, expected {' or '.join(OURS.dtypes)}"]
        found = []
        peers = {"inference": PEERS, "ops": op_contenders.PEERS}.get(self.suite, training.PEERS)
        for dtype in self.dtypes or ():
            if dtype not in self.all_dtypes:
                found.append(f"--dtype {dtype}: the suite {self.suite} has {', '.join(self.all_dtypes)} on {self.device}")
        for peer in self.peers or ():
            if peer not in peers:
                found.append(f"--peers {peer}: the suite {self.suite} has {', '.join(peers)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            found.append("--device is cuda, and torch finds no CUDA device")
        if self.threads is not None and self.threads > (processors := os.cpu_count() or self.threads):
            found.append(f"--threads {self.threads}: this machine has {processors} processors")
        if self.suite == "ops":
            return found + self._problems_of_ops()
        if self.ops is not None:
            found.append(f"--ops: the suite {self.suite} measures models; --suite ops measures ops")
        try:
            config = config_for(self.model)
            longest = max(batch.padded_to for batch in self.workloads)
            if longest > config.max_position_embeddings:
                found.append(f"--batches: {longest} tokens, and {self.model} takes {config.max_position_embeddings} at most")
        except (WorkloadError, OSError, ValueError) as error:
            found.append(str(error))
        return found

    def _problems_of_ops(self) -> list[str]:
        found = [f"--ops {op}: there are {', '.join(ops.OPS)}" for op in self.ops or () if op not in ops.OPS]
        given = {"--batches": self.batches, "--data": self.data, "--tokenizer": self.tokenizer}
        given |= {"--model": None if self.model == Options.model else self.model, "--profile": self.profile or None}
        unused = [option for option, value in given.items() if value is not None]
        if unused:
            found.append(f"{', '.join(unused)}: the suite ops measures ops at sizes of its own, and takes no models and no batches")
        return found

    @property
    def all_dtypes(self) -> tuple[str, ...]:
        """fastbert's, for this suite and device."""
        if self.suite == "ops":
            return ops.DTYPES
        return OURS.dtypes[self.device] if self.suite == "inference" else FLOATS

    @functools.cached_property
    def workloads(self) -> tuple[Workload, ...]:
        """Raises WorkloadError for what there is not, FileNotFoundError for a set whose file ``data`` lacks, and DataError for a
        file or a tokenizer that cannot be used."""
        names = names_of(self.batches or _BATCHES[self.suite])
        of_embedded = workloads(names)
        if self.data is None:
            if self.tokenizer is not None:
                raise WorkloadError("--tokenizer counts the tokens of --data, which is not given")
            return of_embedded
        counted = [of for of in dict.fromkeys(map(set_of, names)) if of in lengths.SETS]
        if not counted:
            raise WorkloadError(f"--data: none of the batches {', '.join(names)} has lengths that are counted there")
        if self.tokenizer is None and self.model in SIZES:
            raise WorkloadError(f"--data needs --tokenizer (folder or Hub name), since --model {self.model} has none")
        if not self.data.is_dir():
            raise WorkloadError(f"--data {self.data}: no such folder")
        tokenizer = load_tokenizer(self.tokenizer or self.model)
        return workloads(names, {**lengths.embedded(), **lengths.counted(self.data, tokenizer, counted)})


def run(options: Options, say: Callable[[str], None], keep: harness.Keep) -> dict[str, Any]:
    """Measures a suite and says its tables; the document has ``failed``: why results of fastbert are missing, by name. It is kept
    whenever a batch of a dtype, or a case of an op, is complete."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.suite == "ops":
        given = {"ops": options.ops, "dtypes": options.dtypes, "rounds": options.rounds, "limit_s": options.limit_s}
        chosen_ops = {name: value for name, value in given.items() if value is not None}
        return ops.run(ops.Options(peers=options.peers, device=options.device, **chosen_ops), say, keep)
    rounds = _ROUNDS if options.rounds is None else options.rounds
    limit_s = _LIMIT_S if options.limit_s is None else options.limit_s
    batches, dtypes = options.workloads, options.dtypes or options.all_dtypes
    if options.suite == "inference":
        chosen = inference.Options(options.model, batches, dtypes, options.peers, options.device, rounds, limit_s)
        document = inference.run(chosen, say, keep)
        return document | inference.profiles(chosen, document["ceilings"], say) if options.profile else document
    runs: dict[str, Any] = {}
    settings, peers = {}, options.peers or training.DEFAULT_PEERS
    described = {"machine": machine(options.device), "model": options.model, "peers": training.described(peers)}
    for dtype in dtypes:
        settings[dtype] = training.Options(
            options.model, batches, dtype, rounds, limit_s, peers, packed=True, device=options.device
        )

        def keep_runs(of_dtype: dict[str, Any], dtype: str = dtype) -> None:
            keep(described | _outcome(options, {**runs, dtype: of_dtype}))

        runs[dtype] = training.run(_TASKS[options.suite], settings[dtype], say, keep_runs)
    for dtype, document in runs.items() if options.profile else ():
        document |= training.profiles(_TASKS[options.suite], settings[dtype], document["ceilings"], say)
    document = described | _outcome(options, runs)
    if rows := document["goals"]:
        say("\n" + goals.table(rows, "goal on a CPU"))
    return document


def _outcome(options: Options, runs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a training suite's runs by dtype, as far as they are measured."""
    results = {dtype: document["results"] for dtype, document in runs.items()}
    not_run = {f"{title} {dtype}": why for dtype, document in runs.items() for title, why in document["not_run"].items()}
    has_goals = options.device == "cpu" and options.model == "base"
    rows = goals.compare(cpu_goals.TRAINING_GOALS[options.suite], results) if has_goals else []
    return {"not_run": not_run, "failed": failures(results), "runs": dict(runs), "goals": rows}


def failures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Of fastbert's contenders, the reasons by batch, contender and dtype."""
    return {
        f"{batch}: {contender} {dtype}": reason
        for dtype, by_batch in results.items()
        for batch, measured in by_batch.items()
        for contender, reason in measured["failed"].items()
        if contender.startswith(training.OURS)
    }


def name_of(options: Options) -> str:
    """Of the files of a run: the suite's name, and the model's and the batches' or the ops' where they are not the suite's own:
    ``inference``, ``inference-by-length``."""
    chosen = [options.suite, *([] if options.model == Options.model else [model_title(options.model)])]
    chosen += [*(options.batches or ()), *(options.ops or ())]
    return re.sub(r"[^\w.-]+", "-", "-".join(chosen))


def results_folder(folder: str) -> Path:
    """Where :func:`save` keeps documents. Raises ValueError for a path that is not below benchmarks/results."""
    path = harness.RESULTS / folder
    if harness.RESULTS.resolve() not in path.resolve().parents:
        raise ValueError(f"{folder!r} is no folder below benchmarks/results, such as zen5-2-cores; --output takes any folder")
    return path


def unfinished(options: Options, command: str, folders: Sequence[Path]) -> contextlib.AbstractContextManager[harness.Keep]:
    """What :func:`run` keeps, in the folders that are to get the document."""
    paths = [folder / f"{name_of(options)}.json" for folder in folders]
    return harness.unfinished(paths, {"benchmark": options.suite, "command": command})


def save(options: Options, document: dict[str, Any], command: str, folder: str) -> None:
    """Keeps the document in benchmarks/results/<folder>, as ``command`` made it."""
    harness.save_results(name_of(options), {"benchmark": options.suite, "command": command, **document}, folder)


def report(options: Options, document: dict[str, Any], command: str, folder: Path) -> list[Path]:
    """Writes JSON, Markdown and pictures into any folder, in place of an earlier report of that name."""
    return write({"benchmark": options.suite, "command": command, **document}, folder, name_of(options))
