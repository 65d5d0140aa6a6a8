"""What a call without gradients needs beside its layers, natively: every instruction set against torch, float64 as the truth."""

from __future__ import annotations

import pytest
import torch

from fastbert.ops import native, reference
from fastbert.ops.encoder_layer import LinearWeights
from fastbert.ops.native.inference import EmbeddingTables, PackedDense, are_readable_ids, read_mask

from .helpers import assert_within_budget
from .test_native import REASON, instruction_set  # noqa: F401

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.bfloat16)
WORDS, POSITIONS, TYPES = 50, 12, 3


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (4, 9), (70, 130)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_mask_is_read_as_torch_reads_it(shape, share, nan_filled_memory):
    mask = (torch.rand(shape) < share).long() * torch.randint(1, 5, shape)
    cu_seqlens, longest, indices = read_mask(mask)
    lengths = (mask != 0).sum(1)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert longest == max(lengths.tolist(), default=0)
    assert torch.equal(indices, mask.flatten().nonzero().squeeze(1))


def test_which_ids_can_be_read():
    ids = torch.zeros(4, 6, dtype=torch.int64)
    assert are_readable_ids(ids, None, ids[:2])
    for other in (ids.int(), ids[:, ::2], ids.t(), ids.to("meta"), torch.nn.Parameter(ids, requires_grad=False)):
        assert not are_readable_ids(ids, other)


def tables(dtype: torch.dtype, hidden: int) -> list[torch.Tensor]:
    """In float64, of values that ``dtype`` holds: three tables, and the LayerNorm's weight and bias."""
    shapes = ((WORDS, hidden), (POSITIONS, hidden), (TYPES, hidden), (hidden,), (hidden,))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).double() for shape in shapes]


def expected(parts: list[torch.Tensor], dtype: torch.dtype, ids: torch.Tensor, types: torch.Tensor, positions: torch.Tensor):
    word, position, token_type, weight, bias = (part.to(dtype) for part in parts)
    z = word[ids] + token_type[types] + position[positions]
    return torch.nn.functional.layer_norm(z, (word.shape[1],), weight, bias, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [7, 64, 768])
def test_embeddings(instruction_set, dtype, hidden, nan_filled_memory):  # noqa: F811
    parts = tables(dtype, hidden)
    form = EmbeddingTables(*(part.to(dtype) for part in parts), 1e-12)
    ids, types = torch.randint(WORDS, (5, 9)), torch.randint(TYPES, (5, 9))
    positions, some = torch.randint(POSITIONS, (5, 9)), torch.tensor([0, 3, 8, 9, 40, 44])
    columns, zeros = torch.arange(9).expand(5, 9), torch.zeros_like(types)
    for given_types, given_positions, indices in (
        (None, None, None), (types, None, some), (None, positions, some), (types, positions, None), (types, None, some[:0]),
    ):  # fmt: skip
        got = form.embed(ids, given_types, given_positions, indices)
        all_ids = (ids, zeros if given_types is None else types, columns if given_positions is None else positions)
        real = [x.flatten() if indices is None else x.flatten()[indices] for x in all_ids]
        plain, truth = expected(parts, dtype, *real), expected(parts, torch.float64, *real)
        assert_within_budget([got], [plain], [truth], ["embeddings"])


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
@pytest.mark.parametrize("wrong", [-1, WORDS])
def test_an_id_in_no_table_is_refused_where_it_is_read(name, wrong):
    form = EmbeddingTables(*(part.float() for part in tables(torch.float32, 8)), 1e-12)
    ids = {key: torch.zeros(2, 4, dtype=torch.int64) for key in ("input_ids", "token_type_ids", "position_ids")}
    ids[name][1, 2] = wrong
    assert form.embed(**ids, indices=None) is None
    assert form.embed(**ids, indices=torch.tensor([0, 5, 7])) is not None


def test_columns_behind_the_last_position_are_refused():
    form = EmbeddingTables(*(part.float() for part in tables(torch.float32, 8)), 1e-12)
    ids = torch.zeros(1, POSITIONS + 1, dtype=torch.int64)
    assert form.embed(ids[:, :-1].contiguous(), None, None, None) is not None
    assert form.embed(ids, None, None, None) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(768, 768), (64, 8), (65, 30), (3, 2), (200, 130)])
@pytest.mark.parametrize("bias", [True, False])
def test_dense(instruction_set, dtype, out_features, in_features, bias, nan_filled_memory):  # noqa: F811
    weight = (torch.randn(out_features, in_features, dtype=torch.float64) * in_features**-0.5).to(dtype)
    b = torch.randn(out_features, dtype=torch.float64).to(dtype) if bias else None
    dense = PackedDense(LinearWeights(weight, b))
    x = torch.randn(200, 3, in_features, dtype=torch.float64).to(dtype)[:, 1]  # rows that are apart
    # torch multiplies one row by another kernel, which adds in another order: the budget is that of many.
    plain = torch.nn.functional.linear(x, weight, b)
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    assert_within_budget([dense(x)], [plain], [truth], ["dense"])
    parts = [dense(part.contiguous()) for part in x.split([0, 1, 5, 33, 161])]
    assert_within_budget([torch.cat(parts)], [plain], [truth], ["dense in parts"])


def test_extreme_rows_stay_among_themselves():
    weight = torch.randn(70, 16)
    x = torch.randn(4, 16)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    y = PackedDense(LinearWeights(weight, None))(x)
    assert torch.isfinite(y[[0, 3]]).all()
    assert not torch.isfinite(y[[1, 2]]).any()


def test_results_do_not_depend_on_the_threads():
    parts = [part.float() for part in tables(torch.float32, 768)]
    form, ids = EmbeddingTables(*parts, 1e-12), torch.randint(WORDS, (30, POSITIONS))
    dense, threads, runs = PackedDense(LinearWeights(torch.randn(768, 768), torch.randn(768))), torch.get_num_threads(), []
    x = torch.randn(40, 768)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append((form.embed(ids, None, None, None), dense(x)))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_embeddings_are_those_of_the_op():
    word, position, token_type, *norm = (part.float() for part in tables(torch.float32, 96))
    ids = [torch.randint(size, (3, 9)) for size in (WORDS, TYPES, POSITIONS)]
    got = EmbeddingTables(word, position, token_type, *norm, 1e-12).embed(*ids, None)
    flat = [x.flatten() for x in ids]
    assert torch.equal(got, native.embedding_layer_norm_forward(*flat, word, position, token_type, *norm, 1e-12)[0])
    expected = reference.embedding_layer_norm_forward(*flat, word, position, token_type, *norm, 1e-12)[0]
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)
