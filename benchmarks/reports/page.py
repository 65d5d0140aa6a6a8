"""docs/performance.md, a page and pictures for each machine, and README.md's speed tables, from all of benchmarks/results.

    python -m benchmarks.reports.page [--check]

--check writes nothing: exit code 1 and the difference where a file is not what the results give, 0 where all are. A picture is
what the results give when it carries the digest of what it shows.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..harness import RESULTS
from . import losses, page_text, pictures, readme
from .documents import Document, ReportError, documents, others
from .pictures import Picture
from .report import hardware, made_by, model_rows, op_rows, section, title, versions, write_text
from .rows import DTYPES, OURS
from .tables import markdown, times

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Page:
    """text: of docs/performance.md; readme: of README.md; machines and pictures: by file name in docs/performance."""

    text: str
    readme: str
    machines: Mapping[str, str]
    pictures: Mapping[str, Picture]


@dataclass(frozen=True)
class Places:
    """Where everything is, in the repository or in a copy of it."""

    repository: Path = REPOSITORY
    results: Path = RESULTS

    @property
    def page(self) -> Path:
        return self.repository / "docs" / "performance.md"

    @property
    def machines(self) -> Path:
        return self.repository / "docs" / "performance"

    @property
    def readme(self) -> Path:
        return self.repository / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    given = parser.parse_args()
    places = Places()
    try:
        page = made(places)
    except ReportError as error:
        parser.error(str(error))
    if given.check:
        differences = list(check(page, places))
        print("\n".join(differences) or "docs/performance.md, machines' pages, pictures and README.md are what the results give")
        sys.exit(1 if differences else 0)
    if reason := pictures.why_not():
        parser.error(reason)
    write(page, places)


def made(places: Places) -> Page:
    folders = sorted(places.results.iterdir(), key=lambda folder: (folder.name != readme.MACHINE, folder.name))
    by_machine = {folder.name: documents(folder) for folder in folders if folder.is_dir()}
    by_machine = {name: found for name, found in by_machine.items() if found}
    parts = [
        page_text.HEAD,
        "## fastbert against transformers", page_text.SUMMARY, _summary(by_machine),
        "## How to read this", page_text.READING,
        "## When fastbert does not help", *_when_not(by_machine),
        "## Measure it yourself", page_text.RERUN,
    ]  # fmt: skip
    drawn: dict[str, Picture] = {}
    machines = {}
    for machine, found in by_machine.items():
        of_document = {name: pictures.pictures(document, f"{machine}-{name}") for name, document in found.items()}
        machines[f"{machine}.md"] = _machine(machine, found, of_document, others(places.results / machine))
        drawn |= {file: picture for of_one in of_document.values() for file, picture in of_one.items()}
    for_readme = readme.rendered(places.readme.read_text(encoding="utf-8"), by_machine)
    return Page("\n\n".join(parts) + "\n", for_readme, machines, drawn)


def _machine(
    machine: str,
    found: Mapping[str, Document],
    drawn: Mapping[str, Mapping[str, Picture]],
    rest: Mapping[str, str | None],
) -> str:
    """The page of one machine: a section for each document."""
    parts = [page_text.MADE, f"# {machine}", hardware(next(iter(found.values()))["machine"]), page_text.OF_A_MACHINE]
    for name, document in found.items():
        link = f"[{name}.json](../../benchmarks/results/{machine}/{_file_of(name)})"
        addresses = {file: picture.title for file, picture in drawn[name].items()}
        parts += [f"## {_title(name, document)}", f"{link}. {made_by(document)} {versions(document['machine'])}"]
        parts.append(section(document, addresses, "###"))
    if rest:
        parts += ["## Other measurements", _others(machine, rest)]
    return "\n\n".join(parts) + "\n"


def _title(name: str, document: Document) -> str:
    """A machine may have several documents of a suite: those beyond the first are told apart by the file's name."""
    return title(document) if name == document["benchmark"] else f"{title(document)} ({name})"


def write(page: Page, places: Places) -> None:
    """Pages of machines and pictures that are no longer there are removed."""
    places.machines.mkdir(parents=True, exist_ok=True)
    for path in _left_over(page, places):
        path.unlink()
    for file, picture in page.pictures.items():
        picture.save(places.machines / file)
    for path, text in _texts(page, places).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def _texts(page: Page, places: Places) -> dict[Path, str]:
    machines = {places.machines / file: text for file, text in page.machines.items()}
    return {places.page: page.text, places.readme: page.readme, **machines}


def _left_over(page: Page, places: Places) -> list[Path]:
    return [
        path
        for path in sorted(places.machines.glob("*.*"))
        if path.suffix in (".md", ".png") and path.name not in {*page.machines, *page.pictures}
    ]


def check(page: Page, places: Places) -> Iterator[str]:
    """What differs, as lines of text."""
    for path, text in _texts(page, places).items():
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        name = str(path.relative_to(places.repository))
        yield from difflib.unified_diff(
            there.splitlines(), text.splitlines(), name, f"{name} from benchmarks/results", lineterm="", n=0
        )
    for file, picture in page.pictures.items():
        path = places.machines / file
        if not path.exists():
            yield f"{path.relative_to(places.repository)} is missing"
        elif pictures.digest_in(path) != picture.digest:
            yield f"{path.relative_to(places.repository)} shows other figures than benchmarks/results has"
    for path in _left_over(page, places):
        yield f"{path.relative_to(places.repository)} belongs to no result"


def _file_of(name: str) -> str:
    """A GPU's documents lie together in one file."""
    return "gpu.json" if name.startswith("gpu-") else f"{name}.json"


def _summary(by_machine: Mapping[str, Mapping[str, Document]]) -> str:
    lines = []
    for machine, found in by_machine.items():
        page = f"[{machine}](performance/{machine}.md)"
        for name, document in found.items():
            ours = [row for row in model_rows(document) if row.contender == OURS and row.median_s is not None]
            for batch in dict.fromkeys(row.batch for row in ours):
                of_dtype = {row.dtype: row for row in ours if row.batch == batch}
                ratios = [times(*row.against_transformers) if (row := of_dtype.get(dtype)) else None for dtype in DTYPES]
                lines.append([page, _title(name, document), batch, *ratios])
    return markdown(("machine", "suite and model", "batch", "float32", "bfloat16", "int8, against float32"), lines, text_columns=3)


def _when_not(by_machine: Mapping[str, Mapping[str, Document]]) -> Iterator[str]:
    yield page_text.NOT_HELPING
    results = [(machine, document) for machine, found in by_machine.items() for document in found.values()]
    found = [(machine, loss) for machine, document in results for loss in losses.losses(model_rows(document))]
    ops = [(machine, loss) for machine, document in results for loss in losses.op_losses(op_rows(document))]
    if found:
        yield f"Measured, on batches of models ({len(found)}):"
        yield losses.table(found)
    else:
        yield "Of the batches of models that were measured: none."
    if ops:
        yield f"Measured, ops one by one, where another contender was faster in the same rounds ({len(ops)}):"
        yield losses.op_table(ops)
    if not any(document["machine"].get("gpu") for _, document in results):
        yield page_text.NO_GPU


def _others(machine: str, commands: Mapping[str, str | None]) -> str:
    lines = [
        (f"[{name}.json](../../benchmarks/results/{machine}/{name}.json)", command and f"`{command}`")
        for name, command in commands.items()
    ]
    return markdown(("document", "made by"), lines, text_columns=2)


if __name__ == "__main__":
    main()
