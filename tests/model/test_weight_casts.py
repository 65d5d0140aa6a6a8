"""Weights that are float32 become bfloat16 once in a training step under autocast, not once more in the backward pass.

A cast reads 4 bytes of a weight and writes 2, which at few tokens is as much as a matmul reads of it.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastbert
from fastbert.ops import feed_forward

from ..ops.helpers import DEVICE
from .helpers import BATCH, inputs_for, mask, small_config

pytestmark = pytest.mark.gpu

HIDDEN, INTERMEDIATE, LAYERS, CLASSES = 48, 96, 3, 130


def matrices_cast(model: torch.nn.Module, batch: dict, dtype: torch.dtype) -> Counter:
    """How often float32 matrices of each shape became bfloat16 in a training step, whichever operator asked for it."""

    def step() -> None:
        with torch.autocast(DEVICE, dtype):
            loss = model(**batch).loss
        loss.backward()

    step()  # moves queries', keys' and values' weights together, and compiles on a GPU
    cast = Counter()

    def counted(copies, originals, foreach_copy=torch._foreach_copy_):
        """What a GPU does for all layers at once; the profiler sees no shapes of it."""
        for copy, original in zip(copies, originals, strict=True):
            cast[tuple(copy.shape)] += (copy.dtype, original.dtype, copy.dim()) == (torch.bfloat16, torch.float32, 2)
        foreach_copy(copies, originals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", without_copies_of_weights)
        patch.setattr(torch, "_foreach_copy_", counted)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            step()
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "aten::copy_":
            (shape, *_), (to, source, *_) = event.shapes(), event.dtypes()
            if (to, source) == ("c10::BFloat16", "float") and len(shape) == 2:
                cast[tuple(shape)] += 1
    return cast


def without_copies_of_weights(tensors, *args, cat=torch.cat, **kwargs):
    """torch.cat, which queries', keys' and values' weights have no need of: they lie side by side."""
    assert not any(tensor.shape == (HIDDEN, HIDDEN) for tensor in tensors)
    return cat(tensors, *args, **kwargs)


def without_activations(cast: Counter, model: torch.nn.Module) -> Counter:
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2} | {(3 * HIDDEN, HIDDEN)}
    return Counter({shape: count for shape, count in cast.items() if shape in weights and count})


@pytest.mark.parametrize("whole_feed_forward", [True, False], ids=["feed_forward", "one by one"])
@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification"])
def test_each_weight_is_cast_once(name, whole_feed_forward, monkeypatch):
    """Embedding tables are read in float32: theirs would be (40, 48) and (2, 48). The word table is the decoder's matrix, too."""
    if not whole_feed_forward:  # as on a GPU
        monkeypatch.setattr(feed_forward, "_saves_memory", lambda *_: False)
    model = getattr(fastbert, name)(small_config(num_labels=5)).train().to(DEVICE)
    batch = {key: value.to(DEVICE) for key, value in inputs_for(name).items()}
    rows = {BATCH, int(mask().sum()), int((batch["labels"] != -100).sum()), int((batch["labels"] != -100).sum()) + BATCH}
    assert rows.isdisjoint({HIDDEN, INTERMEDIATE, 3 * HIDDEN, CLASSES, 40, 5, 2}), "a weight could not be told from activations"
    square, heads = LAYERS, {}  # attention's output
    if name != "BertForSequenceClassification":
        square += 1  # in front of the decoder
        heads[CLASSES, HIDDEN] = 1
    if name != "BertForMaskedLM":
        square += 1  # the pooler's
        heads[5 if name == "BertForSequenceClassification" else 2, HIDDEN] = 1
    expected = Counter({(INTERMEDIATE, HIDDEN): LAYERS, (HIDDEN, INTERMEDIATE): LAYERS, (HIDDEN, HIDDEN): square, **heads})
    apart = 1 if DEVICE == "cpu" else 0  # the last layer's query, from keys and values, whose rows are more
    expected += {(3 * HIDDEN, HIDDEN): LAYERS - apart, (2 * HIDDEN, HIDDEN): apart, (HIDDEN, HIDDEN): apart}
    assert without_activations(matrices_cast(model, batch, torch.bfloat16), model) == expected
