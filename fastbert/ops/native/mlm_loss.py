"""The masked-LM loss of one block of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import DTYPES, EXTENSION, as_float32, empty, pointer, row_sum_workspace


def mlm_loss_forward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_class: int,
    row_max: Tensor,
    row_sum: Tensor,
    label_logit: Tensor,
    logit_sum: Tensor | None,
) -> None:
    """See :func:`reference.mlm_loss_forward`."""
    rows, block = logits.shape
    bias = as_float32(bias)
    EXTENSION.mlm_loss_forward(
        logits.data_ptr(), pointer(bias), labels.data_ptr(),
        row_max.data_ptr(), row_sum.data_ptr(), label_logit.data_ptr(), pointer(logit_sum),
        rows, block, logits.stride(0), first_class, DTYPES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip


def mlm_loss_backward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_class: int,
    num_classes: int,
    row_max: Tensor,
    row_sum: Tensor,
    dloss: Tensor,
    label_smoothing: float,
    dbias: Tensor | None,
) -> None:
    """See :func:`reference.mlm_loss_backward`."""
    rows, block = logits.shape
    bias = as_float32(bias)
    sums = None if dbias is None else empty(block)
    partials = None if dbias is None else row_sum_workspace(rows, block)
    EXTENSION.mlm_loss_backward(
        logits.data_ptr(), pointer(bias), labels.data_ptr(),
        row_max.data_ptr(), row_sum.data_ptr(), dloss.data_ptr(), pointer(sums), pointer(partials),
        rows, block, logits.stride(0), first_class, num_classes, label_smoothing,
        DTYPES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if dbias is not None:
        dbias.copy_(sums)
