"""Regressions of the C++ kernels by the instructions that they execute, which no other program on the machine changes.

    python -m benchmarks.instructions [--save]

Runs ``native_calls`` under valgrind's callgrind and compares the instructions per element of every kernel with the table
``results/instructions.json``: at most 10% more where compiler and major version are those of the table, 40% with another one.
--save writes what was measured into the table, in place of what it has of this compiler. Valgrind knows no AVX-512: AVX2 is what
is counted, from the same sources. An instruction count is no time; it tells that a kernel's code became worse, not how fast it is.
Where valgrind is missing nothing is checked: times, and ratios of them, change with whatever else runs on the machine.
Exit code 1 where a kernel needs more, 2 where nothing can be counted here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastbert.build_report import read_build_report
from fastbert.runs.whole_file import whole_file

CALLS = Path(__file__).with_name("native_calls.py")
TABLE = Path(__file__).parent / "results" / "instructions.json"
INSTRUCTION_SET = "avx2"
SAME_COMPILER, OTHER_COMPILER = 1.10, 1.40
MARK = "fastbert::cpu::set_openmp_parallel(*"
_KEY = ("op", "direction", "dtype", "dropout", "isa")
Record = dict[str, Any]


class CountingError(Exception):
    """Why there are no counts."""


def why_not() -> str | None:
    """Why nothing can be counted here, or None where it can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (apt-get install valgrind)"
    if extension() is None:
        return "fastbert._cpu was not built (fastbert doctor says why)"
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or not re.search(rf"^flags\s*:.*\b{INSTRUCTION_SET}\b", cpuinfo.read_text(), re.MULTILINE):
        return f"this machine does not have the instruction set {INSTRUCTION_SET}"
    return None


def extension() -> str | None:
    spec = importlib.util.find_spec("fastbert._cpu")
    return spec.origin if spec is not None else None


def compiler() -> str:
    """Name and major version of what the extension was compiled with, such as "g++ 12"; "unknown" where nobody says."""
    report = read_build_report()
    line = report.modules["_cpu"].compiler if report is not None and "_cpu" in report.modules else None
    return compiler_of(line or "")


def compiler_of(version_line: str) -> str:
    versions = re.findall(r"\b(\d+)\.\d+", version_line)
    if not versions:
        return "unknown"
    name = "clang++" if "clang" in version_line else Path(version_line.split()[0]).name
    return f"{name} {versions[-1]}"


def measure(library: str | None = None) -> list[Record]:
    """A record for each kernel, direction, dtype and dropout; library: the extension, None for the installed one.

    Raises CountingError with the end of what valgrind says where it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch, "counts")
        command = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={files}", f"--dump-before={MARK}",
            sys.executable, "-I", "-S", str(CALLS), library or str(extension()), INSTRUCTION_SET,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CountingError("\n".join([f"valgrind ended with {done.returncode}", *done.stderr.splitlines()[-12:]]))
        called = [json.loads(line) for line in done.stdout.splitlines()]
        # The first file is of what comes before all calls, the last one of the call of nothing.
        _, *counts = (count_of(Path(f"{files}.{number + 1}")) for number in range(len(called) + 2))
    *counts, nothing = counts
    return merged([record_of(call, count - nothing) for call, count in zip(called, counts, strict=True)])


def count_of(path: Path) -> int:
    """Instructions since the mark before; CountingError where callgrind wrote the file for another reason than a mark."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    trigger = re.search(r"^desc: Trigger: (.*)$", text, re.MULTILINE)
    total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
    if trigger is None or total is None or not trigger.group(1).startswith(f"--dump-before={MARK.rstrip('*')}"):
        reason = trigger.group(1) if trigger else "it does not exist"
        raise CountingError(f"{path.name} is not what callgrind counted between two marks: {reason}")
    return int(total.group(1))


def record_of(call: Record, count: int) -> Record:
    op, _, direction = call["kernel"].rpartition("_")
    if direction not in ("forward", "backward"):
        op, direction = call["kernel"], "forward"
    return {
        "op": op, "direction": direction, "dtype": call["dtype"], "dropout": call["dropout"], "isa": INSTRUCTION_SET,
        "compiler": compiler(), "instructions": count, "elements": call["elements"],
    }  # fmt: skip


def merged(records: list[Record]) -> list[Record]:
    """One record of the calls of a kernel that differ in their shape alone, with ``instructions_per_element``."""
    by_key: dict[tuple, Record] = {}
    for record in records:
        before = by_key.setdefault(key(record), {**record, "instructions": 0, "elements": 0})
        before["instructions"] += record["instructions"]
        before["elements"] += record["elements"]
    for record in by_key.values():
        record["instructions_per_element"] = round(record.pop("instructions") / record.pop("elements"), 4)
    return list(by_key.values())


def key(record: Record) -> tuple:
    return tuple(record[name] for name in _KEY)


def compare(measured: list[Record], table: list[Record]) -> list[str]:
    """What is worse than the table, or not in it, as text; empty where all is well."""
    found = []
    for record in measured:
        rows = [row for row in table if key(row) == key(record)]
        same = [row for row in rows if row["compiler"] == record["compiler"]]
        allowed = SAME_COMPILER if same else OTHER_COMPILER
        if not rows:
            found.append(f"{label(record)}: {TABLE.name} does not have it (python -m benchmarks.instructions --save)")
            continue
        known = max(row["instructions_per_element"] for row in same or rows)
        ratio = record["instructions_per_element"] / known
        if not ratio <= allowed:
            of = "" if same else f" of {', '.join(row['compiler'] for row in rows)}"
            found.append(
                f"{label(record)}: {record['instructions_per_element']:.3f} instructions per element with {record['compiler']}, "
                f"{ratio:.2f} times the {known:.3f}{of} in {TABLE.name}; {allowed:.2f} times are allowed"
            )
    return found


def label(record: Record) -> str:
    dropout = ", dropout" if record["dropout"] else ""
    return f"{record['op']} {record['direction']}, {record['dtype']}{dropout}, {record['isa']}"


def read_table() -> list[Record]:
    return json.loads(TABLE.read_text(encoding="utf-8"))["results"] if TABLE.exists() else []


def save(measured: list[Record]) -> None:
    """Replaces what the table has of this compiler."""
    kept = [row for row in read_table() if row["compiler"] != measured[0]["compiler"]]
    document = {"benchmark": "instructions", "command": "python -m benchmarks.instructions --save", "results": kept + measured}
    with whole_file(TABLE) as beside:
        beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write {TABLE.name}")
    given = parser.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        sys.exit(2)
    measured, table = measure(), read_table()
    print(f"{'instructions per element, ' + compiler():<60}{'measured':>10}{'table':>10}")
    for record in measured:
        known = [row["instructions_per_element"] for row in table if key(row) == key(record)]
        print(f"{label(record):<60}{record['instructions_per_element']:>10.3f}{max(known, default=float('nan')):>10.3f}")
    if given.save:
        save(measured)
        print(f"written to {TABLE}", file=sys.stderr)
        return
    problems = compare(measured, table)
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
