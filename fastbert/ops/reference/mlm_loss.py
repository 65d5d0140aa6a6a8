"""The masked-LM loss of one block of the vocabulary.

The op walks over the vocabulary in blocks (ops/mlm_loss.py): one matmul per block makes logits (rows, block), and a backend
supplies what happens to that block. Logits are never whole.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Folds one block of logits into the running softmax statistics of each row (Milakov and Gimelshein, 2018), in place.

    logits: (rows, block), the scores of classes first_class .. first_class + block - 1 without their bias (block,) or None;
    labels: (rows,) int64, a label outside the block (ignored ones too) touches nothing.
    row_max (start at -inf), row_sum = sum exp(logit - row_max) (start at 0), label_logit (start at 0) and, for label
    smoothing, logit_sum = sum of logits (start at 0; None where it is not wanted): (rows,) float32 (float64 for float64).
    """
    scores = logits.to(row_max.dtype)
    if bias is not None:
        scores = scores + bias
    new_max = torch.maximum(row_max, scores.amax(-1))
    base = new_max.masked_fill(new_max == -torch.inf, 0.0)  # all classes so far may be ruled out
    row_sum.mul_((row_max - base).exp()).add_((scores - base.unsqueeze(-1)).exp().sum(-1))
    row_max.copy_(new_max)
    inside = (labels >= first_class) & (labels < first_class + logits.shape[-1])
    column = torch.where(inside, labels - first_class, 0)
    label_logit.copy_(torch.where(inside, scores.gather(-1, column.unsqueeze(-1)).squeeze(-1), label_logit))
    if logit_sum is not None:
        logit_sum.add_(scores.sum(-1))


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
    """Overwrites a block of logits with its gradient: dloss * (softmax - (1 - s) * onehot(label) - s / num_classes).

    row_max, row_sum: (rows,), the final statistics of the forward pass; softmax = exp(logit - row_max) / row_sum, which keeps
    the digits that exp(logit - lse) loses to the rounding of a large lse.
    dloss: (rows,), 0 on ignored rows, whose gradient is exactly 0 whatever their logits are.
    dbias: (block,), overwritten with the column sums of the gradient, or None.
    """
    scores = logits.to(row_max.dtype)
    if bias is not None:
        scores = scores + bias
    grad = (scores - row_max.unsqueeze(-1)).exp() / row_sum.unsqueeze(-1) - label_smoothing / num_classes
    columns = torch.arange(first_class, first_class + logits.shape[-1], device=logits.device)
    grad = grad - (1.0 - label_smoothing) * (labels.unsqueeze(-1) == columns)
    grad = torch.where(dloss.unsqueeze(-1) == 0.0, 0.0, grad * dloss.unsqueeze(-1))
    logits.copy_(grad)
    if dbias is not None:
        dbias.copy_(grad.sum(0))
