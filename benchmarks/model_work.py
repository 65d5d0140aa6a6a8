"""What a whole model has to do at the least: FLOPs and bytes of a forward pass and of a training step, whole and by part.

Every figure of the benchmarks ends in two shares: of the matmul rate (MFU: the FLOPs below by the measured rate, by the time that
was taken), and of the limit, the roofline (Williams, Waterman and Patterson, 2009):

    limit = max(FLOPs / matmul rate, bytes / copy bandwidth)

With T real tokens, P pairs of tokens that attend to each other, L layers, hidden H, intermediate I, M labelled rows, vocabulary V,
e bytes per element (``fastbert.train.telemetry`` has the same FLOPs):

    forward   FLOPs  2 L (T (4 H^2 + 2 H I) + 2 P H)
              bytes  e (L (4 H^2 + 2 H I) + 2 T H): every weight once, the embeddings' rows in, the hidden states out
    training  FLOPs  3 (forward + 2 M (H^2 + H V)) with masked words, 3 forward without
              bytes  2 e (W - E) + 32 W for the W weights that learn, E of them in tables of which a step reads some rows only
                     (positions, token types, and the words without a masked-LM head): the others are read by both passes; the
                     gradient in float32 written and read again; AdamW reads the weight and its two moments and writes them (4
                     bytes each). What the backward pass keeps of the forward pass is an implementation's choice and left out.

The parts (:func:`parts`) are those of a profile (``benchmarks.parts``), each a list of ops that run one after another, with every
tensor of an op read and written once: together more than the limit, which knows no ops. Their FLOPs are the whole model's. GELU has
no pass of its own in them, since a matmul can apply it as it stores, only the pre-activation that a training step keeps. An
implementation whose rows stay in the caches between two ops can be faster than a floor of bytes, and one that computes less than
the published model (fastbert's last layer before a masked-LM head, where it goes on with the rows that are read) than any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import BertConfig

from fastbert.train import telemetry

from . import work
from .parts import ATTENTION, EMBEDDINGS, GELU, LAYER_NORM, LINEAR, OPTIMIZER
from .work import Work, floor_seconds
from .workloads import Workload

ELEMENT_SIZE = {"float32": 4, "bfloat16": 2, "int8": 1}
_FLOAT32 = 4
_OPTIMIZER_BYTES = _FLOAT32 * 6  # weight and two moments, in and out
_GRADIENT_BYTES = _FLOAT32 * 2


def linear_weights(config: BertConfig) -> int:
    """Elements of the matrices of all layers."""
    hidden = config.hidden_size
    return config.num_hidden_layers * (4 * hidden * hidden + 2 * hidden * config.intermediate_size)


def forward(config: BertConfig, batch: Workload, dtype: str) -> Work:
    """Of the encoder. int8: weights of one byte, hidden states in float32."""
    size = ELEMENT_SIZE[dtype]
    states = 2 * batch.tokens * config.hidden_size * (_FLOAT32 if dtype == "int8" else size)
    return Work(int(telemetry.encoder_flops(config, batch.tokens, batch.pairs)), size * linear_weights(config) + states)


def training_step(config: BertConfig, batch: Workload, dtype: str, labelled: float, weights: int) -> Work:
    """labelled: the share of tokens with a masked-LM label, 0 without that head; weights: elements that learn."""
    flops = telemetry.training_flops(config, batch.tokens, batch.pairs, labelled * batch.tokens)
    read = max(0, weights - _rows_read_singly(config, labelled))
    return Work(int(flops), 2 * ELEMENT_SIZE[dtype] * read + weights * (_GRADIENT_BYTES + _OPTIMIZER_BYTES))


def _rows_read_singly(config: BertConfig, labelled: float) -> int:
    """Elements of the embeddings' tables, without that of the words where the masked-LM head multiplies by all of it."""
    tables = config.max_position_embeddings + config.type_vocab_size + (0 if labelled else config.vocab_size)
    return tables * config.hidden_size


def parts(
    config: BertConfig, batch: Workload, dtype: str, labelled: float | None = None, weights: int = 0
) -> dict[str, list[Work]]:
    """By part the ops of a forward pass, or of a training step where ``labelled`` is a share, as of :func:`training_step`.

    A part that is not there needs nothing at the least. Activations have 4 bytes in float32, else 2 (also between int8's matmuls);
    gradients of weights have 4, since the weights that learn are float32.
    """
    size, training = 4 if dtype == "float32" else 2, labelled is not None
    hidden, wide, layers, rows = config.hidden_size, config.intermediate_size, config.num_hidden_layers, batch.tokens
    labelled_rows = int((labelled or 0.0) * rows)

    def linear(rows: int, inner: int, outer: int, stored: int) -> list[Work]:
        """One product, with training also those of its two gradients; ``stored``: elements of the result."""
        flops, moved = 2 * rows * inner * outer, ELEMENT_SIZE[dtype] * inner * outer + size * (rows * inner + stored)
        gradient = Work(flops, size * (rows * inner + stored) + _FLOAT32 * inner * outer)
        return [Work(flops, moved), Work(flops, moved), gradient] if training else [Work(flops, moved)]

    shapes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden))
    found = {LINEAR: layers * [op for shape in shapes for op in linear(rows, *shape, stored=rows * shape[1])]}
    heads = {"num_heads": config.num_attention_heads, "head_dim": hidden // config.num_attention_heads}
    attention = {d: work.work("attention", d, lengths=batch.lengths, **heads, element_size=size) for d in work.DIRECTIONS}
    found[ATTENTION] = layers * [attention["forward"]]
    if not training:
        # x and the residual in, y out: no z for a backward pass.
        found[LAYER_NORM] = 2 * layers * [Work(0, 3 * rows * hidden * size)]
        found[EMBEDDINGS] = [Work(0, 2 * rows * hidden * size)]
        return found
    # Twice the forward's FLOPs: one that keeps the scores does not compute them again, as ``work`` counts.
    found[ATTENTION] += layers * [Work(2 * attention["forward"].flops, attention["backward"].bytes)]
    dropout = config.hidden_dropout_prob > 0
    norms = [work.work("add_layer_norm", d, rows=rows, hidden=hidden, element_size=size, dropout=dropout) for d in work.DIRECTIONS]
    found[LAYER_NORM] = 2 * layers * norms
    found[GELU] = 2 * layers * [Work(0, rows * wide * size)]  # the pre-activation, written and read
    table_gradient = Work(0, 2 * rows * hidden * size + config.vocab_size * hidden * _FLOAT32)
    found[EMBEDDINGS] = [Work(0, 2 * rows * hidden * size), table_gradient]
    found[OPTIMIZER] = [Work(0, weights * (_GRADIENT_BYTES // 2 + _OPTIMIZER_BYTES))]
    if labelled:
        found[LINEAR] += linear(labelled_rows, hidden, hidden, stored=labelled_rows * hidden)
        found[LINEAR] += linear(labelled_rows, hidden, config.vocab_size, stored=0)  # no logits, as ops.mlm_loss
        found[LAYER_NORM] += [
            work.work("gelu_layer_norm", d, rows=labelled_rows, hidden=hidden, element_size=size) for d in work.DIRECTIONS
        ]
    return found


def floors(required: Mapping[str, list[Work]], limits: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each of the :func:`parts` on a machine with these ceilings: the sum of its ops' floors."""
    return {part: sum(floor_seconds(op, limits) for op in ops) for part, ops in required.items()}


def rated(required: Work, seconds: float, limits: Mapping[str, Any]) -> dict[str, float]:
    """What every figure ends in: ``share_of_matmul_rate`` (MFU) and ``share_of_limit``."""
    return {
        "share_of_matmul_rate": required.flops / seconds / limits["matmul_flops"],
        "share_of_limit": floor_seconds(required, limits) / seconds,
    }
