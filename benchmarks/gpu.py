"""Tests and measures everything on a machine with an NVIDIA GPU, in under 9 minutes, without a network or an installation.

    python -m benchmarks.gpu [--budget 530]     # what `make gpu` runs
    python -m benchmarks.gpu --steps build tests ops    # those alone whose names begin so, into gpu-steps.json
    python -m benchmarks.gpu --rehearse         # every step at toy size on the CPU, into a temporary folder

Builds csrc in place for this GPU alone, runs the tests marked gpu, compute-sanitizer where it is there, and the benchmarks, each
step in a process of its own with a time limit: one that crashes or hangs takes no other with it. After each step the document
gpu.json is written anew, in the folder that the environment variable OUT names, else in benchmarks/results/<the GPU's name>; each
step's output is beside it in logs/. At the end a table of the steps and one of the goals, and the document as the last line of
stdout. Exit code 0 where nothing failed, 1 where something did or found no time, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbert.ops import backends, cuda

from . import goals, gpu_goals
from .harness import RESULTS, write_json
from .record_tests import summarized

REPOSITORY = Path(__file__).resolve().parent.parent
BUDGET_S = 530.0
# Less than this is too little for any step: its imports alone take up to 10 s.
SHORTEST_STEP_S = 15.0
TEST_PROCESSES = 15  # Triton's compiler is what tests wait for, on one core each
TEST_LIMIT_S = 60
MODEL_TOKENS = {"base": 32768, "large": 16384}  # of a pretraining batch with its padding
OK, FAILED, NOT_RUN, NOT_PRESENT = "ok", "failed", "not run", "not present"


@dataclass
class Step:
    """A command and its time limit. "{seconds}" in an argument becomes the time in which the command should end by itself.

    result: (stdout) -> what is kept in the document; default the JSON document that is stdout's last line. absent: why the step
    cannot run on this machine.
    """

    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] | None = None
    result: Callable[[str], Any] | None = None
    absent: str | None = None
    folder: Path = REPOSITORY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help=f"of all steps (default {BUDGET_S:.0f})")
    parser.add_argument("--rehearse", action="store_true", help="at toy size, on the CPU, into a temporary folder")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only those whose names begin so; machine always")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print("torch finds no CUDA device: --rehearse runs every step at toy size on the CPU", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the running step is ended too
    with tempfile.TemporaryDirectory() as scratch:
        steps = rehearsal_steps(Path(scratch)) if arguments.rehearse else gpu_steps(Path(scratch))
        if arguments.steps:
            unknown = [name for name in arguments.steps if not any(step.name.startswith(name) for step in steps)]
            if unknown:
                parser.error(f"no step begins with {', '.join(unknown)}; there are {', '.join(step.name for step in steps)}")
            steps = [step for step in steps if step.name.startswith(("machine", *arguments.steps))]
        name = "gpu-steps.json" if arguments.steps else "gpu.json"
        sys.exit(run_all(steps, arguments.budget, arguments.rehearse, Path(scratch), name))


def run_all(steps: list[Step], budget_s: float, rehearse: bool, scratch: Path, name: str = "gpu.json") -> int:
    """Runs the steps in order; returns the exit code. ``scratch`` is gone afterwards; a rehearsal leaves nothing elsewhere. name:
    of the document."""
    deadline = time.monotonic() + budget_s
    folder = scratch / "results" if rehearse else results_folder()
    document: dict[str, Any] = {
        "benchmark": "gpu",
        "rehearsal": rehearse,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "budget_s": budget_s,
        "machine": None,
        "ceilings": None,
        "goals": [],
        "steps": {},
    }
    for step in steps:
        remaining = deadline - time.monotonic()
        record = run_step(step, remaining, import_path(), folder / "logs")
        document["steps"][step.name] = record
        if step.name == "machine" and record["status"] == OK:
            document |= record["result"]
        results = {name: done["result"] for name, done in document["steps"].items() if done["result"]}
        document["goals"] = goals.compare(gpu_goals.GOALS, gpu_goals.Measurements(results))
        document["seconds"] = round(budget_s - (deadline - time.monotonic()), 1)
        write_json(folder / name, document)
        print(f"{step.name:<28}{record['status']:<13}{record['seconds']:>7.1f} s  {note(record)}", file=sys.stderr, flush=True)
    print(steps_table(document))
    print()
    print(goals.table(document["goals"], "goal on one H200"))
    print(json.dumps(document))
    return 1 if any(record["status"] in (FAILED, NOT_RUN) for record in document["steps"].values()) else 0


# --- the steps -----------------------------------------------------------------------------------------------------------


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def benchmark(name: str, *arguments: str) -> list[str]:
    return python("-m", f"benchmarks.{name}", *arguments)


def gpu_steps(scratch: Path) -> list[Step]:
    """Limits are generous, their sum exceeds the budget: building and testing leave the benchmarks 205 s at the least, and what
    matters less comes last."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    sanitizer = find_cuda_tool("compute-sanitizer")
    bfloat16 = ("--dtype", "bfloat16")
    steps = [
        Step("machine", benchmark("machine", *bfloat16), 40),
        build_step(architecture, scratch),
        test_step(scratch, ["tests/ops", "tests/model", "tests/train"], TEST_PROCESSES, 135),
        *(
            Step(
                f"compute-sanitizer {tool}",
                [
                    str(sanitizer),
                    "--tool",
                    tool,
                    "--target-processes",
                    "all",
                    "--error-exitcode",
                    "9",
                    "--kernel-name",
                    "kns=fastbert",  # racecheck finds fault with cuBLAS' own kernels
                    *benchmark("sanitized", "--backend", "cuda", *without),
                ],
                45,
                # torch's cache hands out parts of large blocks, whose ends would then not be seen.
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                absent=None if sanitizer else "compute-sanitizer is neither on PATH nor in CUDA_HOME",
            )
            # Under racecheck a matmul of cuBLAS for mlm_loss ends with a hardware exception, and with it all that follows.
            for tool, without in (("memcheck", ()), ("racecheck", ("--without", "mlm_loss")))
        ),
        *(
            Step(f"ops {op}", benchmark("ops", "--op", op, "--limit", "{seconds}"), 90 if op == "attention" else 45)
            for op in backends.OPS
        ),
        Step("optimizers", benchmark("optimizers"), 45),
    ]
    rounds = ("--rounds", "30", "--limit", "3")
    for model, tokens in MODEL_TOKENS.items():
        options = ("--model", model, *bfloat16, "--packed", "--graphed", *rounds)
        steps.append(Step(f"pretrain {model}", benchmark("pretrain", "--batches", *batches_of(tokens), *options), 80))
        steps.append(Step(f"finetune {model}", benchmark("finetune", *options), 50))
    steps += [backends_step(scale, 50) for scale in ("many", "few")]
    # Few tokens are what recording is for.
    graphed = ("--model", "base", *bfloat16, "--graphed", *rounds)
    steps.append(Step("graphed base", benchmark("pretrain", "--batches", "8x128", "32x128", "64x512", *graphed), 60))
    for model, tokens in MODEL_TOKENS.items():  # last: torch.compile takes a minute for each
        peers = ("--peers", "transformers", "transformers-compiled")
        options = ("--model", model, *bfloat16, "--batches", f"{tokens // 512}x512", *rounds, "--graphed", *peers)
        steps.append(Step(f"compile {model}", benchmark("pretrain", *options), 120))
    return steps


def backends_step(scale: str, limit_s: float, *options: str) -> Step:
    """Fastbert's own backends beside each other, for every op of which CUDA C++ has kernels: ``fastest_backends.py`` reads it."""
    command = benchmark("ops", "--op", *cuda.OPS, "--scale", scale, "--peers", "--limit", "{seconds}", *options)
    return Step(f"backends {scale}", command, limit_s)


def batches_of(tokens: int) -> tuple[str, ...]:
    """Batches of about so many tokens with their padding: without any, of MNLI's lengths, and of Wikipedia's."""
    return f"{tokens // 128}x128", f"{tokens // 512}x512", f"{tokens // 128}xmnli", f"{tokens // 512}xmlperf"


def rehearsal_steps(scratch: Path) -> list[Step]:
    """The same kinds of steps; what they measure means nothing."""
    cpu, tiny = ("--device", "cpu"), ("--model", "tiny", "--rounds", "1")
    interpreted = {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1"}
    build = build_step("90a", scratch)
    build.command.append("--help")  # compiling would take a minute: this checks the command line
    peers = ("transformers", "transformers-compiled")
    few = ["tests/model/test_gpu.py", "-k", "two_training_passes or current_stream"]
    return [
        Step("machine", benchmark("machine", *cpu), 60),
        build,
        test_step(scratch, few, 1, 120),
        Step("sanitized", benchmark("sanitized", "--backend", "native", "--scale", "toy"), 60),
        Step("compute-sanitizer memcheck", [], 60, absent="there is no GPU to watch"),
        Step("ops", benchmark("ops", "--scale", "toy", *cpu, "--rounds", "1", "--limit", "{seconds}"), 200, interpreted),
        backends_step("toy", 60, *cpu, "--rounds", "1"),
        Step("optimizers", benchmark("optimizers", *tiny, *cpu), 60),
        Step("pretrain", benchmark("pretrain", *tiny, *cpu, "--batches", "1x128", "--graphed"), 100),
        Step("finetune", benchmark("finetune", *tiny, *cpu, "--batches", "mnli", "--packed", "--peers", *peers), 100, interpreted),
    ]


def build_step(architecture: str, scratch: Path) -> Step:
    """`setup.py build_ext --inplace` with the machine's own setuptools, which may be too old for pyproject.toml (77 is not).

    So it runs in a folder of links to all that a build reads but this file, and the modules land beside fastbert's sources.
    FASTBERT_CUDA=1 makes a CUDA build that fails an error instead of a note.
    """
    folder = scratch / "build"
    folder.mkdir()
    for name in ("setup.py", "csrc", "fastbert", "kernels"):
        (folder / name).symlink_to(REPOSITORY / name)
    environment = {"FASTBERT_CUDA_ARCHS": architecture, "FASTBERT_CUDA": "1"}
    missing = [name for name in ("setuptools", "pybind11") if importlib.util.find_spec(name) is None]
    missing += [] if find_cuda_tool("nvcc") else ["nvcc"]
    absent = f"not installed: {', '.join(missing)}" if missing else None
    return Step("build", python("setup.py", "build_ext", "--inplace"), 60, environment, build_report, absent, folder)


def build_report(_stdout: str) -> Any:
    return json.loads((REPOSITORY / "fastbert" / "_build_report.json").read_text(encoding="utf-8"))


def test_step(scratch: Path, selected: list[str], processes: int, limit_s: float) -> Step:
    record = scratch / "tests.jsonl"
    command = python("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "benchmarks.record_tests", "--record")
    alone = processes == 1 or importlib.util.find_spec("xdist") is None
    parallel = [] if alone else ["-n", str(processes), "--dist", "worksteal"]
    if not alone and importlib.util.find_spec("pytest_timeout"):  # a kernel that never ends takes its process along, no more
        parallel += ["--timeout", str(TEST_LIMIT_S), "--timeout-method", "thread"]
    environment = {"OMP_NUM_THREADS": "1"}
    return Step("tests", [*command, str(record), *parallel, *selected], limit_s, environment, lambda _: summarized(record))


def find_cuda_tool(name: str) -> Path | None:
    found = shutil.which(name)
    places = [Path(home, "bin", name) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return Path(found) if found else next((place for place in places if place.exists()), None)


# --- running one ---------------------------------------------------------------------------------------------------------


def run_step(step: Step, remaining_s: float, path: str, logs: Path) -> dict[str, Any]:
    """status, seconds, exit code, result and, where something is wrong, reason and the end of what was printed."""
    limit = min(step.limit_s, remaining_s)
    command = [argument.replace("{seconds}", str(max(5, int(limit) - 15))) for argument in step.command]
    record: dict[str, Any] = {
        "status": OK,
        "seconds": 0.0,
        "command": command,
        "environment": step.environment or {},
        "result": None,
    }
    if step.absent:
        return {**record, "status": NOT_PRESENT, "reason": step.absent}
    if limit < SHORTEST_STEP_S:
        return {**record, "status": NOT_RUN, "reason": f"only {max(0.0, remaining_s):.0f} s of the budget are left"}
    logs.mkdir(parents=True, exist_ok=True)
    out, err = (logs / f"{step.name.replace(' ', '-')}.{name}.log" for name in ("out", "err"))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(step.environment or {})}
    start = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=step.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    record |= {"seconds": round(time.monotonic() - start, 1), "exit_code": code}
    printed = out.read_text(encoding="utf-8", errors="replace")
    try:
        record["result"] = (step.result or last_line)(printed)
    except (OSError, ValueError, IndexError) as error:
        record |= {"status": FAILED, "reason": f"no result: {error}"}
    if code != 0:
        reason = f"stopped after its limit of {limit:.0f} s" if code is None else f"exit code {code}"
        tail = printed.splitlines()[-12:] + err.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        record |= {"status": FAILED, "reason": reason, "output": [line[:300] for line in tail]}
    return record


def end_group(process: subprocess.Popen) -> None:
    """Ends what the step has left running: its workers outlive a process that is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(printed: str) -> Any:
    """The benchmark's document; compute-sanitizer prints its summary behind it."""
    return json.loads([line for line in printed.splitlines() if not line.startswith("=====")][-1])


def import_path() -> str:
    """PYTHONPATH under which the repository's packages are found as if they were installed.

    ``fastbert_kernels`` is the folder kernels/ (setup.py says so to an installation), which must not be importable by that
    name: a link in build/, which git ignores, gives it the other one.
    """
    folder = REPOSITORY / "build" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "fastbert_kernels"
    if not link.is_symlink():
        link.symlink_to(Path("..", "..", "kernels"))
    return os.pathsep.join([str(folder), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


def results_folder() -> Path:
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return RESULTS / re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


# --- showing -------------------------------------------------------------------------------------------------------------


def note(record: dict[str, Any]) -> str:
    """The reason of a step that is not ok; of tests their counts; of others the number of results and of those that failed."""
    notes = [record["reason"]] if "reason" in record else []
    result = record["result"] or {}
    if "passed" in result:
        notes.append(f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped")
    if isinstance(result.get("results"), list):
        timed = sum("median_s" in r for r in result["results"])
        failures = sum("failed" in r for r in result["results"])
        notes.append(f"{timed} figures, {failures} contenders failed")
    return "; ".join(notes)


def steps_table(document: dict[str, Any]) -> str:
    lines = [f"{'step':<28}{'status':<13}{'seconds':>9}"]
    for name, record in document["steps"].items():
        lines.append(f"{name:<28}{record['status']:<13}{record['seconds']:>9.1f}  {note(record)}")
        lines += [f"    {failure['test']}: {failure['message']}" for failure in (record["result"] or {}).get("failures", [])[:20]]
        lines += [f"    {line}" for line in record.get("output", [])[-6:]]
    return "\n".join([*lines, f"{'all':<41}{document['seconds']:>9.1f}"])


if __name__ == "__main__":
    main()
