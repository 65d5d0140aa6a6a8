"""``fastbert.register()``: transformers' Auto classes build ours, and after ``unregister()`` their own again."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import fastbert
from fastbert.model.swap import counterparts

from ..model.helpers import NAMES, config_for, inputs_for
from .helpers import small_tokenizer

AUTO_CLASSES = {
    "BertModel": transformers.AutoModel,
    "BertForPreTraining": transformers.AutoModelForPreTraining,
    "BertForMaskedLM": transformers.AutoModelForMaskedLM,
    "BertLMHeadModel": transformers.AutoModelForCausalLM,
    "BertForNextSentencePrediction": transformers.AutoModelForNextSentencePrediction,
    "BertForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "BertForMultipleChoice": transformers.AutoModelForMultipleChoice,
    "BertForTokenClassification": transformers.AutoModelForTokenClassification,
    "BertForQuestionAnswering": transformers.AutoModelForQuestionAnswering,
}
RELATIVES = (
    transformers.RobertaConfig, transformers.XLMRobertaConfig, transformers.CamembertConfig, transformers.ElectraConfig,
)  # fmt: skip


@pytest.fixture
def registered() -> Iterator[None]:
    fastbert.register()
    yield
    fastbert.unregister()


def built() -> dict[tuple[str, str], type | tuple[type, ...]]:
    """What each Auto class builds for the configurations that we know."""
    autos = [getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModel")]
    mappings = {auto.__name__: auto._model_mapping for auto in autos if getattr(auto, "_model_mapping", None) is not None}
    configs = (transformers.BertConfig, *RELATIVES)
    return {(name, c.__name__): mapping[c] for name, mapping in mappings.items() for c in configs if c in mapping}


@pytest.mark.parametrize("name", NAMES)
def test_every_auto_class_builds_ours(registered, name, tmp_path):
    config = config_for(name)
    model = AUTO_CLASSES[name].from_config(config).eval()
    assert type(model) is getattr(fastbert, name)
    model.save_pretrained(tmp_path)
    loaded = AUTO_CLASSES[name].from_pretrained(tmp_path).eval()
    assert type(loaded) is getattr(fastbert, name)
    batch = inputs_for(name)
    torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0], rtol=0, atol=0)
    assert type(getattr(transformers, name)(config)).__module__.startswith("transformers."), "transformers' classes stay theirs"


def test_all_and_only_what_has_a_counterpart_changes():
    before = built()
    fastbert.register()
    try:
        during = built()
        fastbert.register()
        assert built() == during, "calling it again changes nothing"
    finally:
        fastbert.unregister()
    fast = counterparts()
    assert during == {key: fast.get(theirs, theirs) for key, theirs in before.items()}
    models = {theirs for theirs in fast if issubclass(theirs, PreTrainedModel)}
    assert models <= set(before.values()), "a class that no Auto class builds can only be had by its name"
    assert built() == before
    fastbert.unregister()
    assert built() == before


@pytest.mark.parametrize("config_class", RELATIVES)
def test_relatives_of_bert(registered, config_class):
    config = config_class(
        vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=20
    )
    heads = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
    for auto in (transformers.AutoModel, *(getattr(transformers, f"AutoModelFor{head}") for head in heads)):
        model = auto.from_config(config)
        assert type(model).__module__.startswith("fastbert.")
        assert isinstance(model, getattr(transformers, type(model).__name__))
        assert fastbert.explain(model).encoder == []  # the encoder inside of a head is ours, too


def test_a_class_that_somebody_else_registered_stays():
    class Mine(transformers.BertModel):
        pass

    mapping = transformers.AutoModel._model_mapping
    original = mapping[transformers.BertConfig]
    try:
        transformers.AutoModel.register(transformers.BertConfig, Mine, exist_ok=True)
        fastbert.register()
        assert mapping[transformers.BertConfig] is Mine
        fastbert.unregister()
        assert mapping[transformers.BertConfig] is Mine
        transformers.AutoModel.register(transformers.BertConfig, original, exist_ok=True)
        fastbert.register()
        assert mapping[transformers.BertConfig] is fastbert.BertModel
        transformers.AutoModel.register(transformers.BertConfig, Mine, exist_ok=True)
        fastbert.unregister()
        assert mapping[transformers.BertConfig] is Mine
    finally:
        fastbert.unregister()
        transformers.AutoModel.register(transformers.BertConfig, original, exist_ok=True)


def test_threads_that_register_at_once_agree():
    before = built()
    threads = [threading.Thread(target=fastbert.register) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert built()["AutoModel", "BertConfig"] is fastbert.BertModel
    finally:
        fastbert.unregister()
    assert built() == before


@pytest.mark.parametrize(
    ("task", "name", "text"),
    [
        ("feature-extraction", "BertModel", "the old captain"),
        ("fill-mask", "BertForMaskedLM", "the old [MASK]"),
        ("text-classification", "BertForSequenceClassification", "the old captain"),
        ("token-classification", "BertForTokenClassification", "the old captain"),
    ],
)
def test_pipelines_build_ours(task, name, text, tmp_path):
    tokenizer = small_tokenizer()
    theirs = getattr(transformers, name)(config_for(name, vocab_size=len(tokenizer), max_position_embeddings=64))
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = transformers.pipeline(task, model=str(tmp_path))
    assert type(expected.model) is getattr(transformers, name)
    fastbert.register()
    try:
        got = transformers.pipeline(task, model=str(tmp_path))
    finally:
        fastbert.unregister()
    assert type(got.model) is getattr(fastbert, name)
    same(got(text), expected(text))


def same(got, expected) -> None:
    """Nested lists and dictionaries with numbers that may differ by rounding."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        got, expected = list(got.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            same(one, other)
    elif isinstance(expected, str):
        assert got == expected
    else:
        assert got == pytest.approx(expected, abs=2e-5)


def test_a_pair_of_encoder_and_decoder_is_made_of_ours(registered, tmp_path):
    """Other classes of transformers load their parts through the Auto classes."""
    transformers.BertModel(config_for("BertModel")).save_pretrained(tmp_path)
    pair = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path, tmp_path)
    assert type(pair.encoder) is fastbert.BertModel
    assert type(pair.decoder) is fastbert.BertLMHeadModel


def test_trainer_trains_ours(registered, tmp_path):
    config_for("BertForSequenceClassification").save_pretrained(tmp_path / "config")

    def model_init() -> PreTrainedModel:
        config = transformers.AutoConfig.from_pretrained(tmp_path / "config")
        return transformers.AutoModelForSequenceClassification.from_config(config)

    batch = inputs_for("BertForSequenceClassification")
    examples = [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model_init=model_init, args=arguments, train_dataset=examples)
    before = trainer.model.classifier.weight.detach().clone()
    trainer.train()
    assert type(trainer.model) is fastbert.BertForSequenceClassification
    assert not torch.equal(trainer.model.classifier.weight, before)


def test_attention_is_registered_too(registered):
    model = transformers.BertModel._from_config(config_for("BertModel"), attn_implementation="fastbert")
    assert model.config._attn_implementation == "fastbert"
