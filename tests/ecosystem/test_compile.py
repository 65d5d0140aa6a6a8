"""torch.compile, torch.export and torch.jit.trace: one graph, the right numbers, and no graph per length.

``backend="aot_eager"`` traces as Inductor does, operators and derivatives included, without its minutes of code generation.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastbert

from ..model.helpers import VOCABULARY, assert_same_gradients, inputs_for, mask, small_config
from ..model.test_packed_inputs import packed
from .helpers import DOORS, assert_same_on_real_tokens, fast_pair

NAME = "BertForSequenceClassification"


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: torch.nn.Module, backend: str = "eager", **options) -> torch.nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("door", "name"), [("class", NAME), ("accelerate", "BertForPreTraining")])
def test_a_training_step_without_padding(door, name):
    theirs, ours = fast_pair(door, name, num_hidden_layers=1)
    batch = inputs_for(name)
    batch.pop("attention_mask")
    expected, got = theirs(**batch).loss, compiled(ours, "aot_eager")(**batch).loss
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    expected.backward()
    got.backward()
    assert_same_gradients(ours, theirs, 1e-4)
    assert graphs() == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(("door", "name"), [("class", "BertForMaskedLM"), ("accelerate", NAME)])
def test_a_training_step_with_padding_runs_transformers_forward(monkeypatch, door, name):
    theirs, ours = fast_pair(door, name, num_hidden_layers=1)
    batch = inputs_for(name)
    expected, got = theirs(**batch).loss, compiled(ours)(**batch).loss
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    expected.backward()
    got.backward()
    assert_same_gradients(ours, theirs, 1e-4)
    assert graphs() == 1
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "torch.compile cannot know" in fastbert.explain(ours, attention_mask=batch["attention_mask"]).encoder[0]
    assert fastbert.explain(ours).encoder == []


@pytest.mark.parametrize(("door", "with_mask"), [("class", False), ("accelerate", True)])
def test_one_graph_for_all_lengths(door, with_mask):
    theirs, ours = fast_pair(door, "BertModel", num_hidden_layers=1)
    fast = compiled(ours, dynamic=True)
    with torch.no_grad():
        for batch, length in ((3, 5), (3, 9), (4, 12), (7, 40), (2, 2)):
            ids = torch.randint(VOCABULARY, (batch, length))
            padding = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long() if with_mask else None
            real = torch.ones(batch, length, 1) if padding is None else padding.unsqueeze(-1)
            expected, got = theirs(ids, padding), fast(ids, padding)
            torch.testing.assert_close(got.last_hidden_state * real, expected.last_hidden_state * real, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=2e-5, rtol=2e-5)
    assert graphs() == 1


def test_lengths_that_compile_finds_out_to_be_dynamic():
    """Without ``dynamic=True``: a graph for the first shape, one for another length, one for another batch size, then no more."""
    theirs, ours = fast_pair("class", "BertModel", num_hidden_layers=1)
    fast = compiled(ours)
    with torch.no_grad():
        for batch, length in ((3, 5), (3, 9), (4, 12), (7, 21), (2, 30), (6, 2), (3, 40), (5, 17)):
            ids = torch.randint(VOCABULARY, (batch, length))
            torch.testing.assert_close(fast(ids).last_hidden_state, theirs(ids).last_hidden_state, atol=2e-5, rtol=2e-5)
    assert graphs() <= 3


@pytest.mark.parametrize(("door", "named"), [("class", ("position_ids", "max_length_q")), ("accelerate", ())])
def test_packed_rows(door, named):
    """Sequences of any number and lengths run fused in one graph."""
    _, ours = fast_pair(door, "BertModel", num_hidden_layers=1)
    fast = compiled(ours, dynamic=True)
    seen = []
    with torch.no_grad():
        for lengths in ((3, 4, 9), (5, 1, 2, 20), (30, 2, 2, 2, 8), (11, 10)):
            bounds = torch.tensor([0, *lengths]).cumsum(0).int()
            row = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            if "max_length_q" in named:
                row |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
            if "position_ids" in named:
                row["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
            ids = torch.randint(VOCABULARY, (1, sum(lengths)))
            expected, got = ours(ids, **row), fast(ids, **row)
            torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=2e-5, rtol=2e-5)
            seen.append(graphs())
    assert seen[-1] == seen[-2] <= 2


def test_a_training_step_on_packed_rows():
    theirs, ours = fast_pair("accelerate", "BertForPreTraining", num_hidden_layers=1)
    batch = inputs_for("BertForPreTraining")
    expected, got = theirs(**batch).loss, compiled(ours, "aot_eager")(**packed(batch)).loss
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    expected.backward()
    got.backward()
    assert_same_gradients(ours, theirs, 1e-4)


def test_position_ids_alone():
    """Compiled code cannot know how many sequences they start: those of one are right, others an error that names the way out."""
    theirs, ours = fast_pair("class", "BertModel", num_hidden_layers=1)
    fast = compiled(ours)
    ids = torch.randint(VOCABULARY, (1, 12))
    positions = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(
            fast(ids, position_ids=positions).last_hidden_state, theirs(ids).last_hidden_state, atol=2e-5, rtol=2e-5
        )
        with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
            fast(ids, position_ids=positions % 5)


def test_dropout_is_drawn_at_each_call():
    _, ours = fast_pair("class", NAME, num_hidden_layers=1, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    batch = inputs_for(NAME)
    batch.pop("attention_mask")
    fast = compiled(ours.train())
    losses = [fast(**batch).loss.item() for _ in range(3)]
    assert len(set(losses)) == 3
    torch.manual_seed(1)
    first = fast(**batch).loss
    torch.manual_seed(1)
    torch.testing.assert_close(fast(**batch).loss, first, atol=0, rtol=0)


@pytest.mark.parametrize(("name", "swapped"), [(NAME, False), ("BertForMaskedLM", True)])
def test_checkpointed_layers(name, swapped):
    """In one graph, as transformers' are; attention alone drops, so that a layer is the first to draw."""
    theirs, ours = fast_pair("class", name, num_hidden_layers=1, use_cache=False)
    batch = inputs_for(name)
    batch.pop("attention_mask")
    for model in (theirs, ours):
        model.train().gradient_checkpointing_enable()
    if swapped:  # it runs transformers' forward, on padded rows
        ours.base_model.encoder.layer[0].chunk_size_feed_forward = 1
    expected, got = theirs(**batch).loss, compiled(ours, "aot_eager")(**batch).loss
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    expected.backward()
    got.backward()
    assert_same_gradients(ours, theirs, 1e-4)
    assert graphs() == 1


def test_checkpointed_layers_draw_the_same_dropout_again():
    theirs, ours = fast_pair("class", NAME, num_hidden_layers=1, attention_probs_dropout_prob=0.3)
    ours.train().config.use_cache = False
    batch = inputs_for(NAME)
    batch.pop("attention_mask")
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            ours.gradient_checkpointing_enable()
        torch._dynamo.reset()
        torch.manual_seed(1)
        compiled(ours, "aot_eager")(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
        ours.zero_grad()
    torch.testing.assert_close(*gradients)


def test_hidden_states_and_autocast():
    theirs, ours = fast_pair("accelerate", "BertModel", num_hidden_layers=1)
    ids = torch.randint(VOCABULARY, (3, 7))
    fast = compiled(ours)
    with torch.no_grad():
        expected, got = theirs(ids, output_hidden_states=True), fast(ids, output_hidden_states=True)
        for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(fast(ids).last_hidden_state, ours(ids).last_hidden_state, atol=0.05, rtol=0.05)


def test_weights_changed_after_compilation():
    theirs, ours = fast_pair("class", "BertModel", num_hidden_layers=1)
    ids = torch.randint(VOCABULARY, (3, 7))
    ours(ids)
    fast = compiled(ours)
    with torch.no_grad():
        fast(ids)
        for model in (theirs, ours):
            model.encoder.layer[0].attention.self.key.weight.mul_(1.5)
        torch.testing.assert_close(fast(ids).last_hidden_state, theirs(ids).last_hidden_state, atol=2e-5, rtol=2e-5)


# --- export and trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("door", "with_mask"), [("class", False), ("accelerate", True)])
def test_export(door, with_mask):
    theirs, ours = fast_pair(door, NAME, num_hidden_layers=1)
    batch = {key: value for key, value in inputs_for(NAME).items() if key in ("input_ids", "token_type_ids")}
    batch |= {"attention_mask": mask()} if with_mask else {}
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=40)}
    with torch.no_grad():
        program = torch.export.export(ours, (), batch, dynamic_shapes=dict.fromkeys(batch, sizes))
        for rows, columns in ((6, 21), (3, 9), (2, 2)):
            part = {key: value[:rows, :columns].contiguous() for key, value in batch.items()}
            torch.testing.assert_close(program.module()(**part)["logits"], theirs(**part).logits, atol=2e-5, rtol=2e-5)
    fused = any("fastbert.attention" in str(node.target) for node in program.graph.nodes)
    assert fused == (not with_mask)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("door", "name", "with_mask"),
    [("class", "BertModel", True), ("class", NAME, False), ("accelerate", NAME, True), ("accelerate", "BertForMaskedLM", True)],
)
def test_jit_trace(door, name, with_mask):
    """A traced model takes other lengths than those of its example, as transformers' does."""
    theirs, ours = fast_pair(door, name, num_hidden_layers=1, return_dict=False)
    ids = torch.randint(VOCABULARY, (6, 21))
    arguments = (ids, mask()) if with_mask else (ids,)
    with torch.no_grad():
        traced = torch.jit.trace(ours, arguments)
        for rows, columns in ((6, 21), (3, 9)):
            part = [x[:rows, :columns].contiguous() for x in arguments]
            real = part[1].unsqueeze(-1) if with_mask else 1
            for mine, other in zip(traced(*part), theirs(*part), strict=True):
                weight = real if mine.dim() == 3 else 1
                torch.testing.assert_close(mine * weight, other * weight, atol=2e-5, rtol=2e-5)
    assert fastbert.explain(ours).encoder == []


@pytest.mark.parametrize("with_mask", [False, True], ids=["without a mask", "with a mask"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
@pytest.mark.parametrize("door", DOORS)
def test_onnx(door, dynamo, with_mask, tmp_path):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs the package onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    theirs, ours = fast_pair(door, NAME, num_hidden_layers=1)
    batch = {key: value for key, value in inputs_for(NAME).items() if key in ("input_ids", "attention_mask", "token_type_ids")}
    names = ("input_ids", "attention_mask", "token_type_ids") if with_mask else ("input_ids",)
    batch = {name: batch[name] for name in names}
    path = tmp_path / "model.onnx"
    torch.onnx.export(ours.eval(), tuple(batch.values()), path, dynamo=dynamo, input_names=list(names), verbose=False)
    outputs = runtime.InferenceSession(path).run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    found, expected = torch.from_numpy(outputs[0]), theirs.eval()(**batch).logits
    if with_mask:
        assert_same_on_real_tokens(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_onnx_has_no_int8(tmp_path):
    """The other exporter makes several attempts, and its error is that of the last one."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs the package onnxscript")
    model = fastbert.quantize(fastbert.BertModel(small_config()).eval())
    with pytest.raises(RuntimeError, match="an int8 Linear of fastbert cannot be exported to ONNX"):
        torch.onnx.export(model, (torch.ones(2, 5, dtype=torch.int64),), tmp_path / "model.onnx", dynamo=False)


@pytest.mark.parametrize("how", ["function", "method", "part"])
def test_explain_knows_of_compilation(how):
    """Of the encoder, or of what it is in; before the first call, too."""
    ours = fastbert.BertForMaskedLM(small_config())
    head = fastbert.BertForMaskedLM(small_config())
    if how == "function":
        ours = torch.compile(ours)
    else:
        (ours if how == "method" else ours.bert).compile()
    head.cls.compile()
    assert "torch.compile cannot know how many tokens a mask leaves" in fastbert.explain(ours).encoder[0]
    without = fastbert.explain(ours, attention_mask=None)
    assert without.encoder == [] and "torch.compile has its ops in a graph" in str(without)
    assert "all rows: torch.compile" in without.head[-1] and without.last_layer == ["it is compiled"]
    assert fastbert.explain(head).fast
    assert fastbert.explain(ours, cu_seq_lens_q=torch.tensor([0, 3]), max_length_q=3).encoder == []


def test_explain_knows_of_compiled_layers_and_forwards():
    layers, forward = (fastbert.BertModel(small_config()).eval() for _ in range(2))
    layers.encoder.layer[1].compile()
    explanation = fastbert.explain(layers)
    assert explanation.inference[0] == explanation.training[0] == []
    assert "has its ops in a graph" in explanation.inference[1][0] and explanation.training[1] == explanation.inference[1]
    forward.forward = torch.compile(forward.forward)
    assert any("torch.compile cannot know" in reason for reason in fastbert.explain(forward).encoder)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining"])
def test_shapes_without_numbers(name, grad, with_labels):
    """Memory estimates, and what plans a model's parallelism, ask for no more."""
    batch = {key: value for key, value in inputs_for(name).items() if with_labels or "label" not in key}
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        given = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in batch.items()}
        expected, got = (getattr(library, name)(small_config())(**given) for library in (transformers, fastbert))
        assert {key: got[key].shape for key in expected} == {key: value.shape for key, value in expected.items()}
        if name == "BertModel":
            row = {"input_ids": torch.zeros(1, 9).long(), "position_ids": torch.arange(9)[None]}
            assert fastbert.BertModel(small_config())(**row).last_hidden_state.shape == (1, 9, 48)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_a_graph_that_make_fx_draws(name):
    _, ours = fast_pair("class", name)
    first, second = inputs_for(name)["input_ids"].chunk(2)
    graph = make_fx(lambda ids: ours(ids)[0])(first)
    torch.testing.assert_close(graph(second), ours(second)[0], atol=2e-5, rtol=2e-5)
