"""The work of whole models and of their parts, beside numbers worked out by hand for a model that fits on paper."""

from __future__ import annotations

import pytest
from transformers import BertConfig

from benchmarks import model_work
from benchmarks.parts import ATTENTION, EMBEDDINGS, GELU, LAYER_NORM, LINEAR, OPTIMIZER
from benchmarks.work import Work
from benchmarks.workloads import Workload, config_for, workload
from fastbert.train import telemetry

# 2 layers, H = 4, I = 8, V = 10, 6 positions, 2 token types; T = 8 tokens, P = 9 + 25 = 34 pairs.
CONFIG = BertConfig(
    num_hidden_layers=2, hidden_size=4, num_attention_heads=2, intermediate_size=8, vocab_size=10,
    max_position_embeddings=6, type_vocab_size=2,
)  # fmt: skip
BATCH = Workload("two", (3, 5), 5)
LABELLED = 0.25  # 2 rows
WEIGHTS = 1000


@pytest.mark.parametrize(("dtype", "bytes"), [("float32", 1280), ("bfloat16", 640), ("int8", 256 + 256)])
def test_forward(dtype, bytes):
    # 4 H^2 + 2 H I = 128: 2 * 2 * (8 * 128 + 2 * 34 * 4) FLOPs; 2 * 128 weights and 2 * 8 * 4 elements of hidden states.
    assert model_work.linear_weights(CONFIG) == 256
    assert model_work.forward(CONFIG, BATCH, dtype) == Work(5184, bytes)


@pytest.mark.parametrize(
    ("dtype", "labelled", "expected"),
    [
        # Head: 2 * 2 * (4 * 4 + 4 * 10) = 224 FLOPs. Tables of single rows: (6 + 2) * 4 = 32 elements, 72 with the words.
        ("float32", LABELLED, Work(3 * (5184 + 224), 8 * (1000 - 32) + 32 * 1000)),
        ("float32", 0.0, Work(3 * 5184, 8 * (1000 - 72) + 32 * 1000)),
        ("bfloat16", LABELLED, Work(3 * (5184 + 224), 4 * (1000 - 32) + 32 * 1000)),
    ],
)
def test_training_step(dtype, labelled, expected):
    assert model_work.training_step(CONFIG, BATCH, dtype, labelled, WEIGHTS) == expected


def totals(parts: dict[str, list[Work]]) -> dict[str, tuple[int, int]]:
    return {part: (sum(op.flops for op in ops), sum(op.bytes for op in ops)) for part, ops in parts.items()}


def test_parts_of_a_forward_pass():
    assert totals(model_work.parts(CONFIG, BATCH, "float32")) == {
        # A layer's weights are 128 elements, its rows in and out 8 * ((4 + 12) + (4 + 4) + (4 + 8) + (8 + 4)) = 384.
        LINEAR: (2 * 2 * 8 * 128, 2 * 4 * (128 + 384)),
        ATTENTION: (2 * 4 * 34 * 4, 2 * 4 * 4 * 8 * 4),
        LAYER_NORM: (0, 4 * 3 * 8 * 4 * 4),
        EMBEDDINGS: (0, 2 * 8 * 4 * 4),
    }


def test_parts_of_a_forward_pass_in_int8():
    found = totals(model_work.parts(CONFIG, BATCH, "int8"))
    assert found[LINEAR] == (4096, 2 * (128 + 2 * 384))
    assert found[ATTENTION] == (1088, 2 * 4 * 8 * 4 * 2)


def test_parts_of_a_training_step():
    parts = model_work.parts(CONFIG, BATCH, "float32", LABELLED, WEIGHTS)
    assert totals(parts) == {
        # The head's transform: 16 weights, 2 * (4 + 4) elements of rows; the vocabulary's product: 40, 2 * 4 and no logits.
        LINEAR: (3 * (4096 + 224), 3 * (2 * 4 * (128 + 384) + 4 * (16 + 16) + 4 * (40 + 8))),
        ATTENTION: (3 * 1088, 2 * 4 * (4 + 8) * 8 * 4),
        # x, residual, y, z; dy, z, dresidual, dx. The head: x, y; dy, x, dx.
        LAYER_NORM: (0, 4 * (4 + 4) * 8 * 4 * 4 + (2 + 3) * 2 * 4 * 4),
        GELU: (0, 2 * 2 * 8 * 8 * 4),
        EMBEDDINGS: (0, 4 * 8 * 4 * 4 + 10 * 4 * 4),
        OPTIMIZER: (0, 28 * 1000),
    }


def test_parts_of_a_training_step_in_bfloat16():
    """Weights and rows of 2 bytes, the gradients of weights of 4."""
    found = totals(model_work.parts(CONFIG, BATCH, "bfloat16", LABELLED, WEIGHTS))
    forward, gradient = 2 * (128 + 384), 2 * 384 + 4 * 128
    head = 2 * 2 * (16 + 16) + (2 * 16 + 4 * 16) + 2 * 2 * (40 + 8) + (2 * 8 + 4 * 40)
    assert found[LINEAR][1] == 2 * (2 * forward + gradient) + head
    assert found[EMBEDDINGS][1] == 4 * 8 * 4 * 2 + 10 * 4 * 4
    assert found[OPTIMIZER][1] == 28 * 1000


def test_without_dropout_a_residual_has_one_gradient():
    plain = BertConfig(**{**CONFIG.to_dict(), "hidden_dropout_prob": 0.0})
    found = totals(model_work.parts(plain, BATCH, "float32", 0.0, WEIGHTS))
    assert found[LAYER_NORM] == (0, 4 * (4 + 3) * 8 * 4 * 4)


@pytest.mark.parametrize("labelled", [None, 0.0, 0.15])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", ["20x128", "1x40", "mnli"])
def test_parts_are_the_whole(batch, dtype, labelled):
    """Their FLOPs are the model's, and no part's floor makes the sum of them less than the limit."""
    config, batch = config_for("base"), workload(batch)
    weights = 110_000_000
    parts = model_work.parts(config, batch, dtype, labelled, weights)
    if labelled is None:
        whole = model_work.forward(config, batch, dtype)
    else:
        whole = model_work.training_step(config, batch, dtype, labelled, weights)
        assert whole.flops == int(telemetry.training_flops(config, batch.tokens, batch.pairs, labelled * batch.tokens))
    assert sum(op.flops for ops in parts.values() for op in ops) == pytest.approx(whole.flops, rel=1e-4)
    for copy_bytes in (1e10, 1e13):
        limits = {"matmul_flops": 1e11, "copy_bytes": copy_bytes}
        # Of matmuls alone the limit is the sum, up to the labelled rows, which are whole.
        assert sum(model_work.floors(parts, limits).values()) > (1 - 1e-4) * model_work.floor_seconds(whole, limits)


def test_floors_are_those_of_ops_one_after_another():
    parts = {LINEAR: [Work(100, 1), Work(0, 3)], GELU: []}
    assert model_work.floors(parts, {"matmul_flops": 10.0, "copy_bytes": 1.0}) == {LINEAR: 10.0 + 3.0, GELU: 0}


@pytest.mark.parametrize(("required", "mfu", "share"), [(Work(100, 50), 0.5, 0.5), (Work(40, 150), 0.2, 0.75)])
def test_rated(required, mfu, share):
    rated = model_work.rated(required, 2.0, {"matmul_flops": 100.0, "copy_bytes": 100.0})
    assert rated == {"share_of_matmul_rate": mfu, "share_of_limit": share}
