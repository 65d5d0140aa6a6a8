"""doctor reports what is there and why the rest is not, whatever the installation looks like."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

import fastbert
from fastbert.build_report import ModuleBuild
from fastbert.cli import doctor
from fastbert.cli.main import app
from fastbert.ops.backends import BACKENDS, INFERENCE_OPS, OPS


def test_json_and_text():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["versions"]["fastbert"] == fastbert.__version__
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["cpu"]["cores"] >= 1 and report["cpu"]["model"]
    assert set(report["ops"]["ops"]) == {*OPS, *INFERENCE_OPS} and set(report["ops"]["backends"]) == set(BACKENDS)
    for op in (*OPS, *INFERENCE_OPS):
        assert f"{op} on cpu" in result.stderr and f"{op} on cuda" in result.stderr


def test_reasons_are_shown():
    kernel = {"source": "rows", "kernel": "sum<float>", "stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0}
    of_two = [
        {**kernel, "architecture": "sm_80", "registers": 40},
        {**kernel, "architecture": "sm_90a", "registers": 32, "stack_bytes": 8, "spill_store_bytes": 16, "spill_load_bytes": 4},
    ]
    build = ModuleBuild(
        "_cuda", True, None, "nvcc", "", 9.0, None, of_two, ["ptxas info : (C7510) Potential Performance Loss: toy"]
    )
    report = {
        "ops": {
            "backends": {
                "reference": {"available": True, "reason": None},
                "native": {"available": False, "reason": "no compiler"},
            },
            "ops": {
                "attention": {
                    "cpu": {
                        "auto": {"float32": "reference", "bfloat16": "reference"},
                        "not_picked": {"native": ["no compiler"], "triton": ["it is for GPUs", "it is not installed"]},
                    }
                }
            },
            "measured": ["attention forward on sm_90: cuda"],
        },
        "versions": {"fastbert": "1.0", "triton": None},
        "cpu": {
            "model": "A",
            "features": ["amx_tile", "amx_bf16", "amx_int8"],
            "torch_capability": "DEFAULT",
            "cores": 2,
            "torch_threads": 2,
            "instruction_set": "avx2",
            "supported_instruction_sets": ["baseline", "avx2", "avx512"],
        },
        "gpus": [{"name": "B", "compute_capability": "9.0", "memory_gib": 139.8}],
        "openmp_runtimes": ["/lib/libgomp.so.1", "/lib/libiomp5.so"],
        "native_build": {
            "reason": None,
            "modules": {
                "_cpu": {"built": False, "reason": "no compiler", "compiler": None, "seconds": 0.0, "kernels": None},
                "_cuda": {"built": True, "reason": None, "compiler": "nvcc", "seconds": 9.0, "kernels": doctor._kernels(build)},
            },
        },
        "matmul": {
            "not_measured": None,
            "file": "/cache/matmul.json",
            "flops_per_s": {"dx, float32, many rows": {"onednn": 4.4e11, "torch": 2.1e11}},
        },
        "memory": {"fresh_bytes_per_s": 3e9, "used_bytes_per_s": 2e10, "advice": "A=1"},
    }
    text = "\n".join(doctor.report_lines(report))
    for expected in (
        "triton        not installed",
        "native      not available: no compiler",
        "_cpu        not built: no compiler",
        "2 kernels for sm_80, sm_90a, 1 of them spill registers; most registers: 40, rows sum<float> for sm_80",
        "spills 16 bytes: rows sum<float> for sm_90a",
        "Potential Performance Loss: toy",
        "attention on cpu: reference (float32, bfloat16)",
        "not triton: it is for GPUs; it is not installed",
        "the C++ kernels use avx2, forced by FASTBERT_CPU_ISA; avx512 would be the fastest here",
        "not avx512_amx, though the CPU has it: the system does not let",
        "more than one",
        "B, compute capability 9.0",
        "dx, float32, many rows        onednn 440, torch 210",
        "kept in /cache/matmul.json",
        "3.0 GB/s into a new tensor of 64 MB, 20.0 GB/s",
        "with A=1",
        "  attention forward on sm_90: cuda",
    ):
        assert expected in text


def test_openmp_runtimes_of_a_process(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 fe:00 123 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0\n"
        "7f01-7f02 r--p 00001000 fe:00 123 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0\n"
        "7f02-7f03 r-xp 00000000 fe:00 124 /home/my user/torch/lib/libgomp-a34b3233.so.1\n"
        "7f03-7f04 r-xp 00000000 fe:00 125 /lib/libc.so.6\n"
        "7f04-7f05 rw-p 00000000 00:00 0 [heap]\n"
        "7f05-7f06 rw-p 00000000 00:00 0\n",
        encoding="utf-8",
    )
    assert doctor.openmp_runtimes(maps) == [
        "/home/my user/torch/lib/libgomp-a34b3233.so.1",
        "/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0",
    ]
    assert doctor.openmp_runtimes(tmp_path / "none") is None


def test_cpu_features_come_from_the_first_processor(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: A\nflags\t\t: fpu avx2 fma\n\nmodel name\t: B\nflags\t: avx512f\n", encoding="utf-8")
    assert doctor._linux_cpu(cpuinfo) == ("A", {"fpu", "avx2", "fma"})
    assert doctor._linux_cpu(tmp_path / "none") == (None, frozenset())


def test_matmuls_are_measured_unless_that_is_off(tmp_path, monkeypatch):
    from fastbert.ops import calibration
    from fastbert.ops import linear as products

    assert "FASTBERT_CALIBRATION=off" in doctor._matmul()["not_measured"]
    monkeypatch.delenv("FASTBERT_CALIBRATION")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(products, "MEASURED_FLOPS", 0)
    monkeypatch.setattr(products, "_TIMED", {"few rows": (4, 8, 16), "many rows": (300, 8, 16)})
    report = doctor._matmul()
    assert len(report["flops_per_s"]) == 12 and report["file"].startswith(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("x" * 300)))  # as with a home that belongs to another user: OSError
    assert doctor._matmul() == {**report, "file": None}
    monkeypatch.setattr(products, "onednn_unavailable_reason", lambda: "there is none")
    assert "there is none" in doctor._matmul()["not_measured"]
