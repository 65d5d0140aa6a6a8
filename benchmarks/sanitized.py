"""Every op of one backend, once forward and backward on few rows, and CUDA's optimizers: what compute-sanitizer watches.

compute-sanitizer --tool racecheck python3 -m benchmarks.sanitized --backend cuda

The last line of stdout is one JSON document; exit code 1 where an op that the backend has kernels for could not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection

import torch

from fastbert.ops import backends, cuda
from fastbert.train.multi_tensor import MultiTensorAdamW, MultiTensorLAMB, MultiTensorOptimizer

from .op_cases import SCALES, Contender, cases
from .ops import forward_and_backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=backends.BACKENDS, default="cuda")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--without", nargs="+", choices=backends.OPS, default=(), metavar="OP")
    arguments = parser.parse_args()
    document = run(arguments.backend, arguments.scale, arguments.without)
    print(json.dumps(document))
    sys.exit(1 if document["not_run"] else 0)


def run(backend: str, scale: str, without: Collection[str] = ()) -> dict[str, object]:
    """ops: those that ran; not_run: the reasons against the others that the backend has kernels for. without: not asked for."""
    device = {"native": "cpu", "cuda": cuda.DEVICE_TYPE}.get(backend, "cuda")
    ran, not_run = [], {}
    for op in (op for op in (cuda.OPS if backend == "cuda" else backends.OPS) if op not in without):
        reasons = backends.not_supported_reasons(backend, op, device, torch.bfloat16)
        if reasons:
            not_run[op] = reasons
            continue
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        for dtype in (dtype for dtype in dtypes if not backends.not_supported_reasons(backend, op, device, dtype)):
            for case in cases(op, SCALES[scale], device, dtype):
                forward_and_backward(Contender(case.ours(backend), case.leaves, case.dout))
        ran.append(op)
    if backend == "cuda" and not not_run:
        for optimizer in (MultiTensorAdamW, MultiTensorLAMB):
            train(optimizer, device)
            ran.append(optimizer.__name__)
    return {"benchmark": "sanitized", "backend": backend, "ops": ran, "not_run": not_run}


def train(optimizer_class: type[MultiTensorOptimizer], device: str) -> None:
    """Two clipped steps on one element, on less than a chunk and on several, not all of them whole vectors."""
    parameters = [torch.randn(size, device=device).requires_grad_() for size in (1, 1000, 70001)]
    optimizer = optimizer_class(parameters, lr=1e-3)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.clip_grad_norm(1.0)
        optimizer.step()


if __name__ == "__main__":
    main()
