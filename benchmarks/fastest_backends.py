"""Makes the table that ``backend="auto"`` heeds out of measured results: fastbert/ops/measured_backends.json.

    python -m benchmarks.fastest_backends benchmarks/results/<GPU>/*.json [--margin 0.03] [--dry-run]

The results are what `make gpu` writes (``gpu.json``) and what ``benchmarks.ops --save`` does, on NVIDIA's GPUs; others are
passed over. They must be committed, and made by a commit: a table says where it comes from. It is written anew each time: name
all results.

CUDA C++ takes an op's direction from Triton, for one dtype on one architecture, at the sizes where it was faster by the margin in
every case that was measured there, with dropout and without. Between two sizes that were measured it does where it did at both, and
beyond the smallest and the largest it does not; but what holds at the most rows that were measured holds at more, since from there
on the time grows with the rows. Where some sizes need more rows than their neighbours, there is a wider entry for more, too.
``fastbert/ops/measured_backends.py`` describes the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastbert.ops.measured_backends import DIRECTIONS, PATH, SIZES

from .harness import write_json
from .machine import printed

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT, CHALLENGER = "triton", "cuda"
MARGIN = 0.03
Kind = tuple[str, str, str, str]  # architecture, op, direction, dtype
Point = tuple[int, ...]  # in the order of SIZES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--margin", type=float, default=MARGIN, help=f"share of its own time (default {MARGIN})")
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    given = parser.parse_args()
    try:
        found = table({str(path.resolve().relative_to(REPOSITORY)): read_committed(path) for path in given.results}, given.margin)
    except ValueError as error:
        parser.error(str(error))
    for entry in found["entries"]:
        kind = " ".join(entry[name] for name in ("architecture", "op", "direction", "dtype"))
        print(f"{kind} {entry['sizes']}: {entry['backend']}, {entry['times_faster'][0]:.2f} to {entry['times_faster'][1]:.2f}x")
    print(f"{len(found['entries'])} entries from {', '.join(found['results']) or 'no results of a GPU'}", file=sys.stderr)
    if not given.dry_run:
        write_json(PATH, found)


def read_committed(path: Path) -> dict[str, Any]:
    """The document of a file that git has just so; ValueError for others."""
    git = ("git", "-C", str(path.resolve().parent))
    tracked = printed(*git, "ls-files", "--error-unmatch", path.name)
    if tracked is None or printed(*git, "status", "--porcelain", "--", path.name):
        raise ValueError(f"{path} is not committed as it is: a table's source must be")
    return json.loads(path.read_text(encoding="utf-8"))


def table(documents: Mapping[str, Mapping[str, Any]], margin: float = MARGIN) -> dict[str, Any]:
    """The content of measured_backends.json; ``documents``: by file. ValueError for one that no commit made."""
    points: dict[Kind, dict[Point, list[tuple[float, str, str]]]] = defaultdict(lambda: defaultdict(list))
    used = []
    for file, document in documents.items():
        for result in _op_results(document):
            machine = result["machine"]
            if "compute_capability" not in machine or machine["gpu"] is None:
                continue
            if machine["commit"] is None or machine["commit"].endswith("-dirty"):
                raise ValueError(f"{file} was measured with code that no commit has: {machine['commit']}")
            used.append(file)
            for kind, point, times_faster in comparisons(result["results"]):
                architecture = "sm_{}{}".format(*machine["compute_capability"])
                points[(architecture, *kind)][point].append((times_faster, file, machine["commit"]))
    entries = [entry for kind in sorted(points) for entry in _entries(kind, points[kind], 1 + margin)]
    return {"margin": margin, "results": sorted(set(used)), "entries": entries}


def _op_results(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The documents of benchmarks.ops in this one: itself, or those of make gpu's steps."""
    if document.get("benchmark") == "ops":
        yield document
    for step in document.get("steps", {}).values() if document.get("benchmark") == "gpu" else ():
        if isinstance(step["result"], dict):
            yield from _op_results(step["result"])


def comparisons(records: list[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str, str], Point, float]]:
    """((op, direction, dtype), sizes, how many times as fast as the default the challenger was) of each case that has both."""
    cases: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for record in records:
        if record.get("direction") in DIRECTIONS and "sizes" in record and record["op"] in SIZES:
            case = tuple(record[name] for name in ("op", "direction", "dtype", "case", "hidden", "dropout_p"))
            cases[case][record["contender"]] = record
    for (op, direction, dtype, *_), contenders in cases.items():
        default, challenger = (contenders.get(f"fastbert {name}") for name in (DEFAULT, CHALLENGER))
        if default and challenger:
            point = tuple(default["sizes"][name] for name in SIZES[op])
            yield (op, direction, dtype), point, default["median_s"] / challenger["median_s"]


def _entries(kind: Kind, points: Mapping[Point, list[tuple[float, str, str]]], least: float) -> Iterator[dict[str, Any]]:
    """Rows are the first of an op's sizes, and the last is the one that a range runs over; any between them are equal in it."""
    architecture, op, direction, dtype = kind
    won = {point: all(times >= least for times, _, _ in found) for point, found in points.items()}
    for middle, group in itertools.groupby(sorted(points, key=lambda point: point[1:]), key=lambda point: point[1:-1]):
        fewest_rows = {}
        for last, column in itertools.groupby(group, key=lambda point: point[-1]):
            fewest_rows[last] = _fewest_rows({point[0]: won[point] for point in column})
        for rows, values in _runs(fewest_rows):
            ranges = [(rows, None), *((value, value) for value in middle), (values[0], values[-1])]
            inside = [point for point in points if point[0] >= rows and point[1:-1] == middle and point[-1] in values]
            measured = [figures for point in inside for figures in points[point]]
            sources = sorted({(file, commit) for _, file, commit in measured})
            yield {
                "architecture": architecture,
                "op": op,
                "direction": direction,
                "dtype": dtype,
                "sizes": {name: list(limits) for name, limits in zip(SIZES[op], ranges, strict=True)},
                "backend": CHALLENGER,
                "times_faster": [round(extreme(times for times, _, _ in measured), 3) for extreme in (min, max)],
                "source": {"file": ", ".join(f for f, _ in sources), "commit": ", ".join(dict.fromkeys(c for _, c in sources))},
            }


def _runs(fewest_rows: Mapping[int, int | None]) -> Iterator[tuple[int, list[int]]]:
    """(rows, neighbouring values of the last size at all of which so many rows are enough): wider ones for more rows."""
    found = set()
    for rows in sorted({rows for rows in fewest_rows.values() if rows is not None}):
        for enough, run in itertools.groupby(fewest_rows, key=lambda last: (fewest_rows[last] or math.inf) <= rows):
            values = tuple(run)
            if enough and values not in found:
                found.add(values)
                yield rows, list(values)


def _fewest_rows(won: Mapping[int, bool]) -> int | None:
    """The number of rows from which on it was won at all that were measured, None where it was lost at the most."""
    wins = itertools.takewhile(lambda rows: won[rows], sorted(won, reverse=True))
    return min(wins, default=None)


if __name__ == "__main__":
    main()
