"""Timing that can be trusted on a noisy machine: contenders take turns, medians and paired ratios are quoted, and the
machine's own ceilings (matmul rate, copy bandwidth) are measured in the same run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import fastbert
from fastbert.ops import backends

RESULTS = Path(__file__).parent / "results"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each contender in each round, A B C A B C ..., after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in seconds."""
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return {"median_s": float(median), "q25_s": float(low), "q75_s": float(high), "rounds": len(seconds)}


def paired_ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """How many times ``faster`` beats ``slower``: the median and quartiles of the ratios of each round."""
    low, median, high = np.quantile([a / b for a, b in zip(slower, faster, strict=True)], [0.25, 0.5, 0.75])
    return {"median": float(median), "q25": float(low), "q75": float(high)}


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Matmul rate in FLOP/s at a BERT-sized shape and copy bandwidth in B/s (read + write), the best of several runs."""
    rows, width = (2048, 768) if device == "cpu" else (16384, 4096)
    a, b = torch.randn(rows, width, device=device, dtype=dtype), torch.randn(4 * width, width, device=device, dtype=dtype)
    source = torch.randn(1 << (25 if device == "cpu" else 28), device=device)
    target = torch.empty_like(source)
    runs = interleaved(
        {"matmul": lambda: torch.nn.functional.linear(a, b), "copy": lambda: target.copy_(source)}, rounds=10, device=device
    )
    return {
        "matmul_flops": 2 * rows * width * 4 * width / min(runs["matmul"]),
        "copy_bytes": 2 * source.numel() * source.element_size() / min(runs["copy"]),
    }


def machine() -> dict[str, Any]:
    """Everything that a figure depends on beside the code."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastbert": fastbert.__version__,
        "commit": commit or None,
        "backends": {op: backends.select(op, "auto", "cpu", torch.float32) for op in backends.OPS},
    }


def cpu_name() -> str:
    """The processor's family name and widest instructions: virtual machines often hide the model."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    widest = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flags and f in flags.group(1).split()]
    return f"{name.group(1).strip() if name else platform.processor()} ({', '.join(widest[:2]) or platform.machine()})"


def write_results(name: str, document: dict[str, Any], folder: str | None) -> None:
    """Prints the document as the last line of stdout, and keeps it as ``results/<folder>/<name>.json`` where one is named."""
    document = {"benchmark": name, "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]), **document}
    if folder is not None:
        path = RESULTS / folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}", file=sys.stderr)
    print(json.dumps(document))
