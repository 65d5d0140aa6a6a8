"""The figures of a suite's document as flat rows, whoever wrote the document: ``fastbert bench``, ``python -m benchmarks.pretrain``
or an earlier version of either. Tables, plots and comparisons read rows and no documents.

Nothing here computes a figure that the document lacks, with one exception that says so: the ratio of two contenders of one race
whose rounds the document has not paired is the quotient of their medians, and has no quartiles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OURS, THEIRS = "fastbert", "transformers"
# Of models; "ops" has rows of its own.
MODEL_SUITES = ("inference", "finetune", "pretrain")
OPS_SUITE = "ops"
DTYPES = ("float32", "bfloat16", "int8")  # in the order in which they are shown
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A contender's figures on a batch, or the ``reason`` why there are none; what the document lacks is None. Without figures
    ``dtype`` may be empty: the reason holds in all of them.

    sequences, tokens: of the batch, real ones. median_s, q25_s, q75_s: seconds of a call or step over ``rounds`` rounds; rates are
    those of the median. ratio: how many times as fast as transformers in the same dtype; float32_ratio: as transformers in
    float32. share_of_matmul_rate (MFU), share_of_limit: see benchmarks/model_work.py, with flops and bytes the least work of the
    batch and matmul_flops (FLOP/s) and copy_bytes (B/s) the machine's ceilings in that run. peak_bytes: memory beyond weights,
    optimizer's state and batch. joules: of a call or step.
    """

    suite: str
    model: str
    batch: str
    dtype: str
    contender: str
    ours: bool
    reason: str | None = None
    sequences: int | None = None
    tokens: int | None = None
    median_s: float | None = None
    q25_s: float | None = None
    q75_s: float | None = None
    rounds: int | None = None
    tokens_per_s: float | None = None
    sequences_per_s: float | None = None
    ratio: float | None = None
    ratio_q25: float | None = None
    ratio_q75: float | None = None
    float32_ratio: float | None = None
    float32_ratio_q25: float | None = None
    float32_ratio_q75: float | None = None
    share_of_matmul_rate: float | None = None
    share_of_limit: float | None = None
    peak_bytes: int | None = None
    joules: float | None = None
    flops: int | None = None
    bytes: int | None = None
    matmul_flops: float | None = None
    copy_bytes: float | None = None

    @property
    def against_transformers(self) -> tuple[float | None, float | None, float | None]:
        """The ratio to transformers in the same dtype, of int8, which it has not, to its float32; with quartiles."""
        if self.dtype == "int8":
            return self.float32_ratio, self.float32_ratio_q25, self.float32_ratio_q75
        return self.ratio, self.ratio_q25, self.ratio_q75


@dataclass(frozen=True)
class OpRow:
    """A contender's figures in a direction ("forward", "backward") of an op's case, or the ``reason`` why there are none.

    direction: also "both", one after the other. flops_per_s, bytes_per_s: of the work that the op needs at the least
    (benchmarks/work.py); share_of_ceiling: of the roofline. fastbert_ratio: how many times as fast as this contender fastbert's own
    choice was, None for that itself.
    """

    op: str
    case: str
    hidden: int
    dropout_p: float
    dtype: str
    contender: str
    ours: bool
    direction: str | None = None
    reason: str | None = None
    median_s: float | None = None
    q25_s: float | None = None
    q75_s: float | None = None
    flops_per_s: float | None = None
    bytes_per_s: float | None = None
    share_of_ceiling: float | None = None
    fastbert_ratio: float | None = None
    fastbert_ratio_q25: float | None = None
    fastbert_ratio_q75: float | None = None


def digest(rows: Sequence[Row | OpRow]) -> str:
    """SHA-256 of all fields of the rows, in hexadecimal: what a picture carries of the rows that it shows."""
    return hashlib.sha256(json.dumps([asdict(row) for row in rows], sort_keys=True).encode()).hexdigest()


def rows_of(document: Figures) -> list[Row]:
    """Of a document of one of :data:`MODEL_SUITES`, in its order: batches, within each the contenders, then those without
    figures. Training's dtypes, races of their own, come one after another."""
    runs = document.get("runs")
    races = [document] if runs is None else [{"model": model_of(document), **run} for run in runs.values()]
    return [row for race in races for row in _race(document["benchmark"], race)]


def model_of(document: Figures) -> str:
    """The name of a size or a checkpoint's; earlier documents called it ``size``."""
    return document["model"] if "model" in document else document["size"]


def op_rows_of(document: Figures) -> list[OpRow]:
    """Of a document of ``ops``: its records in their order."""
    return [_op_row(record) for record in document["results"]]


def _op_row(record: Figures) -> OpRow:
    reason = next((record[key] for key in ("not_supported", "not_run", "failed") if record.get(key)), None)
    case = ("op", "case", "hidden", "dropout_p", "dtype", "contender")
    figures = ("direction", "median_s", "q25_s", "q75_s", "flops_per_s", "bytes_per_s", "share_of_ceiling")
    found: dict[str, Any] = {**{name: record[name] for name in case}, **{name: record.get(name) for name in figures}}
    ratio = _ratio("fastbert_ratio", record.get("fastbert_ratio"))
    return OpRow(**found, **ratio, ours=_is_ours(record["contender"]), reason=reason)


def _race(suite: str, race: Figures) -> Iterator[Row]:
    """``race``: contenders that took turns on the same batches. Inference has all dtypes in it, training one."""
    model = model_of(race)
    for batch, measured in race["results"].items():
        of_batch = {"suite": suite, "model": model, "batch": batch}
        of_batch |= {"sequences": measured.get("sequences"), "tokens": measured.get("tokens")}
        if "contenders" in measured:
            yield from _inference(of_batch, measured, race)
        else:
            yield from _one_dtype(of_batch, measured, race)


def _inference(of_batch: dict[str, Any], measured: Figures, race: Figures) -> Iterator[Row]:
    """Contenders are named "<title> <dtype>"."""
    contenders, baseline = measured["contenders"], f"{THEIRS} float32"
    for name, figures in contenders.items():
        dtype = figures["dtype"]
        same = f"{THEIRS} {dtype}"
        paired = dict(measured["ratios"].get(name, {}))
        if name in measured["baseline_ratios"]:
            paired.setdefault(baseline, measured["baseline_ratios"][name])
        # Before documents had bytes, too.
        required = measured["work"][dtype] if "work" in measured else {"flops": measured.get("flops")}
        yield Row(
            **of_batch,
            **_named(name.removesuffix(f" {dtype}"), dtype),
            **_measured(figures),
            **_ratio("ratio", _ratio_of(name, same, paired, contenders)),
            **_ratio("float32_ratio", _ratio_of(name, baseline, paired, contenders)),
            **_limits(required, race["ceilings"][dtype]),
        )
    for name, reason in {**race.get("not_run", {}), **measured["failed"]}.items():
        title, _, dtype = name.rpartition(" ")
        yield Row(**of_batch, **(_named(title, dtype) if dtype in DTYPES else _named(name, "")), reason=reason)


def _one_dtype(of_batch: dict[str, Any], measured: Figures, race: Figures) -> Iterator[Row]:
    """Contenders stand beside other keys of the batch. The earliest documents had two of them and one ratio."""
    dtype = race["dtype"]
    contenders = {key: value for key, value in measured.items() if isinstance(value, Mapping) and "median_s" in value}
    paired = measured.get("ratios") or {OURS: measured.get("ratio")}
    for name, figures in contenders.items():
        of_race = {"share_of_matmul_rate": measured.get("share_of_matmul_rate")} if name == OURS else {}
        ratio = _ratio_of(name, THEIRS, {THEIRS: paired[name]} if paired.get(name) else {}, contenders)
        yield Row(
            **of_batch,
            **_named(name, dtype),
            **_measured({**of_race, **figures}),
            **_ratio("ratio", ratio),
            **_ratio("float32_ratio", ratio if dtype == "float32" else None),
            **_limits(measured.get("work", {}), race["ceilings"]),
        )
    for name, reason in {**race.get("not_run", {}), **measured.get("failed", {})}.items():
        yield Row(**of_batch, **_named(name, dtype), reason=reason)


def _named(contender: str, dtype: str) -> dict[str, Any]:
    return {"contender": contender, "dtype": dtype, "ours": _is_ours(contender)}


def _is_ours(contender: str) -> bool:
    return contender.split(" ")[0] == OURS


def _measured(figures: Figures) -> dict[str, Any]:
    times = ("median_s", "q25_s", "q75_s", "rounds", "tokens_per_s", "sequences_per_s")
    found = {name: figures.get(name) for name in (*times, "share_of_matmul_rate", "share_of_limit", "joules")}
    # Earlier documents of training called it step_bytes.
    return {**found, "peak_bytes": figures.get("peak_bytes", figures.get("step_bytes"))}


def _limits(required: Figures, ceilings: Figures) -> dict[str, Any]:
    """The least work of a batch and the machine's ceilings."""
    return {
        "flops": required.get("flops"), "bytes": required.get("bytes"),
        "matmul_flops": ceilings["matmul_flops"], "copy_bytes": ceilings["copy_bytes"],
    }  # fmt: skip


def _ratio_of(name: str, to: str, paired: Mapping[str, Figures], contenders: Mapping[str, Figures]) -> Figures | None:
    """How many times ``name`` is as fast as ``to``; None for itself and where ``to`` took no part."""
    if name == to or to not in contenders:
        return None
    return paired.get(to) or {"median": contenders[to]["median_s"] / contenders[name]["median_s"]}


def _ratio(field: str, ratio: Figures | None) -> dict[str, Any]:
    ratio = ratio or {}
    return {field: ratio.get("median"), f"{field}_q25": ratio.get("q25"), f"{field}_q75": ratio.get("q75")}
