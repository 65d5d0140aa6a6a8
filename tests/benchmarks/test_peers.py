"""Who takes part beside fastbert, what a document says of them, and why somebody does not. tests/test_benchmarks_cpu.py compares
the outputs of those that are installed."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest
import torch
import transformers
from torch import nn
from transformers.models.bert import modeling_bert
from typer.testing import CliRunner

import fastbert
from benchmarks import bench, finetune, inference, memory, op_contenders, peers, pretrain, training
from benchmarks.peers import engines, steps, with_torch
from benchmarks.peers.peer import NotAvailable, Package, Peer
from benchmarks.workloads import Workload, config_for, padded_batch
from fastbert.cli.main import app

MISSING = Package("no_such_package", "pip install no-such-package")
BATCH = Workload("toy", (5, 12), 12)
TINY = transformers.BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)  # fmt: skip


@pytest.fixture
def subject(tmp_path):
    return peers.Subject(config_for("tiny"), "cpu", tmp_path, "tiny")


def hidden_states(subject, dtype):
    return lambda batch: subject.model(**batch).last_hidden_state


# --- the registry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registry", [peers.PEERS, training.PEERS, {"fastbert": peers.OURS}])
def test_every_peer_says_how_it_is_run(registry):
    for name, peer in registry.items():
        described = peer.described()
        assert described["title"] and described["how"], name
        assert "\n" not in described["how"]
        for device, dtypes in peer.on_request.items():
            assert set(dtypes) < set(peer.dtypes[device])
        for package in (*peer.packages, *peer.extras):
            assert package.install.startswith("pip install ")


def test_versions_have_the_names_of_the_distributions():
    assert peers.PEERS["transformers"].described()["version"].startswith(f"transformers {transformers.__version__}, torch ")
    assert peers.PEERS["transformers-flash"].described()["version"].startswith("transformers ") or peers.FLASH_ATTN.installed
    assert Peer("Nobody", hidden_states, {}, "", (MISSING,)).described() == {"title": "Nobody", "version": None, "how": ""}


def test_a_version_without_a_distribution(monkeypatch):
    module = types.ModuleType("no_such_package")
    module.__version__ = "7.1"
    monkeypatch.setitem(sys.modules, "no_such_package", module)
    assert MISSING.version == "no_such_package 7.1"


def test_reasons():
    peer = Peer("P", hidden_states, {"cpu": ("float32", "bfloat16")}, packages=(MISSING,), on_request={"cpu": ("bfloat16",)})
    assert peer.why_not_on("cuda") == "not on cuda, only on cpu"
    assert peer.why_not_on("cpu") == "no_such_package is not installed (pip install no-such-package)"
    assert peer.why_not_in("int8", "cpu", named=True) == "not in int8 on cpu"
    assert "only where --peers names it" in peer.why_not_in("bfloat16", "cpu", named=False)
    assert peer.why_not_in("bfloat16", "cpu", named=True) is peer.why_not_in("float32", "cpu", named=False) is None
    two = dataclasses.replace(peer, packages=(MISSING, Package("neither_this"), peers.TRANSFORMERS))
    assert two.why_not_installed() == (
        "no_such_package and neither_this are not installed (pip install no-such-package && pip install 'fastbert[bench]')"
    )


def test_the_help_of_the_command_names_all():
    result = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "400"})
    shown = result.stdout.replace("\n", " ")
    for name in (*peers.PEERS, *training.PEERS, *op_contenders.PEERS):
        assert name in shown, name


# --- inference -------------------------------------------------------------------------------------------------------------


def contenders(monkeypatch, subject, registry, **options):
    monkeypatch.setattr(inference, "PEERS", registry)
    said = []
    made, not_run = inference.make_contenders(subject, inference.Options("tiny", **options), said.append)
    assert said == [f"not run: {name}: {reason}" for name, reason in not_run.items()]
    return [contender.name for contender in made], not_run


def broken(subject, dtype):
    raise ValueError("cannot convert\nmany lines more")


def unwilling(subject, dtype):
    raise NotAvailable("not on this processor")


def test_who_cannot_take_part_is_listed_with_the_reason(monkeypatch, subject):
    floats = {"cpu": peers.FLOATS}
    registry = {
        "good": Peer("Good", hidden_states, {"cpu": ("float32",)}),
        "gpu": Peer("Of GPUs", hidden_states, {"cuda": ("float32",)}),
        "missing": Peer("Missing", hidden_states, floats, packages=(MISSING,)),
        "broken": Peer("Broken", broken, {"cpu": ("float32",)}),
        "unwilling": Peer("Unwilling", unwilling, {"cpu": ("bfloat16",)}),
        "slow": Peer("Slow", hidden_states, floats, on_request={"cpu": ("bfloat16",)}),
    }
    made, not_run = contenders(monkeypatch, subject, registry, dtypes=peers.FLOATS)
    assert made == ["Good float32", "Slow float32", "fastbert float32", "fastbert bfloat16"]
    assert not_run == {
        "Good bfloat16": "not in bfloat16 on cpu",
        "Of GPUs": "not on cpu, only on cuda",
        "Missing": "no_such_package is not installed (pip install no-such-package)",
        "Broken float32": "ValueError: cannot convert",
        "Broken bfloat16": "not in bfloat16 on cpu",
        "Unwilling float32": "not in float32 on cpu",
        "Unwilling bfloat16": "not on this processor",
        "Slow bfloat16": "in bfloat16 on cpu only where --peers names it: it takes minutes to compile",
    }
    made, not_run = contenders(monkeypatch, subject, registry, dtypes=peers.FLOATS, peers=("slow",))
    assert made == ["Slow float32", "Slow bfloat16", "fastbert float32", "fastbert bfloat16"] and not_run == {}


def test_a_mistake_of_fastberts_is_an_error(monkeypatch, subject):
    monkeypatch.setattr(inference, "OURS", dataclasses.replace(peers.OURS, make=broken))
    with pytest.raises(ValueError, match="cannot convert"):
        contenders(monkeypatch, subject, {}, dtypes=("float32",))


def test_what_fastbert_makes_of_a_subject_is_not_written_into_it(subject):
    with_torch.fastbert_model(subject, "int8")
    assert getattr(subject.config, "quantization_config", None) is None
    transformers.BertModel.from_pretrained(subject.checkpoint)


def test_weights_that_openvino_packs_on_its_first_call_are_no_memory_of_the_calls(tmp_path):
    """The mini model's layers have 12.6 MB of weights in float32; a call on 8 tokens needs nothing like it."""
    pytest.importorskip("openvino")
    subject = peers.Subject(config_for("mini"), "cpu", tmp_path, "mini")
    batch = padded_batch(Workload("1 x 8", (8,), 8))
    with torch.inference_mode():
        run = engines.openvino(subject, "float32")
        before = memory.resident_bytes()
        run(batch)
        assert memory.resident_bytes() - before < 3e6


def test_what_a_document_says_of_them():
    described = inference.peers_described(("openvino", "transformers"))
    assert list(described) == ["fastbert", "transformers", "openvino"]
    assert set(inference.peers_described(None)) == {"fastbert", *peers.PEERS}
    json.dumps(described)


def test_memory_that_is_kept_between_calls_counts_for_every_call():
    kept = []

    def arena(batch):
        if not kept:
            kept.append(torch.ones(50_000_000))
        return batch

    contender = inference.Contender("arena", "float32", lambda batch: arena(batch), ours=False, kept_bytes=200_000_000)
    run = lambda: contender.run({})  # noqa: E731
    assert 395e6 < inference.contender_bytes(contender, run, "cpu") < 415e6
    assert (
        195e6 < inference.contender_bytes(contender, run, "cpu") < 215e6
    )  # what it had kept by the first of these calls is not known
    assert inference.contender_bytes(dataclasses.replace(contender, in_torch=False), run, "cuda") is None


def test_measured_memory_is_the_same_for_engines_that_keep_theirs_and_those_that_free_it(subject):
    """A hidden state of 2 x 12 x 128 floats tells nothing: both contenders take 200 MB more, and give the right result."""

    class Keeps:
        memory = None

        def __call__(self, batch):
            if self.memory is None:
                self.memory = torch.ones(50_000_000)
            return subject.model(**batch).last_hidden_state

    def frees(batch):
        torch.ones(50_000_000)
        return subject.model(**batch).last_hidden_state

    made = [inference.Contender("keeps", "float32", Keeps(), False), inference.Contender("frees", "float32", frees, False)]
    batch = padded_batch(BATCH)
    with torch.inference_mode():
        measured = inference.measure(made, subject, batch, {"float32": lambda: None}, 3, 1.0, inference.Meter(None, None))
        again = inference.measure(made, subject, batch, {"float32": lambda: None}, 3, 1.0, inference.Meter(None, None))
    for result in (measured, again):
        for figures in result["contenders"].values():
            assert 190e6 < figures["peak_bytes"] < 215e6, figures["peak_bytes"]


# --- those of GPUs, whose libraries are not here -----------------------------------------------------------------------------


def test_a_packed_batch_comes_back_padded(subject, monkeypatch):
    """fastbert's model stands in for transformers' under flash-attention, which alone takes such rows."""
    model = fastbert.BertModel(subject.config, add_pooling_layer=False).eval()
    model.load_state_dict(subject.model.state_dict())
    monkeypatch.setattr(subject, "with_attention", lambda implementation, dtype: model)
    batch = padded_batch(BATCH)
    real = batch["attention_mask"].unsqueeze(-1)
    with torch.inference_mode():
        found = with_torch.transformers_packed(subject, "float32")(batch)
        expected = subject.model(**batch).last_hidden_state * real
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for flash_attn.models.bert with its names; its model is transformers' under other keys."""
    seen = types.SimpleNamespace()

    class BertModel(nn.Module):
        def __init__(self, config, add_pooling_layer):
            super().__init__()
            seen.config, seen.pooler = config, add_pooling_layer
            self.inner = transformers.BertModel(config, add_pooling_layer=add_pooling_layer)

        def forward(self, input_ids, attention_mask):
            seen.mask = attention_mask.dtype
            return self.inner(input_ids, attention_mask=attention_mask)

    def remap_state_dict(state, config):
        assert all(name.startswith(("bert.embeddings.", "bert.encoder.")) for name in state)
        return {name.replace("bert.", "bert.inner.", 1): value for name, value in state.items()}

    bert = types.ModuleType("flash_attn.models.bert")
    bert.BertModel, bert.remap_state_dict = BertModel, remap_state_dict
    models = types.ModuleType("flash_attn.models")
    models.bert = bert
    for name, module in (("flash_attn", types.ModuleType("flash_attn")), (models.__name__, models), (bert.__name__, bert)):
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_flash_attns_bert_gets_the_weights_and_its_options(flash_attn, subject):
    run = with_torch.flash_attn_bert(subject, "bfloat16")
    batch = padded_batch(BATCH)
    with torch.inference_mode():
        found, expected = run(batch), subject.of_dtype("bfloat16")(**batch).last_hidden_state
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    config = flash_attn.config
    assert config.use_flash_attn and config.fused_dropout_add_ln and not config.fused_mlp and not flash_attn.pooler
    assert flash_attn.mask == torch.bool and config.position_embedding_type == "absolute"
    assert not hasattr(subject.config, "use_flash_attn")


def test_flash_attns_bert_does_not_know_every_activation(flash_attn, subject):
    subject.config.hidden_act = "relu"
    with pytest.raises(NotAvailable, match="no activation relu"):
        with_torch.flash_attn_bert(subject, "bfloat16")


@pytest.mark.parametrize(("has", "falls_back", "message"), [(False, False, "pip install onnxruntime-gpu"), (True, True, "CPU")])
def test_onnxruntime_without_a_gpu_says_so(has, falls_back, message, monkeypatch, subject, tmp_path):
    module = types.ModuleType("onnxruntime")
    providers = ["CUDAExecutionProvider"] if has else ["CPUExecutionProvider"]
    module.get_available_providers = lambda: providers
    session = types.SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    module.InferenceSession = lambda path, providers: session
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    with pytest.raises(NotAvailable, match=message):
        engines._onnxruntime_on_cuda(tmp_path / "model.onnx", subject)


# --- training steps --------------------------------------------------------------------------------------------------------


def models(task):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**TINY.to_dict(), **task.config})
    ours, theirs = (training.model_of(task, library, "tiny", config) for library in (training.fastbert, transformers))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def made_steps(task=pretrain.TASK, **options):
    said = []
    theirs, ours = models(task)
    made, not_run = training.make_steps(theirs, ours, training.Options("tiny", (BATCH,), **options), said.append)
    assert said == [f"not run: {name}: {reason}" for name, reason in not_run.items()]
    return made, not_run


def test_a_requested_step_that_cannot_be_is_said(monkeypatch):
    monkeypatch.setitem(training.PEERS, "broken", Peer("Broken", lambda theirs: 1 / 0, {"cpu": peers.FLOATS}))
    made, not_run = made_steps(peers=(*training.DEFAULT_PEERS, "transformers-eager", "broken"))
    assert set(made) == {"transformers", "transformers eager", training.PADDED_TO_LONGEST, training.SORTED, "fastbert"}
    assert made[training.SORTED].model is made["transformers"].model is not made["transformers eager"].model
    assert not_run == {
        "transformers flash-attention": "not on cpu, only on cuda",
        "transformers with Liger": "not on cpu, only on cuda",
        "Broken": "ZeroDivisionError: division by zero",
    }


def test_on_a_gpu_the_cpus_peer_is_said(monkeypatch):
    monkeypatch.setattr(training, "TrainingStep", lambda model, device, dtype: types.SimpleNamespace(model=model))
    _, not_run = made_steps(peers=("transformers-sorted", "transformers-flash"), device="cuda")
    assert not_run[training.PEERS["transformers-sorted"].title] == "not on cuda, only on cpu"
    assert "pip install flash-attn" in not_run["transformers flash-attention"] or peers.FLASH_ATTN.installed


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for liger_kernel.transformers: torch's arithmetic, counted."""
    calls = {"norm": 0, "loss": 0}

    class LigerLayerNorm:
        def forward(self, hidden_states):
            calls["norm"] += 1
            return nn.functional.layer_norm(hidden_states, self.weight.shape, self.weight, self.bias, self.variance_epsilon)

    class LigerCrossEntropyLoss(nn.CrossEntropyLoss):
        def forward(self, *given):
            calls["loss"] += 1
            return super().forward(*given)

    module = types.ModuleType("liger_kernel.transformers")
    module.LigerLayerNorm, module.LigerCrossEntropyLoss = LigerLayerNorm, LigerCrossEntropyLoss
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    return calls


def test_liger_takes_every_layer_norm_and_the_losses_of_its_own_step_alone(liger):
    made, _ = made_steps()
    theirs = made["transformers"]
    (step,) = steps._liger(theirs).values()
    parts = ((1.0, pretrain.with_labels(padded_batch(BATCH, TINY.vocab_size))),)
    expected = theirs.loss_without_dropout(parts)
    assert liger == {"norm": 0, "loss": 0}
    assert step.loss_without_dropout(parts) == pytest.approx(expected, rel=1e-6)
    assert liger == {"norm": 1 + 2 * 2 + 1, "loss": 2}  # embeddings, layers, head; words and next sentence
    assert modeling_bert.CrossEntropyLoss is nn.CrossEntropyLoss
    step(parts)
    assert liger["loss"] == 4
    assert theirs.loss_without_dropout(parts) == pytest.approx(expected, rel=1e-6)  # its weights are its own
    decayed, others = step.optimizer.param_groups
    assert sum(p.numel() for p in others["params"]) == sum(p.numel() for p in theirs.optimizer.param_groups[1]["params"])


def test_whose_loss_differs_is_left_out_fastbert_too():
    made, _ = made_steps(finetune.TASK, peers=("transformers-eager",))
    parts = ((1.0, finetune.with_labels(padded_batch(BATCH, TINY.vocab_size))),)
    with torch.no_grad():
        for name in ("transformers eager", "fastbert"):
            made[name].model.classifier.bias[0] += 3.0
    contenders = {name: (made[name], parts) for name in ("transformers", "transformers eager", "fastbert")}
    difference, failed = training.loss_difference(contenders, torch.float32)
    assert difference == 0.0 and list(failed) == ["transformers eager", "fastbert"]
    assert all(reason.startswith("RuntimeError: losses differ by ") for reason in failed.values())
    results = {"float32": {"mnli": {"failed": failed}}}
    assert list(bench.failures(results)) == ["mnli: fastbert float32"]  # what makes the command fail


def test_a_model_trains_on_after_its_loss_could_not_be_computed():
    made, _ = made_steps(finetune.TASK)
    with pytest.raises(ValueError, match="input_ids"):
        made["fastbert"].loss_without_dropout(((1.0, {"no_such_argument": None}),))
    assert made["fastbert"].model.training
