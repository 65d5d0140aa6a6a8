"""The encoder layer in one C++ call: every instruction set and dtype of weights against float64."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from fastbert.ops import native, reference
from fastbert.ops.encoder_layer import EncoderLayerWeights, LayerNormWeights, LinearWeights, encoder_layer
from fastbert.ops.native.encoder_layer import (
    PackedEncoderLayer,
    PackedEncoderLayers,
    not_supported_reasons,
    run_layers,
    work_counted,
)

from .helpers import assert_within_budget
from .test_native import REASON, SETS, instruction_set  # noqa: F401

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
# hidden, intermediate, heads: of BERT, of whole panels, and of neither whole vectors nor whole panels
SHAPES = ((768, 3072, 12), (128, 512, 2), (72, 204, 3), (12, 20, 1))
# Few rows are divided by columns, many by rows, more than a thousand in chunks of sequences.
LENGTHS = ((5,), (32,), (7, 0, 1, 40), (40,) * 14 + (3,), (0, 400, 0, 333, 500, 1, 0))


def draw(hidden: int, intermediate: int, heads: int, dtype: torch.dtype, bias: bool = True) -> EncoderLayerWeights:
    """Weights whose values ``dtype`` holds, in float64; for int8 the weights are quantised, the rest is float32."""

    def linear(out_features: int, in_features: int) -> LinearWeights:
        weight = torch.randn(out_features, in_features, dtype=torch.float64) * in_features**-0.5
        b = (torch.randn(out_features, dtype=torch.float64) * 0.1).to(_activations(dtype)).double() if bias else None
        if dtype == torch.int8:
            return LinearWeights(*_quantized(weight, b))
        return LinearWeights(weight.to(dtype).double(), b)

    def norm() -> LayerNormWeights:
        weight, shift = 1 + torch.randn(hidden, dtype=torch.float64) * 0.1, torch.randn(hidden, dtype=torch.float64) * 0.1
        return LayerNormWeights(weight.to(_activations(dtype)).double(), shift.to(_activations(dtype)).double(), 1e-12)

    linears = (linear(3 * hidden, hidden), linear(hidden, hidden), linear(intermediate, hidden), linear(hidden, intermediate))
    return EncoderLayerWeights(
        linears[0], linears[1], norm(), linears[2], linears[3], norm(), heads, (hidden // heads) ** -0.5
    )  # fmt: skip


def _quantized(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    quantized, scale = reference.quantize_weight(weight.float())
    return quantized, None if bias is None else bias.float(), scale


def _activations(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.int8 else dtype


def converted(weights: EncoderLayerWeights, dtype: torch.dtype, dequantize: bool = False) -> EncoderLayerWeights:
    """With all that is not int8 in ``dtype``, and int8 too where it is to be dequantised."""

    def of(layer: LinearWeights | LayerNormWeights):
        if isinstance(layer, LayerNormWeights):
            return LayerNormWeights(layer.weight.to(dtype), layer.bias.to(dtype), layer.eps)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        if layer.scale is None:
            return LinearWeights(layer.weight.to(dtype), bias)
        if dequantize:
            return LinearWeights(layer.weight.to(dtype) * layer.scale.to(dtype)[:, None], bias)
        return LinearWeights(layer.weight, layer.bias, layer.scale)

    parts = {name: of(layer) for name, layer in (*weights.linears(), *weights.norms())}
    return dataclasses.replace(weights, **parts)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _cases() -> list:
    """Every shape with every division of the rows on the widest instruction set; on the others, whose rows are divided alike, every
    second pair of them, and not what takes seconds."""
    cases = []
    for name in SETS:
        for i, shape in enumerate(SHAPES):
            for j, lengths in enumerate(LENGTHS):
                quick = (i + j) % 2 == 0 and not (shape[0] == 768 and sum(lengths) > 100)
                if quick or name == SETS[-1]:
                    cases.append(pytest.param(name, *shape, lengths, id=f"{name}-{shape}-{lengths}"))
    return cases


CASES = pytest.mark.parametrize(
    ("instruction_set", "hidden", "intermediate", "heads", "lengths"), _cases(), indirect=["instruction_set"]
)


def check(weights: EncoderLayerWeights, exact: EncoderLayerWeights, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """On rows of ``dtype``, against plain torch with ``weights`` and the truth of ``exact`` in float64."""
    cu_seqlens, longest = bounds(lengths), max(lengths)
    x = torch.randn(sum(lengths), weights.hidden).to(dtype)
    truth = reference.encoder_layer_forward(x.double(), cu_seqlens, longest, exact)
    plain = reference.encoder_layer_forward(x, cu_seqlens, longest, weights)
    ours = encoder_layer(x, cu_seqlens, longest, weights, backend="native")
    assert_within_budget([ours], [plain], [truth], ["y"])


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("nan_filled_memory")
def test_every_instruction_set_is_right(instruction_set, dtype, hidden, intermediate, heads, lengths):  # noqa: F811
    exact = draw(hidden, intermediate, heads, dtype, bias=hidden != 12)
    weights = converted(exact, dtype)
    check(weights, exact, lengths, dtype)


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("nan_filled_memory")
def test_int8(instruction_set, dtype, hidden, intermediate, heads, lengths):  # noqa: F811
    """Against the float64 layer of the same weights, whose activations are not rounded to int8."""
    weights = draw(hidden, intermediate, heads, torch.int8)
    check(weights, converted(weights, torch.float64, dequantize=True), lengths, dtype)


@CASES
@pytest.mark.usefixtures("nan_filled_memory")
def test_bfloat16_weights_under_float32_rows(instruction_set, hidden, intermediate, heads, lengths):  # noqa: F811
    """As under autocast: what enters a linear layer is rounded, residuals and LayerNorms are not."""
    exact = draw(hidden, intermediate, heads, torch.bfloat16)
    weights = converted(exact, torch.float32).with_linears(torch.bfloat16)
    check(weights, exact, lengths, torch.float32)


@pytest.mark.parametrize("lengths", [(32,), (300, 2, 298)], ids=str)
def test_int8_products_are_exact(instruction_set, lengths):  # noqa: F811
    """Where nothing but one linear layer moves the result, it is that layer to the last digits but a few: no budget of int8."""
    hidden, intermediate = 64, 128
    weights = draw(hidden, intermediate, 1, torch.int8)

    def zero(layer: LinearWeights) -> LinearWeights:
        return LinearWeights(torch.zeros_like(layer.weight), torch.zeros_like(layer.bias), layer.scale)

    # Attention is the mean of the values where all scores are equal; without attention's output h is LN(x).
    weights = dataclasses.replace(weights, attention_output=zero(weights.attention_output), qkv=zero(weights.qkv))
    x, cu_seqlens = torch.randn(sum(lengths), hidden), bounds(lengths)
    for change, tolerance in ({"intermediate": zero(weights.intermediate)}, 2e-6), ({}, 0.02):
        changed = dataclasses.replace(weights, **change)
        expected = reference.encoder_layer_forward(x, cu_seqlens, max(lengths), changed)
        ours = encoder_layer(x, cu_seqlens, max(lengths), changed, backend="native")
        # With the intermediate layer a rounding that falls the other way is one step of 1/127 in one of 128 activations.
        assert (ours - expected).abs().max() < tolerance


def _weight_cases() -> list:
    pairs = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.int8, torch.float32)]
    return [pytest.param(*p, id=str(p[0]).removeprefix("torch.")) for p in pairs]


@pytest.mark.parametrize("lengths", [(32,), (90, 3), (300, 2, 298, 1), (500,) * 5], ids=str)
@pytest.mark.parametrize(("weight_dtype", "dtype"), _weight_cases())
def test_results_do_not_depend_on_the_number_of_threads(instruction_set, weight_dtype, dtype, lengths):  # noqa: F811
    weights = draw(192, 260, 3, weight_dtype)
    weights = weights if weight_dtype == torch.int8 else converted(weights, dtype)
    packed, x, cu_seqlens = PackedEncoderLayer(weights, dtype), torch.randn(sum(lengths), 192).to(dtype), bounds(lengths)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run_layers(PackedEncoderLayers([packed]), x, cu_seqlens))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("weight_dtype", "dtype"), _weight_cases())
def test_a_sequence_does_not_depend_on_the_batch(instruction_set, weight_dtype, dtype):  # noqa: F811
    """Neither on what lies beside it nor on how the rows are divided: no padding, no mixing, the same bits."""
    weights = draw(96, 160, 2, weight_dtype)
    weights = weights if weight_dtype == torch.int8 else converted(weights, dtype)
    packed, lengths = PackedEncoderLayer(weights, dtype), (70, 9, 400, 1, 800)
    x, cu_seqlens = torch.randn(sum(lengths), 96).to(dtype), bounds(lengths)
    together = run_layers(PackedEncoderLayers([packed]), x, cu_seqlens)
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        assert torch.equal(run_layers(PackedEncoderLayers([packed]), x[first:last], bounds((last - first,))), together[first:last])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("weight_dtype", "dtype"), _weight_cases())
def test_what_is_not_finite_stays_in_its_sequence(instruction_set, weight_dtype, dtype, value):  # noqa: F811
    weights = draw(64, 96, 2, weight_dtype)
    weights = weights if weight_dtype == torch.int8 else converted(weights, dtype)
    packed, cu_seqlens, x = PackedEncoderLayer(weights, dtype), bounds((9, 5, 130)), torch.randn(144, 64).to(dtype)
    clean = run_layers(PackedEncoderLayers([packed]), x, cu_seqlens)
    x[10, 7] = value
    y = run_layers(PackedEncoderLayers([packed]), x, cu_seqlens)
    assert y[9:14].isnan().all()  # its neighbours see it as a key and as a value
    assert torch.equal(y[:9], clean[:9])
    assert torch.equal(y[14:], clean[14:])


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e15])
def test_int8_rows_of_any_size(instruction_set, scale):  # noqa: F811
    weights = draw(64, 96, 2, torch.int8)
    x, cu_seqlens = torch.randn(20, 64) * scale, bounds((20,))
    expected = reference.encoder_layer_forward(x, cu_seqlens, 20, weights)
    ours = encoder_layer(x, cu_seqlens, 20, weights, backend="native")
    truth = reference.encoder_layer_forward(x.double(), cu_seqlens, 20, converted(weights, torch.float64, dequantize=True))
    assert_within_budget([ours], [expected], [truth], ["y"])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_several_layers_are_one_after_the_other(count):
    layers = [PackedEncoderLayer(converted(draw(64, 96, 2, torch.float32), torch.float32), torch.float32) for _ in range(count)]
    x, cu_seqlens = torch.randn(40, 64), bounds((3, 37))
    before, expected = x.clone(), x
    for layer in layers:
        expected = run_layers(PackedEncoderLayers([layer]), expected, cu_seqlens)
    assert torch.equal(run_layers(PackedEncoderLayers(layers), x, cu_seqlens), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_no_rows(lengths):
    weights = converted(draw(64, 96, 2, torch.float32), torch.float32)
    assert encoder_layer(torch.randn(0, 64), bounds(lengths), 0, weights, backend="native").shape == (0, 64)


def test_time_is_counted():
    weights = converted(draw(128, 512, 2, torch.float32), torch.float32)

    def run():
        start = time.perf_counter()
        encoder_layer(torch.randn(256, 128), bounds((128, 128)), 128, weights, backend="native")
        return torch.get_num_threads() * (time.perf_counter() - start)

    run()
    with work_counted() as outer:
        with work_counted() as inner:
            spent = run()
        run()
    run()
    for seconds in (outer, inner):
        assert set(seconds) == {"linear", "attention", "rest"} and min(seconds.values()) > 0
    assert sum(inner.values()) <= spent


def test_what_does_not_fit_is_refused():
    weights = converted(draw(64, 96, 2, torch.float32), torch.float32)
    x, cu_seqlens = torch.randn(3, 64), bounds((3,))
    with pytest.raises(ValueError, match=r"x has shape \(3, 60\), expected \(3, 64\)"):
        encoder_layer(x[:, :60], cu_seqlens, 3, weights)
    with pytest.raises(ValueError, match="cu_seqlens is torch.int64"):
        encoder_layer(x, cu_seqlens.long(), 3, weights)
    for wrong in ([0, 4], [1, 3], [0, 2], [0, 5, -1, 3]):
        with pytest.raises(ValueError, match="expected steps that never fall from 0 to total = 3"):
            encoder_layer(x, torch.tensor(wrong, dtype=torch.int32), 5, weights)
        with pytest.raises(ValueError, match="expected steps that never fall from 0 to total = 3"):
            run_layers(PackedEncoderLayers([PackedEncoderLayer(weights, x.dtype)]), x, torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(ValueError, match="max_seqlen is 2, but the longest sequence has 3 tokens"):
        encoder_layer(x, cu_seqlens, 2, weights)
    with pytest.raises(RuntimeError, match="encoder_layer got tensors on cpu, meta"):
        encoder_layer(x, cu_seqlens.to("meta"), 3, weights)
    with pytest.raises(ValueError, match=r"output.weight has shape \(96, 64\), expected \(64, 96\)"):
        encoder_layer(x, cu_seqlens, 3, dataclasses.replace(weights, output=weights.intermediate))
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        encoder_layer(x, cu_seqlens, 3, weights, backend="cuda")
    with pytest.raises(RuntimeError, match=r"the weights are torch.float32, x is torch.bfloat16"):
        encoder_layer(x.bfloat16(), cu_seqlens, 3, weights, backend="native")
    with pytest.raises(RuntimeError, match="no kernels for torch.float16"):
        encoder_layer(x.half(), cu_seqlens, 3, converted(weights, torch.float16), backend="native")
    odd = draw(9, 10, 1, torch.bfloat16)
    assert not_supported_reasons(converted(odd, torch.bfloat16), torch.bfloat16, "cpu") == [
        f"{name}'s in_features 9 are no multiple of 2" for name in ("qkv", "attention_output", "intermediate")
    ]


@pytest.mark.parametrize("kinds", [((torch.int8, 512), (torch.float32, 512)), ((torch.float32, 16), (torch.float32, 2048))])
def test_the_most_demanding_layer_says_how_much_memory_a_call_needs(kinds):
    """A model may have layers that were left as they are beside quantised ones (``fastbert.quantize(model, skip=...)``)."""
    layers = []
    for dtype, intermediate in kinds:
        weights = converted(draw(128, intermediate, 2, dtype), torch.float32)
        layers.append(PackedEncoderLayers([PackedEncoderLayer(weights, torch.float32)]))
    cu_seqlens, threads = bounds((30, 10)), torch.get_num_threads()
    first, last, both = (
        stack.handle.workspace_bytes(cu_seqlens.data_ptr(), 40, 2, threads)
        for stack in (*layers, PackedEncoderLayers.joined(layers))
    )
    x = torch.randn(40, 128)
    assert first < last == both - x.nbytes  # the rows between the two
    expected = run_layers(layers[1], run_layers(layers[0], x, cu_seqlens), cu_seqlens)
    assert torch.equal(run_layers(PackedEncoderLayers.joined(layers), x, cu_seqlens), expected)


@pytest.mark.parametrize("lengths", [(5,), (40,) * 14 + (3,), (0, 400, 0, 333, 500, 1, 0)])
def test_threads_that_come_late_or_sleep_change_nothing(lengths):
    """Far more threads than cores: some come to a loop when it is over, others wait for it asleep."""
    weights = converted(draw(96, 160, 3, torch.float32), torch.float32)
    layers = PackedEncoderLayers(PackedEncoderLayer(weights, torch.float32) for _ in range(5))
    x, threads = torch.randn(sum(lengths), 96), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run_layers(layers, x, bounds(lengths))
        for count in (2, 3, 16):
            torch.set_num_threads(count)
            for _ in range(20):
                assert torch.equal(run_layers(layers, x, bounds(lengths)), expected)
    finally:
        torch.set_num_threads(threads)


def test_several_callers_at_once():
    weights = converted(draw(96, 160, 3, torch.float32), torch.float32)
    layers = PackedEncoderLayers(PackedEncoderLayer(weights, torch.float32) for _ in range(4))
    batches = [torch.randn(rows, 96) for rows in (3, 40, 200, 1100)]
    expected = [run_layers(layers, x, bounds((len(x),))) for x in batches]

    def repeated(index: int) -> bool:
        torch.set_num_threads(2)  # of this thread
        results = [run_layers(layers, batches[index], bounds((len(batches[index]),))) for _ in range(20)]
        return all(torch.equal(result, expected[index]) for result in results)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeated, range(4)))


def test_an_error_of_all_threads_is_raised_once_and_leaves_nothing_behind():
    """Weights lie as the instruction set that they were packed for reads them."""
    weights = converted(draw(96, 160, 3, torch.bfloat16), torch.bfloat16)
    layers, x = PackedEncoderLayers([PackedEncoderLayer(weights, torch.bfloat16)] * 3), torch.randn(50, 96).bfloat16()
    expected, before = run_layers(layers, x, bounds((50,))), native.instruction_set()
    other = next(name for name in native.supported_instruction_sets() if name != before)
    for _ in range(5):
        native.set_instruction_set(other)
        try:
            with pytest.raises(ValueError, match=f"packed for the instruction set {before}, the one in use is {other}"):
                run_layers(layers, x, bounds((50,)))
        finally:
            native.set_instruction_set(before)
        assert torch.equal(run_layers(layers, x, bounds((50,))), expected)


def test_gelu_in_bfloat16_is_off_by_roundings_alone():
    """Weights of 0 and 1 make y = +-gelu(intermediate.bias) times one factor: differences of one sign from the exact function,
    rounded in the same places, over neighbouring arguments are the function's own error."""
    count = 256  # arguments of a call
    hidden, dtype = 2 * count, torch.bfloat16
    arguments = torch.arange(0x3C80, 0x4110).to(torch.int16).view(dtype)  # all of bfloat16's from 1/64 to 9
    arguments = torch.cat([-arguments[arguments <= 5.5].flip(0), arguments])
    pairs = torch.cat([torch.eye(count), -torch.eye(count)]).to(dtype)  # a mean of 0
    nothing = LinearWeights(torch.zeros(3 * hidden, hidden, dtype=dtype), None)
    zero_norm = LayerNormWeights(torch.zeros(hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype), 1e-12)
    norm = zero_norm._replace(weight=torch.ones(hidden, dtype=dtype))
    for u in (*arguments.split(count)[:-1], arguments[-count:]):
        weights = EncoderLayerWeights(
            nothing, LinearWeights(nothing.weight[:hidden], None), zero_norm,
            LinearWeights(torch.zeros(count, hidden, dtype=dtype), u), LinearWeights(pairs, None), norm, 8, 0.125
        )  # fmt: skip
        y = encoder_layer(torch.ones(1, hidden, dtype=dtype), bounds((1,)), 1, weights, backend="native")[0, :count].double()
        truth = u.double() * 0.5 * torch.erfc(-u.double() * 0.5**0.5)
        rounded = truth.to(dtype).double()
        rounded = (rounded / rounded.square().mean().sqrt()).to(dtype).double()  # as LayerNorm does
        errors = (y - rounded) / rounded
        assert errors.abs().max() < 2 * 2**-7 + 5e-4  # a neighbour, twice
        assert errors.unfold(0, 64, 16).mean(1).abs().max() < 1e-3
