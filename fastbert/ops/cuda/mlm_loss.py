"""What happens to a block of logits in ``mlm_loss``, by CUDA C++ (csrc/cuda)."""

from __future__ import annotations

from torch import Tensor

from .extension import DTYPES, current_stream, device_guard, extension, float32_like, pointer


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
    with device_guard(logits):
        extension.mlm_loss_forward(
            logits.data_ptr(), pointer(bias), labels.data_ptr(),
            row_max.data_ptr(), row_sum.data_ptr(), label_logit.data_ptr(), pointer(logit_sum),
            rows, block, logits.stride(0), first_class, DTYPES[logits.dtype], current_stream(logits),
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
    dtype = DTYPES[logits.dtype]
    with device_guard(logits):
        partials = None if dbias is None else float32_like(logits, extension.mlm_loss_lines(rows, block, dtype), block)
        extension.mlm_loss_backward(
            logits.data_ptr(), pointer(bias), labels.data_ptr(), row_max.data_ptr(), row_sum.data_ptr(), dloss.data_ptr(),
            pointer(dbias), pointer(partials),
            rows, block, logits.stride(0), first_class, num_classes, label_smoothing, dtype, current_stream(logits),
        )  # fmt: skip
