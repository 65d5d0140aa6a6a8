"""The files that GLUE's server scores: one TSV per test set, ``index`` and ``prediction``, together in ``submission.zip``.

Label words for MNLI, QNLI, RTE and the diagnostic set, 0 or 1 for the others, a number from 0 to 5 with three decimals for STS-B
(https://gluebenchmark.com/faq). The server refuses a zip in which a file is missing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from fastbert.runs.whole_file import whole_file
from fastbert.tasks.glue_tasks import SUBMISSION_NAMES, GlueTask

ZIP_NAME = "submission.zip"
_TIME = (1980, 1, 1, 0, 0, 0)  # zip's earliest: the same predictions make the same bytes


def submission_text(task: GlueTask, index: Sequence[str], predictions: Sequence[str | float]) -> str:
    """The file of a test set. ``index``: what the test file calls its rows; ``predictions``: a label or number for each of them."""
    rows = [f"{row}\t{_written(task, value)}" for row, value in zip(index, predictions, strict=True)]
    return "\n".join(["index\tprediction", *rows]) + "\n"


def write_submission(folder: Path, name: str, text: str) -> Path:
    """Writes ``folder/<name>.tsv`` whole: readers see the old file or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.tsv"
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")
    return path


def zip_submission(folder: Path, names: Sequence[str], path: Path) -> list[str]:
    """Zips the files of ``names`` in ``folder`` to ``path``; returns the names of those that the server wants besides."""
    with whole_file(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(names, key=SUBMISSION_NAMES.index):
            entry = zipfile.ZipInfo(f"{name}.tsv", _TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, (folder / entry.filename).read_bytes())
    return [name for name in SUBMISSION_NAMES if name not in names]


def _written(task: GlueTask, value: str | float) -> str:
    if task.label_range is None:
        return str(value)
    low, high = task.label_range
    return f"{min(max(float(value), low), high):.3f}"
