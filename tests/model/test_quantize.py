"""``fastbert.quantize``: what becomes int8, what it computes, what is refused."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert.model import layer as layer_module
from fastbert.model import packed_layer
from fastbert.model.int8 import Int8Linear, join
from fastbert.model.quantize import LINEARS, layer_linears
from fastbert.ops import reference

from .helpers import LENGTHS, NAMES, config_for, inputs_for, mask, on_real_tokens, small_config
from .test_accelerate import RELATIVES, relative
from .test_accelerate import batch_for as batch_of_relative
from .test_packed_inputs import packed


class Rounded(nn.Module):
    """What int8 stands for, in float64 and without kernels: a Linear of rounded weights on rounded rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = reference.quantize_weight(linear.weight.detach())
        self.weight, self.bias = weight.double() * scale[:, None], linear.bias.detach().double()

    def forward(self, x):
        q, step = reference.quantize_rows(x.flatten(0, -2))
        rounded = (q.double() * step.double()[:, None]).view(x.shape)
        return nn.functional.linear(rounded, self.weight, self.bias).to(x.dtype)


def with_rounded_linears(theirs: nn.Module) -> nn.Module:
    theirs = copy.deepcopy(theirs)
    for name, linear in dict(layer_linears(theirs)).items():
        theirs.set_submodule(name, Rounded(linear))
    return theirs


def assert_computes_int8(ours: nn.Module, theirs: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Op by op, outputs are those of rounded Linears in transformers' model, but for steps that a last bit moves.

    In one call what stays inside of a layer is bfloat16, which moves more steps: they are as far from float.
    """
    with torch.no_grad():
        with mock.patch.object(packed_layer, "_takes", return_value=False):
            got = ours(**batch)
        one_call, expected, exact = ours(**batch), with_rounded_linears(theirs)(**batch), theirs(**batch)
    key = next(key for key in exact if key != "loss")
    got, one_call, expected, exact = (on_real_tokens(output[key]).double() for output in (got, one_call, expected, exact))
    rounding = (expected - exact).square().mean().sqrt()
    assert rounding > 1e-4 * exact.square().mean().sqrt()
    assert (got - expected).square().mean().sqrt() < 0.3 * rounding
    assert 0.5 * rounding < (one_call - exact).square().mean().sqrt() < 2 * rounding


def quantized(name: str = "BertForSequenceClassification", **changes) -> nn.Module:
    return fastbert.quantize(getattr(fastbert, name)(config_for(name, **changes)).eval())


@pytest.mark.parametrize("name", NAMES)
def test_every_class(name):
    theirs = getattr(transformers, name)(config_for(name)).eval()
    ours = copy.deepcopy(theirs)
    others = {
        n: p
        for n, p in ours.named_parameters()
        if n not in {f"{m}.{k}" for m, _ in layer_linears(ours) for k in ("weight", "bias")}
    }
    assert fastbert.quantize(ours) is ours
    assert type(ours) is getattr(fastbert, name)
    assert all(type(linear) is Int8Linear for _, linear in layer_linears(ours))
    assert sum(type(m) is Int8Linear for m in ours.modules()) == len(LINEARS) * ours.config.num_hidden_layers
    after = dict(ours.named_parameters())
    assert after.keys() == others.keys() and all(after[n] is p for n, p in others.items())
    assert_computes_int8(ours, theirs, inputs_for(name))


@pytest.mark.parametrize("task", ["ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives(name, task):
    theirs, ours = relative(name, task)
    assert_computes_int8(fastbert.quantize(ours), theirs, batch_of_relative(task, theirs.config))


def test_explain_says_what_is_int8():
    model = quantized()
    explanation = fastbert.explain(model)
    assert explanation.fast
    assert explanation.int8 == {index: list(LINEARS) for index in range(3)}
    assert explanation.ops["int8_linear"]["backend"] in ("native", "reference")
    assert f"int8       0-2: {', '.join(LINEARS)}" in str(explanation)
    plain = fastbert.explain(fastbert.BertModel(small_config()))
    assert plain.int8 == {} and "int8" not in str(plain)


def test_packed_rows():
    model, batch = quantized("BertModel"), inputs_for("BertModel")
    with torch.no_grad():
        expected, got = model(**batch).last_hidden_state, model(**packed(batch)).last_hidden_state
    assert torch.equal(got[0], expected[mask().bool()])


def test_a_sequence_does_not_depend_on_the_others_of_its_batch():
    model, batch = quantized("BertModel"), inputs_for("BertModel")
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        for i, length in enumerate(LENGTHS):
            alone = model(**{key: x[i : i + 1, :length] for key, x in batch.items()}).last_hidden_state
            torch.testing.assert_close(alone[0], together[i, :length], atol=1e-6, rtol=1e-6)


def test_bfloat16():
    theirs = transformers.BertModel(small_config()).eval()
    ours, batch = fastbert.quantize(copy.deepcopy(theirs).bfloat16()), inputs_for("BertModel")
    with torch.no_grad():
        got, exact = ours(**batch).last_hidden_state, on_real_tokens(theirs(**batch).last_hidden_state)
        rounded = on_real_tokens(copy.deepcopy(theirs).bfloat16()(**batch).last_hidden_state)
        int8 = on_real_tokens(with_rounded_linears(theirs)(**batch).last_hidden_state)
    assert got.dtype == torch.bfloat16
    budget = (rounded.float() - exact).square().mean() + (int8 - exact).square().mean()
    assert (got.float() - exact).square().mean() <= 2 * budget


# --- the fused layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_projections_are_one_matmul_of_neighbours(bias, monkeypatch):
    attention = quantized("BertModel").encoder.layer[0].attention.self
    linears = [attention.query, attention.key, attention.value]
    if not bias:
        for linear in linears:
            linear.bias = None
    x = torch.randn(9, 48)
    expected = torch.cat([linear(x) for linear in linears], dim=-1)
    calls = []
    monkeypatch.setattr(layer_module, "int8_linear", lambda *a, **k: calls.append(a) or fastbert.ops.int8_linear(*a, **k))
    assert torch.equal(layer_module._project_qkv(attention, x), expected)
    assert len(calls) == 1
    if bias:
        assert calls[0][1].data_ptr() == attention.query.weight.data_ptr()  # no copy
    # Apart again, as .to() leaves them, and where one has no bias.
    attention.key.bias = None
    expected = torch.cat([linear(x) for linear in linears], dim=-1)
    assert torch.equal(layer_module._project_qkv(attention, x), expected)
    assert all(torch.equal(a, b) for a, b in zip(join(linears)[:2], calls[-1][1:3], strict=True))


def test_quantized_in_inference_mode(monkeypatch):
    monkeypatch.setattr(packed_layer, "_takes", lambda x: False)
    with torch.inference_mode():
        model = quantized("BertModel")
        model(**inputs_for("BertModel"))
    attention = model.encoder.layer[0].attention.self
    assert attention.key.weight.data_ptr() == attention.query.weight.data_ptr() + attention.query.weight.nbytes


def test_gelu_is_fused(monkeypatch):
    intermediate = quantized("BertModel").encoder.layer[0].intermediate
    x = torch.randn(9, 48)
    expected = nn.functional.gelu(intermediate.dense(x))
    calls = []
    monkeypatch.setattr(layer_module, "int8_linear", lambda *a, **k: calls.append(k) or fastbert.ops.int8_linear(*a, **k))
    torch.testing.assert_close(layer_module._intermediate(intermediate, x), expected, atol=1e-6, rtol=1e-6)
    assert calls == [{"activation": "gelu"}]
    intermediate.intermediate_act_fn = nn.ReLU()
    assert torch.equal(layer_module._intermediate(intermediate, x), intermediate.dense(x).relu())
    assert len(calls) == 1


def test_one_projection_alone_is_called_and_said_to_be():
    model = fastbert.quantize(fastbert.BertModel(small_config()).eval(), skip=["key", "value"])
    note = "query, key and value are called one by one: query is fastbert.model.int8.Int8Linear"
    assert fastbert.explain(model).layers == {index: [note] for index in range(3)}
    batch = inputs_for("BertModel")
    with torch.no_grad():
        model(**batch)


def test_a_watched_int8_linear_is_called():
    model, batch, seen = quantized("BertModel"), inputs_for("BertModel"), []
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        model.encoder.layer[1].output.dense.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        got = model(**batch).last_hidden_state
    assert seen == [(6, 21, 48)]
    assert (got - expected).abs().max() < 0.05
    assert "output.dense has hooks" in str(fastbert.explain(model))


@pytest.mark.parametrize("name", ["attention.self.key", "intermediate.dense"])
def test_an_int8_linear_with_another_forward_is_called(name):
    model, batch = quantized("BertModel"), inputs_for("BertModel")
    linear = model.encoder.layer[0].get_submodule(name)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        linear.forward = lambda x: 0 * Int8Linear.forward(linear, x)
        assert (model(**batch).last_hidden_state - expected).abs().max() > 1e-3
    assert f"{name.rpartition('.')[2]} has another forward than its class" in str(fastbert.explain(model))


@pytest.mark.parametrize("how", ["eager", "restored"])
def test_transformers_own_forward(how):
    theirs = transformers.BertModel(small_config()).eval()
    ours = fastbert.quantize(copy.deepcopy(theirs))
    if how == "restored":
        fastbert.restore(ours)
        assert type(ours) is transformers.BertModel
    else:
        ours.set_attn_implementation("eager")
    assert_computes_int8(ours, theirs, inputs_for("BertModel"))


def test_compiled_without_graph_breaks():
    model, ids = quantized("BertModel"), torch.randint(130, (3, 21))
    with torch.no_grad():
        with mock.patch.object(packed_layer, "_takes", return_value=False):
            expected = model(ids).last_hidden_state
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# --- gradients -----------------------------------------------------------------------------------------------------------


def test_without_no_grad_the_encoder_is_frozen_and_a_head_trains():
    model, batch = quantized(), inputs_for("BertForSequenceClassification")
    output = model(**batch)
    output.loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"classifier.weight", "classifier.bias"}
    assert not any(p.requires_grad for p in model.bert.parameters())
    model.bert.embeddings.requires_grad_()
    with pytest.raises(RuntimeError, match="int8_linear has no derivative"):
        model(**batch)


# --- what stays as it is, what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("layer.1", {f"layer.1.{name}" for name in LINEARS}),
        (["query"], {f"layer.{i}.attention.self.query" for i in range(3)}),
        (["bert.encoder.layer.2.output.dense"], {"layer.2.output.dense"}),
        (["layer.0.output.dense", "layer.2.intermediate"], {"layer.0.output.dense", "layer.2.intermediate.dense"}),
        (["output.dense"], {f"layer.{i}.{name}" for i in range(3) for name in ("output.dense", "attention.output.dense")}),
    ],
)
def test_skip(skip, left):
    model = fastbert.BertForSequenceClassification(small_config()).eval()
    fastbert.quantize(model, skip=skip)
    assert {name.partition("encoder.")[2] for name, linear in layer_linears(model) if type(linear) is nn.Linear} == left


@pytest.mark.parametrize("part", ["pooler", "layer.7", "uery"])
def test_a_part_that_is_nowhere_is_refused(part):
    model = fastbert.BertModel(small_config()).eval()
    with pytest.raises(
        ValueError, match=f"skip names '{part}', which is in no name.*such as 'encoder.layer.0.attention.self.query'"
    ):
        fastbert.quantize(model, skip=[part])


def _with_adapters(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)
    model.eval()


def _with_torchao(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def _with_infinite_weight(model):
    model.encoder.layer[1].output.dense.weight.data[3, 4] = torch.inf


REFUSED = {
    "it is in training mode": lambda model: model.train(),
    "it is a decoder": lambda model: setattr(model.config, "is_decoder", True),
    "it is on meta; int8 is fast on CPUs": lambda model: model.to("meta"),
    "attention.self.query is peft.tuners.lora.layer.Linear: merge the adapters first": _with_adapters,
    r"query has a weight of type torchao.*: it is quantized already": _with_torchao,
    "layer.0.attention.self.query is int8 already": lambda model: fastbert.quantize(model, skip=["layer.1"]),
    "layer.1.output.dense has hooks": lambda model: model.encoder.layer[1].output.dense.register_forward_hook(print),
    "intermediate.dense has hooks or another forward": lambda model: setattr(
        model.encoder.layer[0].intermediate.dense, "forward", print
    ),
    "output.dense is torch.nn.modules.linear.Identity, not torch.nn.Linear": lambda model: setattr(
        model.encoder.layer[0].output, "dense", nn.Identity()
    ),
    "layer.1.output.dense cannot be quantized: its weight holds inf or NaN": _with_infinite_weight,
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason):
    model = transformers.BertModel(small_config()).eval()
    REFUSED[reason](model)
    before = list(map(type, model.modules()))
    with pytest.raises(ValueError, match=reason):
        fastbert.quantize(model)
    assert list(map(type, model.modules())) == before  # as it was


def test_all_reasons_are_given_but_not_without_end():
    model = transformers.BertModel(small_config())
    for layer in model.encoder.layer:
        layer.output.dense = layer.intermediate.dense = nn.Identity()
    with pytest.raises(ValueError, match=r"this BertModel cannot be quantized: it is in training mode.*; and 2 more$"):
        fastbert.quantize(model)


def test_what_holds_no_encoder_is_refused():
    with pytest.raises(TypeError, match="Linear contains nothing that fastbert can accelerate"):
        fastbert.quantize(nn.Linear(2, 2).eval())
    with pytest.raises(TypeError, match="expected a torch.nn.Module or a transformers pipeline, got builtins.str"):
        fastbert.quantize("bert-base-uncased")


def test_a_model_with_encoders_in_it():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (transformers.BertModel(small_config()) for _ in range(2))

    pair = Pair().eval()
    theirs = copy.deepcopy(pair.right)
    fastbert.quantize(pair, skip=["left.encoder.layer.0"])
    assert type(pair.left.encoder.layer[0].output.dense) is nn.Linear
    assert_computes_int8(pair.right, theirs, inputs_for("BertModel"))


# --- calibration ---------------------------------------------------------------------------------------------------------


def with_outlier(model: nn.Module) -> nn.Module:
    """One channel of what the feed-forward part of layer 1 reads is 300 times as large as the others, and weighs nothing there."""
    layer = model.encoder.layer[1]
    with torch.no_grad():
        layer.attention.output.LayerNorm.bias[5] = 300.0
        layer.intermediate.dense.weight[:, 5] = 0.0
        layer.output.dense.weight *= 300.0
    return model


def batches(number: int = 2) -> list[dict[str, torch.Tensor]]:
    return [{**inputs_for("BertModel"), "labels": torch.zeros(6), "idx": [1, 2]} for _ in range(number)]


def test_calibration_leaves_what_int8_would_hurt():
    model = with_outlier(fastbert.BertModel(small_config()).eval())
    batch = inputs_for("BertModel")
    with torch.no_grad():
        exact = model(**batch).last_hidden_state
        careless = fastbert.quantize(copy.deepcopy(model))(**batch).last_hidden_state
        fastbert.quantize(model, calibration=iter(batches()))
        careful = model(**batch).last_hidden_state
    left = {name for name, linear in layer_linears(model) if type(linear) is nn.Linear}
    # What comes after reads the outlier, too, through the residual and the next LayerNorm.
    assert "encoder.layer.1.intermediate.dense" in left and not any("layer.0" in name for name in left)
    assert (careful - exact).abs().mean() < 0.7 * (careless - exact).abs().mean()


def test_calibration_of_a_model_without_outliers_leaves_nothing():
    theirs = transformers.BertForSequenceClassification(small_config()).eval()
    ours = fastbert.quantize(copy.deepcopy(theirs), calibration=batches(), skip=["layer.1"])
    reference_ = fastbert.quantize(copy.deepcopy(theirs), skip=["layer.1"])
    assert ours.config.quantization_config.to_dict() == reference_.config.quantization_config.to_dict()
    assert [type(m) for m in ours.modules()] == [type(m) for m in reference_.modules()]


def test_calibration_on_packed_rows():
    model = with_outlier(fastbert.BertModel(small_config()).eval())
    again = copy.deepcopy(model)
    batch = inputs_for("BertModel")
    fastbert.quantize(model, calibration=[batch])
    fastbert.quantize(again, calibration=[packed(batch)])
    assert [type(m) for m in model.modules()] == [type(m) for m in again.modules()]


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], ValueError, "calibration holds no batches"),
        ([{"labels": torch.zeros(3)}], ValueError, "batch 0 of calibration has no input_ids; it has labels"),
        (
            [{"input_ids": torch.ones(1, 3, dtype=torch.long)}, {}],
            ValueError,
            "batch 1 of calibration has no input_ids; it has nothing",
        ),
        ({"input_ids": torch.ones(1, 3)}, TypeError, "batch 0 of calibration is a str, expected a mapping with input_ids"),
        (["A text."], TypeError, "batch 0 of calibration is a str"),
        ([{"input_ids": [[1, 2], [3, 4]]}], TypeError, "batch 0 of calibration has input_ids as a list, expected a torch.Tensor"),
    ],
)
def test_calibration_that_is_none(calibration, error, message):
    model = fastbert.BertModel(small_config()).eval()
    before = list(model.modules())
    with pytest.raises(error, match=message):
        fastbert.quantize(model, calibration=calibration)
    assert list(model.modules()) == before and all(p.requires_grad for p in model.parameters())


# --- dtypes and copies ---------------------------------------------------------------------------------------------------


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": b for name, m in model.named_modules() if type(m) is Int8Linear for key, b in m.named_buffers()}


@pytest.mark.parametrize(
    "change", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.double(), lambda m: m.to("cpu")]
)
def test_weights_and_steps_survive_a_change_of_dtype(change):
    model = quantized()
    before = {name: buffer.clone() for name, buffer in buffers(model).items()}
    change(model)
    after = buffers(model)
    assert {buffer.dtype for name, buffer in after.items() if name.endswith(".weight")} == {torch.int8}
    assert {buffer.dtype for name, buffer in after.items() if not name.endswith(".weight")} == {torch.float32}
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


def test_there_and_back_through_bfloat16():
    """What is int8 does not wear: only the other parameters are rounded, once."""
    model, batch = quantized("BertModel"), inputs_for("BertModel")
    model.bfloat16()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        model.to(torch.float32).bfloat16()
        assert torch.equal(model(**batch).last_hidden_state, expected)


def test_another_device():
    model = quantized("BertModel").to("meta")
    assert all(buffer.is_meta for buffer in buffers(model).values())


@pytest.mark.parametrize("used", [False, True])
def test_copies(used, tmp_path):
    model, batch = quantized(), inputs_for("BertForSequenceClassification")
    other = fastbert.quantize(fastbert.BertForSequenceClassification(small_config()).eval())
    if used:
        model(**batch), other(**batch)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    copies = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False), other]
    with torch.no_grad():
        expected = model(**batch).logits
        for again in copies:
            assert torch.equal(again(**batch).logits, expected)
            assert {b.data_ptr() for b in buffers(again).values()}.isdisjoint(b.data_ptr() for b in buffers(model).values())


def test_the_file_shrinks(tmp_path):
    """To a quarter, but for what stays float32."""
    model = fastbert.BertModel(small_config(hidden_size=128, num_attention_heads=4, intermediate_size=512)).eval()
    linears = sum(linear.weight.nbytes for _, linear in layer_linears(model))
    model.save_pretrained(tmp_path / "float32")
    fastbert.quantize(model).save_pretrained(tmp_path / "int8")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float32", "int8")]
    assert sizes[0] - sizes[1] > 0.7 * linears
