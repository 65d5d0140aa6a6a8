"""What nvcc made of csrc/cuda in this installation: a kernel for every architecture, no spills, room on the chip, wgmma on Hopper.

The installation compiled it: here its build report and the machine code of its module are looked at. (The time that takes is in the
report; three minutes on two cores are the limit, which no test watches, since it would measure the machine.)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import runpy
import subprocess
from typing import Any

import pytest

from benchmarks.gpu import find_cuda_tool
from fastbert.build_report import REPORT_PATH, ModuleBuild, read_build_report
from fastbert.gpus import GPUS

from .conftest import REPOSITORY

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
SOURCES = REPOSITORY / "csrc" / "cuda"


@pytest.fixture(scope="module")
def build() -> ModuleBuild:
    """The build of fastbert._cuda; skips where there is no nvcc, fails where there is and the module is none of these sources."""
    report = read_build_report()
    found = report.modules.get("_cuda") if report else None
    if find_cuda_tool("nvcc") is None or os.environ.get("FASTBERT_CUDA") == "0":
        pytest.skip((found and found.reason) or "there is no nvcc")
    assert found is not None and found.built, f"there is nvcc, but no module: {found and found.reason}\n{found and found.output}"
    sources = [REPOSITORY / "setup.py", REPOSITORY / "csrc" / "fastbert.h", *SOURCES.iterdir()]
    changed = [path for path in sources if path.stat().st_mtime > REPORT_PATH.stat().st_mtime]
    assert not changed, f"the module was built before {', '.join(p.name for p in changed)} changed: pip install -e ."
    return found


@pytest.fixture(scope="module")
def rows(build, tmp_path_factory) -> list[dict[str, Any]]:
    """A row per kernel and architecture, as ``python -m benchmarks.aot`` shows them; made once for all of xdist's workers."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    from filelock import FileLock

    from benchmarks.aot import cuda_rows

    base = tmp_path_factory.getbasetemp()
    file = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_rows.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(cuda_rows()), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_source_is_built_for_every_architecture(build):
    if build.requested_archs:
        pytest.skip(f"it was built with FASTBERT_CUDA_ARCHS={build.requested_archs}")
    known = subprocess.run([find_cuda_tool("nvcc"), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = {architecture for architecture in ARCHITECTURES if architecture.rstrip("a") in known}
    sources = {path.stem for path in SOURCES.glob("*.cu") if "__global__" in path.read_text(encoding="utf-8")}
    assert {(kernel["source"], kernel["architecture"]) for kernel in build.kernels} == {(s, a) for s in sources for a in wanted}


def test_the_lowest_architecture_is_there_for_newer_gpus(monkeypatch):
    """As PTX, in whatever order they were asked for."""
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    flags = runpy.run_path(str(REPOSITORY / "setup.py"))["cuda_arch_flags"]
    monkeypatch.setitem(flags.__globals__, "run_command", lambda command: "")
    monkeypatch.setenv("FASTBERT_CUDA_ARCHS", "100;90a,80")
    assert [flag.rpartition("code=")[2] for flag in flags("nvcc")] == ["[sm_80,compute_80]", "sm_90a", "sm_100"]


def test_nothing_spills(build):
    assert build.spilling == []


SPILLING = """
template <int kCount>
__global__ void __launch_bounds__(1024, 2) sums(const float* x, float* y) {
  float held[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) held[i] = x[i * blockDim.x + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[(kCount - 1 - i) * blockDim.x + threadIdx.x] = held[i];
}
template __global__ void sums<8>(const float*, float*);
template __global__ void sums<128>(const float*, float*);
"""


def test_a_kernel_that_spills_is_seen(build, tmp_path, monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    steps = runpy.run_path(str(REPOSITORY / "setup.py"))
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING, encoding="utf-8")
    command = [steps["find_nvcc"](), *steps["CUDA_FLAGS"], *steps["PTXAS_FLAGS"], "-gencode=arch=compute_80,code=sm_80"]
    printed = steps["run_command"]([*command, "-c", str(source), "-o", str(tmp_path / "spilling.o")])
    kernels = steps["with_readable_names"](steps["ptxas_kernels"]("spilling", printed))
    spilling = dataclasses.replace(build, kernels=kernels).spilling
    assert {kernel["kernel"] for kernel in kernels} == {"sums<8>", "sums<128>"}
    assert [kernel["kernel"] for kernel in spilling] == ["sums<128>"]
    assert spilling[0]["registers"] <= 32 and spilling[0]["spill_store_bytes"] > 0


def test_the_compilers_have_nothing_to_complain_of(build):
    """Where ptxas cannot keep wgmma instructions in flight it serializes them, and says so in a line of information."""
    assert build.warnings == []


def test_blocks_fit_a_multiprocessor(rows):
    """By registers, for the largest block that a kernel's launch bounds allow, and by static shared memory."""
    assert [(row["target"], row["kernel"], row["failures"]) for row in rows if row["failures"]] == []
    for row in rows:
        gpu = GPUS[row["target"]]
        assert row["registers"] * row["warps"] * gpu.warp_size <= 4 * gpu.registers, row
        assert row["blocks_per_multiprocessor"] >= 1, row


def test_report_and_machine_code_agree(build, rows):
    of_report = sorted((f"{k['source']}.{k['kernel']}", k["architecture"].rstrip("a"), k["registers"]) for k in build.kernels)
    assert sorted((row["kernel"], row["target"], row["registers"]) for row in rows) == of_report


@pytest.mark.parametrize(
    ("files", "target", "instruction"), [("attention_hopper*.cu", "sm_90", "HGMMA"), ("attention_streaming*.cu", "sm_80", "HMMA")]
)
def test_attention_is_made_of_matrix_instructions(rows, files, target, instruction):
    """wgmma on Hopper, mma.sync elsewhere: in each source, in both directions, and no others."""
    sources = {path.stem for path in SOURCES.glob(files) if "__global__" in path.read_text(encoding="utf-8")}
    if not sources:
        pytest.skip(f"there is no {files}")
    kernels = [row for row in rows if row["target"] == target and row["kernel"].partition(".")[0] in sources]
    multiplying = [row for row in kernels if row["matrix_instructions"]]
    assert {row["kernel"].partition(".")[0] for row in multiplying} == sources
    assert [row for row in multiplying if set(row["matrix_instructions"]) != {instruction}] == []
    for direction in ("forward", "backward"):
        assert any(direction in row["kernel"] for row in multiplying), direction
