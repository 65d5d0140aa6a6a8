"""One document as a report: Markdown with its tables and pictures, beside the document itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.runs.whole_file import whole_file

from ..harness import write_complete
from ..workloads import model_title
from . import pictures
from .documents import Document
from .profile_plot import profile_table
from .rows import OPS_SUITE, OpRow, Row, model_of, op_rows_of, rows_of
from .tables import (
    batch_table,
    by_batch,
    contenders_table,
    limits_table,
    ops_table,
    ops_without_figures,
    without_figures,
)


def write(document: Document, folder: Path, name: str) -> list[Path]:
    """``<name>.json``, ``<name>.md`` and ``<name>-<plot>.png`` in the folder, which is made if missing. Pictures of an
    earlier report that this document has not are removed. Returns what was written."""
    json_path = folder / f"{name}.json"
    write_complete(json_path, document)  # first: figures that took an hour outlive a picture that fails
    return [json_path, *write_report(document, folder, name)]


def write_report(document: Document, folder: Path, name: str) -> list[Path]:
    """``<name>.md`` and its pictures, of a document that lies elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {} if pictures.why_not() else pictures.pictures(document, name)
    for plot in pictures.NAMES:
        if f"{name}-{plot}.png" not in found:
            (folder / f"{name}-{plot}.png").unlink(missing_ok=True)
    for file, picture in found.items():
        picture.save(folder / file)
    titles = {file: picture.title for file, picture in found.items()}
    machine = document["machine"]
    lines = [f"# {title(document)}", f"{hardware(machine)} {versions(machine)}", made_by(document), section(document, titles, "##")]
    if reason := pictures.why_not():
        lines.append(f"Without pictures: {reason}")
    write_text(folder / f"{name}.md", "\n\n".join(lines) + "\n")
    return [folder / f"{name}.md", *(folder / file for file in found)]


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def model_rows(document: Document) -> list[Row]:
    """The rows of a document of a model's suite, none of another's."""
    return [] if document["benchmark"] == OPS_SUITE else rows_of(document)


def op_rows(document: Document) -> list[OpRow]:
    return op_rows_of(document) if document["benchmark"] == OPS_SUITE else []


def title(document: Document) -> str:
    if document["benchmark"] == OPS_SUITE:
        return OPS_SUITE
    return f"{document['benchmark']}, {model_title(model_of(document))}"


def hardware(machine: Mapping[str, Any]) -> str:
    gpu = f"{machine['gpu']}; " if machine.get("gpu") else ""
    return f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads."


def versions(machine: Mapping[str, Any]) -> str:
    found = [f"{name} {machine[name]}" for name in ("torch", "transformers", "triton", "python") if machine.get(name)]
    return f"fastbert {machine['fastbert']} at commit {machine['commit']}; {', '.join(found)}."


def made_by(document: Document) -> str:
    unfinished = ", which has not come to its end" if document.get("unfinished") else ""
    return f"Made by `{document['command']}`{unfinished}."


def section(document: Document, titles: Mapping[str, str], heading: str) -> str:
    """All that a document has to show, from the limits to the pictures.

    titles: of pictures by their address as seen from the text; heading: the marks of the section's own headings ("##").
    """
    parts = [f"{heading} Limits in this run", limits_table(document)]
    energy = document.get("energy") or next((run["energy"] for run in document.get("runs", {}).values() if "energy" in run), None)
    if energy:
        parts.append(f"Energy: {energy['source'] or 'not measured: ' + str(energy['reason'])}.")
    if table := contenders_table(document):
        parts += [f"{heading} Contenders", table]
    rows = model_rows(document)
    for batch, of_batch in by_batch(rows).items():
        parts += [f"{heading} {batch}{_size(of_batch)}", batch_table(of_batch)]
    if ops := op_rows(document):
        parts += [f"{heading} Ops", ops_table(ops)]
    reasons = [*without_figures(rows), *ops_without_figures(ops)]
    if left_out := document.get("not_asked_for"):
        reasons.append(f"not asked for: {', '.join(left_out)}")
    if reasons:
        parts += [f"{heading} Not run", "\n".join(f"- {reason}" for reason in reasons)]
    if table := profile_table(document):
        parts += [f"{heading} Where the time goes", table]
    return "\n\n".join([*parts, *(f"![{text}]({address})" for address, text in titles.items())])


def _size(rows: Sequence[Row]) -> str:
    """Of a batch, where the document has it."""
    row = rows[0]
    if row.tokens is None or row.sequences is None:
        return ""
    return f": {row.sequences:,} sequence{'' if row.sequences == 1 else 's'}, {row.tokens:,} tokens"
