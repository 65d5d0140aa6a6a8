"""Logits of many rows, without gradients: batches under a budget of tokens, the longest first, in the rows' order at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastbert.data.budget import token_budget_batches
from fastbert.runs.errors import TrainingError

from .model import TaskModel

TOKENS_PER_BATCH = 4096
_TARGETS = ("labels", "start_positions", "end_positions")


def model_outputs(
    loaded: TaskModel,
    rows: Sequence[dict[str, Any]],
    *,
    family: str,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    autocast: torch.dtype | None = None,
    progress: str | None = None,
) -> list[NDArray[np.float32]]:
    """For each row its logits, float32: (num_labels,) of family "text", (length, num_labels) of "words", (length, 2) of
    "questions", (num_choices,) of "choices".

    ``rows``: features, whose labels are left out; ``autocast``: the dtype of matmuls; ``progress``: the title of a progress bar.
    The model comes back in the mode, training or not, that it was in. Raises TrainingError for logits that are not finite.
    """
    model = loaded.model
    inputs = [{key: value for key, value in row.items() if key not in _TARGETS} for row in rows]
    lengths = [_length(row["input_ids"]) for row in inputs]
    batches = token_budget_batches(lengths, tokens_per_batch, padded=not loaded.packed)
    results: list[NDArray[np.float32] | None] = [None] * len(inputs)
    training = model.training
    model.eval()
    bar = tqdm(total=len(inputs), desc=progress, unit="row", disable=True if progress is None else None, leave=False)
    device = model.device
    cast = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    try:
        with torch.inference_mode(), cast, bar:
            for batch in batches:
                collated = loaded.collate([inputs[number] for number in batch])
                output = model(**{key: _to(value, device) for key, value in collated.items()})
                sizes = [lengths[number] for number in batch]
                for number, logits in zip(batch, _by_row(output, family, sizes, loaded.packed), strict=True):
                    if not np.isfinite(logits).all():
                        raise TrainingError(
                            "the model's outputs hold NaN or infinity: its training diverged (a lower --learning-rate helps), "
                            "or its weights are damaged"
                        )
                    results[number] = logits
                bar.update(len(batch))
    finally:
        model.train(training)
    return results


def _by_row(output: Any, family: str, lengths: list[int], packed: bool) -> list[NDArray[np.float32]]:
    if family in ("text", "choices"):
        return list(output.logits.float().cpu().numpy())
    logits = torch.stack((output.start_logits, output.end_logits), -1) if family == "questions" else output.logits
    values = logits.float().cpu().numpy()
    if packed:
        return np.split(values[0], np.cumsum(lengths)[:-1])
    return [row[:length] for row, length in zip(values, lengths, strict=True)]


def _length(ids: Any) -> int:
    """Tokens of a row; of several choices, their number times the longest."""
    if len(ids) and not np.isscalar(ids[0]):
        return len(ids) * max(map(len, ids))
    return len(ids)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
