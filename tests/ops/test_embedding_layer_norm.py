"""Every backend of ``embedding_layer_norm`` against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbert.ops import embedding_layer_norm, reference

from .helpers import (
    SMALLEST,
    assert_within_budget,
    backend_cases,
    device_of,
    gradients,
    merged,
    new_seed,
    rounded,
    skip_unless_width_suits,
)

EPS = 1e-12
NAMES = ["y", "dword", "dposition", "dtoken_type", "dweight", "dln_bias"]
WORDS, POSITIONS, TOKEN_TYPES, PADDING = 11, 7, 2, 3
CASES = backend_cases("embedding_layer_norm")
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def draw_ids(rows):
    """Few enough words for every id to repeat; row 0 is padding, the last word never occurs."""
    input_ids, position_ids = torch.randint(WORDS - 1, (rows,)), torch.randint(POSITIONS, (rows,))
    input_ids[:1] = PADDING
    return input_ids, torch.randint(TOKEN_TYPES, (rows,)), position_ids


def draw_parameters(hidden, scale=1.0, offset=0.0):
    tables = [torch.randn(n, hidden, dtype=torch.float64) * scale + offset for n in (WORDS, POSITIONS, TOKEN_TYPES)]
    return [*tables, *(torch.randn(hidden, dtype=torch.float64) for _ in range(2))]


def plain(ids, *parameters, dropout_p=0.0, seed=None, stream=0):
    """As transformers' BertEmbeddings spells it, in the tables' dtype."""
    word, position, token_type, weight, ln_bias = parameters
    input_ids, token_type_ids, position_ids = ids
    z = F.embedding(input_ids, word, PADDING) + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
    return reference.dropout(F.layer_norm(z, (z.shape[1],), weight, ln_bias, EPS), dropout_p, seed, stream)


def ours(ids, *parameters, backend, **options):
    device = device_of(backend)
    input_ids, token_type_ids, position_ids = (i.to(device) for i in ids)
    return embedding_layer_norm(
        input_ids, token_type_ids, position_ids, *parameters, EPS, padding_idx=PADDING, backend=backend, **options
    )


def check(backend, dtype, rows, hidden, dropout_p=0.0, scale=1.0, offset=0.0) -> None:
    skip_unless_width_suits(backend, hidden)
    device, seed = device_of(backend), new_seed()

    def draw():
        ids = draw_ids(rows)
        inputs = rounded(*draw_parameters(hidden, scale, offset), dtype=dtype)
        dy = torch.randn(rows, hidden, dtype=torch.float64).to(dtype).double()

        def fused(*leaves):
            return ours(ids, *leaves, backend=backend, dropout_p=dropout_p, seed=seed.to(device), stream=5)

        def spelled_out(*leaves):
            return plain(ids, *leaves, dropout_p=dropout_p, seed=seed, stream=5)

        return (
            gradients(fused, inputs, dy, dtype, device),
            gradients(spelled_out, inputs, dy, dtype),
            gradients(spelled_out, inputs, dy, torch.float64),
        )

    assert_within_budget(*merged(draw, rows * hidden), NAMES)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 8), (3, 7), (37, 96), (130, 40), (5, 768), (2, 1000)])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_shapes(backend, dtype, rows, hidden, dropout_p):
    check(backend, dtype, rows, hidden, dropout_p)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_rows_far_from_zero(backend, dtype):
    check(backend, dtype, 9, 64, offset=50.0)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_long_sums_keep_their_digits(backend, dtype):
    """2,000 rows of one word, one position and one type: summed in a 16-bit dtype the gradient would stop growing."""
    device, hidden, rows = device_of(backend), 8, 2000
    ids = [torch.ones(rows, dtype=torch.int64) for _ in range(3)]
    inputs = rounded(*draw_parameters(hidden), dtype=dtype)
    dy = torch.randn(hidden, dtype=torch.float64).to(dtype).double().expand(rows, hidden)
    got = gradients(lambda *leaves: ours(ids, *leaves, backend=backend), inputs, dy, dtype, device)
    summed_in_float32 = gradients(lambda *leaves: plain(ids, *leaves), inputs, dy, torch.float32)
    truth = gradients(lambda *leaves: plain(ids, *leaves), inputs, dy, torch.float64)
    assert_within_budget(got, [t.to(dtype) for t in summed_in_float32], truth, NAMES)


@pytest.mark.parametrize("padding", [-1, 0, 5])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_runs_of_all_lengths(backend, dtype, padding):
    """An id on one row, and on as many as make kernels cut its rows in two or more pieces, which begin and end anywhere."""
    device, hidden = device_of(backend), 40
    words = torch.arange(WORDS).repeat_interleave(torch.tensor([1, 63, 64, 65, 0, 200, 2, 128, 127, 1, 66]))
    ids = [i[torch.randperm(len(words))] for i in (words, torch.arange(len(words)) % 2, torch.arange(len(words)) % 3)]
    inputs = rounded(*draw_parameters(hidden), dtype=dtype)
    dy = torch.randn(len(words), hidden, dtype=torch.float64).to(dtype).double()

    def fused(*leaves):
        return embedding_layer_norm(*(i.to(device) for i in ids), *leaves, EPS, padding_idx=padding, backend=backend)

    def spelled_out(word, position, token_type, weight, ln_bias):
        z = F.embedding(ids[0], word, None if padding < 0 else padding)
        z = z + F.embedding(ids[1], token_type) + F.embedding(ids[2], position)
        return F.layer_norm(z, (hidden,), weight, ln_bias, EPS)

    got = gradients(fused, inputs, dy, dtype, device)
    in_dtype = gradients(spelled_out, inputs, dy, dtype)
    assert_within_budget(got, in_dtype, gradients(spelled_out, inputs, dy, torch.float64), NAMES)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_no_rows(backend, dtype):
    device = device_of(backend)
    leaves = [p.to(device, dtype).requires_grad_() for p in draw_parameters(16)]
    y = ours(draw_ids(0), *leaves, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 16)
    assert all((leaf.grad.double().abs() < SMALLEST).all() for leaf in leaves)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_padding_and_absent_ids_have_no_gradient(backend, dtype):
    device = device_of(backend)
    leaves = [p.to(device, dtype).requires_grad_() for p in draw_parameters(24)]
    ids = draw_ids(40)
    y = ours(ids, *leaves, backend=backend)
    y.backward(torch.randn_like(y))
    size = leaves[0].grad.cpu().double().abs().amax(1)
    assert (size[[PADDING, WORDS - 1]] < SMALLEST).all()
    present = ids[0].unique()
    assert (size[present[present != PADDING]] > SMALLEST).all()


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_no_padding_row_unless_asked_for(backend, dtype):
    device = device_of(backend)
    word, *others = (p.to(device, dtype) for p in draw_parameters(24))
    word.requires_grad_()
    ids = [i.to(device) for i in draw_ids(40)]
    y = embedding_layer_norm(*ids, word, *others, EPS, backend=backend)
    y.backward(torch.randn_like(y))
    assert word.grad[PADDING].abs().max() > SMALLEST


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_dropout_mask_is_the_references_bit_for_bit(backend, dtype):
    device, rows, hidden, seed = device_of(backend), 33, 88 if backend == "cuda" else 83, new_seed()
    parameters = [p.to(device, dtype) for p in draw_parameters(hidden)]
    y = ours(draw_ids(rows), *parameters, backend=backend, dropout_p=0.35, seed=seed.to(device), stream=11)
    keep = reference.row_keep(torch.zeros(rows, hidden), 0.35, seed, 11)
    assert torch.equal(y.cpu().double().abs() > SMALLEST, keep)


@pytest.mark.parametrize("wanted", [(False, True, True, True, True), (True, False, False, False, False), (False,) * 4 + (True,),
                                    (False, False, True, False, True)])  # fmt: skip
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_gradients_of_some_inputs_only(backend, dtype, wanted):
    device, ids = device_of(backend), draw_ids(21)
    parameters = [p.to(device, dtype) for p in draw_parameters(24)]
    dy = torch.randn(21, 24, device=device, dtype=dtype)
    full = [p.clone().requires_grad_() for p in parameters]
    ours(ids, *full, backend=backend).backward(dy)
    some = [p.clone().requires_grad_(needed) for p, needed in zip(parameters, wanted, strict=True)]
    ours(ids, *some, backend=backend).backward(dy)
    for a, b, needed in zip(some, full, wanted, strict=True):
        assert (a.grad is not None) == needed
        assert not needed or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_what_is_not_wanted_is_not_made(backend, dtype):
    """The operator of the backward: no memory for a table that is frozen."""
    device = device_of(backend)
    ids = [i.to(device) for i in draw_ids(5)]
    *tables, weight, ln_bias = (p.to(device, dtype) for p in draw_parameters(8))
    y, mean, rstd = torch.ops.fastbert.embedding_layer_norm(*ids, *tables, weight, ln_bias, -1, EPS, 0.0, None, 0, backend)
    arguments = (torch.ones_like(y), *ids, *tables, weight, mean, rstd, -1)
    for needs in ([False, True, False, True, False], [False] * 4 + [True]):
        grads = torch.ops.fastbert.embedding_layer_norm_backward(*arguments, needs, 0.0, None, 0, backend)
        assert [grad.numel() > 0 for grad in grads] == needs


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_two_runs_give_the_same_bits(backend, dtype):
    device, ids = device_of(backend), draw_ids(300)
    inputs, dy = draw_parameters(48), torch.randn(300, 48)
    runs = [gradients(lambda *leaves: ours(ids, *leaves, backend=backend), inputs, dy, dtype, device) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_int32_ids_and_parameters_of_other_dtypes_are_converted():
    ids, parameters = draw_ids(9), [p.float().to(device_of("auto")) for p in draw_parameters(8)]
    expected = ours(ids, *parameters, backend="auto")
    got = ours([i.int() for i in ids], parameters[0], *(p.double() for p in parameters[1:]), backend="auto")
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, r"input_ids has shape \(2, 3\), expected \(rows,\)"),
        ({"position_ids": torch.zeros(3, dtype=torch.long)}, r"position_ids has shape \(3,\), expected \(2,\)"),
        ({"token_type_ids": torch.zeros(2)}, "token_type_ids has dtype torch.float32, expected torch.int64"),
        ({"position": torch.zeros(4, 5)}, r"position has shape \(4, 5\), expected \(number of ids, hidden\)"),
        ({"weight": torch.zeros(5)}, r"weight has shape \(5,\), expected \(4,\)"),
        ({"padding_idx": 6}, "padding_idx is 6, expected a row of word, 0 to 5"),
        ({"dropout_p": 0.1}, "needs a seed"),
        ({"input_ids": torch.tensor([0, 6])}, "input_ids holds 6, expected 0 to 5"),
        ({"input_ids": torch.tensor([-1, 0])}, "input_ids holds -1"),
        ({"token_type_ids": torch.tensor([0, 2])}, "token_type_ids holds 2, expected 0 to 1"),
        ({"position_ids": torch.tensor([0, 3])}, "position_ids holds 3, expected 0 to 2"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_bad_input_is_named(change, message, backend):
    arguments = {
        "input_ids": torch.tensor([1, 5]), "token_type_ids": torch.tensor([0, 1]), "position_ids": torch.tensor([0, 1]),
        "word": torch.zeros(6, 4), "position": torch.zeros(3, 4), "token_type": torch.zeros(2, 4),
        "weight": torch.ones(4), "ln_bias": torch.zeros(4), "eps": EPS, "backend": backend,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        embedding_layer_norm(**{**arguments, **change})
