"""What fastbert is built to reach on two cores with AVX-512, BF16 and VNNI: ratios of bert-base within one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .goals import Goal
from .workloads import STANDARD, workloads

Results = Mapping[str, Mapping[str, Any]]


def _inference(goal: float, batch: str, ours: str, theirs: str) -> Goal:
    def measured(results: Results) -> float | None:
        ratio = results.get(batch, {}).get("ratios", {}).get(f"fastbert {ours}", {}).get(theirs)
        return ratio and ratio["median"]

    return Goal(f"{batch}: {ours} against {theirs}", goal, "x", measured)


# (ours, theirs) -> goals in the order of STANDARD
_INFERENCE = {
    ("float32", "transformers float32"): (2.65, 7.8, 2.6, 3.4),
    ("float32", "OpenVINO float32"): (1.08, 3.2, 1.06, 1.1),
    ("bfloat16", "transformers float32"): (5.3, 15.5, 5.2, 6.0),
    ("int8", "transformers float32"): (9.2, 27.0, 8.5, 10.0),
}
# They read the results of ``inference``.
INFERENCE_GOALS = tuple(
    _inference(goal, batch.name, *pair)
    for pair, row in _INFERENCE.items()
    for batch, goal in zip(workloads(STANDARD), row, strict=True)
)


def _step(suite: str, goal: float, batch: str, dtype: str, theirs: str = "transformers") -> Goal:
    def measured(runs: Mapping[str, Results]) -> float | None:
        ratio = runs.get(dtype, {}).get(batch, {}).get("times_faster", {}).get(theirs)
        return ratio and ratio["median"]

    return Goal(f"{suite}, {batch}: {dtype} against {theirs}", goal, "x", measured)


PADDED_TO_LONGEST = "transformers padded to the longest, oneDNN"
_MNLI, _DENSE = "MNLI lengths, padded to 128", "16 x 128"
# They read the results of training by dtype.
TRAINING_GOALS = {
    "finetune": (
        _step("finetune", 5.5, _MNLI, "float32"),
        _step("finetune", 2.0, _MNLI, "float32", PADDED_TO_LONGEST),
        _step("finetune", 3.0, _MNLI, "bfloat16"),
    ),
    "pretrain": (
        _step("pretrain", 3.0, _DENSE, "float32"),
        _step("pretrain", 2.0, _DENSE, "bfloat16"),
    ),
}
