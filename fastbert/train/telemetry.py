"""How a run is doing: what its steps need in arithmetic and what of that the machine could give, its memory, its waiting.

Model FLOPs are those of BERT as it is published (Devlin et al., 2019), counted as Chowdhery et al., "PaLM" (2022), appendix B,
count them: multiply-adds of the matmuls times two, forward, and twice as many backward, of real tokens only, whatever an
implementation leaves out or computes twice. So the same batch has the same FLOPs whoever trains on it:

    forward = 2 layers (tokens (4 hidden^2 + 2 hidden intermediate) + 2 pairs hidden) + 2 labelled (hidden^2 + hidden vocabulary)
    step    = 3 forward

``pairs``: pairs of tokens of one sequence, the sum of the squared lengths. The masked-LM head counts on ``labelled`` rows, where
the original computes it, too; the last layer counts whole, although fastbert computes only the rows of it that are read: other
implementations compute all. Not counted: embeddings, pooler, next sentences, LayerNorm, softmax, optimizer.

MFU (model FLOPs utilization) sets the FLOPs per second beside the machine's matmul rate in the run's dtype, measured when the run
starts: ``fastbert.ops.matmul_rate``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import BertConfig

from fastbert.ops.matmul_rate import matmul_rates, unmeasured_reason

if TYPE_CHECKING:  # the benchmarks need the FLOPs alone
    from fastbert.runs import Say

    from .prefetch import DeviceStep
    from .run_state import RunState
    from .settings import PretrainSettings

PER_SECOND = 1e9  # GFLOP/s in texts
_STATUS = Path("/proc/self/status")

T = TypeVar("T")


def encoder_flops(config: BertConfig, tokens: int, pairs: int) -> float:
    """Of a forward pass through the layers; see the module for the formula."""
    hidden = config.hidden_size
    weights = 4 * hidden * hidden + 2 * hidden * config.intermediate_size
    return 2 * config.num_hidden_layers * (tokens * weights + 2 * pairs * hidden)


def training_flops(config: BertConfig, tokens: int, pairs: int, labelled: float) -> float:
    """Of a training step, forward and backward; see the module for the formula."""
    hidden = config.hidden_size
    head = 2 * labelled * (hidden * hidden + hidden * config.vocab_size)
    return 3 * (encoder_flops(config, tokens, pairs) + head)


def measured_rate(device: torch.device, dtype: str, say: Say) -> float | None:
    """FLOP/s of the fastest library on ``device``; None, and a line that says why, where nothing may be measured."""
    if (reason := unmeasured_reason()) is not None:
        say(f"No MFU: the matmul rate of this machine is not measured, because {reason}")
        return None
    rates = matmul_rates(device, getattr(torch, dtype))
    library = max(rates, key=rates.__getitem__)
    say(f"Matmul rate of this machine: {rates[library] / PER_SECOND:,.0f} GFLOP/s in {dtype} ({library})")
    return rates[library]


class Telemetry:
    """Makes the lines of ``metrics.jsonl`` from what a run has counted. ``matmul_rate``: FLOP/s of the machine, or None."""

    def __init__(self, settings: PretrainSettings, config: BertConfig, matmul_rate: float | None):
        self._config = config
        self._matmul_rate = matmul_rate
        self._step_budget = settings.batches_per_step * settings.tokens_per_batch

    def flops(self, step: DeviceStep) -> float:
        """Model FLOPs of training on ``step``; the device is not asked."""
        return training_flops(self._config, sum(step.tokens), step.pairs, sum(step.masked))

    def row(self, state: RunState, learning_rate: float) -> dict[str, Any]:
        """The window's line: its means and speed, ``mfu`` where the rate is known, ``fill`` (the share of the batches' token budget
        that are real tokens), and ``skipped_steps`` of the run so far.
        """
        window = state.window
        row = window.row(state.step, learning_rate)
        if self._matmul_rate and window.seconds:
            row["mfu"] = window.flops / window.seconds / self._matmul_rate
        return {**row, "fill": window.tokens / (window.steps * self._step_budget), "skipped_steps": len(state.skipped)}


def counting_waits(items: Iterator[T], state: RunState) -> Iterator[T]:
    """``items``, with the seconds that they were waited for added to the window of ``state``."""
    while True:
        started = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        state.window.waited += time.perf_counter() - started
        yield item


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: ``peak_rss_bytes`` of this process so far, where the system tells, and ``peak_cuda_bytes`` of tensors on the GPU."""
    found = {}
    if (resident := _peak_resident_bytes()) is not None:
        found["peak_rss_bytes"] = resident
    if device.type == "cuda":
        found["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def summary(rows: Sequence[dict[str, Any]], matmul_rate: float | None) -> dict[str, Any]:
    """Of a whole run, from its ``metrics.jsonl``, whichever machines and processes it went on in.

    ``mfu`` (over the time in which a rate was known) and ``loader_wait``, each weighted by seconds; ``matmul_rate``: FLOP/s
    of the machine it ended on; the highest peaks of memory. What no line has is None.
    """
    return {
        "mfu": _mean(rows, "mfu"),
        "matmul_rate": matmul_rate,
        "loader_wait": _mean(rows, "loader_wait"),
        **{name: max((row[name] for row in rows if name in row), default=None) for name in ("peak_rss_bytes", "peak_cuda_bytes")},
    }


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    weighted = [(row[name] * row["seconds"], row["seconds"]) for row in rows if name in row]
    seconds = sum(weight for _, weight in weighted)
    return sum(value for value, _ in weighted) / seconds if seconds else None


def _peak_resident_bytes() -> int | None:
    # getrusage counts what the process was before exec, too: of one that a large process has started, that one's memory.
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
