"""The suites behind ``fastbert bench``: one document of a suite, all dtypes and contenders in it.

inference   benchmarks.inference: all dtypes and engines in one race on each batch
finetune    benchmarks.finetune: sequence classification on 32 sequences of MNLI's lengths, a race for each dtype
pretrain    benchmarks.pretrain: masked words and next sentences on 16 x 128 tokens, a race for each dtype
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import cpu_goals, finetune, goals, inference, pretrain, training
from .harness import save_results
from .machine import machine
from .peers import PEERS
from .workloads import SIZES

SUITES = ("inference", "finetune", "pretrain")
# Of --peers, by suite; the first of training is always there.
TRAINING_PEERS = ("transformers", "transformers-sorted", "transformers-compiled")
_TASKS = {"finetune": finetune.TASK, "pretrain": pretrain.TASK}
_LENGTHS = {"finetune": ("mnli", 32 * 128), "pretrain": ("128", 16 * 128)}  # kind, tokens with padding


@dataclass(frozen=True)
class Options:
    """dtypes, peers: None for all that the suite has; compiled training only where it is asked for. threads: None for torch's."""

    suite: str
    device: str
    dtypes: tuple[str, ...] | None = None
    size: str = "base"
    rounds: int = 5
    limit_s: float = 60.0
    peers: tuple[str, ...] | None = None
    threads: int | None = None

    def problems(self) -> list[str]:
        """What is wrong with them, for the user; empty where nothing is."""
        dtypes, peers = (inference.DTYPES, tuple(PEERS)) if self.suite == "inference" else (inference.DTYPES[:2], TRAINING_PEERS)
        found = [f"--suite is {self.suite!r}, expected one of {', '.join(SUITES)}"] if self.suite not in SUITES else []
        if self.size not in SIZES:
            found.append(f"--size is {self.size!r}, expected one of {', '.join(SIZES)}")
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
        return found


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures a suite and says its tables; the document has ``failed``: why results of fastbert are missing, by name."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.suite == "inference":
        return inference.run(
            inference.Options(
                options.size, options.dtypes or inference.DTYPES, options.peers, options.device, options.rounds, options.limit_s
            ),
            say,
        )
    runs = {dtype: _train(options, dtype, say) for dtype in options.dtypes or inference.DTYPES[:2]}
    results = {dtype: document["results"] for dtype, document in runs.items()}
    rows = []
    if options.device == "cpu" and options.size == "base":
        rows = goals.compare(cpu_goals.TRAINING_GOALS[options.suite], results)
        say("\n" + goals.table(rows, "goal on a CPU"))
    failed = {
        f"{batch}: {contender} {dtype}": reason
        for dtype, by_batch in results.items()
        for batch, measured in by_batch.items()
        for contender, reason in measured["failed"].items()
        if contender.startswith(training.OURS)
    }
    return {"machine": machine(options.device), "size": options.size, "failed": failed, "runs": runs, "goals": rows}


def _train(options: Options, dtype: str, say: Callable[[str], None]) -> dict[str, Any]:
    peers = TRAINING_PEERS[:2] if options.peers is None else options.peers
    kind, tokens = _LENGTHS[options.suite]
    return training.run(
        _TASKS[options.suite],
        training.Options(
            options.size,
            tokens,
            dtype,
            (kind,),
            options.rounds,
            options.limit_s,
            compiled="transformers-compiled" in peers,
            sorted="transformers-sorted" in peers and options.device == "cpu",
            device=options.device,
        ),
        say,
    )


def save(suite: str, document: dict[str, Any], command: str, folder: str) -> None:
    """Keeps the document in benchmarks/results/<folder>, as ``command`` made it."""
    save_results(suite, {"benchmark": suite, "command": command, **document}, folder)
