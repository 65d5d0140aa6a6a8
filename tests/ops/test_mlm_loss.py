"""Every backend of ``mlm_loss`` against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbert.ops import backends, linear, mlm_loss, reference

from .helpers import SMALLEST, assert_within_budget, backend_cases, device_of, gradients, merged, rounded

IGNORED = -100
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.fixture(params=[False, True], ids=["one block", "many blocks"])
def many_blocks(request, monkeypatch):
    """With many blocks the vocabulary of 700 is walked in steps of 256, the last one short."""
    if request.param:
        import sys

        module = sys.modules["fastbert.ops.mlm_loss"]
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", {"cpu": 1, "cuda": 1})
    return request.param


def inputs_for(rows, hidden, classes, dtype, with_bias=True, scale=1.0):
    h = torch.randn(rows, hidden, dtype=torch.float64) * scale
    w, b = torch.randn(classes, hidden, dtype=torch.float64), torch.randn(classes, dtype=torch.float64)
    labels = torch.randint(classes, (rows,))
    labels[1::3] = IGNORED
    return rounded(h, w, b if with_bias else None, dtype=dtype), labels


def plain(labels, smoothing, reduction):
    def loss(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias)
        # Like our losses, which are float32 whatever the logits' dtype.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)

    return loss


# Only a loss per row is compared with the truth: there, every pair of values of the other options. What smoothing adds is a sum of
# logits, which holds the bias and grows from block to block, so all three at once. The reductions make the gradients of the rows.
@pytest.mark.parametrize(
    ("reduction", "with_bias", "smoothing", "many_blocks"),
    [
        ("none", True, 0.1, True),
        ("none", True, 0.0, False),
        ("none", False, 0.1, False),
        ("none", False, 0.0, True),
        ("mean", False, 0.1, True),
        ("mean", True, 0.0, False),
        ("sum", True, 0.1, False),
        ("sum", False, 0.0, True),
    ],
    indirect=["many_blocks"],
)
@pytest.mark.parametrize(("backend", "dtype"), backend_cases("mlm_loss"))
def test_loss_and_gradients(backend, dtype, reduction, with_bias, smoothing, many_blocks):
    device = device_of(backend)

    def draw():
        inputs, labels = inputs_for(rows=13, hidden=24, classes=700, dtype=dtype, with_bias=with_bias)
        dloss = torch.randn(13 if reduction == "none" else (), dtype=torch.float64).abs()

        def ours(*leaves, reduction=reduction):
            return mlm_loss(*leaves, labels.to(device), label_smoothing=smoothing, reduction=reduction, backend=backend)[0]

        results = (
            gradients(ours, inputs, dloss, dtype, device),
            gradients(plain(labels, smoothing, reduction), inputs, dloss, dtype),
            gradients(plain(labels, smoothing, reduction), inputs, dloss, torch.float64),
        )
        if reduction != "none":  # one number is no sample of errors: it has to follow from the rows' losses
            losses = ours(*(None if t is None else t.to(device, dtype) for t in inputs), reduction="none")
            divisor = (labels != IGNORED).sum() if reduction == "mean" else 1
            torch.testing.assert_close(results[0][0], losses.sum() / divisor)
            results = tuple(r[1:] for r in results)
        return results

    names = ["loss", "dhidden", "dweight", "dbias"][reduction != "none" :]
    assert_within_budget(*merged(draw, 13 * 24), names)


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("mlm_loss"))
def test_correct_rows(backend, dtype, many_blocks):
    device = device_of(backend)
    (h, w, b), labels = inputs_for(rows=40, hidden=16, classes=700, dtype=dtype)
    predictions = (h @ w.t() + b).argmax(-1)
    labels[::2] = predictions[::2]
    labels[0] = IGNORED
    _, correct = mlm_loss(*(t.to(device, dtype) for t in (h, w, b)), labels.to(device), backend=backend)
    if dtype == torch.float32:
        assert torch.equal(correct.cpu(), predictions == labels)
    else:  # logits that rounding made equal are both the largest
        assert (correct.cpu() >= (predictions == labels)).float().mean() > 0.9
    assert not correct[labels.to(device) == IGNORED].any()


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("mlm_loss"))
def test_large_logits_do_not_overflow(backend, dtype, many_blocks):
    device = device_of(backend)
    inputs, labels = inputs_for(rows=6, hidden=24, classes=700, dtype=dtype, scale=100.0)
    loss = gradients(
        lambda *leaves: mlm_loss(*leaves, labels.to(device), backend=backend)[0], inputs, torch.ones(()), dtype, device
    )
    assert all(torch.isfinite(t).all() for t in loss)


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("mlm_loss"))
def test_classes_that_are_ruled_out(backend, dtype, many_blocks):
    """A bias of -infinity, of the first blocks of classes too, is a probability of 0; of all of them there is no loss."""
    device = device_of(backend)
    (h, w, b), labels = inputs_for(rows=6, hidden=24, classes=700, dtype=dtype)
    b[:520], labels = -torch.inf, labels.clamp(min=520)
    h, w, b, labels = h.to(device, dtype), w.to(device, dtype), b.to(device, dtype), labels.to(device)
    loss = mlm_loss(h, w, b, labels, backend=backend)[0]
    expected = F.cross_entropy(h.double() @ w.double().t() + b.double(), labels)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=0)
    assert mlm_loss(h, w, torch.full_like(b, -torch.inf), labels, backend=backend)[0].isnan()


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("mlm_loss"))
def test_no_label_counts(backend, dtype):
    """As torch's cross_entropy: the mean over nothing is NaN, the sum 0, and no gradient flows in either case."""
    device = device_of(backend)
    (h, w, b), labels = inputs_for(rows=4, hidden=8, classes=20, dtype=dtype)
    leaves = [t.to(device, dtype).requires_grad_() for t in (h, w, b)]
    labels = torch.full_like(labels, IGNORED).to(device)
    assert mlm_loss(*leaves, labels, backend=backend)[0].isnan()
    loss, correct = mlm_loss(*leaves, labels, reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0
    assert not correct.any()
    assert all((leaf.grad.double().abs() < SMALLEST).all() for leaf in leaves)


@pytest.mark.parametrize("library", ["torch", "onednn", "fastbert"])
@pytest.mark.parametrize("classes", [31, 97, 126, 1000])
def test_what_lies_behind_a_block_of_logits_is_in_no_gradient(classes, library, monkeypatch):
    """Whichever library multiplies: torch's matmul of bfloat16 reads beyond a row's end on CPUs with AMX."""
    if library not in linear.candidates("dx", torch.bfloat16):
        pytest.skip(f"{library} is not among the matmuls of this machine")
    monkeypatch.setattr(linear, "choice", lambda *_: library)
    hidden = torch.randn(64, 48, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(classes, 48, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = mlm_loss(hidden, weight, None, torch.arange(64) % classes)
    loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
@pytest.mark.parametrize(("backend", "dtype"), backend_cases("mlm_loss"))
def test_gradients_of_some_inputs_only(backend, dtype, wanted):
    device = device_of(backend)
    (h, w, b), labels = inputs_for(rows=5, hidden=8, classes=300, dtype=dtype)
    full = [t.to(device, dtype).requires_grad_() for t in (h, w, b)]
    mlm_loss(*full, labels.to(device), backend=backend)[0].backward()
    some = [t.to(device, dtype).requires_grad_(needed) for t, needed in zip((h, w, b), wanted, strict=True)]
    mlm_loss(*some, labels.to(device), backend=backend)[0].backward()
    for a, c, needed in zip(some, full, wanted, strict=True):
        assert (a.grad is not None) == needed
        assert not needed or torch.equal(a.grad, c.grad)


@pytest.mark.parametrize(("backend", "dtype"), backend_cases("mlm_loss"))
def test_no_rows(backend, dtype):
    device = device_of(backend)
    h, w = torch.zeros(0, 8, device=device, dtype=dtype, requires_grad=True), torch.ones(20, 8, device=device, dtype=dtype)
    loss, correct = mlm_loss(h, w, None, torch.zeros(0, dtype=torch.int64, device=device), reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0
    assert correct.shape == (0,)


@pytest.mark.parametrize(("block", "offset"), [(37, 3), (704, 0), (2500, 1)])
@pytest.mark.parametrize(("backend", "dtype"), backend_cases("mlm_loss"))
def test_a_block_of_logits_anywhere_in_memory(backend, dtype, block, offset):
    """What a backend supplies: blocks of any width, rows and a bias that start anywhere, rows of NaN that do not count."""
    rows, first, classes = 40, 100, block + 300
    memory = torch.randn(rows, block + 64, dtype=torch.float64).to(dtype).double()
    bias = torch.randn(block + offset, dtype=torch.float64).to(dtype).double()
    labels, dloss = torch.randint(classes, (rows,)), torch.randn(rows, dtype=torch.float64)
    labels[0], labels[1], labels[3], labels[4] = first, first + block - 1, first - 1, first + block
    counts = torch.arange(rows) % 5 != 2
    dloss[~counts], labels[~counts], memory[~counts, offset : offset + block] = 0, IGNORED, torch.nan

    def run(module, dtype, device):
        mine = memory.to(device, dtype, copy=True)
        logits, block_bias = mine[:, offset : offset + block], bias.to(device, dtype)[offset:]
        own_labels = labels.to(device)
        float32 = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        row_max = torch.full((rows,), -torch.inf, **float32)
        row_sum, label_logit, logit_sum = (torch.zeros(rows, **float32) for _ in range(3))
        module.mlm_loss_forward(logits, block_bias, own_labels, first, row_max, row_sum, label_logit, logit_sum)
        dbias = torch.empty(block + offset, dtype=dtype, device=device)[offset:]
        module.mlm_loss_backward(logits, block_bias, own_labels, first, classes, row_max, row_sum, dloss.to(**float32), 0.1, dbias)
        outside = torch.cat([mine[:, :offset], mine[:, offset + block :]], dim=1)
        per_row = (row_max, row_max + row_sum.log(), label_logit, logit_sum, logits)
        return outside, logits, [*(t[counts.to(device)] for t in per_row), dbias]

    outside, gradient, got = run(backends.implementation("mlm_loss", backend), dtype, device_of(backend))
    assert torch.equal(outside.cpu().double(), torch.cat([memory[:, :offset], memory[:, offset + block :]], dim=1))
    assert (gradient.cpu()[~counts].double().abs() < SMALLEST).all()
    in_dtype, truth = (run(reference, d, "cpu")[2] for d in (dtype, torch.float64))
    assert_within_budget(got, in_dtype, truth, ["row_max", "lse", "label_logit", "logit_sum", "gradient", "dbias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([1, 20])}, r"labels hold 20, expected 0 to 9"),
        ({"labels": torch.tensor([1, -3])}, r"labels hold -3"),
        ({"labels": torch.tensor([1, 2], dtype=torch.int32)}, r"labels are torch.int32, expected torch.int64"),
        ({"labels": torch.tensor([1])}, r"labels has shape \(1,\), expected \(2,\)"),
        ({"weight": torch.zeros(10, 5)}, r"expected \(rows, hidden\) and \(classes, hidden\)"),
        ({"bias": torch.zeros(9)}, r"bias has shape \(9,\), expected \(10,\)"),
        ({"label_smoothing": 2.0}, "number from 0 to 1"),
        ({"reduction": "max"}, "'mean', 'sum' or 'none'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(10, 4), "bias": None, "labels": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match=message):
        mlm_loss(**{**arguments, **change})
