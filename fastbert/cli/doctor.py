"""``fastbert doctor``: what this installation can do, and the reason for everything that it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import CommandResult, Say

if TYPE_CHECKING:
    from fastbert.build_report import ModuleBuild

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton")
OPENMP_LIBRARY = re.compile(r"lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")
# What the C++ kernels and the libraries below torch choose their code by.
_X86_FEATURES = "avx avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx512_fp16 avx_vnni"
_MATRIX_AND_ARM_FEATURES = "amx_tile amx_bf16 amx_int8 asimd bf16 sve"
SHOWN_CPU_FEATURES = (*_X86_FEATURES.split(), *_MATRIX_AND_ARM_FEATURES.split())


def doctor(say: Say) -> CommandResult:
    """Collects the report, says it for people, and returns it; missing parts are reported, never an error."""
    report = collect()
    for line in report_lines(report):
        say(line)
    return CommandResult(report)


def collect() -> dict[str, Any]:
    """Versions, CPU, GPUs, OpenMP runtimes, native builds and the backends of every op, JSON-ready."""
    # First the ops, with the native module and torch in the process: then the OpenMP runtimes are those of a training run.
    from fastbert.ops import backends

    return {
        "ops": backends.report(),
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "openmp_runtimes": openmp_runtimes(),
        "native_build": _native_build(),
        "matmul": _matmul(),
        "memory": _memory(),
    }


def _versions() -> dict[str, str | None]:
    import fastbert

    versions: dict[str, str | None] = {"fastbert": fastbert.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _cpu() -> dict[str, Any]:
    import torch

    from fastbert.ops import native

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, flags = _linux_cpu()
    return {
        "model": model or platform.processor() or platform.machine(),
        "features": [feature for feature in SHOWN_CPU_FEATURES if feature in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_set": native.instruction_set() if native.AVAILABLE else None,
        "supported_instruction_sets": native.supported_instruction_sets() if native.AVAILABLE else [],
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
    }


def _linux_cpu(path: Path = Path("/proc/cpuinfo")) -> tuple[str | None, frozenset[str]]:
    """The model name and the feature flags of the first processor; nothing where there is no /proc."""
    if not path.is_file():
        return None, frozenset()
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields.get("model name"), frozenset((fields.get("flags") or fields.get("Features") or "").split())


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return gpus


def openmp_runtimes(maps: Path = Path("/proc/self/maps")) -> list[str] | None:
    """The OpenMP libraries that this process has loaded, by path; more than one wait for each other. None off Linux."""
    if not maps.is_file():
        return None
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text(encoding="utf-8").splitlines() if line.count("/")}
    return sorted(path for path in paths if OPENMP_LIBRARY.search(path))


def _native_build() -> dict[str, Any]:
    from fastbert.build_report import read_build_report

    report = read_build_report()
    if report is None:
        return {"reason": "never built: install the package (pip install -e .)", "modules": {}}
    modules = {
        name: {
            "built": build.built,
            "reason": build.reason,
            "compiler": build.compiler,
            "seconds": build.seconds,
            "kernels": _kernels(build),
        }
        for name, build in report.modules.items()
    }
    return {"reason": None, "modules": modules}


def _kernels(build: ModuleBuild) -> dict[str, Any] | None:
    """What the build report says of the GPU kernels, in short; None of a module without."""
    if not build.kernels:
        return None
    return {
        "compiled": len(build.kernels),
        "architectures": build.architectures,
        "most_registers": max(build.kernels, key=lambda kernel: kernel["registers"]),
        "spilling": build.spilling,
        "warnings": build.warnings,
    }


def _matmul() -> dict[str, Any]:
    """Which library multiplies what, and the rates that decided it; measured now where it has not been yet."""
    from fastbert.ops import calibration
    from fastbert.ops import linear as products

    if (reason := products.onednn_unavailable_reason()) is not None:
        return {"not_measured": f"there is nothing to choose from: {reason}", "file": None, "flops_per_s": {}}
    if not calibration.is_on():
        return {"not_measured": "FASTBERT_CALIBRATION=off: every product takes its default", "file": None, "flops_per_s": {}}
    products.calibrate()
    path = str(calibration.cache_file())
    # Not Path.is_file, which raises where the cache is in a folder of somebody else's.
    return {"not_measured": None, "file": path if os.path.isfile(path) else None, "flops_per_s": calibration.known()}


def _memory() -> dict[str, Any]:
    """Bytes per second to a new tensor of 64 MB and to the same again, and what helps where they differ."""
    from fastbert.runs import memory

    fresh, again = memory.fresh_page_seconds()
    return {"fresh_bytes_per_s": 2**26 / fresh, "used_bytes_per_s": 2**26 / again, "advice": memory.advice()}


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    cpu, versions = report["cpu"], report["versions"]
    lines = ["Versions", *(f"  {name:<14}{version or 'not installed'}" for name, version in versions.items())]
    lines += [
        "CPU",
        f"  {cpu['model']}, {cpu['cores']} cores, {cpu['torch_threads']} threads in torch",
        f"  features: {' '.join(cpu['features']) or 'unknown'} (torch uses {cpu['torch_capability']})",
        *_instruction_set_lines(cpu),
    ]
    gpus = [f"  {g['name']}, compute capability {g['compute_capability']}, {g['memory_gib']} GiB" for g in report["gpus"]]
    lines += ["GPUs", *(gpus or ["  none that torch can use"])]
    lines += ["OpenMP runtimes in the process", *_openmp_lines(report["openmp_runtimes"])]
    lines += ["Native builds", *_build_lines(report["native_build"])]
    title = "Matmuls on the CPU, GFLOP/s, the fastest first; fastbert's is taken where it is nearly that"
    lines += [title, *_matmul_lines(report["matmul"])]
    lines += ["Memory", *_memory_lines(report["memory"])]
    lines += ["Backends"]
    for name, state in report["ops"]["backends"].items():
        lines.append(f"  {name:<12}{'available' if state['available'] else 'not available: ' + state['reason']}")
    lines += ["What each op runs on"]
    for op, devices in report["ops"]["ops"].items():
        for device_type, choice in devices.items():
            lines += _op_lines(op, device_type, choice)
    lines += ["Measured on GPUs to be faster than these, and so picked", *(f"  {entry}" for entry in report["ops"]["measured"])]
    return lines if report["ops"]["measured"] else [*lines, "  nothing yet"]


def _instruction_set_lines(cpu: dict[str, Any]) -> list[str]:
    used, supported = cpu["instruction_set"], cpu["supported_instruction_sets"]
    if used is None:
        return []
    slower = "" if used == supported[-1] else f", forced by FASTBERT_CPU_ISA; {supported[-1]} would be the fastest here"
    lines = [f"  the C++ kernels use {used}{slower}"]
    if {"amx_tile", "amx_bf16", "amx_int8"} <= set(cpu["features"]) and "avx512_amx" not in supported:
        lines.append(
            "  not avx512_amx, though the CPU has it: the system does not let this process use its tiles (Linux does from 5.16), "
            "or the compiler knew no flags for it"
        )
    return lines


def _openmp_lines(runtimes: list[str] | None) -> list[str]:
    if runtimes is None:
        return ["  unknown (this system has no /proc)"]
    lines = [f"  {path}" for path in runtimes] or ["  none"]
    if len(runtimes) > 1:
        lines.append("  more than one: their threads wait for each other and everything is slower")
    return lines


def _build_lines(build: dict[str, Any]) -> list[str]:
    if build["reason"]:
        return [f"  {build['reason']}"]
    lines = []
    for name, module in build["modules"].items():
        state = "built" if module["built"] else f"not built: {module['reason']}"
        compiler = f" ({module['compiler']}, {module['seconds']:.0f} s)" if module["compiler"] else ""
        lines.append(f"  {name:<12}{state}{compiler}")
        if module["kernels"]:
            lines += [f"  {'':<12}{line}" for line in _kernel_lines(module["kernels"])]
    return lines


def _kernel_lines(kernels: dict[str, Any]) -> list[str]:
    def named(kernel: dict[str, Any]) -> str:
        return f"{kernel['source']} {kernel['kernel']} for {kernel['architecture']}"

    most, archs = kernels["most_registers"], ", ".join(kernels["architectures"])
    lines = [
        f"{kernels['compiled']} kernels for {archs}, {len(kernels['spilling'])} of them spill registers; "
        f"most registers: {most['registers']}, {named(most)}"
    ]
    lines += [f"spills {max(k['stack_bytes'], k['spill_store_bytes'])} bytes: {named(k)}" for k in kernels["spilling"]]
    return lines + kernels["warnings"]


def _matmul_lines(matmul: dict[str, Any]) -> list[str]:
    if matmul["not_measured"]:
        return [f"  not measured: {matmul['not_measured']}"]
    lines = []
    for kind, rates in matmul["flops_per_s"].items():
        lines.append(f"  {kind:<30}{', '.join(f'{name} {rate / 1e9:,.0f}' for name, rate in rates.items())}")
    return [
        *lines,
        f"  kept in {matmul['file']}" if matmul["file"] else "  kept for this process only: the cache folder cannot be written",
    ]


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    fresh, used = memory["fresh_bytes_per_s"] / 1e9, memory["used_bytes_per_s"] / 1e9
    lines = [f"  {fresh:,.1f} GB/s into a new tensor of 64 MB, {used:,.1f} GB/s into one that was written before"]
    if memory["advice"]:
        lines.append(f"  training steps on the CPU reuse their memory with {memory['advice']} (fastbert pretrain does so itself)")
    return lines


def _op_lines(op: str, device_type: str, choice: dict[str, Any]) -> list[str]:
    by_backend: dict[str, list[str]] = {}
    for dtype, backend in choice["auto"].items():
        by_backend.setdefault(backend, []).append(dtype)
    picked = "; ".join(f"{backend} ({', '.join(dtypes)})" for backend, dtypes in by_backend.items())
    lines = [f"  {op} on {device_type}: {picked}"]
    lines += [f"      not {backend}: {'; '.join(reasons)}" for backend, reasons in choice["not_picked"].items()]
    return lines
