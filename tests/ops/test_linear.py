"""``linear`` and its three products, by every library that there is to choose from."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from fastbert.ops import backends
from fastbert.ops import linear as products
from fastbert.ops.linear import (
    linear,
    linear_dweight,
    linear_dweight_into,
    linear_dx,
    linear_forward,
    linear_forward_into,
    linear_parameter_gradients,
)

from .helpers import DEVICE, assert_within_budget, gradients, merged
from .test_linear_gelu import SHAPES, inputs_for

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
CHOICES = [
    pytest.param(product, dtype, name, id=f"{product}-{str(dtype).removeprefix('torch.')}-{name}")
    for product in products.PRODUCTS
    for dtype in products.DTYPES
    for name in products.candidates(product, dtype)
]
no_native = pytest.mark.skipif(backends.unavailable_reason("native") is not None, reason="the C++ kernels are not built")


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("dtype", products.DTYPES)
def test_linear(dtype, rows, in_features, out_features, with_bias):
    def draw():
        inputs, dy = inputs_for(rows, in_features, out_features, dtype, with_bias)
        return tuple(
            gradients(function, inputs, dy, number)
            for function, number in ((linear, dtype), (F.linear, dtype), (F.linear, torch.float64))
        )

    assert_within_budget(*merged(draw, rows * out_features), ["y", "dx", "dweight", "dbias"])


@pytest.mark.parametrize(("product", "dtype", "name"), CHOICES)
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 8, 5), (40, 96, 130), (270, 300, 64)])
def test_every_candidate_is_right(product, dtype, name, rows, in_features, out_features, monkeypatch):
    monkeypatch.setattr(products, "choice", lambda *_: name)

    def draw():
        (x, weight, bias), dy = inputs_for(rows, in_features, out_features, dtype, True)
        ours, plain = {
            "forward": (lambda x, w, b, dy: linear_forward(x, w, b), lambda x, w, b, dy: F.linear(x, w, b)),
            "dx": (lambda x, w, b, dy: linear_dx(dy, w), lambda x, w, b, dy: dy @ w),
            "dweight": (lambda x, w, b, dy: linear_dweight(dy, x), lambda x, w, b, dy: dy.t() @ x),
        }[product]
        operands = [t.to(dtype) for t in (x, weight, bias, dy)]
        return [ours(*operands)], [plain(*operands)], [plain(x, weight, bias, dy)]

    assert_within_budget(*merged(draw, rows * out_features), [product])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float16, "torch"), *((torch.bfloat16, name) for name in products.candidates("dweight", torch.bfloat16))],
)
def test_gradients_of_float32_weights(dtype, name, monkeypatch):
    """A GPU and our own matmul do not round them to the dtype of what was multiplied; other libraries do."""
    monkeypatch.setattr(products, "choice", lambda *_: name)
    (x, weight, _), dy = inputs_for(300, 40, 24, dtype, False)
    operands = [t.to(DEVICE, dtype) for t in (dy, x)]
    rounded = DEVICE == "cpu" and name != "fastbert"
    dweight, dbias = linear_parameter_gradients(*operands, True, True, torch.float32)
    dweight_alone, none = linear_parameter_gradients(*operands, True, False, torch.float32)
    assert none is None and torch.equal(dweight_alone, dweight)
    assert torch.equal(linear_dweight(*operands, torch.float32), dweight)
    for found, expected, dtype_found in (
        (dweight, dy.t() @ x, dtype if rounded else torch.float32),
        (dbias, dy.sum(0), torch.float32),
        (linear_parameter_gradients(*operands, False, True, torch.float32)[1], dy.sum(0), torch.float32),
        (linear_dweight(*operands), dy.t() @ x, dtype),
    ):
        assert found.dtype == dtype_found
        error = (found.double().cpu() - expected).norm() / expected.norm()
        assert error <= (1e-5 if dtype_found == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize(("product", "dtype", "name"), [c for c in CHOICES if c.values[0] != "dx"])
def test_results_in_given_memory(product, dtype, name, monkeypatch):
    """A block of the logits has rows further apart than it is wide."""
    monkeypatch.setattr(products, "choice", lambda *_: name)
    rows, in_features, out_features = 30, 16, 41
    x, weight, dy = (torch.randn(shape).to(dtype) for shape in ((rows, in_features), (out_features, in_features), (rows, 64)))
    if product == "forward":
        got, expected = linear_forward_into(torch.empty(rows, 64, dtype=dtype)[:, :out_features], x, weight), x @ weight.t()
    else:
        got = torch.empty(out_features, in_features, dtype=dtype)
        linear_dweight_into(got, dy[:, :out_features], x)
        expected = dy[:, :out_features].t() @ x
    torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def dtypes_of_native_matmul():
    if backends.unavailable_reason("native") is not None:
        return []
    from fastbert.ops import native

    return [dtype for dtype in products.DTYPES if native.multiplies(dtype)]


@no_native
@pytest.mark.parametrize("dtype", dtypes_of_native_matmul())
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 1, 1), (13, 300, 33), (29, 7, 100), (14, 16, 32), (75, 513, 65), (97, 2, 64), (200, 131, 1), (3, 40, 1601), (2, 33, 3100)],
)
def test_matmul_of_operands_as_they_lie(rows, depth, columns, transposed, dtype):
    """One row and one column, more than a chunk of columns, depths that end within a pair and within a block."""
    from fastbert.ops import native

    def operand(a, b, transpose):
        return torch.randn(b, a).to(dtype).t() if transpose else torch.randn(a, b).to(dtype)

    def draw():
        a, b, bias = operand(rows, depth, transposed[0]), operand(depth, columns, transposed[1]), torch.randn(columns).to(dtype)
        return [native.matmul(a, b, bias)], [torch.addmm(bias, a, b)], [torch.addmm(bias.double(), a.double(), b.double())]

    assert_within_budget(*merged(draw, rows * columns), ["c"])


@no_native
@pytest.mark.skipif(torch.bfloat16 not in dtypes_of_native_matmul(), reason="this CPU has no dot product of bfloat16")
@pytest.mark.parametrize("transposed", [(False, False), (True, True)])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 1, 1), (75, 513, 65), (200, 131, 1), (3, 40, 1601), (97, 64, 128)])
def test_unrounded_sums_of_bfloat16(rows, depth, columns, transposed):
    from fastbert.ops import native

    before = native.instruction_set()
    try:
        for name in native.supported_instruction_sets():
            native.set_instruction_set(name)
            if not native.multiplies(torch.bfloat16):
                continue

            def draw():
                shapes = ((rows, depth), (depth, columns))
                a, b = (torch.randn(s[::-1]).bfloat16().t() if t else torch.randn(s).bfloat16() for s, t in zip(shapes, transposed))
                found = native.matmul(a, b, dtype=torch.float32)
                assert found.dtype == torch.float32 and torch.equal(found.bfloat16(), native.matmul(a, b))
                given = torch.full((rows, columns + 3), float("nan"))
                native.matmul(a, b, out=given[:, :columns])
                assert torch.equal(given[:, :columns], found) and given[:, columns:].isnan().all()
                return [found], [a.float() @ b.float()], [a.double() @ b.double()]

            assert_within_budget(*merged(draw, rows * columns), ["c"])
    finally:
        native.set_instruction_set(before)


@no_native
@pytest.mark.parametrize("dtype", dtypes_of_native_matmul())
def test_matmul_takes_any_strides(dtype):
    from fastbert.ops import native

    tolerance = {"rtol": 2e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {}
    a, b = torch.randn(20, 2, 30).to(dtype)[:, 1], torch.randn(60, 80).to(dtype)[::2, ::2]
    torch.testing.assert_close(native.matmul(a, b), a @ b, **tolerance)
    torch.testing.assert_close(native.matmul(a[:1].expand(5, 30), b), a[:1].expand(5, 30) @ b, **tolerance)
    odd_rows = torch.randn(40, 31).to(dtype)[:, :30]  # bfloat16 is packed in pairs, and these start at odd addresses
    torch.testing.assert_close(native.matmul(odd_rows, b), odd_rows @ b, **tolerance)
    torch.testing.assert_close(native.matmul(a, odd_rows.t()), a @ odd_rows.t(), **tolerance)
    torch.testing.assert_close(native.matmul(odd_rows.t(), odd_rows), odd_rows.t() @ odd_rows, **tolerance)
    out = torch.full((20, 50), float("nan"), dtype=dtype)
    torch.testing.assert_close(native.matmul(a, b, out=out[:, :40]), a @ b, **tolerance)
    assert out[:, 40:].isnan().all()


@no_native
@pytest.mark.parametrize("dtype", dtypes_of_native_matmul())
@pytest.mark.parametrize("rows", [1, 32, 33])
@pytest.mark.parametrize("columns", [1, 50])
def test_gradients_of_operands_as_they_lie(columns, rows, dtype):
    """An odd depth of bfloat16 is filled up to pairs, and the sums of rows read the columns of what that makes."""
    from fastbert.ops import native

    tolerance = {"rtol": 2e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for dy_turned, x_turned in itertools.product((False, True), repeat=2):
        dy, x = (
            torch.randn(width, rows).to(dtype).t() if turned else torch.randn(rows, width).to(dtype)
            for width, turned in ((40, dy_turned), (columns, x_turned))
        )
        product, sums = native.matmul_and_row_sums(dy.t(), x)
        torch.testing.assert_close(product, dy.t() @ x, **tolerance)
        torch.testing.assert_close(sums, dy.float().sum(0))


@no_native
@pytest.mark.parametrize("dtype", dtypes_of_native_matmul())
def test_matmul_keeps_what_is_not_finite_to_its_row_and_column(dtype):
    from fastbert.ops import native

    for transposed in (False, True):
        a, b = torch.randn(40, 71).to(dtype), torch.randn(71, 70).to(dtype)
        a[3, 70], b[70, 5] = float("inf"), float("nan")
        c = native.matmul(a.t().contiguous().t() if transposed else a, b)
        assert c[:, 5].isnan().all() and not c[3].isfinite().any()
        kept = c[[i for i in range(40) if i != 3]][:, [j for j in range(70) if j != 5]]
        assert kept.isfinite().all()


@no_native
@pytest.mark.parametrize("dtype", dtypes_of_native_matmul())
def test_matmul_reads_no_neighbour_of_an_odd_depth(dtype):
    """Of operands that are no rows and no columns, whose copies end within a pair; what follows a row is infinite."""
    from fastbert.ops import native

    whole = torch.randn(20, 62).to(dtype)
    whole[1:, 0] = float("inf")
    a, b = whole[:1, ::2], torch.randn(40, 62).to(dtype)[::2, ::2].t()
    assert native.matmul(a, b).isfinite().all()
    a, b = torch.randn(7, 31).to(dtype), torch.randn(62, 4).to(dtype)[::2, ::4]
    torch.testing.assert_close(native.matmul(a, b), a @ b, rtol=2e-2, atol=1e-1)
    a = torch.full((9, 62), float("inf")).to(dtype)
    a[::2, ::2] = 1.0
    assert native.matmul(a[::2, ::2], torch.ones(31, 3).to(dtype).t().contiguous().t()).eq(31.0).all()


@no_native
@pytest.mark.parametrize("dtype", dtypes_of_native_matmul())
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (7, 65), (256, 1536), (300, 1537), (33, 3100), (40_000, 130)])
def test_matmul_stays_within_its_workspace(depth, columns, dtype):
    from fastbert.ops import native

    number = native.DTYPES[dtype]
    size = native.EXTENSION.matmul_workspace_bytes(depth, columns, number)
    assert size <= 32 << 20
    a, b, c = torch.ones(depth, 2, dtype=dtype).t(), torch.ones(depth, columns, dtype=dtype), torch.empty(2, columns, dtype=dtype)
    before = native.instruction_set()
    try:
        for name in native.supported_instruction_sets():
            native.set_instruction_set(name)
            workspace = torch.full((size + 4096,), 0x5A, dtype=torch.uint8)
            if native.multiplies(dtype):
                native.EXTENSION.matmul(
                    a.data_ptr(), b.data_ptr(), 0, c.data_ptr(), 0, 0, 0, workspace.data_ptr(), 2, depth, columns, *a.stride(),
                    *b.stride(), columns, native.EXTENSION.MatmulEnd.product, number, number, 2,
                )  # fmt: skip
                assert (workspace[size:] == 0x5A).all()
                torch.testing.assert_close(c, torch.full_like(c, depth), rtol=1e-2, atol=0)
    finally:
        native.set_instruction_set(before)


@no_native
def test_matmul_on_every_instruction_set():
    from fastbert.ops import native

    before = native.instruction_set()
    a, b, bias = torch.randn(45, 290), torch.randn(70, 290).t(), torch.randn(70)
    try:
        for name in native.supported_instruction_sets():
            native.set_instruction_set(name)
            for left in (a, a.t().contiguous().t()):
                for right in (b, b.contiguous()):
                    torch.testing.assert_close(native.matmul(left, right, bias), torch.addmm(bias, a, b), rtol=1e-5, atol=1e-4)
            halves = [t.bfloat16() for t in (a, b, bias)]
            own = "fastbert" in products.candidates("dx", torch.bfloat16)
            assert own == native.multiplies(torch.bfloat16)
            if own:
                expected = torch.addmm(*(t.double() for t in (halves[2], *halves[:2])))
                torch.testing.assert_close(native.matmul(*halves).double(), expected, rtol=1e-2, atol=1e-2)
            else:
                with pytest.raises(ValueError, match="this instruction set has no matmul of this dtype"):
                    native.matmul(*halves)
    finally:
        native.set_instruction_set(before)


@no_native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 50, 65, 95, 96, 97, 200])
def test_products_of_whole_numbers_are_exact(rows, transposed):
    """On every instruction set, at sizes beside those of its tiles, panels and blocks; in bfloat16 but for one rounding."""
    from fastbert.ops import native

    before = native.instruction_set()
    try:
        for depth, columns in ((2, 65), (30, 1), (32, 64), (34, 130), (98, 48), (768, 127), (1538, 16)):
            a, b, bias = (torch.randint(-4, 5, size).float() for size in ((rows, depth), (depth, columns), (columns,)))
            a = a.t().contiguous().t() if transposed else a
            for name in native.supported_instruction_sets():
                native.set_instruction_set(name)
                for dtype in filter(native.multiplies, (torch.float32, torch.bfloat16)):
                    for right in (b, b.t().contiguous().t()):
                        found = native.matmul(a.to(dtype), right.to(dtype), bias.to(dtype))
                        assert torch.equal(found, torch.addmm(bias, a, b).to(dtype)), (name, dtype, depth, columns)
                    found, sums = native.matmul_and_row_sums(a.to(dtype), b.to(dtype))
                    assert torch.equal(found, (a @ b).to(dtype)) and torch.equal(sums, a.sum(1)), (name, dtype, depth, columns)
    finally:
        native.set_instruction_set(before)


@no_native
@pytest.mark.parametrize("dtype", dtypes_of_native_matmul())
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(500, 300, 200), (20, 700, 1900), (5, 40, 30), (1, 64, 640)])
def test_matmul_does_not_depend_on_the_number_of_threads(rows, depth, columns, transposed, dtype):
    from fastbert.ops import native

    a, b = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)
    a = a.t().contiguous().t() if transposed else a
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7, 16):
            torch.set_num_threads(count)
            results.append(native.matmul(a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("with_bias", [True, False])
def test_under_autocast_the_product_is_chosen_too(with_bias, monkeypatch):
    """As close to float64 as torch's own linear under autocast, in its dtype, with gradients in the parameters'."""
    asked = []
    monkeypatch.setattr(products, "choice", lambda product, dtype, *_: asked.append((product, dtype)) or "torch")

    def autocast(function):
        def call(*inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*inputs)

        return call

    inputs, dy = inputs_for(40, 24, 56, torch.bfloat16, with_bias)
    ours, plain = (gradients(autocast(function), inputs, dy, torch.float32) for function in (linear, F.linear))
    assert_within_budget(ours, plain, gradients(F.linear, inputs, dy, torch.float64), ["y", "dx", "dweight", "dbias"])
    assert asked == [(product, torch.bfloat16) for product in ("forward", "dx", "dweight")]
    assert ours[0].dtype == torch.bfloat16 and ours[2].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_autocast_leaves_to_torch_what_is_torchs(dtype):
    """It does not convert float64; and of float16 there is no product of another library."""
    given, to = (dtype, torch.bfloat16) if dtype == torch.float64 else (torch.float32, dtype)
    x, weight, bias = (torch.randn(shape, dtype=given) for shape in ((3, 4), (5, 4), (5,)))
    with torch.autocast("cpu", to):
        ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    assert ours.dtype == theirs.dtype == dtype and torch.equal(ours, theirs)


def test_without_onednn_torch_multiplies(monkeypatch):
    monkeypatch.setattr(products, "onednn_unavailable_reason", lambda: "for a test")
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert not products.is_ours(x, weight)
    assert torch.equal(linear_forward(x, weight, None), F.linear(x, weight))
    assert torch.equal(linear_dx(x @ weight.t(), weight), x @ weight.t() @ weight)


@pytest.mark.parametrize("dtype", products.DTYPES)
def test_shapes_that_do_not_fit_are_an_error_as_in_torch(dtype):
    """Of the matmul of our own, too, which would read what lies behind its operands."""
    x, weight, bias, dy = (torch.randn(shape).to(dtype) for shape in ((40, 64), (32, 64), (32,), (40, 32)))
    for call in (
        lambda: linear(x, weight[:, :48].contiguous(), bias),
        lambda: linear(x, weight, bias[:5]),
        lambda: linear_dx(dy[:, 1:].contiguous(), weight),
        lambda: linear_dweight(dy[1:], x),
    ):
        with pytest.raises(RuntimeError):
            call()
