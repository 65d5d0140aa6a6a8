"""The GPUs that kernels can be compiled for on a machine without them, and what one of their multiprocessors holds.

Nothing here imports torch or Triton, so the command line can list them at once.

Sources: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the allocation units of
the toolkit's ``cuda_occupancy.h``; AMD, CDNA 3 instruction set guide, and LLVM's "User Guide for AMDGPU Backend".
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class GPU:
    """``backend``, ``arch`` and ``warp_size`` are Triton's; the rest are limits of one multiprocessor (AMD: compute unit).

    Shared memory in bytes: ``shared_per_block``, what one block may ask for; ``shared``, what all blocks share; each block
    takes ``shared_reserved`` bytes more than it asks for, in units of ``shared_unit``. ``warps``, ``blocks``: that may be
    resident. ``registers``: 32-bit registers of each of the 4 sub-partitions (AMD: SIMDs; 512 vector registers per lane),
    given to warps in units of ``registers_unit``. ``tensor_memory``: columns (of 128 lanes of 32 bits), in powers of two.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_per_block: int
    shared: int
    shared_reserved: int
    shared_unit: int
    warps: int
    blocks: int
    registers: int
    registers_unit: int
    tensor_memory: int = 0


SUB_PARTITIONS = 4


def _nvidia(arch: int, shared: int, warps: int, blocks: int, tensor_memory: int = 0) -> GPU:
    registers = 65536 // SUB_PARTITIONS
    return GPU("cuda", arch, 32, (shared - 1) * KIB, shared * KIB, KIB, 128, warps, blocks, registers, 256, tensor_memory)


GPUS = {
    "sm_80": _nvidia(80, 164, warps=64, blocks=32),  # A100
    "sm_86": _nvidia(86, 100, warps=48, blocks=16),  # A10, RTX 30
    "sm_89": _nvidia(89, 100, warps=48, blocks=24),  # L4, L40, RTX 40
    "sm_90": _nvidia(90, 228, warps=64, blocks=32),  # H100, H200
    "sm_100": _nvidia(100, 228, warps=64, blocks=32, tensor_memory=512),  # B200
    "sm_120": _nvidia(120, 100, warps=48, blocks=24),  # RTX 50
    "gfx942": GPU("hip", "gfx942", 64, 64 * KIB, 64 * KIB, 0, 512, 32, 16, 512 * 64, 8 * 64),  # MI300
}
