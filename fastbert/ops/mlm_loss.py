"""``mlm_loss``: decoder matmul + cross-entropy over the vocabulary, block by block, so that logits are never whole.

Both directions walk over the vocabulary: a matmul makes one block of logits (rows, block) in a buffer that every block
reuses, and the backend folds it into each row's running softmax statistics (forward) or turns it into its gradient in place
(backward, which recomputes the logits), from where two more matmuls make that block's rows of dweight, written once, and a
summand of dhidden. The matmuls are ``linear``'s; blocks along the vocabulary, not along the rows, because then
no part of dweight is ever read back.

FLOPs: 2 rows hidden classes forward, 6 backward (one third recomputed). Memory beyond hidden, weight and their gradients: one
block. The alternative of Liger-Kernel, gradients already in the forward pass, saves the recomputation but makes evaluation pay.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import implementation_for
from .linear import is_ours, linear_dweight_into, linear_dx, linear_forward_into
from .registration import check_shape, register

IGNORE_INDEX = -100
# Elements of the logits buffer: on a CPU one that stays in the cores' caches between matmul and softmax, on a GPU one that
# keeps the matmul's grid full.
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
_SMALLEST_BLOCK, _BLOCK_MULTIPLE = 256, 64


def mlm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``labels``, as torch.nn.functional.cross_entropy defines it.

    hidden: (rows, hidden), float32, bfloat16, float16 or float64; weight: (classes, hidden), the decoder's (BERT ties it to the
    word embeddings); bias: (classes,) or None; both are converted to hidden's dtype where they differ; labels: (rows,) int64
    in 0 .. classes - 1, or ``ignore_index`` on rows that count for nothing, anywhere. label_smoothing: Szegedy et al., 2016.
    reduction: "mean" over the rows that count (NaN where there are none, as in torch), "sum", or "none" (0 on ignored rows).

    Returns (loss, correct): the loss in float32 (float64 for float64), and (rows,) bool, whether a row's label has the largest
    logit (False on ignored rows). Raises ValueError for shapes, labels and options that do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}, "
            "expected (rows, hidden) and (classes, hidden)"
        )
    check_shape("bias", bias, (weight.shape[0],), "(classes,)")
    check_shape("labels", labels, (hidden.shape[0],), "one label per row")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}, expected torch.int64")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a number from 0 to 1")
    weight, bias = weight.to(hidden.dtype).contiguous(), None if bias is None else bias.to(hidden.dtype).contiguous()
    losses, _, _, correct = torch.ops.fastbert.mlm_loss(
        hidden.contiguous(), weight, bias, labels.contiguous(), ignore_index, label_smoothing, backend
    )
    if reduction == "none":
        return losses, correct
    if reduction == "sum":
        return losses.sum(), correct
    if reduction == "mean":
        return losses.sum() / (labels != ignore_index).sum(), correct
    raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")


def _blocks(hidden: Tensor, num_classes: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first class, end class, buffer) of each block; the buffer (rows, end - first) is the same memory every time.

    Its rows start at multiples of 64 elements: BERT's 30,522 classes are no multiple of 8, and matmuls that store to rows of
    such a length, as kernels that read them, cannot move 16 bytes at a time.
    """
    rows = hidden.shape[0]
    budget = _BLOCK_ELEMENTS.get(hidden.device.type, _BLOCK_ELEMENTS["cuda"])
    block = max(_SMALLEST_BLOCK, budget // max(rows, 1) // _BLOCK_MULTIPLE * _BLOCK_MULTIPLE)
    block = min(block, num_classes)
    stride = -(-block // _BLOCK_MULTIPLE) * _BLOCK_MULTIPLE
    buffer = hidden.new_empty(rows, stride)
    if hidden.device.type == "cpu":
        buffer[:, block:].zero_()  # oneDNN's tiles (AMX) multiply what lies behind a row of bfloat16, too, by 0: a NaN would stay
    for first in range(0, num_classes, block):
        end = min(first + block, num_classes)
        yield first, end, buffer[:, : end - first]


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-row loss, softmax statistics (maximum and sum) and correctness, each (rows,)."""
    rows, num_classes = hidden.shape[0], weight.shape[0]
    counts = labels != ignore_index
    if labels.device.type == "cpu" and not ((labels >= 0) & (labels < num_classes) | ~counts).all():
        wrong = labels[counts & ((labels < 0) | (labels >= num_classes))][0].item()
        raise ValueError(f"labels hold {wrong}, expected 0 to {num_classes - 1} or ignore_index = {ignore_index}")
    module = implementation_for("mlm_loss", backend, hidden, "forward", rows=len(hidden), vocabulary=len(weight))
    statistics = {"dtype": torch.float64 if hidden.dtype == torch.float64 else torch.float32, "device": hidden.device}
    row_max = torch.full((rows,), -torch.inf, **statistics)
    row_sum, label_logit = torch.zeros(rows, **statistics), torch.zeros(rows, **statistics)
    logit_sum = torch.zeros(rows, **statistics) if label_smoothing else None
    for first, end, logits in _blocks(hidden, num_classes):
        logits = linear_forward_into(logits, hidden, weight[first:end])
        block_bias = None if bias is None else bias[first:end]
        module.mlm_loss_forward(logits, block_bias, labels, first, row_max, row_sum, label_logit, logit_sum)
    log_sum = row_sum.log()
    losses = log_sum + (row_max - label_logit)
    if logit_sum is not None:
        losses = torch.lerp(losses, log_sum + (row_max - logit_sum / num_classes), label_smoothing)
    return torch.where(counts, losses, 0.0), row_max, row_sum, counts & (label_logit == row_max)


def _fake(hidden: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return losses, torch.empty_like(losses), torch.empty_like(losses), torch.empty_like(losses, dtype=torch.bool)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, ctx.ignore_index, ctx.label_smoothing, ctx.backend = inputs
    _, row_max, row_sum, correct = output
    ctx.save_for_backward(hidden, weight, bias, labels, row_max, row_sum)
    ctx.mark_non_differentiable(row_max, row_sum, correct)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dlosses: Tensor | None, *_unused: Tensor | None):
    if dlosses is None:
        return (None,) * 7
    hidden, weight, bias, labels, row_max, row_sum = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs_bias = needs[2] and bias is not None
    grads = torch.ops.fastbert.mlm_loss_backward(
        dlosses, hidden, weight, bias, labels, row_max, row_sum, ctx.ignore_index, ctx.label_smoothing,
        [needs[0], needs[1], needs_bias], ctx.backend,
    )  # fmt: skip
    wanted = (grad if needed else None for grad, needed in zip(grads, (needs[0], needs[1], needs_bias), strict=True))
    return *wanted, None, None, None, None


def _backward(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias; those that ``needs`` does not ask for come back empty."""
    needs_hidden, needs_weight, needs_bias = needs
    module = implementation_for("mlm_loss", backend, hidden, "backward", rows=len(hidden), vocabulary=len(weight))
    dlosses = torch.where(labels == ignore_index, 0.0, dlosses.to(row_max.dtype)).contiguous()
    # Every block adds to dhidden: in the statistics' dtype, or bfloat16 would round once per block.
    dhidden = torch.zeros(hidden.shape if needs_hidden else 0, dtype=row_max.dtype, device=hidden.device)
    dweight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    dbias = torch.empty_like(weight[:, 0]) if needs_bias else weight.new_empty(0)
    num_classes = weight.shape[0]
    for first, end, logits in _blocks(hidden, num_classes):
        block_weight, block_bias = weight[first:end], None if bias is None else bias[first:end]
        logits = linear_forward_into(logits, hidden, block_weight)
        module.mlm_loss_backward(
            logits, block_bias, labels, first, num_classes, row_max, row_sum, dlosses, label_smoothing,
            dbias[first:end] if needs_bias else None,
        )  # fmt: skip
        if needs_weight:
            linear_dweight_into(dweight[first:end], logits, hidden)
        if needs_hidden and logits.dtype == dhidden.dtype and not is_ours(logits, block_weight):
            dhidden.addmm_(logits, block_weight)
        elif needs_hidden:
            dhidden.add_(linear_dx(logits, block_weight))
    return dhidden.to(hidden.dtype), dweight, dbias


def _fake_backward(dlosses, hidden, weight, bias, labels, row_max, row_sum, ignore_index, label_smoothing, needs, backend):
    return (
        torch.empty_like(hidden) if needs[0] else hidden.new_empty(0),
        torch.empty_like(weight) if needs[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0]) if needs[2] else weight.new_empty(0),
    )


register(
    "mlm_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, float label_smoothing, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _autograd_backward,
)
register(
    "mlm_loss_backward",
    "(Tensor dlosses, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor row_max, Tensor row_sum, int ignore_index, "
    "float label_smoothing, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
