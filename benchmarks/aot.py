"""Compiles every Triton kernel for GPUs that need not be there, and shows what the compiler made of it, and of those in CUDA C++.

    python -m benchmarks.aot [--targets sm_80 sm_90 sm_100 gfx942] [--backends triton cuda] [--quick] [--jobs N]

Triton: all ops that have a kernel, forward and backward, over dtypes, widths, dropout and sequence lengths; a kernel that several
of these share stands there once, for the first. Per kernel: registers and spilled bytes per thread, shared memory per block, blocks
that a multiprocessor holds and the share of its warps that they fill (``compiled.py``), matrix instructions in the machine code;
and the least FLOPs and bytes of the whole op on a batch of 16,384 tokens (``work.py``). CUDA: the kernels of the installed module,
as its build report and its machine code show them; dynamic shared memory is not in it. Exits with 1 where a kernel spills, needs
more shared memory than a block may have, or does not compile. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from tqdm import tqdm

from fastbert.build_report import REPORT_PATH, read_build_report
from fastbert.cli.warmup import available_cores
from fastbert.gpus import GPU, GPUS
from fastbert.ops.launches import DIRECTIONS, DTYPES, Case, has_kernel
from fastbert.ops.offline import Kernel, compile_kernel, compiler_processes, in_parallel, kernels_of, target_name, target_of

from .compiled import module_resources, occupancy, resources
from .work import Work, work

BACKENDS = ("triton", "cuda")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (32, 64, 80, 96, 128)
NUM_HEADS = 12
LENGTHS = (128, 256, 512, 2048)
HIDDEN_SIZES = (256, 768, 1024)
# One vocabulary that 16 divides and BERT's own, which it does not.
VOCABULARIES = (30522, 30528)
POSITIONS, TOKEN_TYPES = 512, 2
BATCH_TOKENS, LABELLED_ROWS = 16384, 2458
TITLE_WIDTH = 118


def cases(quick: bool) -> Iterator[Case]:
    """Every shipped configuration, or BERT-base's in bfloat16."""
    for dtype in ("bfloat16",) if quick else DTYPES:
        for op, shape in _shapes(quick):
            if has_kernel(op):
                for direction in DIRECTIONS:
                    yield Case(op, direction, dtype, shape)


def _shapes(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for dropout_p in (0.1,) if quick else (0.1, 0.0):
        for head_dim in (64,) if quick else HEAD_DIMS:
            for length in LENGTHS:
                yield "attention", {"num_heads": NUM_HEADS, "head_dim": head_dim, "dropout_p": dropout_p, "lengths": (length,)}
        for hidden in (768,) if quick else HIDDEN_SIZES:
            yield "add_layer_norm", {"hidden": hidden, "dropout_p": dropout_p}
            yield "add_layer_norm_mixed", {"hidden": hidden, "dropout_p": dropout_p}
            tables = (VOCABULARIES[0], POSITIONS, TOKEN_TYPES)
            yield "embedding_layer_norm", {"hidden": hidden, "tables": tables, "dropout_p": dropout_p}
    for hidden in (768,) if quick else HIDDEN_SIZES:
        for recompute in (False,) if quick else (False, True):
            yield "linear_gelu", {"in_features": hidden, "out_features": 4 * hidden, "recompute": recompute}
        yield "gelu_layer_norm", {"hidden": hidden}
    for vocabulary in VOCABULARIES[:1] if quick else VOCABULARIES:
        yield "mlm_loss", {"vocabulary": vocabulary}


def least_work(case: Case) -> Work:
    """FLOPs and bytes of the case's op on a batch; of ``mlm_loss`` what lies between its matmuls: a pass over the logits."""
    shape = dict(case.shape)
    element_size = DTYPES[case.dtype].itemsize
    if case.op == "mlm_loss":
        passes = 1 if case.direction == "forward" else 2
        return Work(0, passes * LABELLED_ROWS * shape["vocabulary"] * element_size)
    shape.pop("recompute", None)
    if "dropout_p" in shape:
        dropout_p = shape.pop("dropout_p")
        if case.op != "embedding_layer_norm":
            shape["dropout"] = dropout_p > 0.0
    if case.op == "attention":
        length = max(shape["lengths"])
        shape["lengths"] = (length,) * (BATCH_TOKENS // length)
    else:
        shape["rows"] = LABELLED_ROWS if case.op == "gelu_layer_norm" else BATCH_TOKENS
    if case.op == "embedding_layer_norm":
        shape["vocabulary"] = shape.pop("tables")[0]
    return work(case.op, case.direction, element_size=element_size, **shape)


def _list_kernels(task: tuple[Case, str]) -> list[Kernel]:
    case, target = task
    return kernels_of(case, target_of(target))


def _row(kernel: Kernel) -> dict[str, Any]:
    """A row of the table, with ``"failures"``: what is wrong with the kernel."""
    target, required = target_name(kernel.target), least_work(kernel.case)
    row = {
        "target": target,
        "kernel": kernel.name,
        "case": str(kernel.case),
        "op_flops": required.flops,
        "op_bytes": required.bytes,
    }
    try:
        binary, _ = compile_kernel(kernel)
    except Exception as error:  # a compiler fails in many ways; the rest of the table is still wanted
        return {**row, "failures": [f"does not compile: {type(error).__name__}: {error}"]}
    return {**row, **_fit(resources(binary), GPUS[target])}


def _fit(facts: dict[str, Any], gpu: GPU) -> dict[str, Any]:
    """The facts with how many blocks a multiprocessor holds, and what is wrong with the kernel."""
    failures = []
    blocks, share = occupancy(gpu, *(facts[name] for name in ("registers", "shared_memory", "warps", "tensor_memory")))
    if facts["spilled_bytes"]:
        failures.append(f"spills {facts['spilled_bytes']} bytes ({facts['spill_instructions']} instructions)")
    if facts["shared_memory"] > gpu.shared_per_block:
        failures.append(f"needs {facts['shared_memory']} bytes of shared memory, a block may have {gpu.shared_per_block}")
    elif blocks < 1:
        failures.append(
            f"a multiprocessor cannot hold a block of {facts['warps']} warps with {facts['registers']} registers a thread"
        )
    return {**facts, "blocks_per_multiprocessor": blocks, "share_of_warps": round(share, 4), "failures": failures}


def cuda_rows(targets: Sequence[str] = tuple(GPUS)) -> list[dict[str, Any]]:
    """A row per kernel and architecture of the CUDA module in this installation; RuntimeError, with the reason, where it has none.

    It needs what the build report has of the very same build: names, and the spills that ptxas counted.
    """
    report = read_build_report()
    build = report.modules.get("_cuda") if report else None
    if build is None or not build.built:
        raise RuntimeError(build.reason if build else "fastbert._cuda was never built: install the package (pip install -e .)")
    module = REPORT_PATH.with_name(f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}")
    found, rows = module_resources(module), []
    if found.keys() != {(kernel["symbol"], kernel["architecture"]) for kernel in build.kernels}:
        raise RuntimeError(f"{REPORT_PATH} and {module} are not of the same build: install the package anew (pip install -e .)")
    for kernel in build.kernels:
        target = kernel["architecture"].rstrip("af")
        if target in targets:
            facts = found[kernel["symbol"], kernel["architecture"]]
            facts["spilled_bytes"] = max(facts["spilled_bytes"], kernel["spill_store_bytes"], kernel["spill_load_bytes"])
            facts["shared_memory"] = kernel["shared_bytes"]
            names = {"target": target, "kernel": f"{kernel['source']}.{kernel['kernel']}", "case": f"cuda {kernel['source']}"}
            rows.append({**names, **_fit(facts, GPUS[target])})
    return sorted(rows, key=lambda row: targets.index(row["target"]))


def compile_all(targets: list[str], quick: bool, jobs: int) -> list[dict[str, Any]]:
    """A row per kernel, in the order of targets and cases."""
    tasks = [(case, target) for target in targets for case in cases(quick)]
    with compiler_processes(jobs) as pool:
        listed = [kernel for kernels in pool.map(_list_kernels, tasks) for kernel in kernels]
        kernels: dict[tuple[Any, str, str], Kernel] = {}
        for kernel in listed:
            kernels.setdefault((kernel.target, kernel.name, kernel.key), kernel)
        rows = list(tqdm(in_parallel(_row, kernels.values(), pool), total=len(kernels), unit="kernel", disable=None))
    places = {(target_name(kernel.target), kernel.name, str(kernel.case)): place for place, kernel in enumerate(listed)}
    return sorted(rows, key=lambda row: places[row["target"], row["kernel"], row["case"]])


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = ("regs", 5), ("spilled", 8), ("shared", 8), ("blocks", 7), ("warps", 7), ("matrix", 14), ("GFLOP", 8), ("MB", 6)
    print(f"{'target':<8}{'case: kernel':<{TITLE_WIDTH}}" + "".join(f"{name:>{width}}" for name, width in columns))
    for row in rows:
        start = f"{row['target']:<8}{row['case'] + ': ' + row['kernel'].partition('.')[2].strip('_'):<{TITLE_WIDTH}}"
        if "registers" not in row:
            print(f"{start} does not compile")
            continue
        facts = (
            row["registers"],
            row["spilled_bytes"],
            row["shared_memory"],
            row["blocks_per_multiprocessor"],
            f"{row['share_of_warps']:.0%}",
            " ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items()),
            f"{row['op_flops'] / 1e9:.1f}" if "op_flops" in row else "",
            f"{row['op_bytes'] / 1e6:.0f}" if "op_bytes" in row else "",
        )
        print(start + "".join(f"{fact:>{width}}" for fact, (_, width) in zip(facts, columns, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=GPUS, default=list(TARGETS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--quick", action="store_true", help="Triton's kernels for bfloat16 and BERT-base's shapes only")
    parser.add_argument("--jobs", type=int, default=available_cores(), help="processes that compile (default: one per core)")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")

    begin = time.perf_counter()
    rows = compile_all(arguments.targets, arguments.quick, arguments.jobs) if "triton" in arguments.backends else []
    if "cuda" in arguments.backends:
        try:
            rows += cuda_rows(arguments.targets)
        except RuntimeError as error:
            print(f"CUDA C++: {error}", file=sys.stderr)
    seconds = time.perf_counter() - begin
    print_table(rows)
    failures = [f"{row['target']} {row['kernel']}: {row['case']}: {failure}" for row in rows for failure in row["failures"]]
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(rows)} kernels, {len(failures)} of them in trouble, {seconds:.0f} s with {arguments.jobs} processes")
    document = {"benchmark": "aot", "torch": torch.__version__, "triton": triton.__version__, "quick": arguments.quick}
    print(json.dumps({**document, "seconds": round(seconds, 1), "kernels": rows, "failures": failures}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
