"""A step of several batches is the step of one large batch; steps that are left out change nothing; activations computed again."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from fastbert import BertConfig, BertForMaskedLM, BertForPreTraining
from fastbert.data.batches import PackedBatch, positions_within
from fastbert.data.masking import IGNORE_INDEX
from fastbert.train.learner import Learner, MicroBatch
from fastbert.train.metrics import BatchScores
from fastbert.train.optimizer import optimizer_tensors
from fastbert.train.settings import PretrainSettings

from ..model.helpers import rows_of_layers

VOCABULARY = 60
LENGTHS = (9, 17, 12, 30, 8, 21, 14, 25)
SPLITS = ([8], [4, 4], [1, 5, 2], [1] * 8)


def config(dropout: float = 0.0, layers: int = 2) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip


def settings(**changes) -> PretrainSettings:
    return PretrainSettings(**{"steps": 100, "warmup_steps": 0, "max_grad_norm": 1e9, "learning_rate": 1e-2, **changes})


def packed(first: int, last: int, pairs: bool = True) -> PackedBatch:
    """Sequences ``first`` .. ``last - 1`` of a fixed set, in which some have one masked token and others many."""
    generator = np.random.default_rng(7)
    sequences = []
    for number, length in enumerate(LENGTHS):
        ids = generator.integers(5, VOCABULARY, length)
        labels = np.where(generator.random(length) < (0.6 if number % 3 else 0.0), ids, IGNORE_INDEX)
        labels[3] = ids[3]
        sequences.append((ids, labels, generator.integers(0, 2)))
    chosen = sequences[first:last]
    bounds = np.cumsum([0, *(len(ids) for ids, _, _ in chosen)])
    position_ids = positions_within(bounds)
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([ids for ids, _, _ in chosen])),
        token_type_ids=torch.from_numpy((position_ids > 5).astype(np.int64)),
        position_ids=torch.from_numpy(position_ids),
        labels=torch.from_numpy(np.concatenate([labels for _, labels, _ in chosen])),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(np.diff(bounds).max()),
        next_sentence_label=torch.tensor([label for _, _, label in chosen]) if pairs else None,
    )


def micro_batches(model, split: list[int]) -> list[MicroBatch]:
    bounds = np.cumsum([0, *split]).tolist()
    pairs = isinstance(model, BertForPreTraining)
    batches = [packed(first, last, pairs) for first, last in zip(bounds, bounds[1:], strict=False)]
    masked = [int((batch.labels != IGNORE_INDEX).sum()) for batch in batches]
    return [
        MicroBatch(batch.model_inputs(), count / sum(masked), batch.num_sequences / 8 if pairs else count / sum(masked))
        for batch, count in zip(batches, masked, strict=True)
    ]


def gradients_of_step(model, split: list[int], run: PretrainSettings, monkeypatch) -> tuple[dict[str, Tensor], BatchScores]:
    learner = Learner(model.train(), run)
    learner.optimizer._opt_called = True  # there is no step of it, about which the schedule would warn
    seen: dict[str, Tensor] = {}
    with monkeypatch.context() as patch:
        patch.setattr(
            learner, "_optimizer_step", lambda left_out: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
        )
        scores = learner.step(micro_batches(model, split))
    return seen, BatchScores(*scores.tolist())


def true_gradients(model, name: str) -> dict[str, Tensor]:
    """transformers' in float64, of all sequences in one padded batch."""
    theirs = getattr(transformers, name)(model.config).double()
    theirs.load_state_dict(model.state_dict())
    theirs(**packed(0, 8, pairs=name == "BertForPreTraining").padded(0)).loss.backward()
    return {name: parameter.grad for name, parameter in theirs.named_parameters()}


def errors(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return math.sqrt(sum((gradients[name].double() - truth[name]).square().sum().item() for name in truth))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_class", [BertForPreTraining, BertForMaskedLM])
def test_any_division_of_a_step_has_the_gradient_of_the_whole(model_class, dtype, monkeypatch):
    model = model_class(config())
    truth = true_gradients(model, model_class.__name__)
    found = [gradients_of_step(model, split, settings(dtype=dtype), monkeypatch) for split in SPLITS]
    whole = errors(found[0][0], truth)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in truth.values()))
    assert whole < norm * (1e-6 if dtype == "float32" else 2e-2)
    for gradients, scores in found[1:]:
        assert errors(gradients, truth) < 2 * whole
        assert scores.mlm_loss == pytest.approx(found[0][1].mlm_loss, rel=1e-6 if dtype == "float32" else 1e-2)
        assert (scores.mlm_count, scores.nsp_count) == (found[0][1].mlm_count, found[0][1].nsp_count)
        assert scores.grad_norm == pytest.approx(norm, rel=1e-6 if dtype == "float32" else 2e-2)


def test_equal_weights_would_be_wrong():
    """The batches of the test above differ enough for a mean of means to be seen."""
    model = BertForPreTraining(config())
    truth = true_gradients(model, "BertForPreTraining")
    for batch in micro_batches(model, [1, 5, 2]):
        (model(**batch.inputs).loss / 3).backward()
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in truth.values()))
    assert errors({name: parameter.grad for name, parameter in model.named_parameters()}, truth) > 0.05 * norm


def test_a_step_of_one_batch_is_the_plain_step():
    model = BertForPreTraining(config())
    plain = copy.deepcopy(model)
    run = settings(max_grad_norm=1.0, schedule="linear", steps=10)
    learner, reference = Learner(model.train(), run), Learner(plain.train(), run)
    for _ in range(3):
        (batch,) = micro_batches(model, [8])
        learner.step([batch])
        plain(**batch.inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.optimizer.step()
        reference.schedule.step()
        reference.optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_bfloat16_is_for_the_forward_pass_only():
    model = BertForPreTraining(config())
    learner = Learner(model.train(), settings(dtype="bfloat16"))
    kinds = set()
    model.bert.encoder.layer[0].register_forward_hook(lambda *call: kinds.add(torch.is_autocast_enabled("cpu")))
    learner.step(micro_batches(model, [4, 4]))
    assert kinds == {True} and not torch.is_autocast_enabled("cpu")
    tensors = [*model.parameters(), *optimizer_tensors(model, learner.optimizer).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("poison", ["loss", "gradient", "spike"])
def test_a_step_that_is_left_out_changes_nothing(optimizer, poison, monkeypatch):
    monkeypatch.setattr("fastbert.train.guard.LEAST_STEPS", 1)
    model = BertForPreTraining(config())
    learner = Learner(model.train(), settings(optimizer=optimizer, loss_spike=1.5))
    batches = micro_batches(model, [4, 4])
    assert not learner.step(batches)[-1]
    before = copy.deepcopy(model.state_dict()), optimizer_tensors(model, learner.optimizer)
    before_optimizer = {name: tensor.clone() for name, tensor in before[1].items()}
    rate = learner.learning_rate

    forward = BertForPreTraining.forward

    def poisoned(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if poison == "loss":
            output.loss, output.mlm_loss = output.loss * math.nan, output.mlm_loss * math.nan
        elif poison == "gradient":
            output.loss.register_hook(lambda gradient: gradient * math.inf)
        else:
            output.loss, output.mlm_loss = output.loss * 3, output.mlm_loss * 3
        return output

    with monkeypatch.context() as patch:
        patch.setattr(BertForPreTraining, "forward", poisoned)
        scores = BatchScores(*learner.step(batches).tolist())
    named = {"loss": "the loss is nan", "gradient": "the gradient norm is", "spike": "the loss is .*, above"}
    assert scores.left_out and re.match(named[poison], scores.reason)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    after = optimizer_tensors(model, learner.optimizer)
    assert after.keys() == before_optimizer.keys()
    assert all(torch.equal(after[name], before_optimizer[name]) for name in after)
    assert learner.learning_rate < rate
    assert not learner.step(batches)[-1]
    assert not all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())


def test_a_step_is_left_out_without_a_fused_optimizer_too(monkeypatch):
    """As on devices for which torch has no fused AdamW."""
    monkeypatch.setattr("fastbert.train.optimizer.FUSED_DEVICE_TYPES", frozenset())
    model = BertForPreTraining(config())
    learner = Learner(model.train(), settings())
    learner.step(micro_batches(model, [8]))
    with torch.no_grad():
        model.cls.predictions.bias[0] = math.nan
    before = copy.deepcopy(model.state_dict())
    assert learner.step(micro_batches(model, [8]))[-1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name.startswith("bert"))
    with torch.no_grad():
        model.cls.predictions.bias[0] = 0.0
    assert not learner.step(micro_batches(model, [8]))[-1]
    assert not torch.equal(model.bert.pooler.dense.weight, before["bert.pooler.dense.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_that_are_computed_again_give_the_same_gradients(dtype, monkeypatch):
    """With dropout: the masks are the same the second time."""
    model = BertForPreTraining(config(dropout=0.1, layers=3))
    calls = rows_of_layers(monkeypatch)
    found = []
    for again, expected_calls in ((False, 6), (True, 12)):
        run = settings(dtype=dtype, gradient_checkpointing=again)
        torch.manual_seed(3)
        found.append(gradients_of_step(copy.deepcopy(model), [4, 4], run, monkeypatch)[0])
        assert len(calls) == expected_calls
        calls.clear()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    torch.manual_seed(4)
    other = gradients_of_step(model, [4, 4], run, monkeypatch)[0]
    assert not all(torch.equal(found[0][name], other[name]) for name in other)
