"""Makes the reports of a folder of results again: a Markdown file and pictures for each JSON document of a suite in it.

    python -m benchmarks.reports FOLDER [--output FOLDER]

FOLDER: what ``fastbert bench --output`` or ``--save`` left, such as benchmarks/results/zen5-2-cores. Documents are not changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import report
from .documents import ReportError, documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where reports go; default: beside the documents")
    given = parser.parse_args()
    try:
        found = documents(given.folder)
    except ReportError as error:
        parser.error(str(error))
    if not found:
        parser.error(f"{given.folder} has no document of fastbert bench")
    folder = given.output or (given.folder if given.folder.is_dir() else given.folder.parent)
    if folder.exists() and not folder.is_dir():
        parser.error(f"--output {folder} is a file: expected a folder")
    for name, document in found.items():
        for path in report.write_report(document, folder, name):
            print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
