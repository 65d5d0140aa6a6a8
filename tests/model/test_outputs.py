"""Outputs that are computed when they are read behave like transformers' in every way they are used."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import MaskedLMOutput

import fastbert
from fastbert.model.outputs import PooledEncoderOutput

from .helpers import VOCABULARY, inputs_for, on_real_tokens, pair, small_config


@pytest.fixture
def output():
    _, ours = pair("BertForMaskedLM")
    return ours(**inputs_for("BertForMaskedLM"))


def is_waiting(output) -> bool:
    return "Deferred" in type(output.__dict__["logits"]).__name__


def test_the_loss_does_not_compute_logits(output):
    output.loss.backward()
    assert output["loss"] is output.loss
    assert output[0] is output.loss
    assert isinstance(output, MaskedLMOutput)
    assert "logits" in output
    assert is_waiting(output)


def test_mixed_precision_of_accelerate_does_not_compute_logits():
    """It goes through all outputs of a step, to make them float32."""
    accelerate = pytest.importorskip("accelerate")
    theirs, ours = (model.train() for model in pair("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    batch = inputs_for("BertForMaskedLM")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    expected, output = accelerator.prepare(theirs)(**batch), accelerator.prepare(ours)(**batch)
    assert is_waiting(output)
    output.loss.backward()
    assert is_waiting(output)
    assert output.loss.dtype == output.logits.dtype == expected.logits.dtype == torch.float32
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], expected.logits[real], rtol=0.1, atol=0.05)
    assert not is_waiting(output) and output.logits.requires_grad
    # What gathers outputs in an evaluation reads them.
    assert accelerate.utils.gather(ours(**batch)).logits.shape == expected.logits.shape


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_only_half_precision_becomes_float32(dtype, expected):
    operations = pytest.importorskip("accelerate.utils.operations")
    _, ours = pair("BertForMaskedLM")
    output = operations.convert_to_fp32(ours.to(dtype)(**inputs_for("BertForMaskedLM")))
    assert is_waiting(output)
    assert output.logits.dtype == expected


def test_what_ddp_looks_for_is_not_computed(output):
    from torch.nn.parallel.distributed import _find_tensors

    found = list(_find_tensors(output))
    assert len(found) == 1 and found[0] is output.loss
    assert is_waiting(output)
    output.logits  # noqa: B018 (computes them)
    assert len(list(_find_tensors(output))) == 2


@pytest.mark.parametrize(
    "read",
    [
        lambda o: o.logits,
        lambda o: o["logits"],
        lambda o: o[1],
        lambda o: o[1:][0],
        lambda o: o.to_tuple()[1],
        lambda o: dict(o)["logits"],
        lambda o: {**o}["logits"],
        lambda o: list(o.values())[1],
        lambda o: o.get("logits"),
        lambda o: pickle.loads(pickle.dumps(o)).logits,
        lambda o: copy.copy(o).logits,
        lambda o: pytree.tree_leaves(o)[1],
        lambda o: type(o)(**o).logits,
    ],
)
def test_every_way_of_reading(output, read):
    with torch.no_grad():
        detached = type(output)(loss=output.loss.detach())
        detached.defer("logits", output.__dict__["logits"])
        logits = read(detached)
    assert logits.shape == (6, 21, 130)
    torch.testing.assert_close(logits.detach(), output.logits.detach())


def test_logits_keep_the_grad_mode_of_the_forward_pass():
    _, ours = pair("BertForMaskedLM")
    batch = inputs_for("BertForMaskedLM")
    output = ours(**batch)
    with torch.no_grad():
        assert output.logits.requires_grad
        quiet = ours(**batch)
    assert not quiet.logits.requires_grad


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_logits_keep_the_inference_mode_of_the_forward_pass(name):
    """What is read for telemetry in between can still be differentiated; what was made for inference stays so."""
    _, ours = pair(name)
    output = ours(**inputs_for(name))
    with torch.inference_mode():
        logits = output[1]
    assert logits.requires_grad and not logits.is_inference()
    logits.sum().backward()
    assert ours.bert.encoder.layer[-1].output.dense.weight.grad is not None
    with torch.inference_mode():
        output = ours(**inputs_for(name))
    assert output[1].is_inference() and not output[1].requires_grad


def test_logits_after_an_optimizer_step_are_refused():
    """They would be those of the new weights; transformers' are of the old ones."""
    ours = fastbert.BertForMaskedLM(small_config())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    output = ours(**inputs_for("BertForMaskedLM"))
    output.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="read outputs.logits before the optimizer step"):
        _ = output.logits
    shown = repr(output)  # by whatever logs it
    assert shown.startswith(f"MaskedLMOutput(loss={output.loss!r}, logits=<not computed before the model changed>, ")


def test_what_is_printed_is_what_transformers_prints(output):
    theirs = MaskedLMOutput(loss=output.loss, logits=output.logits)
    assert repr(output).startswith(repr(theirs)[:-1])


def hooks_that_go(model: nn.Module) -> contextlib.AbstractContextManager:
    return model.cls.predictions.decoder.register_forward_hook(lambda _, inputs, output: 2 * output)


def adapters_off(model: nn.Module) -> contextlib.AbstractContextManager:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return (
        peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval().disable_adapter()
    )


@pytest.mark.parametrize("switch", [hooks_that_go, adapters_off])
def test_logits_of_a_head_that_is_something_else_afterwards(switch):
    """At once without gradients (a reference model's, say); with gradients somebody may never read them."""
    batch, results = inputs_for("BertForMaskedLM"), []
    for model in pair("BertForMaskedLM"):
        switched = switch(model)
        with switched, torch.no_grad():
            output = model(**batch)
        results.append(on_real_tokens(output.logits))
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)
    _, ours = pair("BertForMaskedLM")
    with switch(ours):
        output = ours(**batch)
    with pytest.raises(RuntimeError, match="parameters or modules have changed since the forward pass"):
        _ = output.logits


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict({name: 1.2 * x for name, x in model.state_dict().items()}, assign=True),
        lambda model: model.double(),
        lambda model: fastbert.quantize(model),
        lambda model: model.resize_token_embeddings(VOCABULARY + 8),
    ],
    ids=["assigned", "double", "int8", "resized"],
)
def test_logits_of_a_model_that_is_another_one_afterwards_are_refused(change):
    _, ours = pair("BertForMaskedLM")
    output = ours(**inputs_for("BertForMaskedLM"))
    change(ours)
    with pytest.raises(RuntimeError, match="parameters or modules have changed since the forward pass"):
        _ = output.logits


@pytest.mark.parametrize("part", ["", "layer.2.", "cls."])
def test_logits_of_parameters_of_one_call(part):
    """torch.func.functional_call: gone when the logits are read, which may take part in the loss."""
    batch, results = inputs_for("BertForMaskedLM"), []
    for model in pair("BertForMaskedLM"):
        named = {name: (1.3 * p.detach()).requires_grad_() for name, p in model.named_parameters() if part in name}
        output = functional_call(model, named, kwargs=batch)
        (output.loss + on_real_tokens(output.logits).square().mean()).backward()
        results.append([on_real_tokens(output.logits), *(p.grad for p in named.values() if p.grad is not None)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("forward_in_autocast", [True, False])
def test_logits_are_those_of_the_forward_passs_autocast(forward_in_autocast):
    """Whatever autocast is on where they are read: Trainer reads them after its autocast context has ended."""
    _, ours = pair("BertForMaskedLM")
    inputs = inputs_for("BertForMaskedLM")

    def autocast(enabled):
        return torch.autocast("cpu", torch.bfloat16, enabled)

    with autocast(forward_in_autocast):
        expected = ours(**inputs).logits
        output = ours(**inputs)
    with autocast(not forward_in_autocast):
        logits = output.logits
    assert logits.dtype == (torch.bfloat16 if forward_in_autocast else torch.float32)
    assert torch.equal(logits, expected)


def test_an_empty_output_is_what_the_constructor_makes():
    made, constructed = PooledEncoderOutput.empty(), PooledEncoderOutput()
    assert vars(made) == vars(constructed) and vars(made) is not vars(PooledEncoderOutput.empty())
    assert list(made.keys()) == list(constructed.keys()) == [] and made.to_tuple() == ()
    made["pooler_output"] = torch.ones(2)
    assert made.pooler_output is made["pooler_output"] and "pooler_output" in made
    assert PooledEncoderOutput.empty().pooler_output is None
