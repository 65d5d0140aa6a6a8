"""Inference on packed weights: which calls take it, and that it never works with weights of yesterday."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import prune_linear_layer

import fastbert
from fastbert.model import layer as layer_module
from fastbert.model import packed_layer, request
from fastbert.ops import calibration, native
from fastbert.ops.native.encoder_layer import PackedEncoderLayer, PackedEncoderLayers, run_layers, run_layers_if_unchanged

from .helpers import LENGTHS, inputs_for, mask, on_real_tokens, pair

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=str(native.unavailable_reason()))
NAME = "BertModel"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per packed layer that is run: its rows."""
    rows: list[int] = []

    def counted(run):
        def run_and_count(layers, x, *rest):
            y = run(layers, x, *rest)
            rows.extend([] if y is None else [x.shape[0]] * len(layers))
            return y

        return run_and_count

    for module in (layer_module, packed_layer):
        monkeypatch.setattr(module, "run_layers", counted(run_layers))
    for module in (packed_layer, request):
        monkeypatch.setattr(module, "run_layers_if_unchanged", counted(run_layers_if_unchanged))
    return rows


def output(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).last_hidden_state * batch["attention_mask"].unsqueeze(-1)


def packed_layers(model: torch.nn.Module) -> int:
    return sum(layer in packed_layer._entries for layer in model.encoder.layer)


def test_inference_takes_one_call_per_layer_and_is_right(calls):
    theirs, ours = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        assert (output(ours, batch) - output(theirs, batch)).abs().max() < 2e-5
    assert calls == [sum(LENGTHS)] * 3


def test_bfloat16(calls):
    theirs, ours = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        truth = output(theirs.double(), batch)
        error = (output(ours.bfloat16(), batch).double() - truth).abs().max()
        assert error <= 2 * (output(theirs.bfloat16(), batch).double() - truth).abs().max()
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8(calls, dtype):
    _, model = pair(NAME)
    model, batch = fastbert.quantize(model).to(dtype), inputs_for(NAME)
    with torch.no_grad():
        before = output(copy.deepcopy(model).train(False), batch)
        packed = len(calls)
        for layer in model.encoder.layer:
            layer.attention.self.query.register_forward_hook(lambda *_: None)  # takes the ops one by one
        one_by_one = output(model, batch)
    assert (before - one_by_one).abs().max() < 0.1
    assert packed == len(calls) == 3


def test_training_and_gradients_take_the_ops_and_drop_the_copies(calls):
    _, model = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        model(**batch)
    assert packed_layers(model) == 3
    model.train()
    with torch.no_grad():
        model(**batch)  # dropout
    assert packed_layers(model) == 0
    model.eval()
    with torch.no_grad():
        model(**batch)
    assert packed_layers(model) == 3
    model(**batch).last_hidden_state.sum().backward()
    assert packed_layers(model) == 0
    assert len(calls) == 6


def test_frozen_layers_run_packed_while_others_train(calls):
    _, model = pair("BertForSequenceClassification")
    model.bert.requires_grad_(False)
    batch = inputs_for("BertForSequenceClassification")
    model(**batch).loss.backward()
    assert model.classifier.weight.grad is not None
    assert len(calls) == 3


def _step(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def _through_data(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.01)


def _load(model: torch.nn.Module) -> None:
    model.load_state_dict({name: tensor * 1.01 for name, tensor in model.state_dict().items()})


def _swap(model: torch.nn.Module) -> None:
    dense = model.encoder.layer[1].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.detach() * 1.5)


def _swap_data(model: torch.nn.Module) -> None:
    dense = model.encoder.layer[1].output.dense
    dense.weight.data = dense.weight.data * 1.5


def _bias(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.encoder.layer[2].attention.self.key.bias.add_(1)
        model.encoder.layer[2].attention.self.value.bias[3] += 1


def _norm(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.encoder.layer[0].output.LayerNorm.weight[5] = 3.0


def _module(model: torch.nn.Module) -> None:
    model.encoder.layer[0].intermediate.dense = torch.nn.Linear(48, 96)


@pytest.mark.parametrize("change", [_step, _through_data, _load, _swap, _swap_data, _bias, _norm, _module])
def test_changed_weights_are_packed_again(calls, change):
    _, model = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        before = output(model, batch)
    change(model)
    with torch.no_grad():
        after = output(model, batch)
        fresh = output(copy.deepcopy(model), batch)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh)
    assert len(calls) == 9  # of three layers, before, after and of the copy


@pytest.mark.parametrize("change", [_step, _through_data, _load, _swap, _swap_data, _bias, _norm, _module])
def test_changed_weights_of_layers_that_were_one_call_are_packed_again(calls, change):
    _, model = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        before = [output(model, batch) for _ in range(3)]
    assert torch.equal(before[0], before[2])
    change(model)
    with torch.no_grad():
        after = [output(model, batch) for _ in range(3)]
        fresh = output(copy.deepcopy(model), batch)
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(y, fresh) for y in after)
    assert len(calls) == 3 * 7


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.Tanh])
def test_a_class_that_gets_another_forward_after_the_first_calls(monkeypatch, kind):
    theirs, model = pair(NAME)
    batch, forward = inputs_for(NAME), kind.forward
    with torch.no_grad():
        before = [model(**batch).pooler_output for _ in range(3)]
        monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
        expected, changed = theirs(**batch).pooler_output, [model(**batch).pooler_output for _ in range(2)]
        monkeypatch.undo()
        after = [model(**batch).pooler_output for _ in range(2)]
    for y in changed:
        torch.testing.assert_close(y, expected)
    assert all(torch.equal(y, before[0]) for y in (*before, *after))


def test_the_same_weights_are_packed_once(monkeypatch):
    _, model = pair(NAME)
    made = []
    init = PackedEncoderLayer.__init__
    monkeypatch.setattr(PackedEncoderLayer, "__init__", lambda self, *args: made.append(1) or init(self, *args))
    with torch.no_grad():
        for _ in range(3):
            model(**inputs_for(NAME))
    assert len(made) == 3


def test_parameters_of_inference_mode():
    with torch.inference_mode():
        _, model = pair(NAME)
        batch = inputs_for(NAME)
        before = output(model, batch)
        model.encoder.layer[0].output.dense.weight.mul_(2)
        assert not torch.equal(before, output(model, batch))


def test_copies_and_pickles_hold_no_packed_weights():
    _, model = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        expected = output(model, batch)
        size = len(pickle.dumps(copy.deepcopy(model)))
        assert len(pickle.dumps(model)) == size
        assert torch.equal(output(copy.deepcopy(model), batch), expected)
        assert torch.equal(output(pickle.loads(pickle.dumps(model)), batch), expected)


def test_layers_that_nobody_watches_are_one_call(monkeypatch):
    """From the second forward pass on; a class that calls its layers in its own way is left to it."""
    _, model = pair(NAME)
    batch, single, several = inputs_for(NAME), [], []
    monkeypatch.setattr(layer_module, "run_layers", lambda stack, *args: single.append(1) or run_layers(stack, *args))
    monkeypatch.setattr(packed_layer, "run_layers", lambda stack, *args: several.append(len(stack)) or run_layers(stack, *args))
    with torch.no_grad():
        first = output(model, batch)
        assert (len(single), several) == (3, [])
        assert torch.equal(output(model, batch), first)
        assert (len(single), several) == (3, [3])
        states = model(**batch, output_hidden_states=True).hidden_states
        assert torch.equal(states[-1] * batch["attention_mask"].unsqueeze(-1), first)
        assert (len(single), several) == (6, [3])
        seen = []
        model.encoder.layer[2].register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(output(model, batch), first)
        assert (len(single), several, seen) == (9, [3], [1])

    class Doubled(type(model.encoder.layer[0])):
        def forward(self, hidden_states, *args, **kwargs):
            return 2 * super().forward(hidden_states, *args, **kwargs)

    _, model = pair(NAME)
    model.encoder.layer[1].__class__ = Doubled
    with torch.no_grad():
        once = output(model, batch)
        assert torch.equal(output(model, batch), once)
    assert several == [3]


def test_a_model_that_is_gone_leaves_nothing():
    _, model = pair(NAME)
    with torch.no_grad():
        model(**inputs_for(NAME))
    before = len(packed_layer._entries)
    assert packed_layers(model) == 3
    del model
    assert len(packed_layer._entries) == before - 3


def test_hidden_states_hooks_and_dtypes(calls):
    """What watches a layer goes on seeing it; a model in another dtype is packed again."""
    theirs, ours = pair(NAME)
    batch = inputs_for(NAME)
    seen = []
    handle = ours.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        states = ours(**batch, output_hidden_states=True).hidden_states
        expected = theirs(**batch, output_hidden_states=True).hidden_states
        real = mask().unsqueeze(-1)
        for ours_state, theirs_state in zip(states, expected, strict=True):
            assert ((ours_state - theirs_state) * real).abs().max() < 2e-5
        assert seen == [(*mask().shape, 48)]
        handle.remove()
        assert ours.double()(**batch).last_hidden_state.dtype == torch.float64  # no kernels: the reference
    assert len(calls) == 3


def test_modules_that_are_not_plain_take_the_ops(calls):
    _, model = pair(NAME)
    model.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()
    model.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(**inputs_for(NAME))
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(calls, dtype):
    """bfloat16 weights under rows that stay float32; no kernels for float16."""
    theirs, ours = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        truth = output(theirs, batch)
        for _ in range(2):
            with torch.autocast("cpu", dtype):
                result, expected = output(ours, batch), output(theirs, batch)
            assert result.dtype == torch.float32
            assert (result - truth).abs().max() <= 2 * (expected - truth).abs().max()
        assert len(calls) == (6 if dtype == torch.bfloat16 else 0)
        assert (output(ours, batch) - truth).abs().max() < 2e-5  # packed again, in float32


@pytest.mark.parametrize("winner", ["one call", "op by op"])
def test_the_faster_of_both_is_taken(calls, monkeypatch, tmp_path, winner):
    """Measured once per machine; a model that is too small to matter is not measured."""
    monkeypatch.setenv("FASTBERT_CALIBRATION", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_known", {})
    asked = []

    def measured(candidates, operands, flops):
        x = operands()
        results = [candidate(*x) for candidate in candidates.values()]
        if "one call" in candidates:
            asked.append(list(candidates))
            assert (results[0] - results[1]).abs().max() < 1e-4
            return {winner: 2e9, **{name: 1e9 for name in candidates if name != winner}}
        return dict.fromkeys(candidates, 1e9)

    monkeypatch.setattr(calibration, "_measure", measured)
    _, model = pair(NAME)
    with torch.no_grad():
        model(**inputs_for(NAME))
    assert asked == []
    assert len(calls) == 3
    calls.clear()
    _, model = pair(NAME, hidden_size=192, intermediate_size=768)
    batch = inputs_for(NAME)
    with torch.no_grad():
        first = output(model, batch)
        assert torch.equal(output(model, batch), first)
    assert asked == [["one call", "op by op"]]
    assert len(calls) == 1 + (6 if winner == "one call" else 0)  # the measurement's own
    text = str(fastbert.explain(model))
    assert ("one call per layer" in text) == (winner == "one call")
    assert ("measured here: op by op 2 GFLOP/s, one call 1 GFLOP/s" in text) == (winner == "op by op")


def test_what_is_known_is_not_measured_again(calls, monkeypatch, tmp_path):
    """By a later process: its first call packs, runs nothing for the measurement, and is the only one that packs."""
    monkeypatch.setenv("FASTBERT_CALIBRATION", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_known", {})
    batch, packed, op_by_op = inputs_for(NAME), [], []
    pack, run = packed_layer._pack, layer_module.FusedLayer.op_by_op
    monkeypatch.setattr(packed_layer, "_pack", lambda *args: packed.append(1) or pack(*args))
    monkeypatch.setattr(layer_module.FusedLayer, "op_by_op", lambda *args: op_by_op.append(1) or run(*args))
    for measured in (True, False):
        _, model = pair(NAME, hidden_size=192, intermediate_size=768)
        calibration._known.clear()
        packed.clear(), op_by_op.clear()
        with torch.no_grad():
            model(**batch)
            assert bool(op_by_op) == measured
            if not measured:
                model(**batch)
                assert len(packed) == 3


def test_explain_says_what_inference_takes(calls):
    _, model = pair(NAME)
    assert "one call per layer on packed weights" in str(fastbert.explain(model))
    model.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.ReLU()
    explanation = fastbert.explain(model)
    assert explanation.inference == {0: [], 1: ["its activation is not the erf-GELU"], 2: []}
    assert "its activation is not the erf-GELU" in str(explanation)


@pytest.mark.parametrize("mode", ["training", "float16"])
def test_explain_says_what_inference_takes_in_training_mode_and_under_autocast(calls, mode):
    _, ours = pair(NAME, hidden_dropout_prob=0.1)
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=mode == "float16"):
        ours.train(mode == "training")(**inputs_for(NAME))
        reasons = fastbert.explain(ours).inference[0]
    assert calls == []
    expected = (
        "dropout is on, as in training" if mode == "training" else "no kernels for torch.float32 with weights of torch.float16"
    )
    assert expected in "; ".join(reasons)
    assert fastbert.explain(ours.eval()).inference[0] == []


def test_a_layer_that_gets_other_dicts_of_hooks_is_watched():
    _, model = pair(NAME)
    batch, seen = inputs_for(NAME), []
    with torch.no_grad():
        for _ in range(2):
            model(**batch)
        layer = model.encoder.layer[1]
        layer._forward_hooks = OrderedDict()
        layer.register_forward_hook(lambda *_: seen.append(1))
        model(**batch)
    assert seen == [1]


def test_dropout_of_probability_0_may_be_in_training_mode(monkeypatch):
    """And is looked at again when it gets another probability."""
    _, model = pair(NAME)
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for dropout in dropouts:
        dropout.p = 0.0
    batch, made = inputs_for(NAME), []
    init = PackedEncoderLayer.__init__
    monkeypatch.setattr(PackedEncoderLayer, "__init__", lambda self, *args: made.append(1) or init(self, *args))
    with torch.no_grad():
        expected = output(model.eval(), batch)
        for training in (True, True, False):
            assert torch.equal(output(model.train(training), batch), expected)
        assert packed_layers(model) == len(made) == 3
        model.train()
        for dropout in dropouts:
            dropout.p = 0.5
        assert not torch.equal(output(model, batch), expected)
    assert packed_layers(model) == 0


@pytest.mark.parametrize("how", ["shared", "reversed"])
def test_layers_in_several_places_leave_nothing(how):
    _, ours = pair(NAME)
    layers, batch = ours.encoder.layer, inputs_for(NAME)
    with torch.no_grad():
        if how == "shared":
            layers[1] = layers[0]
        for _ in range(2):
            ours(**batch)
        if how == "reversed":
            ours.encoder.layer = nn.ModuleList(reversed(layers))
            for _ in range(2):
                ours(**batch)
    gone = [weakref.ref(layer) for layer in layers]
    del layers, ours
    assert not any(layer() for layer in gone)


WATCHED = {
    "a layer": lambda model: model.encoder.layer[0],
    "a Linear of one": lambda model: model.encoder.layer[1].attention.self.query,
    "the pooler": lambda model: model.pooler,
    "a table": lambda model: model.embeddings.word_embeddings,
    "a parameter": lambda model: model.encoder.layer[0].output.dense.weight,
}


@pytest.mark.parametrize("runs_again", [False, True])
@pytest.mark.parametrize("watched", WATCHED.values(), ids=WATCHED)
def test_a_model_that_its_own_hooks_know_is_freed(watched, runs_again):
    _, ours = pair(NAME)
    with torch.no_grad():
        ours(**inputs_for(NAME))
        part = watched(ours)
        register = part.register_forward_hook if isinstance(part, nn.Module) else part.register_hook
        register(lambda *_, model=ours: None)
        if runs_again:
            ours(**inputs_for(NAME))
    gone = weakref.ref(ours)
    del ours, part, register
    gc.collect()
    assert gone() is None


def _hook_inside(model: nn.Module) -> None:
    for layer in model.encoder.layer:
        layer.output.dense.register_forward_hook(lambda *_: None)


def _other_linears(model: nn.Module) -> None:
    for layer in model.encoder.layer:
        layer.output.dense = nn.Sequential(layer.output.dense)


@pytest.mark.parametrize("change", [_hook_inside, _other_linears, fastbert.restore])
def test_weights_that_no_call_takes_any_more_are_not_kept_packed(change):
    _, ours = pair(NAME)
    with torch.no_grad():
        ours(**inputs_for(NAME))
        assert set(ours.encoder.layer) <= set(packed_layer._entries)
        change(ours)
        ours(**inputs_for(NAME))
    assert not set(ours.encoder.layer) & set(packed_layer._entries)


def test_weights_that_another_thread_casts_meanwhile_are_packed_as_they_were():
    """In the other dtype they have another size than the memory that was asked for."""
    _, ours = pair(NAME)
    layer, x = ours.encoder.layer[0], torch.randn(5, 48)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    with torch.no_grad():
        expected = run_layers(packed_layer._pack(layer, (torch.float32, None)).packed, x, bounds)
        weights = packed_layer._weights_of(layer)
        layer.bfloat16()
        layer.float()
        nn.init.zeros_(layer.output.dense.weight)
        weights.check()
        packed = PackedEncoderLayers([PackedEncoderLayer(weights, torch.float32)])
    assert torch.equal(run_layers(packed, x, bounds), expected)


def test_weights_that_do_not_fit_are_errors():
    batch = inputs_for(NAME)
    with torch.no_grad():
        _, ours = pair(NAME)
        ours.encoder.layer[1].output.dense.bias = nn.Parameter(torch.zeros(3))
        with pytest.raises(ValueError, match=r"output.bias has shape \(3,\), expected \(48,\)"):
            ours(**batch)
        _, ours = pair(NAME)
        ours.encoder.layer[1].to("meta")
        with pytest.raises(RuntimeError, match="an encoder layer has weights on meta, its input is on cpu"):
            ours(**batch)


class TheirEmbeddings(nn.Module):
    """Of somebody else, ``hidden`` wide, with ``more`` tokens than there are ids, in the place of BERT's."""

    def __init__(self, theirs: nn.Module, hidden: int, more: int = 0) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(theirs.word_embeddings.num_embeddings, hidden)
        self.position_embeddings, self.token_type_embeddings = theirs.position_embeddings, theirs.token_type_embeddings
        self.more = more

    def forward(self, input_ids, **_):
        return self.word_embeddings(input_ids.repeat(1, 2)[:, : input_ids.shape[1] + self.more])


@pytest.mark.parametrize(("wider", "more"), [(16, 0), (-16, 0), (0, 2), (0, -2)])
def test_rows_that_do_not_fit_the_layers_are_errors(wider, more):
    """Embeddings of somebody else may give any: the native code would read, and write, what is no row."""
    _, ours = pair(NAME)
    ours.embeddings = TheirEmbeddings(ours.embeddings, ours.config.hidden_size + wider, more)
    ours.eval()
    ids = inputs_for(NAME)["input_ids"]
    for _ in range(2):  # a layer at a time, then those that are packed in one call
        with torch.no_grad(), pytest.raises(ValueError, match="x has shape" if wider else "never fall from 0 to total"):
            ours(ids)


def test_weights_whose_rows_are_apart_or_all_one():
    theirs, ours = pair(NAME)
    for model in (theirs, ours):
        first, second, _ = (layer.output.dense for layer in model.encoder.layer)
        first.weight = nn.Parameter(torch.full((1, 1), 0.5).expand(first.weight.shape))
        first.bias = nn.Parameter(torch.full((1,), 0.5).expand(first.bias.shape))
        second.weight = nn.Parameter(second.weight.detach().repeat(1, 2)[:, :96])
    batch = inputs_for(NAME)
    with torch.no_grad():
        got, expected = (on_real_tokens(model(**batch).last_hidden_state) for model in (ours, theirs))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_refresh_shows_what_leaves_no_trace():
    _, model = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        for _ in range(3):
            output(model, batch)
        model.encoder.layer[1].output.dense.weight.data[5] = 0.3
        model.pooler.dense.weight.data[5] = 0.3
        assert fastbert.refresh(model) is model
        fresh = copy.deepcopy(model)
        assert torch.equal(output(model, batch), output(fresh, batch))
        assert torch.equal(model(**batch).pooler_output, fresh(**batch).pooler_output)


def test_a_first_call_draws_nothing_from_torchs_generator():
    _, model = pair(NAME, hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    batch, before = inputs_for(NAME), torch.get_rng_state()
    with torch.no_grad():
        model(**batch)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("path", ["intermediate.dense", "attention.self.query", "output.LayerNorm"])
def test_tensors_in_the_places_of_parameters(path, calls):
    """A hypernetwork's weights, say: those of this call are read, and get their gradients."""
    theirs, ours = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        ours(**batch)
    weights = [torch.randn_like(theirs.encoder.layer[1].get_submodule(path).weight).mul_(0.1).requires_grad_() for _ in range(3)]
    for model in (theirs, ours):
        model.requires_grad_(False)
        del model.encoder.layer[1].get_submodule(path).weight
    for weight in weights:
        results = []
        for model in (theirs, ours):
            model.encoder.layer[1].get_submodule(path).weight = weight
            with torch.no_grad():
                without = output(model, batch)
            hidden = output(model, batch)
            results.append((without, hidden, *torch.autograd.grad(hidden.pow(3).sum(), weight)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-3)
    assert "a weight or bias of its is a tensor that is no parameter" in str(fastbert.explain(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_heads(dtype):
    theirs, ours = pair(NAME)
    batch, keep = inputs_for(NAME), torch.arange(24)
    for model in (theirs, ours):
        attention = model.encoder.layer[1].attention
        for name in ("query", "key", "value"):
            setattr(attention.self, name, prune_linear_layer(getattr(attention.self, name), keep))
        attention.output.dense = prune_linear_layer(attention.output.dense, keep, dim=1)
        attention.self.num_attention_heads, attention.self.all_head_size = 2, 24
        model.to(dtype)
    with torch.no_grad():
        error = (output(ours, batch) - output(theirs, batch)).abs().max()
    assert error < (2e-5 if dtype == torch.float32 else 0.1)
    assert "its queries are 24 wide, where hidden states are 48" in str(fastbert.explain(ours))
    with torch.no_grad():
        assert (output(fastbert.quantize(ours), batch) - output(theirs, batch)).abs().max() < 0.3


@pytest.mark.parametrize("path", ["encoder.layer.1.output.dense", "pooler.dense", "embeddings.word_embeddings"])
def test_memory_in_the_place_of_freed_memory(path, calls):
    """A tensor that is given other memory through ``.data`` counts no version, and may get the memory that was its own before."""
    theirs, ours = pair(NAME)
    batch, rounds = inputs_for(NAME), 0
    weights = [model.get_submodule(path).weight for model in (theirs, ours)]
    addresses = set()
    for element in range(100, 700, 23):  # past the first words, which are looked at
        results = []
        for model, weight in zip((theirs, ours), weights, strict=True):
            changed = weight.data.clone()
            changed.view(-1)[element] += 5.0
            weight.data = changed
            del changed
            addresses.add(weight.data_ptr())
            with torch.no_grad():
                got = model(**batch)
            results.append((on_real_tokens(got.last_hidden_state), got.pooler_output))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        rounds += 1
    assert len(addresses) < 2 * rounds


def test_torch_swaps_parameters(calls):
    """As ``torch.utils.swap_tensors`` refuses to where anybody refers to a tensor weakly."""
    theirs, ours = pair(NAME)
    batch = inputs_for(NAME)
    with torch.no_grad():
        ours(**batch), ours(**batch)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in (theirs, ours):
            model.double().float().load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    with torch.no_grad():
        assert (output(ours, batch) - output(theirs, batch)).abs().max() < 2e-5
