"""What the compiler made of one kernel: registers, spills, matrix instructions, and how many blocks a multiprocessor holds."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from fastbert.gpus import GPU, SUB_PARTITIONS

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# mma.sync -> HMMA (up to sm_89, sm_120), wgmma -> HGMMA (sm_90), tcgen05.mma -> UTCHMMA (sm_100); MFMA on AMD.
PTX_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)")
SASS_MATRIX = re.compile(r"\b(HGMMA|UTC[A-Z]*MMA|[A-Z]MMA)\b")
SASS_LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")
AMD_MATRIX = re.compile(r"\bv_mfma")
AMD_LOCAL_MEMORY = re.compile(r"\bscratch_(?:load|store)")


def resources(kernel: Any) -> dict[str, Any]:
    """Registers and spills per thread, memory and warps per block, matrix instructions in the program.

    ``spilled_bytes``: of the stack, where any of its ``spill_instructions`` touches it (ptxas also reports stacks that nothing
    uses). ``shared_memory`` in bytes, ``tensor_memory`` in columns. ``matrix_instructions``: in machine code, by name;
    ``matrix_instructions_ptx``: None on AMD.
    """
    if "cubin" in kernel.asm:
        cubin, in_ptx = kernel.asm["cubin"], len(PTX_MATRIX.findall(kernel.asm["ptx"]))
        usage = _cuobjdump(cubin, "--dump-resource-usage")
        registers, frame, local = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
        stack = frame + local
        # Disassembly takes half a second, and without a stack and matrix products there is nothing to find in it.
        sass = _cuobjdump(cubin, "--dump-sass") if stack or in_ptx else ""
        touched, names = len(SASS_LOCAL_MEMORY.findall(sass)), SASS_MATRIX.findall(sass)
    else:
        text = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text).group(1))
        touched, names = len(AMD_LOCAL_MEMORY.findall(text)), ["MFMA"] * len(AMD_MATRIX.findall(text))
        in_ptx = None
    return {
        "registers": registers,
        "spilled_bytes": stack if touched else 0,
        "spill_instructions": touched,
        "shared_memory": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "warps": kernel.metadata.num_warps,
        "matrix_instructions": {name: names.count(name) for name in dict.fromkeys(names)},
        "matrix_instructions_ptx": in_ptx,
    }


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def occupancy(gpu: GPU, registers: int, shared_memory: int, warps: int, tensor_memory: int = 0) -> tuple[int, float]:
    """Blocks that one multiprocessor holds at a time, and its resident warps as a share of the most it can have.

    The rules of the CUDA toolkit's occupancy calculator (cuda_occupancy.h), which also fit AMD's units: a warp's registers lie
    in one of 4 sub-partitions, in whole allocation units, so of ``registers`` per thread

        warps = 4 * floor(registers of a sub-partition / roundup(registers * warp_size, unit))

    are possible; a block takes roundup(shared_memory + what is reserved, unit) of the shared memory and, on sm_100, its columns
    of tensor memory; the fewest of these and of the chip's own limits of warps and blocks decides. On AMD, scalar registers are
    left out.
    """
    warps_by_registers = SUB_PARTITIONS * (gpu.registers // _round_up(registers * gpu.warp_size, gpu.registers_unit))
    shared = _round_up(shared_memory + gpu.shared_reserved, gpu.shared_unit)
    if shared_memory > gpu.shared_per_block:
        return 0, 0.0
    limits = [gpu.blocks, gpu.warps // warps, warps_by_registers // warps]
    if shared:
        limits.append(gpu.shared // shared)
    if tensor_memory:
        limits.append(gpu.tensor_memory // tensor_memory)
    blocks = min(limits)
    return blocks, blocks * warps / gpu.warps


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
