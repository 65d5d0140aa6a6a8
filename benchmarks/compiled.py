"""What the compilers made of the kernels: registers, spills, matrix instructions, and how many blocks a multiprocessor holds.

Triton's one by one, those of CUDA C++ out of the module that nvcc built; both in machine code, by Triton's own cuobjdump.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from fastbert.gpus import GPU, SUB_PARTITIONS

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# mma.sync -> HMMA (up to sm_89, sm_120), wgmma -> HGMMA (sm_90), tcgen05.mma -> UTCHMMA (sm_100); MFMA on AMD.
PTX_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)")
SASS_MATRIX = re.compile(r"\b(HGMMA|UTC[A-Z]*MMA|[A-Z]MMA)\b")
SASS_LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")
SASS_PLACE = re.compile(r"\barch = (\w+)|\bFunction : (\S+)")
# Of a block in a kernel without launch bounds.
MOST_THREADS = 1024
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
        return _dump(Path(file.name), option)


def _dump(path: Path, option: str) -> str:
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


def module_resources(module: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(symbol, architecture) -> what :func:`resources` says of a Triton kernel, of all kernels in a module that nvcc built.

    Without ``shared_memory``, which cuobjdump gives with what the system reserves of it. ``warps``: of the largest block that the
    kernel's launch bounds allow. The module keeps no PTX of most architectures: ``matrix_instructions_ptx`` is None.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for architecture, usage in _by_architecture(_dump(module, "--dump-resource-usage")):
        for symbol, *figures in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage):
            registers, frame, local = map(int, figures)
            found[symbol, architecture] = {
                "registers": registers,
                "spilled_bytes": frame + local,
                "spill_instructions": 0,
                "tensor_memory": 0,
                "warps": MOST_THREADS // 32,
                "matrix_instructions": {},
                "matrix_instructions_ptx": None,
            }
    for architecture, elf in _by_architecture(_dump(module, "--dump-elf")):
        for part in elf.split("\n.nv.info.")[1:]:
            symbol, _, attributes = part.partition("\n.")[0].partition("\n")
            bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)", attributes)
            if bounds:
                found[symbol, architecture]["warps"] = math.prod(int(size, 16) for size in bounds.groups()) // 32
    for symbol, architecture, instruction in _instructions(module):
        facts = found[symbol, architecture]
        if SASS_LOCAL_MEMORY.fullmatch(instruction):
            facts["spill_instructions"] += 1
        else:
            facts["matrix_instructions"][instruction] = facts["matrix_instructions"].get(instruction, 0) + 1
    return found


def _by_architecture(dump: str) -> Iterator[tuple[str, str]]:
    _, *parts = re.split(r"^arch = (\w+)$", dump, flags=re.MULTILINE)
    yield from zip(parts[::2], parts[1::2])


def _instructions(module: Path) -> Iterator[tuple[str, str, str]]:
    """(symbol, architecture, name) of each instruction of matrix units and of local memory; the text of all would fill a memory."""
    wanted = re.compile(f"{SASS_MATRIX.pattern}|{SASS_LOCAL_MEMORY.pattern}")
    symbol = architecture = ""
    with subprocess.Popen([CUOBJDUMP, "--dump-sass", module], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if ("arch = " in line or "Function : " in line) and (place := SASS_PLACE.search(line)):
                architecture, symbol = place.group(1) or architecture, place.group(2) or symbol
            elif ("MMA" in line or "LDL" in line or "STL" in line) and (instruction := wanted.search(line)):
                yield symbol, architecture, instruction.group()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)


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
