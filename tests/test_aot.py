"""What the compiler makes of the Triton kernels for GPUs that are not here: no spills, enough memory, matrix units in use."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.gpus import GPUS
from fastbert.ops import backends

from .conftest import REPOSITORY

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64") or importlib.util.find_spec("triton") is None,
    reason="Triton compiles on Linux/x86-64 only, where it is installed",
)
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
# Registers are allocated by the compiler that comes with Triton, and the kernels are tuned with that of this one.
TUNED_WITH = (3, 9)


def run_compiling(command: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in the repository with a Triton that compiles: the tests' own one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    done = run_compiling(
        ["-m", "benchmarks.aot", "--backends", "triton", "--quick", "--targets", *TARGETS], tmp_path_factory.mktemp("cache")
    )
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (1 if document["failures"] else 0)
    return document


@pytest.mark.timeout(900)  # the fixture's: some 100 seconds of one core
def test_shared_memory_suffices(report):
    assert [failure for failure in report["failures"] if "spills" not in failure] == []
    for kernel in report["kernels"]:
        assert kernel["shared_memory"] <= GPUS[kernel["target"]].shared_per_block, kernel
        assert kernel["blocks_per_multiprocessor"] >= 1, kernel


@pytest.mark.timeout(900)
def test_nothing_spills(report):
    version = report["triton"]
    if tuple(int(part) for part in version.split(".")[:2]) < TUNED_WITH:
        pytest.skip(
            f"the compiler of Triton {version} spills some bytes that the one of {TUNED_WITH} does not: benchmarks.aot shows them"
        )
    assert report["failures"] == []
    assert [kernel for kernel in report["kernels"] if kernel["spilled_bytes"]] == []


def test_every_op_is_there_for_every_target(report):
    compiled = {(kernel["target"], *kernel["case"].split()[:2]) for kernel in report["kernels"]}
    for op in (*backends.OPS, *backends.MIXED_OPS):
        for direction in ("forward", "backward"):
            assert {(target, op, direction) for target in TARGETS} <= compiled


@pytest.mark.parametrize(
    ("target", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "MFMA")]
)
def test_attention_is_made_of_the_targets_own_matrix_instructions(report, target, instruction):
    kernels = [k for k in report["kernels"] if k["target"] == target and k["kernel"].startswith("attention")]
    assert len(kernels) >= 3
    for kernel in kernels:
        assert set(kernel["matrix_instructions"]) == {instruction}, kernel


SPILLING = """
import json
import triton
import triton.language as tl
from triton.compiler import ASTSource
from benchmarks.compiled import resources
from fastbert.ops.offline import target_of


@triton.jit
def reversed_kernel(x_ptr, y_ptr):
    places = tl.arange(0, 4096)
    x = tl.load(x_ptr + places)
    tl.debug_barrier()
    tl.store(y_ptr + places, x + tl.sum(x, 0))


source = ASTSource(reversed_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {})
for options in ({"num_warps": 1, "maxnreg": 40}, {"num_warps": 8}):
    facts = resources(triton.compile(source, target=target_of("sm_90"), options=options))
    print(json.dumps(facts))
"""


def test_a_kernel_that_spills_is_seen(tmp_path):
    (tmp_path / "spilling.py").write_text(SPILLING, encoding="utf-8")
    done = run_compiling(["-c", f"import runpy; runpy.run_path({str(tmp_path / 'spilling.py')!r})"], tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    spilling, fitting = (json.loads(line) for line in done.stdout.splitlines())
    assert spilling["registers"] <= 40 and spilling["spilled_bytes"] > 0 and spilling["spill_instructions"] > 0
    assert fitting["spilled_bytes"] == 0 and fitting["spill_instructions"] == 0


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "warps", "tensor", "blocks", "warps_resident"),
    [
        # 128 registers: 4,096 a warp, 4 warps in each sub-partition's 16,384.
        ("sm_90", 128, 0, 4, 0, 4, 16),
        # 40 registers: 1,280 a warp, 12 in each sub-partition: 48 warps.
        ("sm_90", 40, 0, 4, 0, 12, 48),
        # 255 registers: 8,192 a warp, 2 in each sub-partition: a block of 16 warps does not fit.
        ("sm_80", 255, 0, 16, 0, 0, 0),
        # Few registers: the limit is 64 warps (sm_90), 48 warps (sm_89), 32 blocks of one warp.
        ("sm_90", 16, 0, 8, 0, 8, 64),
        ("sm_89", 16, 0, 8, 0, 6, 48),
        ("sm_90", 16, 0, 1, 0, 32, 32),
        # 113 KiB + 1 KiB reserved twice are 228 KiB; a byte more is a unit of 128 bytes more.
        ("sm_90", 32, 113 * 1024, 4, 0, 2, 8),
        ("sm_90", 32, 113 * 1024 + 1, 4, 0, 1, 4),
        ("sm_90", 32, 228 * 1024, 4, 0, 0, 0),
        # 256 of 512 columns of tensor memory.
        ("sm_100", 32, 0, 4, 256, 2, 8),
        # 261 vector registers are 264: one wave per SIMD. 64: 8 waves.
        ("gfx942", 261, 0, 4, 0, 1, 4),
        ("gfx942", 64, 0, 4, 0, 8, 32),
        ("gfx942", 64, 40960, 4, 0, 1, 4),
    ],
)
def test_occupancy(gpu, registers, shared, warps, tensor, blocks, warps_resident):
    from benchmarks.compiled import occupancy

    assert occupancy(GPUS[gpu], registers, shared, warps, tensor) == (blocks, warps_resident / GPUS[gpu].warps)
