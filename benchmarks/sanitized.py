"""Every op of one backend, once forward and backward on few rows: what compute-sanitizer watches.

compute-sanitizer --tool racecheck python3 -m benchmarks.sanitized --backend cuda

The last line of stdout is one JSON document; exit code 1 where an op that the backend has kernels for could not run.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from fastbert.ops import backends, cuda

from .op_cases import SCALES, Contender, cases
from .ops import forward_and_backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=backends.BACKENDS, default="cuda")
    parser.add_argument("--scale", choices=SCALES, default="small")
    arguments = parser.parse_args()
    document = run(arguments.backend, arguments.scale)
    print(json.dumps(document))
    sys.exit(1 if document["not_run"] else 0)


def run(backend: str, scale: str) -> dict[str, object]:
    """ops: those that ran; not_run: the reasons against the others that the backend has kernels for."""
    device = {"native": "cpu", "cuda": cuda.DEVICE_TYPE}.get(backend, "cuda")
    ran, not_run = [], {}
    for op in cuda.OPS if backend == "cuda" else backends.OPS:
        reasons = backends.not_supported_reasons(backend, op, device, torch.bfloat16)
        if reasons:
            not_run[op] = reasons
            continue
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        for dtype in (dtype for dtype in dtypes if not backends.not_supported_reasons(backend, op, device, dtype)):
            for case in cases(op, SCALES[scale], device, dtype):
                forward_and_backward(Contender(case.ours(backend), case.leaves, case.dout))
        ran.append(op)
    return {"benchmark": "sanitized", "backend": backend, "ops": ran, "not_run": not_run}


if __name__ == "__main__":
    main()
