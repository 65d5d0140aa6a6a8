"""The speed tables of README.md: two of one machine, and one of all CPUs.

What stands between ``<!-- from benchmarks/results: NAME -->`` and ``<!-- end -->`` is replaced by the table of that name:
``inference`` (milliseconds of a forward pass), ``training`` (of a step, with its peak memory), ``machines`` (ratios to
transformers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from ..cpu_goals import PADDED_TO_LONGEST
from ..workloads import STANDARD, Workload, model_title, workload, workloads
from .documents import Document, ReportError
from .rows import OURS, THEIRS, Row, model_of, rows_of
from .tables import by_batch, milliseconds

MACHINE = "zen5-2-cores"  # whose results README.md shows
_BLOCK = re.compile(r"(<!-- from benchmarks/results: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_MISSING = "-"
Documents = Mapping[str, Document]


def rendered(text: str, by_machine: Mapping[str, Documents]) -> str:
    """The text with its tables made anew from the machines' documents. Raises :class:`ReportError` for a table that there is not
    and for one whose documents are missing."""

    def table(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        if name not in TABLES:
            raise ReportError(f"README.md asks for the table {name!r} from benchmarks/results: there are {', '.join(TABLES)}")
        needed, make = TABLES[name]
        if missing := [f"{suite}.json" for suite in needed if suite not in by_machine.get(MACHINE, {})]:
            raise ReportError(f"README.md's table {name!r} needs {', '.join(missing)} in benchmarks/results/{MACHINE}")
        return f"{start}\n{make(by_machine)}\n\n{end}"

    return _BLOCK.sub(table, text)


def inference_table(by_machine: Mapping[str, Documents]) -> str:
    """A line for each contender with its dtypes, a column for each of the usual batches."""
    document = by_machine[MACHINE]["inference"]
    found = by_batch(rows_of(document))
    batches = [batch for batch in workloads(STANDARD) if batch.name in found]
    timed = [{(row.contender, row.dtype): row for row in found[batch.name] if row.reason is None} for batch in batches]
    dtypes: dict[str, dict[str, None]] = {}
    for contender, dtype in (key for of_batch in timed for key in of_batch):
        dtypes.setdefault(contender, {})[dtype] = None
    lines = [f"| | {' | '.join(_heading(batch, first=batch is batches[0]) for batch in batches)} |", _rule(len(batches) + 1)]
    for contender, of_contender in dtypes.items():
        cells = [" / ".join(_ms(of_batch.get((contender, dtype))) for dtype in of_contender) for of_batch in timed]
        if contender == OURS:
            cells = [f"**{cell}**" for cell in cells]
        lines.append(_line([f"{_label(contender, document)}, {' / '.join(of_contender)}", *cells]))
    ours = [of_batch.get((OURS, "float32")) for of_batch in timed]
    best = max((row.ratio or 0.0 for row in ours if row), default=0.0)
    shares = [f"{_times(row, bold=row.ratio == best)}, {row.share_of_matmul_rate:.0%}" if row else _MISSING for row in ours]
    return "\n".join([*lines, _line(["float32 against transformers, share of the matmul rate", *shares])])


def training_table(by_machine: Mapping[str, Documents]) -> str:
    """A line for each suite and dtype on its usual batch: milliseconds and peak memory of three contenders."""
    documents, contenders = by_machine[MACHINE], (THEIRS, PADDED_TO_LONGEST, OURS)
    headings = [model_title(model_of(documents["finetune"])), THEIRS, PADDED_TO_LONGEST.removeprefix(f"{THEIRS} "), OURS, "ratio"]
    lines = [_line(headings), _rule(len(headings))]
    for suite, task, spec in (("finetune", "classification", "mnli"), ("pretrain", "MLM + NSP", "16x128")):
        batch = workload(spec)
        timed = {(row.dtype, row.contender): row for row in rows_of(documents[suite]) if row.batch == batch.name and not row.reason}
        padding = f" ({THEIRS}: padded to {batch.padded_to})" if batch.has_padding else ", no padding"
        name = f"{task}, {_sequences(batch)}{padding}"
        for dtype in dict.fromkeys(dtype for dtype, _ in timed):
            cells = [_step(timed.get((dtype, contender))) for contender in contenders]
            precision = dtype if dtype == "float32" else f"{dtype} autocast"
            lines.append(_line([f"{name}, {precision}", *cells, _times(timed.get((dtype, OURS)), bold=True)]))
            name = "the same"
    return "\n".join(lines)


def machines_table(by_machine: Mapping[str, Documents]) -> str:
    """A line for each machine without a GPU, a column for each usual batch: how many times as fast as transformers in the same
    dtype, of int8 as transformers in float32."""
    columns = [("inference", batch) for batch in workloads(STANDARD)] + [
        ("finetune", workload("mnli")),
        ("pretrain", workload("16x128")),
    ]
    headings = [batch.name if suite == "inference" else f"{_DOING[suite]}, {batch.name}" for suite, batch in columns]
    lines = [_line(["", *headings]), _rule(len(columns) + 1)]
    for machine, documents in by_machine.items():
        if any(document["machine"].get("gpu") for document in documents.values()):
            continue
        cells = []
        for suite, batch in columns:
            rows = rows_of(documents[suite]) if suite in documents else []
            ours = [row for row in rows if row.batch == batch.name and row.contender == OURS and row.reason is None]
            cells.append(" / ".join(_times(row, bold=False) for row in ours) or _MISSING)
        lines.append(_line([f"[{machine}](docs/performance/{machine}.md)", *cells]))
    return "\n".join(lines)


_DOING = {"finetune": "fine-tuning", "pretrain": "pretraining"}

# name -> the suites that it needs of MACHINE, and how to make it
TABLES: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Documents]], str]]] = {
    "inference": (("inference",), inference_table),
    "training": (("finetune", "pretrain"), training_table),
    "machines": ((), machines_table),
}


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def _sequences(batch: Workload) -> str:
    """As in "32 x 128" and "32 of MNLI's lengths"."""
    return f"{len(batch.lengths)} of {batch.name.partition(' lengths')[0]}'s lengths" if batch.has_padding else batch.name


def _heading(batch: Workload, first: bool) -> str:
    if batch.has_padding:
        return f"{_sequences(batch)}, padded to {batch.padded_to}"
    return f"{batch.name}, no padding" if first else batch.name


def _label(contender: str, document: Document) -> str:
    version = document["machine"]["transformers"].rpartition(".")[0]
    labels = {
        OURS: f"**{OURS}**",
        THEIRS: f"{THEIRS} {version} (sdpa)",
        f"{THEIRS} sorted, oneDNN": f"{THEIRS}, sorted by length, oneDNN's matmul",
    }
    return labels.get(contender, contender)


def _ms(row: Row | None) -> str:
    return _MISSING if row is None or row.median_s is None else milliseconds(row.median_s)


def _times(row: Row | None, bold: bool) -> str:
    ratio = None if row is None else row.against_transformers[0]
    text = _MISSING if ratio is None else f"{ratio:.1f}x"
    return f"**{text}**" if bold else text


def _step(row: Row | None) -> str:
    if row is None:
        return _MISSING
    time = f"**{_ms(row)}**" if row.contender == OURS else _ms(row)
    return time if row.peak_bytes is None else f"{time}, {row.peak_bytes / 1e9:.1f} GB"
