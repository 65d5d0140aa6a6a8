"""What a figure depends on beside the code, and the ceilings it is set beside: one JSON document.

python -m benchmarks.machine [--dtype bfloat16] [--device cpu]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastbert
from fastbert.ops import backends

from .ceilings import ceilings


def machine(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Names and versions; ``backends``: what "auto" picks for each op on ``device`` in ``dtype``."""
    document = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
        "triton": installed("triton"),
        "fastbert": fastbert.__version__,
        "commit": commit(Path(__file__).parent.parent),
        "backends": {op: backends.select(op, "auto", device, dtype) for op in backends.OPS},
    }
    if document["gpu"]:
        document["compute_capability"] = list(torch.cuda.get_device_capability())
        document["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
        document["cuda"] = torch.version.cuda
        document["driver"] = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return document


def commit(repository: Path) -> str | None:
    """As ``git describe --dirty``, but that results are no source: one suite's new document does not make the next one's code
    unknown. None where there is no repository or no git."""
    git = ("git", "-C", str(repository))
    described = printed(*git, "describe", "--always")
    changed = printed(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"{described}-dirty" if described and changed else described


def printed(*command: str) -> str | None:
    """What the command prints, or None where it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's family name and widest instructions: virtual machines often hide the model."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    widest = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flags and f in flags.group(1).split()]
    return f"{name.group(1).strip() if name else platform.processor()} ({', '.join(widest[:2]) or platform.machine()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    limits = {"dtype": arguments.dtype, **ceilings(arguments.device, dtype)}
    print(json.dumps({"machine": machine(arguments.device, torch.float32 if dtype == torch.int8 else dtype), "ceilings": limits}))


if __name__ == "__main__":
    main()
