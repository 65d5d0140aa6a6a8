"""The models on the machine's GPU, on the CPU where there is none: as right as transformers' there, and the same in every run."""

from __future__ import annotations

import pytest
import torch

import fastbert
from fastbert.ops import backends

from ..ops.helpers import DEVICE
from .helpers import NAMES, inputs_for, mask, on_real_tokens, pair, small_config
from .test_packed_inputs import packed

pytestmark = pytest.mark.gpu


def on_device(batch: dict) -> dict:
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def outputs_and_gradients(model: torch.nn.Module, batch: dict, autocast: bool = False) -> dict[str, torch.Tensor]:
    """By name, in float64 and on the CPU; padding is set to 0. The gradients are of the outputs' squares where there is no loss."""
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        output = model(**batch)
        results = {key: on_real_tokens(value.double().cpu()) for key, value in output.items()}
    loss = output["loss"] if "loss" in output else sum(value.square().mean() for value in results.values())
    loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in results.items()} | gradients


def assert_within_twice_their_error(ours: dict, theirs: dict, truth: dict, dtype: torch.dtype) -> None:
    """In the norm of each tensor, relative to the truth's. One rounding is granted on top, as in ``ops/helpers.py``.

    Tensors of few elements (a loss, a label's bias) count together: the error of a handful is a matter of luck.
    """
    assert ours.keys() == truth.keys()
    largest = max(value.abs().max() for name, value in truth.items() if "." in name)
    few: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, expected in truth.items():
        if "." in name and expected.abs().max() < 1e-6 * largest:
            continue  # a gradient that is zero in exact arithmetic: a key's bias
        assert torch.isfinite(ours[name]).all(), f"{name}: not finite"
        error, budget = ((results[name] - expected).norm() / expected.norm() for results in (ours, theirs))
        if expected.numel() < 64:
            few.append((error, budget))
            continue
        assert error <= 2 * budget + torch.finfo(dtype).eps, f"{name}: error {error:.2e}, transformers' {budget:.2e}"
    if few:
        error, budget = (torch.stack(values).mean() for values in zip(*few, strict=True))
        assert error <= 2 * budget + torch.finfo(dtype).eps, f"small tensors: error {error:.2e}, transformers' {budget:.2e}"


def batch_for(name: str) -> dict:
    batch = inputs_for(name)
    if name == "BertForQuestionAnswering":
        batch.pop("attention_mask")  # padding takes part in transformers' softmax, not in ours
    return batch


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_as_close_to_the_truth_as_transformers(name, mode):
    """The truth is transformers' model in float64, on the CPU."""
    theirs, ours = pair(name)
    batch = batch_for(name)
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    theirs, ours = theirs.to(dtype), ours.to(dtype)  # rounding the weights is no part of anybody's error
    results = [outputs_and_gradients(model.to(DEVICE), on_device(batch), mode == "autocast") for model in (ours, theirs)]
    truth = outputs_and_gradients(theirs.cpu().double(), batch)
    assert_within_twice_their_error(*results, truth, torch.float32 if mode == "float32" else torch.bfloat16)


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification", "BertForPreTraining"])
def test_gradients_under_autocast_together(name):
    """Without a rounding on top: also of squares, of which the last LayerNorm's backward pass leaves next to nothing."""
    theirs, ours = pair(name)
    batch = batch_for(name)
    results = [outputs_and_gradients(model.to(DEVICE), on_device(batch), True) for model in (ours, theirs)]
    truth = outputs_and_gradients(theirs.cpu().double(), batch)
    error, budget = (gradients_error(found, truth) for found in results)
    assert error <= 2 * budget, f"error {error:.2e}, transformers' {budget:.2e}"


def gradients_error(found: dict, truth: dict) -> float:
    """The root mean square of all gradients' relative errors."""
    largest = max(value.abs().max() for value in truth.values())
    gradients = [name for name, value in truth.items() if "." in name and value.abs().max() > 1e-6 * largest]
    errors = [(found[name] - truth[name]).norm() / truth[name].norm() for name in gradients]
    return float(torch.stack(errors).square().mean().sqrt())


@pytest.mark.parametrize("autocast", [False, True])
def test_packed_rows_are_the_padded_batch(autocast):
    _, ours = pair("BertForPreTraining")
    ours = ours.to(DEVICE)
    batch = inputs_for("BertForPreTraining")
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        expected, got = ours(**on_device(batch)), ours(**on_device(packed(batch)))
        torch.testing.assert_close(got.loss, expected.loss)
        torch.testing.assert_close(got.prediction_logits[0], expected.prediction_logits[mask().bool().to(DEVICE)])


@pytest.mark.parametrize("autocast", [False, True])
def test_two_training_passes_give_the_same_bits(autocast):
    """Dropout is on: the seed is all that two runs have in common."""
    ours = fastbert.BertForPreTraining(small_config()).train().to(DEVICE)
    batch = on_device(inputs_for("BertForPreTraining"))
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append(outputs_and_gradients(ours, batch, autocast))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_a_training_step_lowers_the_loss():
    ours = fastbert.BertForMaskedLM(small_config()).train().to(DEVICE)
    batch = on_device(inputs_for("BertForMaskedLM"))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = ours(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.cuda
def test_work_is_queued_on_the_current_stream():
    """A stream that is busy runs our kernels after its other work, not beside it: the weights are overwritten in its queue."""
    ours = fastbert.BertForMaskedLM(small_config()).eval().to("cuda")
    batch = on_device(inputs_for("BertForMaskedLM"))
    with torch.no_grad():
        ours(**batch)  # compiles
        doubled = {name: 2 * parameter for name, parameter in ours.named_parameters()}
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            for name, parameter in ours.named_parameters():
                parameter.copy_(doubled[name])
            queued = ours(**batch).loss
        stream.synchronize()
        assert torch.equal(queued, ours(**batch).loss)


@pytest.mark.cuda
@pytest.mark.parametrize("op", ["attention", "add_layer_norm", "mlm_loss"])
def test_a_gpu_runs_a_kernel_and_not_the_reference(op):
    assert backends.select(op, "auto", "cuda", torch.bfloat16) != "reference"


@pytest.mark.cuda
def test_parameters_stay_where_they_are_while_a_first_call_is_recorded():
    """What moved them would be recorded, too, and copy freed memory into them at each replay."""
    torch.manual_seed(0)
    model = fastbert.BertModel(small_config()).to(DEVICE).eval()
    batch = {"input_ids": torch.randint(1, 130, (2, 9), device=DEVICE)}
    warm = fastbert.BertModel(small_config()).to(DEVICE).eval()  # compiles the kernels
    with torch.no_grad():
        warm(**batch)
        expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            recorded = model(**batch).last_hidden_state
        graph.replay()
        torch.cuda.synchronize()
        found = recorded.clone()
        assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
        torch.testing.assert_close(found, model(**batch).last_hidden_state)


@pytest.mark.cuda
def test_a_first_call_on_a_stream_of_its_own_moves_parameters_whole():
    torch.manual_seed(0)
    model = fastbert.BertModel(small_config()).to(DEVICE).eval()
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch, stream = {"input_ids": torch.randint(1, 130, (2, 9), device=DEVICE)}, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what moves them waits behind it
        model(**batch)
    noise = [torch.full_like(parameter, 7.0) for parameter in model.parameters()]  # where the old memory was freed to
    torch.cuda.synchronize()
    assert len(noise) == len(expected)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
