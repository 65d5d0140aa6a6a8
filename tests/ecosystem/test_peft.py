"""PEFT on fast models: the same outputs and adapter gradients as PEFT on transformers' models, and nothing slow once merged."""

from __future__ import annotations

import copy
from importlib.metadata import version

import pytest
import torch
import transformers
from packaging.version import parse
from transformers.integrations.peft import MIN_PEFT_VERSION

import fastbert

from ..model.helpers import BATCH, LENGTH, assert_same_gradients, inputs_for, small_config
from .helpers import DOORS, RELATIVES, assert_same_on_real_tokens, batch_for, fast, notes_of, plain

peft = pytest.importorskip("peft")

# A third way in: the live model has its adapters already.
ADAPTED = "accelerate adapted"
CLASSIFIER = "BertForSequenceClassification"
TARGETS = {
    "query, value": ["query", "value"],
    "query, key, dense": ["query", "key", "dense"],
    "all": "all-linear",
    "embeddings": ["word_embeddings", "position_embeddings", "token_type_embeddings", "value"],
}


# What transformers calls a cache, and which PEFT it adds adapters with, are those of one PEFT or a later one.
of_transformers_peft = pytest.mark.skipif(
    parse(version("peft")) < parse(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} works with PEFT {MIN_PEFT_VERSION} and later; this is {version('peft')}",
)


@pytest.fixture(params=DOORS)
def door(request) -> str:
    return request.param


def lora(targets=("query", "value"), **changes) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": targets, "task_type": "SEQ_CLS", **changes})


def adapt(model, config):
    """The model with an adapter that changes its outputs, as a fresh one does not (LoRA's B is 0)."""
    model = peft.get_peft_model(model, copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def adapted_pair(door, config, name=CLASSIFIER, *, forward_first=False):
    """(transformers' model with an adapter, the fast one with the same weights)."""
    base = plain(name, num_hidden_layers=2)
    theirs = adapt(copy.deepcopy(base), config)
    if door == ADAPTED:
        return theirs, fastbert.accelerate(copy.deepcopy(theirs))
    ours = fast(base, door)
    if forward_first:
        ours(**inputs_for(name)).loss.backward()
        ours.zero_grad()
    ours = peft.get_peft_model(ours, copy.deepcopy(config))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.train(theirs.training)


def assert_same_outputs(ours, theirs, batch):
    got, expected = ours(**batch), theirs(**batch)
    assert got.keys() == expected.keys()
    for key in expected:
        assert_same_on_real_tokens(got[key], expected[key])
    return got, expected


def assert_same_step(ours, theirs, batch):
    for output in assert_same_outputs(ours, theirs, batch):
        output.loss.backward()
    assert_same_gradients(ours, theirs, 1e-4)


def assert_same_state(ours, theirs):
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def adapter_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


# --- LoRA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("way", (*DOORS, *(f"{door}, after a forward" for door in DOORS), ADAPTED))
def test_lora_outputs_and_gradients(way, targets):
    door = way.removesuffix(", after a forward")
    theirs, ours = adapted_pair(door, lora(TARGETS[targets]), forward_first=door != way)
    batch = inputs_for(CLASSIFIER)
    with torch.no_grad():
        assert_same_outputs(ours, theirs, batch)
    assert_same_step(ours, theirs, batch)
    reached = {name: p.grad is not None and p.grad.abs().max() > 0 for name, p in adapter_parameters(ours).items()}
    assert reached and all(reached.values()), reached


@pytest.mark.parametrize("kind", ("dora", "rslora", "bias", "one layer", "parameter"))
def test_lora_variants(door, kind):
    changes = {
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True, "lora_alpha": 3},
        "bias": {"bias": "all"},
        "one layer": {"layers_to_transform": [1]},
        "parameter": {"target_modules": [], "target_parameters": ["query.weight"]},
    }[kind]
    theirs, ours = adapted_pair(door, lora(["query", "dense"], **changes))
    assert_same_step(ours, theirs, inputs_for(CLASSIFIER))


@pytest.mark.parametrize("targets", (["query"], ["transform.dense", "value"], ["decoder"], ["word_embeddings"]), ids=str)
def test_lora_on_a_masked_language_model(door, targets):
    theirs, ours = adapted_pair(door, lora(targets, task_type=None), "BertForMaskedLM")
    assert_same_step(ours, theirs, inputs_for("BertForMaskedLM"))
    in_layers = targets[-1] in ("query", "value")
    assert any("peft" in note for note in fastbert.explain(ours).last_layer) == in_layers


@pytest.mark.parametrize("name", RELATIVES)
def test_lora_on_relatives_of_bert(name):
    theirs, ours = adapted_pair("accelerate", lora(["query", "dense", "word_embeddings"], task_type=None), name)
    assert_same_step(ours, theirs, batch_for(name))
    assert any("lora" in note for note in notes_of(ours))
    assert notes_of(ours.merge_and_unload()) == []


def test_default_targets(door):
    """PEFT knows which modules of a "bert" to adapt; it must know a fast one as such."""
    theirs, ours = adapted_pair(door, peft.LoraConfig(task_type="SEQ_CLS"))
    assert adapter_parameters(ours).keys() == adapter_parameters(theirs).keys() != set()
    assert_same_outputs(ours, theirs, inputs_for(CLASSIFIER))


def test_lora_dropout_is_drawn_in_training_only(door):
    _, ours = adapted_pair(door, lora(lora_dropout=0.5))
    batch = inputs_for(CLASSIFIER)
    assert not torch.equal(ours(**batch).logits, ours(**batch).logits)
    ours.eval()
    assert torch.equal(ours(**batch).logits, ours(**batch).logits)


def test_training_steps(door):
    """Momentum over several steps, so each forward reads the weights that the step before wrote."""
    theirs, ours = adapted_pair(door, lora(["query", "value", "dense"]))
    batch = inputs_for(CLASSIFIER)
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][0] - losses[0][-1] > 1e-2, "the steps change nothing"
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_gradient_checkpointing_with_a_frozen_encoder(door, use_reentrant):
    theirs, ours = adapted_pair(door, lora(["query", "value", "dense"]))
    for model in (theirs, ours):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    assert_same_step(ours, theirs, inputs_for(CLASSIFIER))


# --- merging, switching, mixing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", (False, True))
def test_merge_and_unload_is_fused_again(door, safe_merge):
    theirs, ours = adapted_pair(door, lora(["query", "value", "dense", "word_embeddings"]))
    batch = inputs_for(CLASSIFIER)
    adapted = ours(**batch).logits
    assert notes_of(ours)
    merged = ours.merge_and_unload(safe_merge=safe_merge)
    assert notes_of(merged) == []
    assert fastbert.explain(merged).fast == fastbert.explain(fastbert.BertModel(small_config())).fast
    torch.testing.assert_close(merged(**batch).logits, adapted, rtol=0, atol=2e-5)
    expected = theirs.merge_and_unload(safe_merge=safe_merge)
    assert_same_step(merged.requires_grad_(), expected.requires_grad_(), batch)


def test_merge_unmerge_and_disable(door):
    theirs, ours = adapted_pair(door, lora(["query", "value", "dense"]))
    batch = inputs_for(CLASSIFIER)
    adapted = ours(**batch).logits
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in (theirs, ours):
            getattr(model, change)()
        assert_same_outputs(ours, theirs, batch)
        torch.testing.assert_close(ours(**batch).logits, adapted, rtol=0, atol=2e-5)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_same_outputs(ours, theirs, batch)
        assert (ours(**batch).logits - adapted).abs().max() > 1e-3
    assert_same_step(ours, theirs, batch)


@pytest.mark.parametrize("door", (*DOORS, ADAPTED))
def test_several_adapters(door):
    theirs, ours = adapted_pair(door, lora(task_type=None))  # without a head of its own, of which only one can be active
    for model in (theirs, ours):
        model.add_adapter("second", lora(["query", "key"], r=3, task_type=None, init_lora_weights=False))
    ours.load_state_dict(theirs.state_dict())
    batch, logits = inputs_for(CLASSIFIER), {}
    for adapter in ("second", "default", "both"):
        for model in (theirs, ours):
            model.base_model.set_adapter(["default", "second"] if adapter == "both" else adapter)
            model.zero_grad()
        assert_same_step(ours, theirs, batch)
        logits[adapter] = ours(**batch).logits
    assert all((logits[a] - logits[b]).abs().max() > 1e-3 for a, b in (("second", "default"), ("default", "both")))
    for model in (theirs, ours):
        model.delete_adapter("second")
        model.set_adapter("default")
    assert_same_outputs(ours, theirs, batch)
    torch.testing.assert_close(ours(**batch).logits, logits["default"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("targets", (["query", "value"], ["dense"], ["word_embeddings", "query"]), ids=str)
def test_a_batch_with_an_adapter_per_sequence(door, targets):
    """PEFT picks the adapter by the index of the sequence, which packed rows do not have."""
    theirs, ours = adapted_pair(door, lora(targets, task_type=None), "BertModel")
    for model in (theirs, ours):
        model.add_adapter("second", lora(targets, task_type=None, init_lora_weights=False))
        model.eval()
    ours.load_state_dict(theirs.state_dict())
    names = ["default", "second", "__base__"] * (BATCH // 3)
    batch = inputs_for("BertModel")
    one_token_each = {"input_ids": batch["input_ids"][:, :1]}  # as many rows as sequences
    with torch.no_grad():
        for inputs in (batch, one_token_each):
            one_adapter = assert_same_outputs(ours, theirs, inputs)[1]
            mixed = assert_same_outputs(ours, theirs, {**inputs, "adapter_names": names})[1]
            assert (mixed.pooler_output - one_adapter.pooler_output).abs().max() > 1e-3


# --- saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules_to_save", (None, ["classifier", "pooler"]))
def test_saved_adapter_fits_a_plain_model_and_back(door, modules_to_save, tmp_path):
    theirs, ours = adapted_pair(door, lora(["query", "dense", "word_embeddings"], modules_to_save=modules_to_save))
    batch, base = inputs_for(CLASSIFIER), theirs.unload()
    ours.save_pretrained(tmp_path)
    assert "fastbert" not in (tmp_path / "adapter_config.json").read_text()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).train()
    assert {type(module).__module__.split(".")[0] for module in loaded.modules()} == {"torch", "transformers", "peft"}
    loaded.save_pretrained(tmp_path / "back")
    again = peft.PeftModel.from_pretrained(fast(base, door), tmp_path / "back", is_trainable=True).train()
    saved = peft.get_peft_model_state_dict(ours)
    for model in (loaded, again):
        state = peft.get_peft_model_state_dict(model)
        assert state.keys() == saved.keys() and all(torch.equal(state[key], saved[key]) for key in saved)
    assert_same_outputs(ours, loaded, batch)
    assert_same_step(again, loaded, batch)


def test_adapter_without_a_task_names_the_class_that_it_was_trained_on(door, tmp_path):
    """PEFT writes class and module into the adapter, and asks before it imports other libraries than transformers."""
    plain("BertModel").eval().save_pretrained(tmp_path / "base")
    base = (fastbert if door == "class" else transformers).BertModel.from_pretrained(tmp_path / "base")
    ours = adapt(base if door == "class" else fastbert.accelerate(base), lora(task_type=None))
    ours.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["fastbert"])
    assert type(loaded.base_model.model) is fastbert.BertModel
    assert_same_state(loaded, ours)
    fastbert.restore(ours).save_pretrained(tmp_path / "restored")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "restored")
    assert type(loaded.base_model.model) is transformers.BertModel
    assert_same_state(loaded, ours)


def test_adapter_with_its_base_model_loads_by_itself(door, tmp_path):
    """AutoPeftModelFor... builds transformers' class from the folder that the adapter names."""
    plain(CLASSIFIER).save_pretrained(tmp_path / "base")
    if door == "class":
        base = fastbert.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    else:
        base = fastbert.accelerate(transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base"))
    ours = adapt(base, lora())
    ours.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert type(loaded.base_model.model) is transformers.BertForSequenceClassification
    assert_same_outputs(ours.eval(), loaded.eval(), inputs_for(CLASSIFIER))


@of_transformers_peft
def test_adapters_through_the_interface_of_transformers(door, tmp_path):
    """``model.add_adapter`` instead of ``get_peft_model``: the model keeps its class."""
    theirs = plain(CLASSIFIER)
    ours, base = fast(theirs, door), copy.deepcopy(theirs)
    for model in (theirs, ours):
        model.add_adapter(lora(["query", "dense"], init_lora_weights=False), "mine")
    ours.load_state_dict(theirs.state_dict())
    assert type(ours) is fastbert.BertForSequenceClassification
    batch = inputs_for(CLASSIFIER)
    assert_same_step(ours, theirs, batch)
    adapted = ours(**batch).logits
    ours.disable_adapters()
    assert_same_outputs(ours, base, batch)
    assert (ours(**batch).logits - adapted).abs().max() > 1e-3
    ours.enable_adapters()
    ours.save_pretrained(tmp_path)
    base.load_adapter(tmp_path)
    assert_same_outputs(ours, base.train(), batch)


# --- modules_to_save and the other methods --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modules",
    (["classifier"], ["LayerNorm"], ["pooler"], ["word_embeddings", "value"], ["embeddings"], ["output"]),
    ids=str,
)
def test_modules_to_save(door, modules):
    """PEFT puts a trainable copy in the place of a module: it must run and learn wherever it stands."""
    theirs, ours = adapted_pair(door, lora(["key"], modules_to_save=modules))
    assert_same_step(ours, theirs, inputs_for(CLASSIFIER))


METHODS = {
    "IA3": peft.IA3Config(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"
    ),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["query", "dense"], total_step=10, task_type="SEQ_CLS"),
    "LoHa": peft.LoHaConfig(target_modules=["query", "dense"], task_type="SEQ_CLS"),
    "VeRA": peft.VeraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"),
    "OFT": peft.OFTConfig(target_modules=["query", "dense"], oft_block_size=4, task_type="SEQ_CLS"),
    "LayerNorm tuning": peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"),
    "trainable tokens": peft.TrainableTokensConfig(
        target_modules=["word_embeddings"], token_indices=[3, 4, 5], task_type="SEQ_CLS"
    ),
    "LoRA and trainable tokens": lora(trainable_token_indices={"word_embeddings": [3, 4, 5]}),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS"),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="SEQ_CLS"),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS"),
    "prefix projection": peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, task_type="SEQ_CLS"
    ),
}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=of_transformers_peft) if name.startswith("prefix") else name for name in METHODS]
)
def test_other_methods(door, method):
    theirs, ours = adapted_pair(door, METHODS[method])
    if method in ("prompt tuning", "p-tuning"):
        assert notes_of(ours) == [], "virtual tokens are inputs_embeds with a longer mask, nothing about them is slow"
    assert_same_step(ours, theirs, inputs_for(CLASSIFIER) | {"input_ids": torch.randint(8, (BATCH, LENGTH))})


@pytest.mark.parametrize(
    "head, task",
    (
        pytest.param("ForTokenClassification", "TOKEN_CLS", marks=of_transformers_peft),
        pytest.param("ForQuestionAnswering", "QUESTION_ANS", marks=of_transformers_peft),
        ("Model", "FEATURE_EXTRACTION"),
    ),
)
def test_prefix_tuning_of_other_heads(door, head, task):
    name = f"Bert{head}"
    theirs, ours = adapted_pair(door, peft.PrefixTuningConfig(num_virtual_tokens=5, task_type=task), name)
    batch = {key: value for key, value in inputs_for(name).items() if key in ("input_ids", "attention_mask")}
    assert_same_outputs(ours, theirs, batch)


# --- explain, accelerate, restore -----------------------------------------------------------------------------------------


def test_explain_names_lora_on_its_layer(door):
    _, ours = adapted_pair(door, lora(["query"], layers_to_transform=[1]))
    facts = fastbert.explain(ours)
    assert not facts.fast
    assert facts.layers[0] == facts.encoder == facts.embeddings == []
    (note,) = facts.layers[1]
    assert "query" in note and "lora" in note
    assert note in str(facts)


def test_explain_names_lora_on_embeddings_and_head(door):
    _, ours = adapted_pair(door, lora(["word_embeddings", "transform.dense"], task_type=None), "BertForMaskedLM")
    facts = fastbert.explain(ours)
    assert "word_embeddings" in facts.embeddings[0] and "lora" in facts.embeddings[0]
    assert len(facts.head) == 1 and not any(facts.layers.values())


def test_accelerate_and_restore_a_peft_model():
    theirs = adapt(plain(CLASSIFIER), lora())
    ours = copy.deepcopy(theirs)
    classes, batch = [type(module) for module in ours.modules()], inputs_for(CLASSIFIER)
    assert fastbert.accelerate(ours) is ours
    assert type(ours) is type(theirs) and type(ours.base_model.model.bert) is fastbert.BertModel
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_outputs(ours, theirs, batch)
    assert fastbert.restore(ours) is ours
    assert [type(module) for module in ours.modules()] == classes
    assert torch.equal(ours(**batch).logits, theirs(**batch).logits)
