"""What fastbert is built to reach on one H200 (bfloat16, dropout 0.1, erf-GELU), and how far a measured run is from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .goals import Goal


@dataclass(frozen=True)
class Measurements:
    """The JSON documents of the benchmarks, by step: "ops <op>", "pretrain <size>", "finetune <size>", "compile <size>"."""

    documents: Mapping[str, Mapping[str, Any]]

    def op(self, op: str, direction: str, dropout_p: float, contender: str = "fastbert", case: str = "") -> dict[str, Any] | None:
        """The fastest record at BERT-base's width of the contenders and cases whose names begin so, None where there is none."""
        records = [
            r
            for r in self.documents.get(f"ops {op}", {}).get("results", [])
            if r["hidden"] == 768 and r["dropout_p"] == dropout_p and r.get("direction") == direction
            if r["contender"].startswith(contender) and r["case"].startswith(case)
        ]
        return min(records, key=lambda r: r["median_s"], default=None)

    def step(self, name: str, batch: str) -> dict[str, Any] | None:
        """The results of a training step on the batch whose name ends so."""
        results = self.documents.get(name, {}).get("results", {})
        return next((result for key, result in results.items() if key.endswith(batch)), None)

    # --- one figure each, None where it was not measured ---

    def attention(self, case: str, direction: str, dropout_p: float) -> float | None:
        record = self.op("attention", direction, dropout_p, case=case)
        return record and record["flops_per_s"] / 1e12

    def share(self, op: str, direction: str, dropout_p: float) -> float | None:
        record = self.op(op, direction, dropout_p)
        return record and record["share_of_ceiling"]

    def of_plain_linear(self) -> float | None:
        ours = self.op("linear_gelu", "forward", 0.0)
        plain = self.op("linear_gelu", "forward", 0.0, contender="plain linear")
        return plain["median_s"] / ours["median_s"] if ours and plain else None

    def loss_memory(self) -> float | None:
        record = self.op("mlm_loss", "backward", 0.0)
        return record["extra_bytes"] / 1e9 if record and record["extra_bytes"] is not None else None

    def rate(self, name: str, batch: str, key: str = "tokens_per_s", contender: str = "fastbert") -> float | None:
        """Of the fastest contender whose name begins so."""
        result = self.step(name, batch) or {}
        return max((result[c][key] for c in result if c.startswith(contender)), default=None)

    def ratio(self, name: str, batches: tuple[str, ...], against: str = "transformers") -> float | None:
        """The smallest over the batches of how many times fastbert's fastest contender is as fast as ``against``."""
        ratios = []
        for batch in batches:
            result = self.step(name, batch) or {}
            theirs = result.get(against)
            ours = self.rate(name, batch)
            if theirs and ours:
                ratios.append(ours / theirs["tokens_per_s"])
        return min(ratios, default=None)


_DENSE, _WIKIPEDIA = ("x 128", "x 512"), "padded to 512"
GOALS = (
    Goal("attention S512, p 0, forward", 380, "TFLOP/s", lambda m: m.attention("S512", "forward", 0.0)),
    Goal("attention S512, p 0, backward", 300, "TFLOP/s", lambda m: m.attention("S512", "backward", 0.0)),
    Goal("attention S512, p 0.1, forward", 320, "TFLOP/s", lambda m: m.attention("S512", "forward", 0.1)),
    Goal("attention S512, p 0.1, backward", 260, "TFLOP/s", lambda m: m.attention("S512", "backward", 0.1)),
    Goal("attention S128, p 0.1, forward", 230, "TFLOP/s", lambda m: m.attention("S128", "forward", 0.1)),
    Goal("attention S128, p 0.1, backward", 260, "TFLOP/s", lambda m: m.attention("S128", "backward", 0.1)),
    Goal("add_layer_norm, p 0.1, forward", 0.90, "of bandwidth", lambda m: m.share("add_layer_norm", "forward", 0.1)),
    Goal("add_layer_norm, p 0.1, backward", 0.85, "of bandwidth", lambda m: m.share("add_layer_norm", "backward", 0.1)),
    Goal("linear_gelu, forward", 0.92, "of plain linear", Measurements.of_plain_linear),
    Goal("mlm_loss, memory beyond dX and dW", 0.2, "GB", Measurements.loss_memory, at_most=True),
    Goal("pretraining base S128", 1.01e6, "tokens/s", lambda m: m.rate("pretrain base", "x 128")),
    Goal("pretraining base S512", 0.87e6, "tokens/s", lambda m: m.rate("pretrain base", "x 512")),
    Goal("pretraining large S128", 315e3, "tokens/s", lambda m: m.rate("pretrain large", "x 128")),
    Goal("pretraining large S512", 285e3, "tokens/s", lambda m: m.rate("pretrain large", "x 512")),
    Goal(
        "pretraining large, packed, 254 tokens on average", 1000, "sequences/s",
        lambda m: m.rate("pretrain large", _WIKIPEDIA, "sequences_per_s"),
    ),
    Goal("transformers, padded to 512, real lengths", 3.5, "x", lambda m: m.ratio("pretrain base", (_WIKIPEDIA,))),
    Goal("transformers, base, no padding", 1.9, "x", lambda m: m.ratio("pretrain base", _DENSE)),
    Goal("transformers, large, no padding", 1.6, "x", lambda m: m.ratio("pretrain large", _DENSE)),
    Goal(
        "transformers compiled, base, no padding", 1.4, "x",
        lambda m: m.ratio("compile base", _DENSE, "transformers compiled"),
    ),
    Goal(
        "transformers compiled, large, no padding", 1.25, "x",
        lambda m: m.ratio("compile large", _DENSE, "transformers compiled"),
    ),
    Goal("fine-tuning base 32 x 128", 4.0, "x", lambda m: m.ratio("finetune base", ("32 x 128",))),
    Goal("fine-tuning large 32 x 128", 2.5, "x", lambda m: m.ratio("finetune large", ("32 x 128",))),
)  # fmt: skip
