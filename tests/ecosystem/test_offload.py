"""The accelerate library keeps weights elsewhere and brings them for each call, by forwards that it puts on instances."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastbert

from ..model.helpers import inputs_for
from .helpers import DOORS, assert_same_training_step, fast, fast_pair, notes_of, plain

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

NAME = "BertForSequenceClassification"
LAYER = "bert.encoder.layer.1"
PLACED = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", LAYER: "disk", "bert.encoder.layer.2": "disk"}
PLACED |= dict.fromkeys(("bert.pooler", "dropout", "classifier"), "cpu")


class Recorded(hooks.ModelHook):
    """Changes what goes in and what comes out, and counts."""

    def __init__(self):
        self.calls = []

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append("before")
        return (args[0] * 1.25, *args[1:]), kwargs

    def post_forward(self, module, output):
        self.calls.append("after")
        return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


@pytest.mark.parametrize(
    "path",
    [
        LAYER, f"{LAYER}.attention", f"{LAYER}.attention.self", f"{LAYER}.attention.self.query", f"{LAYER}.output",
        f"{LAYER}.output.LayerNorm", f"{LAYER}.intermediate.dense", f"{LAYER}.intermediate.intermediate_act_fn",
        "bert.embeddings.LayerNorm", "bert.pooler.dense", "classifier",
    ],
)  # fmt: skip
@pytest.mark.parametrize("door", DOORS)
def test_hooks_of_the_accelerate_library(door, path):
    theirs, ours = fast_pair(door, NAME)
    seen = []
    for model in (theirs, ours):
        recorded = Recorded()
        hooks.add_hook_to_module(model.get_submodule(path), recorded)
        seen.append(recorded.calls)
    assert_same_training_step(ours, theirs, NAME)
    assert seen[0] == seen[1] == ["before", "after"]
    assert bool(notes_of(ours)) == (path not in ("bert.pooler.dense", "classifier"))
    for model in (theirs, ours):
        hooks.remove_hook_from_module(model, recurse=True)
    assert_same_training_step(ours, theirs, NAME)
    assert notes_of(ours) == []


def on_disk(model: nn.Module, folder) -> nn.Module:
    return accelerate.dispatch_model(model, PLACED, offload_dir=str(folder), main_device="cpu", force_hooks=True)


PLACES = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "cpu_offload, buffers too": lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu")),
    "dispatch_model on the cpu": lambda model, folder: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "dispatch_model, part on disk": on_disk,
}


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("door", DOORS)
def test_weights_that_live_elsewhere(door, place, used_before, tmp_path):
    """Given transformers' hooks, the fast model is what theirs is, too, call after call."""
    theirs, ours = fast_pair(door, NAME)
    batch = inputs_for(NAME)
    expected = theirs(**batch)
    with torch.no_grad():
        if used_before:
            ours(**batch)
        ours = PLACES[place](ours, tmp_path)
        for _ in range(2):
            got = ours(**batch)
            torch.testing.assert_close(got.logits, expected.logits, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(got.loss, expected.loss, atol=2e-5, rtol=2e-5)
    assert any("forward" in note for note in notes_of(ours))


def test_offloaded_first_and_made_fast_then(tmp_path):
    theirs = plain(NAME).eval()
    batch = inputs_for(NAME)
    with torch.no_grad():
        expected = theirs(**batch).logits
        ours = fastbert.accelerate(PLACES["disk_offload"](theirs, tmp_path))
        for _ in range(2):
            torch.testing.assert_close(ours(**batch).logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("door", DOORS)
def test_a_model_loaded_onto_several_places(door, tmp_path):
    """``device_map`` with a folder for what goes to the disk, as for models that are larger than the memory."""
    theirs = plain(NAME).eval()
    theirs.save_pretrained(tmp_path / "model")
    maker = fastbert.BertForSequenceClassification if door == "class" else type(theirs)
    ours = maker.from_pretrained(tmp_path / "model", device_map=PLACED, offload_folder=tmp_path / "offload").eval()
    ours = fastbert.accelerate(ours) if door == "accelerate" else ours
    batch = inputs_for(NAME)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=2e-5, rtol=2e-5)
    assert any("forward" in note for note in notes_of(ours))


def test_prepared_for_training():
    """Accelerator.prepare wraps ``forward`` in autocast: the model stays right, in bfloat16 here, and trains."""
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    theirs = plain(NAME)
    ours = fast(theirs, "class")
    batch = inputs_for(NAME)
    exact = theirs(**batch).loss
    reference, prepared = accelerator.prepare(theirs), accelerator.prepare(ours)
    tolerance = 2 * abs(reference(**batch).loss - exact).item() + 1e-3
    loss = prepared(**batch).loss
    assert abs(loss - exact) <= tolerance
    accelerator.backward(loss)
    assert all(p.grad is not None for p in ours.parameters())
