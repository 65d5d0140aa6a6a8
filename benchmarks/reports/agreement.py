"""Whether a second measurement gives the ratios of a first one: how many times fastbert is as fast as transformers.

    python -m benchmarks.reports.agreement OLD NEW        # two folders of results, or two JSON documents

Compared are the ratios of fastbert's contenders in the suites inference, finetune and pretrain, to transformers in the same dtype
and in float32, of the same model, batch and dtype; seconds are a machine's own, and ops are measured beside no transformers.
A new median agrees with an old one when it is no further from it than the **stated spread**, the largest of

    the old ratio's interquartile range, the new one's, and 10% of the old median.

The quartiles are those of the rounds of one run, which share its minutes; the 10% (:data:`BETWEEN_RUNS`) are what the medians of
whole runs differ by: other memory pages, other neighbours on the host. Exit code 0 where all agree, 1 where one does not or
there is none in both, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .documents import ReportError, documents
from .report import model_rows
from .rows import THEIRS
from .tables import times

BETWEEN_RUNS = 0.10  # of the old median


class Key(NamedTuple):
    """What a ratio is of; ``to``: transformers in the same dtype or in float32."""

    suite: str
    model: str
    batch: str
    dtype: str
    contender: str
    to: str

    def __str__(self) -> str:
        return f"{self.suite}, {self.model}, {self.batch}: {self.contender} {self.dtype} / {self.to}"


class Ratio(NamedTuple):
    """Quartiles are the median where the document has none."""

    median: float
    q25: float
    q75: float

    def __str__(self) -> str:
        return str(times(*self))


@dataclass(frozen=True)
class Comparison:
    old: Ratio
    new: Ratio

    @property
    def spread(self) -> float:
        """How far the new median may be from the old one."""
        return max(self.old.q75 - self.old.q25, self.new.q75 - self.new.q25, BETWEEN_RUNS * self.old.median)

    @property
    def difference(self) -> float:
        """Relative to the old median."""
        return self.new.median / self.old.median - 1

    @property
    def agrees(self) -> bool:
        return abs(self.new.median - self.old.median) <= self.spread


def ratios(path: Path) -> dict[Key, Ratio]:
    """Of all documents in a folder or of one; of a ratio that two documents of a folder have, the first one's."""
    found: dict[Key, Ratio] = {}
    for document in documents(path).values():
        for row in model_rows(document):
            same = (row.ratio, row.ratio_q25, row.ratio_q75)
            float32 = (row.float32_ratio, row.float32_ratio_q25, row.float32_ratio_q75)
            for to, (median, low, high) in {f"{THEIRS} {row.dtype}": same, f"{THEIRS} float32": float32}.items():
                if row.ours and median is not None:
                    key = Key(row.suite, row.model, row.batch, row.dtype, row.contender, to)
                    found.setdefault(key, Ratio(median, low or median, high or median))
    return found


def compare(old: Mapping[Key, Ratio], new: Mapping[Key, Ratio]) -> dict[Key, Comparison]:
    """Of the ratios that both have."""
    return {key: Comparison(ratio, new[key]) for key, ratio in old.items() if key in new}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args()
    try:
        old, new = ratios(given.old), ratios(given.new)
    except ReportError as error:
        parser.error(str(error))
    compared = compare(old, new)
    print(table(compared))
    for path, only in ((given.old, old.keys() - new.keys()), (given.new, new.keys() - old.keys())):
        for key in sorted(only):
            print(f"only in {path}: {key}")
    apart = sum(not comparison.agrees for comparison in compared.values())
    if not compared:
        print("there is no ratio of fastbert to transformers in both: nothing is compared")
    else:
        print(f"{len(compared) - apart} of {len(compared)} ratios agree within their stated spread")
    sys.exit(1 if apart or not compared else 0)


def table(compared: Mapping[Key, Comparison]) -> str:
    width = max((len(str(key)) for key in compared), default=10)
    lines = [f"{'ratio':<{width}}{'old':>24}{'new':>24}{'difference':>12}{'spread':>8}"]
    for key, found in compared.items():
        verdict = "agrees" if found.agrees else "DISAGREES"
        lines.append(
            f"{key!s:<{width}}{found.old!s:>24}{found.new!s:>24}{found.difference:>+12.1%}"
            f"{found.spread / found.old.median:>8.1%}  {verdict}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
