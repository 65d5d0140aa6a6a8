"""One row per sequence out of packed rows, against a loop over the sequences."""

from __future__ import annotations

import pytest
import torch

from fastbert.features.pooling import num_layers, sequence_rows, token_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences(dtype):
    lengths = [1, 7, 2, 30, 1]
    layers = [torch.randn(sum(lengths), 6).to(dtype) for _ in range(4)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    rows = token_rows(layers)
    assert rows.dtype == torch.float32 and torch.equal(rows[:, 6:12], layers[1].float())
    pieces = rows.double().split(lengths)
    for pooling, expected in (
        ("cls", torch.stack([piece[0] for piece in pieces])),
        ("mean", torch.stack([piece.mean(0) for piece in pieces])),
        ("last-4", torch.stack([piece.mean(0) for piece in pieces])),
        ("max", torch.stack([piece.amax(0) for piece in pieces])),
    ):
        got = sequence_rows(rows, cu_seqlens, pooling)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


def test_layers():
    assert [num_layers(pooling) for pooling in (None, "mean", "cls", "max", "last-4")] == [1, 1, 1, 1, 4]
