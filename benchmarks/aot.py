"""Compiles every Triton kernel for GPUs that need not be there, and shows what the compiler made of it.

    python -m benchmarks.aot [--targets sm_80 sm_90 sm_100 gfx942] [--quick]

The ops' own launchers run on small CPU tensors with a driver that names a target instead of having one, and stop before the
launch: what is compiled is what would be launched. Per kernel and configuration: registers and spilled bytes, shared memory
against the chip's limit, and matrix instructions (wgmma on sm_90, mma elsewhere, mfma on AMD). Exits with 1 where a kernel spills
or needs more shared memory than the chip has. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastbert_kernels import add_layer_norm, attention, gelu_layer_norm, mlm_loss

# name -> (target, bytes of shared memory that a block may have)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MATRIX_INSTRUCTIONS = {"ptx": r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", "amdgcn": r"v_mfma"}


class OfflineDriver:
    """What Triton asks a driver for before it launches. Each target is a device of its own, so that none gets another's code."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self._target, self._device = target, device

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_by(call: Callable[[], Any], target: GPUTarget, device: int) -> list[tuple[str, Any]]:
    """(name, compiled kernel) of every launch in ``call``, none of which happens."""
    kernels = []
    run = JITFunction.run

    @functools.wraps(run)
    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((self.fn.__name__, kernel))
        return kernel

    triton.runtime.driver.set_active(OfflineDriver(target, device))
    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return kernels


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, forward and backward of an op) over dtypes, shapes and dropout."""
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for dropout_p in (0.1,) if quick else (0.0, 0.1):
            for head_dim in (64,) if quick else (32, 64, 128):
                yield (
                    f"attention {name} head_dim {head_dim} p {dropout_p}",
                    functools.partial(_attention, dtype, head_dim, dropout_p),
                )
            for hidden in (768,) if quick else (256, 768, 1024):
                yield (
                    f"add_layer_norm {name} hidden {hidden} p {dropout_p}",
                    functools.partial(_add_layer_norm, dtype, hidden, dropout_p),
                )
        for hidden in (768,) if quick else (256, 768, 1024):
            yield f"gelu_layer_norm {name} hidden {hidden}", functools.partial(_gelu_layer_norm, dtype, hidden)
        yield f"mlm_loss {name}", functools.partial(_mlm_loss, dtype)


def _attention(dtype: torch.dtype, head_dim: int, dropout_p: float) -> None:
    qkv, cu_seqlens = torch.zeros(512, 3, 4, head_dim, dtype=dtype), torch.tensor([0, 512], dtype=torch.int32)
    dropout = (dropout_p, torch.ones(1, dtype=torch.int64) if dropout_p else None, 1)
    out, lse = attention.attention_forward(qkv, cu_seqlens, 512, 0.125, *dropout)
    attention.attention_backward(out, qkv, out, lse, cu_seqlens, 512, 0.125, *dropout)


def _add_layer_norm(dtype: torch.dtype, hidden: int, dropout_p: float) -> None:
    x, weight = torch.zeros(4096, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype)
    dropout = (dropout_p, torch.ones(1, dtype=torch.int64) if dropout_p else None, 1)
    _, z, mean, rstd = add_layer_norm.add_layer_norm_forward(x, weight, x, weight, weight, 1e-12, *dropout)
    add_layer_norm.add_layer_norm_backward(x, z, mean, rstd, weight, True, *dropout)


def _gelu_layer_norm(dtype: torch.dtype, hidden: int) -> None:
    x, weight = torch.zeros(4096, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype)
    _, mean, rstd = gelu_layer_norm.gelu_layer_norm_forward(x, weight, weight, weight, 1e-12)
    gelu_layer_norm.gelu_layer_norm_backward(x, x, weight, weight, mean, rstd)


def _mlm_loss(dtype: torch.dtype) -> None:
    logits, bias, labels = torch.zeros(640, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype), torch.zeros(640, dtype=torch.int64)
    rows = [torch.ones(640) for _ in range(4)]
    mlm_loss.mlm_loss_forward(logits, bias, labels, 0, *rows[:3], None)
    mlm_loss.mlm_loss_backward(logits, bias, labels, 0, 30522, rows[0], rows[1], rows[2], 0.0, bias)


def resources(kernel: Any) -> dict[str, int]:
    """registers and spilled bytes per thread, shared_memory per block in bytes, matrix instructions in the program text."""
    assembly = "ptx" if "ptx" in kernel.asm else "amdgcn"
    text = kernel.asm[assembly]
    if assembly == "amdgcn":
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
        spills = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers = int(re.search(r"REG:(\d+)", usage).group(1))
        spills = int(re.search(r"LOCAL:(\d+)", usage).group(1)) + int(re.search(r"STACK:(\d+)", usage).group(1))
    return {
        "registers": registers,
        "spilled_bytes": spills,
        "shared_memory": kernel.metadata.shared,
        "matrix_instructions": len(re.findall(MATRIX_INSTRUCTIONS[assembly], text)),
        "num_warps": kernel.metadata.num_warps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="bfloat16 and BERT-base's shapes only")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")

    rows, failures = [], []
    print(f"{'target':<8}{'kernel':<66}{'regs':>5}{'spilled':>8}{'shared':>9}{'matrix':>7}{'warps':>6}")
    for device, name in enumerate(arguments.targets):
        target, shared_limit = TARGETS[name]
        for label, call in cases(arguments.quick):
            for kernel_name, kernel in compiled_by(call, target, device):
                row = {"target": name, "case": label, "kernel": kernel_name, **resources(kernel)}
                rows.append(row)
                title = f"{label}: {kernel_name.strip('_')}"
                columns = {"registers": 5, "spilled_bytes": 8, "shared_memory": 9, "matrix_instructions": 7, "num_warps": 6}
                numbers = "".join(f"{row[key]:>{width}}" for key, width in columns.items())
                print(f"{name:<8}{title:<66}{numbers}")
                if row["spilled_bytes"] or row["shared_memory"] > shared_limit:
                    failures.append(f"{name} {title}")
    for failure in failures:
        print(f"spills, or needs more shared memory than the chip has: {failure}", file=sys.stderr)
    print(json.dumps({"benchmark": "aot", "triton": triton.__version__, "kernels": rows, "failures": failures}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
