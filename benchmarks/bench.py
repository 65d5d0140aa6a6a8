"""The suites behind ``fastbert bench``: one document of a suite, all dtypes and contenders in it.

inference   benchmarks.inference: all dtypes and engines in one race on each batch
finetune    benchmarks.finetune: sequence classification, a race for each dtype
pretrain    benchmarks.pretrain: masked words and next sentences, a race for each dtype
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from . import cpu_goals, finetune, goals, inference, lengths, pretrain, training
from .harness import save_results
from .machine import machine
from .peers import PEERS
from .reports.report import write
from .workloads import SIZES, STANDARD, Workload, WorkloadError, config_for, model_title, workloads

SUITES = ("inference", "finetune", "pretrain")
_TASKS = {"finetune": finetune.TASK, "pretrain": pretrain.TASK}
# What a suite measures where nobody says: the batches that README's tables have.
_BATCHES = {"inference": STANDARD, "finetune": ("mnli",), "pretrain": ("16x128",)}


@dataclass(frozen=True)
class Options:
    """model, batches: see ``workloads``, None for the suite's own; dtypes, peers: None for all that the suite has, of training's
    peers :data:`training.DEFAULT_PEERS`; data: a folder as ``lengths`` reads it, whose texts are counted with the tokenizer of
    ``tokenizer`` (or of the checkpoint ``model``) in place of the embedded histograms; threads: None for torch's."""

    suite: str
    device: str
    dtypes: tuple[str, ...] | None = None
    model: str = "base"
    batches: tuple[str, ...] | None = None
    data: Path | None = None
    tokenizer: str | None = None
    rounds: int = 5
    limit_s: float = 60.0
    peers: tuple[str, ...] | None = None
    threads: int | None = None

    def problems(self) -> list[str]:
        """What is wrong with them, for the user; empty where nothing is."""
        if self.suite not in SUITES:
            return [f"--suite is {self.suite!r}, expected one of {', '.join(SUITES)}"]
        found = []
        dtypes, peers = (inference.DTYPES, tuple(PEERS)) if self.suite == "inference" else (inference.DTYPES[:2], training.PEERS)
        for dtype in self.dtypes or ():
            if dtype not in dtypes:
                found.append(f"--dtype {dtype}: the suite {self.suite} has {', '.join(dtypes)}")
        for peer in self.peers or ():
            if peer not in peers:
                found.append(f"--peers {peer}: the suite {self.suite} has {', '.join(peers)}")
        if self.device not in ("cpu", "cuda"):
            found.append(f"--device is {self.device!r}, expected cpu or cuda")
        elif self.device == "cuda" and not torch.cuda.is_available():
            found.append("--device is cuda, and torch finds no CUDA device")
        try:
            config = config_for(self.model)
            if self.data is not None and self.tokenizer is None and self.model in SIZES:
                raise WorkloadError(f"--data needs --tokenizer (folder or Hub name), since --model {self.model} has none")
            longest = max(batch.padded_to for batch in self.workloads())
            if longest > config.max_position_embeddings:
                found.append(f"--batches: {longest} tokens, and {self.model} takes {config.max_position_embeddings} at most")
        except (WorkloadError, OSError, ValueError) as error:
            found.append(str(error))
        return found

    def workloads(self) -> tuple[Workload, ...]:
        """Raises WorkloadError for a batch that there is not, and what reading ``data`` raises."""
        sets = None
        if self.data is not None:
            sets = {**lengths.embedded(), **lengths.counted(self.data, AutoTokenizer.from_pretrained(self.tokenizer or self.model))}
        return workloads(self.batches or _BATCHES[self.suite], sets)


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures a suite and says its tables; the document has ``failed``: why results of fastbert are missing, by name."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    batches = options.workloads()
    if options.suite == "inference":
        dtypes = options.dtypes or inference.DTYPES
        chosen = inference.Options(options.model, batches, dtypes, options.peers, options.device, options.rounds, options.limit_s)
        return inference.run(chosen, say)
    runs = {}
    for dtype in options.dtypes or inference.DTYPES[:2]:
        peers = options.peers or training.DEFAULT_PEERS
        of_dtype = training.Options(
            options.model, batches, dtype, options.rounds, options.limit_s, peers, packed=True, device=options.device
        )
        runs[dtype] = training.run(_TASKS[options.suite], of_dtype, say)
    results = {dtype: document["results"] for dtype, document in runs.items()}
    rows = []
    if options.device == "cpu" and options.model == "base":
        rows = goals.compare(cpu_goals.TRAINING_GOALS[options.suite], results)
        say("\n" + goals.table(rows, "goal on a CPU"))
    return {"machine": machine(options.device), "model": options.model, "failed": failures(results), "runs": runs, "goals": rows}


def failures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Of fastbert's contenders, the reasons by batch, contender and dtype."""
    return {
        f"{batch}: {contender} {dtype}": reason
        for dtype, by_batch in results.items()
        for batch, measured in by_batch.items()
        for contender, reason in measured["failed"].items()
        if contender.startswith(training.OURS)
    }


def save(options: Options, document: dict[str, Any], command: str, folder: str) -> None:
    """Keeps the document in benchmarks/results/<folder>, as ``command`` made it, under the suite's name, and the model's and the
    batches' where they are not the suite's own: ``inference.json``, ``inference-by-length.json``."""
    chosen = [options.suite, *([] if options.model == Options.model else [model_title(options.model)]), *(options.batches or ())]
    name = re.sub(r"[^\w.-]+", "-", "-".join(chosen))
    save_results(name, {"benchmark": options.suite, "command": command, **document}, folder)


def report(options: Options, document: dict[str, Any], command: str, folder: Path) -> list[Path]:
    """Writes ``<suite>.json``, ``<suite>.md`` and pictures into any folder, in place of an earlier report of the suite."""
    return write({"benchmark": options.suite, "command": command, **document}, folder)
