"""The documents of a folder of results: JSON files of the suites, and those inside of a GPU's ``gpu.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..harness import PARTIAL
from .rows import MODEL_SUITES, OPS_SUITE

SUITES = (*MODEL_SUITES, OPS_SUITE)
Document = Mapping[str, Any]


class ReportError(ValueError):
    """No results where they should be; says where and what was expected."""


def documents(path: Path) -> dict[str, Document]:
    """By name (the file's, without its ending) the suites' documents in a folder, or in one JSON file, inference first.

    Other benchmarks' documents are left out (:func:`others`), and in a folder those of unfinished runs. Raises
    :class:`ReportError` where ``path`` is missing or no JSON.
    """
    found = {name: document for file in _files(path) for name, document in _of_file(file) if document.get("benchmark") in SUITES}
    return dict(sorted(found.items(), key=lambda entry: (SUITES.index(entry[1]["benchmark"]), entry[0])))


def others(path: Path) -> dict[str, str | None]:
    """By name the commands that made the folder's other files, where they say so."""
    found = {file.stem: next(_of_file(file))[1] for file in _files(path)}
    return {name: document.get("command") for name, document in found.items() if document.get("benchmark") not in SUITES}


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.glob("*.json") if not file.name.endswith(PARTIAL))
    if not path.is_file():
        raise ReportError(f"{path} does not exist: expected a folder with results, or a JSON document of fastbert bench")
    return [path]


def _of_file(path: Path) -> Iterator[tuple[str, Document]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is no JSON document: {error}") from error
    if not isinstance(document, Mapping):
        raise ReportError(f"{path}: expected a JSON document of a benchmark, got {type(document).__name__}")
    yield path.stem, document
    # `make gpu` keeps what each of its steps printed.
    for step, record in document.get("steps", {}).items() if document.get("benchmark") == "gpu" else ():
        if isinstance(record.get("result"), Mapping):
            yield f"{path.stem}-{re.sub('[^a-z0-9]+', '-', step.lower())}", record["result"]


def ceilings_of(document: Document) -> Mapping[str, Mapping[str, Any]]:
    """The machine's ceilings by dtype, as the document's run measured them."""
    if "runs" in document:
        return {dtype: run["ceilings"] for dtype, run in document["runs"].items()}
    ceilings = document["ceilings"]
    return {document["dtype"]: ceilings} if "matmul_flops" in ceilings else ceilings
