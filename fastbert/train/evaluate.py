"""Scores of a model on text that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastbert.data.batches import PackedBatch

from .learner import autocast
from .metrics import BatchScores, ScoreSums, batch_scores


def fastbert_scores(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The scores (6,) of our model on a packed batch; see ``metrics.batch_scores``."""
    inputs = batch.model_inputs()
    return batch_scores(model(**inputs), inputs)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    batches: Iterable[PackedBatch],
    scores: Callable[[PreTrainedModel, PackedBatch], Tensor] = fastbert_scores,
    *,
    dtype: str = "float32",
) -> dict[str, float]:
    """Means over ``batches``, every masked token and sentence pair weighing the same: see ``metrics.ScoreSums.means``.

    ``batches`` are moved to the model's device; ``scores`` gives the scores of one, under autocast in ``dtype``. The model is left
    in the mode it was in.
    """
    training = model.training
    model.eval()
    try:
        with autocast(model.device, dtype):
            per_batch = [scores(model, batch.to(model.device)) for batch in batches]
    finally:
        model.train(training)
    sums = ScoreSums()
    for values in torch.stack(per_batch).tolist():
        sums.add(BatchScores(*values))
    return sums.means()
