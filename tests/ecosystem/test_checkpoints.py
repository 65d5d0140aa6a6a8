"""Checkpoints of every kind load into fast models as into transformers' own, and what fast models save is theirs, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert

from ..model.helpers import NAMES, config_for, inputs_for
from .helpers import DOORS, RELATIVES, assert_same_on_real_tokens, batch_for, fast, notes_of, plain

ENCODER, CLASSIFIER, MASKED, PRETRAINING = "BertModel", "BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining"


@pytest.fixture(params=DOORS)
def door(request) -> str:
    return request.param


def load(name: str, folder: Path, door: str | None = None, **options):
    """``from_pretrained`` with the seed that new weights are drawn from; door None: transformers' own class."""
    torch.manual_seed(0)
    library = fastbert if door == "class" else transformers
    loaded = getattr(library, name).from_pretrained(folder, **options)
    if door == "accelerate":
        fastbert.accelerate(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def assert_same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Parameters and buffers bit for bit, on their devices, with their dtypes."""
    got, expected = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and got[key].device == value.device, key
        assert torch.equal(got[key], value), key


def assert_same_outputs(ours: torch.nn.Module, theirs: torch.nn.Module, name: str) -> None:
    batch = batch_for(name)
    batch["input_ids"] = batch["input_ids"] % ours.config.vocab_size
    if name in (MASKED, PRETRAINING):
        batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["input_ids"])
    with torch.no_grad():
        got, expected = ours.eval()(**batch), theirs.eval()(**batch)
    assert got.keys() == expected.keys()
    for key in expected:
        assert_same_on_real_tokens(got[key], expected[key])


def assert_loads_alike(name: str, folder: Path, door: str, **options):
    """State dict, and the report of missing, unexpected and mismatched keys; returns our model and the report."""
    ours, report = load(name, folder, door, output_loading_info=True, **options)
    theirs, expected = load(name, folder, output_loading_info=True, **options)
    assert report == expected
    assert_same_state(ours, theirs)
    assert notes_of(ours) == []
    return ours, report


def json_of(path: Path) -> dict:
    return json.loads(path.read_text())


# --- saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saved_files_are_those_of_transformers(door, name, tmp_path):
    """Also after a forward pass, which may have moved query, key and value into one buffer."""
    theirs = plain(name)
    ours = fast(theirs, door)
    for model in (theirs, ours):
        model(**inputs_for(name))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    for file in (file for file in files if file.endswith(".json")):
        assert json_of(tmp_path / "ours" / file) == json_of(tmp_path / "theirs" / file)
    assert json_of(tmp_path / "ours/config.json")["architectures"] == [name]
    weights = (tmp_path / folder / "model.safetensors" for folder in ("ours", "theirs"))
    assert len({path.read_bytes() for path in weights}) == 1


@pytest.mark.parametrize("name", (ENCODER, MASKED))
def test_there_and_back(door, name, tmp_path):
    ours = fast(plain(name), door)
    ours.save_pretrained(tmp_path / "first")
    theirs = load(name, tmp_path / "first")
    assert type(theirs) is getattr(transformers, name)
    assert_same_state(theirs, ours)
    theirs.save_pretrained(tmp_path / "second")
    again = load(name, tmp_path / "second", door)
    assert type(again) is getattr(fastbert, name)
    assert_same_state(again, ours)
    assert_same_outputs(again, theirs, name)


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_bert_save_as_transformers_does(name, tmp_path):
    theirs = plain(name)
    ours = fast(theirs, "accelerate")
    assert notes_of(ours) == []
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    again, _ = assert_loads_alike(name, tmp_path / "ours", "accelerate")
    assert_same_outputs(again, theirs, name)


def test_auto_classes_load_the_folder(door, tmp_path):
    fast(plain(MASKED), door).save_pretrained(tmp_path)
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)) is transformers.BertForMaskedLM
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is transformers.BertModel


@pytest.mark.parametrize("name", (CLASSIFIER, PRETRAINING))
def test_shards(door, name, tmp_path):
    ours = fast(plain(name), door)
    ours(**inputs_for(name))
    ours.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 50_000 for path in shards)
    again, _ = assert_loads_alike(name, tmp_path, door)
    assert_same_state(again, ours)


def test_variant_and_part_of_the_weights(door, tmp_path):
    ours = fast(plain(CLASSIFIER), door)
    part = {key: value for key, value in ours.state_dict().items() if "layer.1" not in key}
    ours.save_pretrained(tmp_path, variant="part", state_dict=part)
    assert (tmp_path / "model.part.safetensors").is_file()
    _, report = assert_loads_alike(CLASSIFIER, tmp_path, door, variant="part")
    assert len(report["missing_keys"]) == 16


# --- foreign and old files ------------------------------------------------------------------------------------------------


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LayerNorm's parameters as Google's TensorFlow code named them."""
    return {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in state.items()
    }


def write(state: dict[str, torch.Tensor], name: str, folder: Path, *, pickled: bool = False) -> Path:
    config_for(name, hidden_dropout_prob=0.0).save_pretrained(folder)
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("old", (False, True))
@pytest.mark.parametrize("into", (ENCODER, CLASSIFIER, MASKED, PRETRAINING))
@pytest.mark.parametrize("source", (ENCODER, CLASSIFIER, PRETRAINING))
def test_files_of_one_class_in_another(source, into, old, tmp_path):
    """With and without the ``bert.`` prefix, heads missing or too many; old: LayerNorm's old names in a pickled file."""
    state = plain(source).state_dict()
    write(old_names(state) if old else state, into, tmp_path, pickled=old)
    ours, report = assert_loads_alike(into, tmp_path, "class")
    assert not any("encoder." in key or "embeddings." in key for key in report["missing_keys"])
    prefix = "" if source == ENCODER else "bert."
    ours_of_layer = getattr(ours, "bert", ours).encoder.layer[1].output.LayerNorm.weight
    assert torch.equal(ours_of_layer, state[f"{prefix}encoder.layer.1.output.LayerNorm.weight"])


def test_models_of_old_files_save_as_transformers_does(door, tmp_path):
    """What renames keys while loading is remembered for saving; the class must not lose it."""
    write(old_names(plain(PRETRAINING).state_dict()), PRETRAINING, tmp_path, pickled=True)
    ours, theirs = load(PRETRAINING, tmp_path, door), load(PRETRAINING, tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    got, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)


def test_missing_and_unexpected_keys(door, tmp_path):
    """What a file has too much (old ones hold the positions' buffer) and too little is reported as transformers reports it."""
    state = plain(CLASSIFIER).state_dict()
    state["bert.embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
    state["bert.encoder.layer.7.output.dense.weight"] = torch.zeros(3)
    for key in ("bert.encoder.layer.0.attention.self.query.bias", "classifier.weight", "bert.embeddings.LayerNorm.bias"):
        del state[key]
    _, report = assert_loads_alike(CLASSIFIER, write(state, CLASSIFIER, tmp_path), door)
    assert len(report["missing_keys"]) == 3 and report["unexpected_keys"]


def test_mismatched_sizes(door, tmp_path):
    plain(CLASSIFIER).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        load(CLASSIFIER, tmp_path, num_labels=5)
    with pytest.raises(RuntimeError, match="mismatch"):
        load(CLASSIFIER, tmp_path, door, num_labels=5)
    ours, report = assert_loads_alike(CLASSIFIER, tmp_path, door, num_labels=5, ignore_mismatched_sizes=True)
    assert {key for key, *_ in report["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert ours.classifier.out_features == 5


OPTIONS = {
    "config object": lambda folder: {"config": transformers.BertConfig.from_pretrained(folder)},
    "config path": lambda folder: {"config": str(folder / "config.json")},
    "overrides": lambda folder: {"num_labels": 3, "classifier_dropout": 0.2, "hidden_dropout_prob": 0.3},
    "local files": lambda folder: {"local_files_only": True, "use_safetensors": True, "weights_only": True},
    "sdpa": lambda folder: {"attn_implementation": "sdpa"},
    "low memory": lambda folder: {"low_cpu_mem_usage": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_from_pretrained(door, options, tmp_path):
    plain(CLASSIFIER).save_pretrained(tmp_path)
    options = OPTIONS[options](tmp_path)
    ours, theirs = load(CLASSIFIER, tmp_path, door, **options), load(CLASSIFIER, tmp_path, **options)
    assert_same_state(ours, theirs)
    assert ours.config.to_diff_dict() == theirs.config.to_diff_dict()
    assert_same_outputs(ours, theirs, CLASSIFIER)


def test_subfolder_and_state_dict(door, tmp_path):
    theirs = plain(CLASSIFIER)
    theirs.save_pretrained(tmp_path / "inside")
    assert_same_state(load(CLASSIFIER, tmp_path, door, subfolder="inside"), theirs)
    given = load(CLASSIFIER, None, door, config=theirs.config, state_dict=theirs.state_dict())
    assert_same_state(given, theirs)


# --- dtypes and devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "dtype"),
    (("dtype", "bfloat16"), ("torch_dtype", torch.bfloat16), ("dtype", "auto"), ("dtype", torch.float32)),
    ids=str,
)
def test_dtype(door, dtype, option, tmp_path):
    """From a file in bfloat16, which "auto" keeps."""
    plain(CLASSIFIER).bfloat16().save_pretrained(tmp_path)
    ours, _ = assert_loads_alike(CLASSIFIER, tmp_path, door, **{option: dtype})
    expected = torch.float32 if dtype is torch.float32 else torch.bfloat16
    assert {parameter.dtype for parameter in ours.parameters()} == {expected}
    exact, theirs = load(CLASSIFIER, tmp_path, dtype=torch.float32).double(), load(CLASSIFIER, tmp_path, dtype=expected)
    batch, errors = inputs_for(CLASSIFIER), []
    del batch["labels"]
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        truth = exact.bert(**batch).last_hidden_state[real]
        for model in (ours, theirs):
            errors.append((model.bert(**batch).last_hidden_state[real] - truth).square().mean().sqrt().item())
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("device_map", ("cpu", "auto", {"": "cpu"}), ids=str)
def test_device_map(door, device_map, tmp_path):
    pytest.importorskip("accelerate")
    plain(CLASSIFIER).save_pretrained(tmp_path)
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto picks the GPU of this machine")
    ours, theirs = load(CLASSIFIER, tmp_path, door, device_map=device_map), load(CLASSIFIER, tmp_path)
    assert notes_of(ours) == []
    assert_same_state(ours, theirs)
    assert_same_outputs(ours, theirs, CLASSIFIER)


@pytest.mark.parametrize("offloaded", ("bert.encoder.layer.1", "bert.embeddings", "bert.encoder.layer.0.attention", "classifier"))
def test_weights_on_disk(door, offloaded, tmp_path):
    """accelerate's hooks bring a module's weights when it is called, and only then."""
    pytest.importorskip("accelerate")
    theirs = plain(CLASSIFIER)
    theirs.save_pretrained(tmp_path)
    modules = ["classifier", "bert.embeddings", "bert.pooler", *(f"bert.encoder.layer.{i}" for i in (0, 1, 2))]
    modules = [name for name in modules if not offloaded.startswith(name)]
    modules += [f"bert.encoder.layer.0.{part}" for part in ("intermediate", "output")] if "attention" in offloaded else []
    device_map = {**dict.fromkeys(modules, "cpu"), offloaded: "disk"}
    ours = load(CLASSIFIER, tmp_path, door, device_map=device_map, offload_folder=tmp_path / "offload")
    assert all(p.device.type == "meta" for p in ours.get_submodule(offloaded).parameters())
    for _ in range(2):
        assert_same_outputs(ours, theirs, CLASSIFIER)
    if offloaded != "classifier":
        assert notes_of(ours)


@pytest.mark.parametrize("name", (CLASSIFIER, PRETRAINING))
def test_shards_into_empty_weights(door, name, tmp_path):
    """accelerate's own loading: a model without memory, filled file by file."""
    accelerate = pytest.importorskip("accelerate")
    theirs = plain(name)
    theirs.save_pretrained(tmp_path, max_shard_size="150KB")
    with accelerate.init_empty_weights():
        ours = getattr(fastbert if door == "class" else transformers, name)(theirs.config)
    if door == "accelerate":
        fastbert.accelerate(ours)
    assert all(parameter.is_meta for parameter in ours.parameters())
    ours.tie_weights()
    ours = accelerate.load_checkpoint_and_dispatch(ours, tmp_path, device_map={"": "cpu"})
    assert notes_of(ours) == []
    assert_same_state(ours, theirs)
    assert_same_outputs(ours, theirs, name)


# --- the vocabulary -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("name", (MASKED, PRETRAINING))
def test_tied_and_untied_decoder(door, name, tied, tmp_path):
    theirs = plain(name, tie_word_embeddings=tied)
    ours = fast(theirs, door)
    ours(**inputs_for(name)).loss.backward()
    assert (ours.cls.predictions.decoder.weight is ours.get_input_embeddings().weight) == tied
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(parameter.grad if parameter.grad is not None else 0.0, alpha=-0.1)
    ours.save_pretrained(tmp_path)
    again, report = assert_loads_alike(name, tmp_path, door)
    assert not report["missing_keys"]
    assert (again.cls.predictions.decoder.weight is again.get_input_embeddings().weight) == tied
    assert_same_state(again, ours)
    assert_same_outputs(again, load(name, tmp_path), name)


@pytest.mark.parametrize("size", (137, 90))
@pytest.mark.parametrize("name", (ENCODER, MASKED, PRETRAINING))
def test_resized_vocabulary(door, name, size, tmp_path):
    theirs = plain(name)
    ours = fast(theirs, door)
    ours(**inputs_for(name))
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(size)
    assert_same_outputs(ours, theirs, name)
    ours.save_pretrained(tmp_path)
    again, report = assert_loads_alike(name, tmp_path, door)
    assert not report["missing_keys"] and again.config.vocab_size == size
    assert_same_state(again, theirs)
    assert_same_outputs(again, theirs, name)
