"""What a whole model has to do at the least: FLOPs and bytes of a forward pass and of a training step, whole and by part.

Every figure of the benchmarks ends in two shares: of the matmul rate (MFU: the FLOPs below by the measured rate, by the time that
was taken), and of the limit, the roofline (Williams, Waterman and Patterson, 2009):

    limit = max(FLOPs / matmul rate, bytes / copy bandwidth)

With T real tokens, P pairs of tokens that attend to each other, L layers, hidden H, intermediate I, M labelled rows, vocabulary V,
e bytes per element (``fastbert.train.telemetry`` has the same FLOPs):

    forward   FLOPs  2 L (T (4 H^2 + 2 H I) + 2 P H)
              bytes  e (L (4 H^2 + 2 H I) + 2 T H): every weight once, the embeddings' rows in, the hidden states out
    training  FLOPs  3 (forward + 2 M (H^2 + H V)) with masked words, 3 forward without
              bytes  2 e W + 32 W for the W weights that learn: read by both passes; the gradient in float32 written and read again;
                     AdamW reads the weight and its two moments and writes them (4 bytes each). What the backward pass keeps of the
                     forward pass is an implementation's choice and left out.

The parts (:func:`parts`) are what an implementation that runs the ops one after another would need at the least, each tensor read
and written once: more than the limit, which knows no ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import BertConfig

from fastbert.train import telemetry

from . import work
from .work import Work, floor_seconds
from .workloads import Workload

ELEMENT_SIZE = {"float32": 4, "bfloat16": 2, "int8": 1}
_OPTIMIZER_BYTES = 4 * 6  # weight and two moments, in and out
_GRADIENT_BYTES = 4 * 2
GEMM, ATTENTION, REST, OPTIMIZER = "gemm", "attention", "rest", "optimizer"


def linear_weights(config: BertConfig) -> int:
    """Elements of the matrices of all layers."""
    hidden = config.hidden_size
    return config.num_hidden_layers * (4 * hidden * hidden + 2 * hidden * config.intermediate_size)


def forward(config: BertConfig, batch: Workload, dtype: str) -> Work:
    """Of the encoder. int8: weights of one byte, hidden states in float32."""
    size = ELEMENT_SIZE[dtype]
    states = 2 * batch.tokens * config.hidden_size * (4 if dtype == "int8" else size)
    return Work(int(telemetry.encoder_flops(config, batch.tokens, batch.pairs)), size * linear_weights(config) + states)


def training_step(config: BertConfig, batch: Workload, dtype: str, labelled: float, weights: int) -> Work:
    """labelled: the share of tokens with a masked-LM label, 0 without that head; weights: elements that learn."""
    flops = telemetry.training_flops(config, batch.tokens, batch.pairs, labelled * batch.tokens)
    return Work(int(flops), weights * (2 * ELEMENT_SIZE[dtype] + _GRADIENT_BYTES + _OPTIMIZER_BYTES))


def parts(config: BertConfig, batch: Workload, dtype: str, labelled: float | None = None, weights: int = 0) -> dict[str, Work]:
    """By part of the profile (``gemm``, ``attention``, ``rest``, ``optimizer``) the work of a forward pass, or of a training step
    where ``labelled`` is a share, as of :func:`training_step`."""
    size = 2 if dtype == "bfloat16" else 4  # activations; int8's stay float32 between the matmuls
    hidden, wide, layers, rows = config.hidden_size, config.intermediate_size, config.num_hidden_layers, batch.tokens
    directions = work.DIRECTIONS[:1] if labelled is None else work.DIRECTIONS
    shapes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden))
    gemm = [Work(0, 0)]
    attention, rest = [Work(0, 0)], [Work(0, 0)]
    for direction in directions:
        matmuls = 1 if direction == "forward" else 2
        for inner, outer in shapes:
            moved = ELEMENT_SIZE[dtype] * inner * outer + size * rows * (inner + outer)
            gemm.append(Work(layers * matmuls * 2 * rows * inner * outer, layers * matmuls * moved))
        heads = {"num_heads": config.num_attention_heads, "head_dim": hidden // config.num_attention_heads}
        one = work.work("attention", direction, lengths=batch.lengths, **heads, element_size=size)
        attention.append(Work(layers * one.flops, layers * one.bytes))
        norm = work.bytes("add_layer_norm", direction, rows=rows, hidden=hidden, element_size=size)
        kept_for_backward = rows * hidden * size if labelled is None else 0
        embedded = work.bytes(
            "embedding_layer_norm", direction, rows=rows, hidden=hidden, vocabulary=config.vocab_size, element_size=size
        )
        rest.append(Work(0, 2 * layers * (norm - kept_for_backward) + embedded))
        if labelled:
            head = work.work("mlm_loss", direction, rows=int(labelled * rows), hidden=hidden, vocabulary=config.vocab_size,
                             element_size=size)  # fmt: skip
            gemm.append(head)
    found = {GEMM: _sum(gemm), ATTENTION: _sum(attention), REST: _sum(rest)}
    if labelled is not None:
        found[OPTIMIZER] = Work(0, weights * (_GRADIENT_BYTES // 2 + _OPTIMIZER_BYTES))
    return found


def rated(required: Work, seconds: float, limits: Mapping[str, Any]) -> dict[str, float]:
    """What every figure ends in: ``share_of_matmul_rate`` (MFU) and ``share_of_limit``."""
    return {
        "share_of_matmul_rate": required.flops / seconds / limits["matmul_flops"],
        "share_of_limit": floor_seconds(required, limits) / seconds,
    }


def _sum(works: list[Work]) -> Work:
    return Work(sum(w.flops for w in works), sum(w.bytes for w in works))
