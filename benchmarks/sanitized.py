"""Every op of one backend, once forward and backward on few rows: what compute-sanitizer watches.

compute-sanitizer --tool racecheck python3 -m benchmarks.sanitized --backend cuda
"""

from __future__ import annotations

import argparse
import json

import torch

from fastbert.ops import backends

from .op_cases import SCALES, Contender, cases
from .ops import forward_and_backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=backends.BACKENDS, default="cuda")
    parser.add_argument("--scale", choices=SCALES, default="small")
    arguments = parser.parse_args()
    device = "cpu" if arguments.backend == "native" else "cuda"
    ran = []
    for op in backends.OPS:
        if backends.not_supported_reasons(arguments.backend, op, device, torch.bfloat16):
            continue
        for dtype in (torch.bfloat16, torch.float32):
            for case in cases(op, SCALES[arguments.scale], device, dtype):
                forward_and_backward(Contender(case.ours(arguments.backend), case.leaves, case.dout))
        ran.append(op)
    print(json.dumps({"benchmark": "sanitized", "backend": arguments.backend, "ops": ran}))


if __name__ == "__main__":
    main()
