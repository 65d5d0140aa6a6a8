"""Documents as the suites write them, now and earlier, with figures that no machine made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MACHINE = {
    "cpu": "Abacus", "cores": 2, "threads": 2, "gpu": None, "python": "3.11", "torch": "2.13", "transformers": "5.23.0",
    "triton": None, "fastbert": "0.1.0", "commit": "abc1234", "backends": {},
}  # fmt: skip
CEILINGS = {"matmul_flops": 1e9, "matmul_flops_by_library": {"oneDNN": 1e9}, "copy_bytes": 1e8}
ENERGY = {"source": None, "reason": "no counters"}
WORK = {"flops": 10_000_000, "bytes": 500_000}
PEERS = {"fastbert": {"title": "fastbert", "version": "fastbert 0.1.0", "how": "fastbert.BertModel"}}
FLOORS = {"linear": 0.05, "attention": 0.01}
EQUAL = ("8 x 4", "4 x 8", "2 x 16", "1 x 32")  # 32 tokens each
# Seconds by contender and dtype.
SECONDS = {
    "transformers": {"float32": 0.4, "bfloat16": 0.3},
    "ONNX Runtime": {"float32": 0.2},
    "OpenVINO": {"bfloat16": 0.15, "int8": 0.05},
    "fastbert": {"float32": 0.1, "bfloat16": 0.08, "int8": 0.06},
}


def profile(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "seconds": 0.1, "parts": {"linear": 0.075, "outside": 0.025}, "operators": {}}


def spread(median: float) -> dict[str, float]:
    return {"median": median, "q25": 0.9 * median, "q75": 1.1 * median}


def timed(median: float, **more: Any) -> dict[str, Any]:
    return {"median_s": median, "q25_s": 0.9 * median, "q75_s": 1.1 * median, "rounds": 5, **more}


def figures(median: float) -> dict[str, Any]:
    """With all that a contender has today."""
    rates = {"tokens_per_s": 32 / median, "sequences_per_s": 4 / median}
    shares = {"share_of_matmul_rate": 0.01 / median, "share_of_limit": 0.02 / median}
    return timed(median, **rates, **shares, peak_bytes=int(1e9 * median), joules=None)


def inference(batches: tuple[str, ...] = ("4 x 8",), seconds: Mapping[str, Mapping[str, float]] = SECONDS) -> dict[str, Any]:
    times = {f"{title} {dtype}": s for title, by_dtype in seconds.items() for dtype, s in by_dtype.items()}
    contenders = {name: {**figures(s), "dtype": name.rsplit(" ", 1)[1]} for name, s in times.items()}
    paired = {
        name: {other: spread(s / times[name]) for other, s in times.items() if other != name}
        for name in times
        if name.startswith("fastbert")
    }
    first = times.get("transformers float32")
    baseline = {name: spread(first / s) for name, s in times.items() if first is not None and name != "transformers float32"}
    measured = {
        "sequences": 4, "tokens": 32, "padded_to": 8, "contenders": contenders, "ratios": paired, "baseline_ratios": baseline,
        "gemms_alone": {}, "failed": {"CTranslate2 float32": "RuntimeError: toy"},
        "work": dict.fromkeys(("float32", "bfloat16", "int8"), WORK),
    }  # fmt: skip
    return {
        "benchmark": "inference", "command": "fastbert bench --suite inference", "machine": MACHINE, "model": "base",
        "dtypes": ["float32", "bfloat16", "int8"], "ceilings": dict.fromkeys(("float32", "bfloat16", "int8"), CEILINGS),
        "energy": ENERGY, "peers": PEERS, "failed": {},
        "not_run": {"transformers int8": "not in int8 on cpu", "flash-attn's BERT": "not on cpu, only on cuda"},
        "results": {batch: measured for batch in batches}, "goals": [],
        "profile": {batch: {f"{name} float32": profile("float32") for name in ("transformers", "fastbert")} for batch in batches},
        "floors": {batch: {"float32": FLOORS} for batch in batches},
    }  # fmt: skip


def race(dtype: str, batch: str = "MNLI lengths, padded to 128") -> dict[str, Any]:
    """A document of ``python -m benchmarks.finetune`` without its name and command."""
    times = {"transformers": 0.8, "transformers padded to the longest, oneDNN": 0.4, "fastbert": 0.2, "fastbert packed": 0.16}
    measured = {
        "sequences": 4, "tokens": 32, "work": WORK, "failed": {"transformers compiled": "RuntimeError: toy"},
        "ratios": {name: spread(0.8 / s) for name, s in times.items() if name != "transformers"},
        "times_faster": {}, **{name: figures(s) for name, s in times.items()},
        "ratio": spread(4.0), "share_of_matmul_rate": 0.05,
    }  # fmt: skip
    return {
        "machine": MACHINE, "model": "base", "dtype": dtype, "ceilings": CEILINGS, "energy": ENERGY, "peers": PEERS,
        "not_run": {"transformers Liger": "not on cpu, only on cuda"}, "results": {batch: measured},
    }  # fmt: skip


def finetune() -> dict[str, Any]:
    runs = {dtype: race(dtype) for dtype in ("float32", "bfloat16")}
    return {
        "benchmark": "finetune", "command": "fastbert bench --suite finetune", "machine": MACHINE, "model": "base", "failed": {},
        "peers": PEERS, "not_run": {}, "runs": runs, "goals": [],
    }  # fmt: skip


def pretrain() -> dict[str, Any]:
    runs = {dtype: race(dtype, "16 x 128") for dtype in ("float32", "bfloat16")}
    return {**finetune(), "benchmark": "pretrain", "command": "fastbert bench --suite pretrain", "runs": runs}


def earliest_inference() -> dict[str, Any]:
    """Two contenders, one dtype, one ratio: what benchmarks/results/xeon-2-cores has."""
    measured = {
        "transformers": timed(0.4), "fastbert": timed(0.1), "ratio": spread(4.1), "share_of_matmul_rate": 0.7,
        "largest_difference": 0.0,
    }  # fmt: skip
    ceilings = {"matmul_flops": 1e9, "copy_bytes": 1e8}
    return {
        "benchmark": "inference", "command": "python -m benchmarks.inference", "machine": MACHINE, "size": "base",
        "dtype": "float32", "ceilings": ceilings, "results": {"4 x 8": measured},
    }  # fmt: skip


def earlier_inference() -> dict[str, Any]:
    """FLOPs without bytes; no rates, no memory, no limit."""
    document = inference()
    gone = ("tokens_per_s", "sequences_per_s", "share_of_limit", "peak_bytes", "joules")
    for measured in document["results"].values():
        for name in ("sequences", "tokens", "work"):
            del measured[name]
        measured["flops"] = 10_000_000
        measured["contenders"] = {n: {k: v for k, v in f.items() if k not in gone} for n, f in measured["contenders"].items()}
    shares = {"seconds": 0.1, "shares": {"gemm": 0.75, "outside": 0.25}, "operators": {}}
    document["profile"] = {batch: {"fastbert float32": shares} for batch in document["results"]}
    now = ("model", "energy", "peers", "floors")
    return {"size": "base", **{key: value for key, value in document.items() if key not in now}}


def earlier_race() -> dict[str, Any]:
    """Training with its memory under another name."""
    document = {"benchmark": "pretrain", "command": "python -m benchmarks.pretrain", "size": "mini", **race("float32")}
    for measured in document["results"].values():
        del measured["work"], measured["times_faster"]
        for figures_of_one in measured.values():
            if isinstance(figures_of_one, dict) and "median_s" in figures_of_one:
                figures_of_one["step_bytes"] = figures_of_one.pop("peak_bytes")
                del figures_of_one["share_of_limit"], figures_of_one["joules"]
    for name in ("model", "energy", "peers", "not_run"):
        del document[name]
    return {**document, "profile": {"16 x 128": {"seconds": 0.2, "shares": {"gemm": 0.5}, "operators": {}}}}


def ops() -> dict[str, Any]:
    """fastbert is twice as fast forward and slower backward."""
    case = {"op": "add_layer_norm", "case": "8 rows", "hidden": 64, "dropout_p": 0.1, "dtype": "bfloat16"}
    rates = {"flops_per_s": 0.0, "bytes_per_s": 2e9, "share_of_matmul_rate": 0.0, "share_of_ceiling": 0.5}
    seconds = {"fastbert native": (1e-4, 4e-4, 5e-4), "torch eager": (2e-4, 3e-4, 5e-4)}
    records = []
    for contender, times in seconds.items():
        for direction, time, ratio in zip(("forward", "backward", "both"), times, (2.0, 0.8, 1.0), strict=True):
            beside = {"fastbert_ratio": {"of": "fastbert native", **spread(ratio)}} if contender == "torch eager" else {}
            record = {**case, "contender": contender, "error": None, "extra_bytes": None, "direction": direction}
            records.append({**record, **timed(time), **rates, **beside})
    records += [
        {**case, "contender": "fastbert triton", "not_supported": "no CUDA device"},
        {**case, "contender": "torch.compile", "failed": "RuntimeError: toy"},
    ]
    return {
        "benchmark": "ops", "command": "fastbert bench --suite ops", "machine": MACHINE, "dtypes": ["bfloat16"], "scale": "toy",
        "ceilings": {"bfloat16": CEILINGS, "int8": CEILINGS}, "not_asked_for": ["torch-compile"], "failed": {}, "results": records,
    }  # fmt: skip
