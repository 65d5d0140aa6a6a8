"""Profiles of real runs at toy size, in both libraries, and of a GPU's events made by hand."""

from __future__ import annotations

import contextlib
import math
import time
import types

import pytest
import torch
import transformers
from torch.autograd import DeviceType

import fastbert
from benchmarks import finetune, inference, peers, pretrain, profile, training
from benchmarks.parts import PARTS, creators_of, members, part_of
from benchmarks.workloads import Workload, config_for, padded_batch, workload, workloads
from fastbert.ops import linear as products
from fastbert.ops import native
from fastbert.ops.feed_forward import feed_forward
from fastbert.ops.native.inference import EmbeddingTables, PackedDense

LIMITS = {"matmul_flops": 1e11, "copy_bytes": 1e10}
BATCH, HIDDEN = workload("4xmnli"), 128
EVERYWHERE = {"linear", "attention", "layer norm", "outside"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def two_turns(monkeypatch):
    monkeypatch.setattr(profile, "_FEWEST", 2)
    monkeypatch.setattr(profile, "_MOST", 2)


def covered(entry: dict) -> set[str]:
    return {part for name in entry["parts"] for part in members(name)}


def check(entry: dict, dtype: str) -> None:
    """What holds of every profile: the parts make up the run, and none is longer than it."""
    parts = entry["parts"]
    assert entry["dtype"] == dtype and covered(entry) <= set(PARTS)
    assert sum(parts.values()) == pytest.approx(entry["seconds"])
    assert min(parts.values()) >= 0
    assert 0 < len(entry["operators"]) <= 10
    assert all(0 < seconds <= entry["profiler_seconds"] for seconds in entry["operators"].values())


def test_inference():
    options = inference.Options("tiny", workloads(["8x64", "4xmnli"]), inference.DTYPES)
    said = []
    document = inference.profiles(options, dict.fromkeys(inference.DTYPES, LIMITS), said.append)
    for batch, contenders in document["profile"].items():
        assert {"transformers float32", "transformers bfloat16", "fastbert float32", "fastbert bfloat16"} <= contenders.keys()
        for name, entry in contenders.items():
            check(entry, name.split()[-1])
            assert EVERYWHERE | {"gelu"} <= covered(entry), (name, entry)
        assert (
            "embeddings" in contenders["fastbert float32"]["parts"] and "embeddings" in contenders["transformers float32"]["parts"]
        )
        assert document["floors"][batch].keys() == set(inference.DTYPES)
    assert "where the time goes" in said[0] and "| gap (fastbert / floor) |" in said[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", [finetune.TASK, pretrain.TASK], ids=lambda task: task.name)
def test_training(task, dtype):
    options = training.Options("tiny", workloads(["4xmnli"]), dtype)
    document = training.profiles(task, options, LIMITS, lambda _: None)
    ((batch, contenders),) = document["profile"].items()
    assert set(contenders) == {"transformers", "fastbert"}
    for entry in contenders.values():
        check(entry, dtype)
        assert EVERYWHERE | {"gelu", "embeddings", "loss", "optimizer", "copies"} <= covered(entry)
    floors = document["floors"][batch][dtype]
    assert set(floors) == {"linear", "attention", "layer norm", "gelu", "embeddings", "optimizer"}
    assert all(seconds > 0 for seconds in floors.values())


def is_named(run, batch: Workload) -> None:
    """No operator counts twice, and none that reads something as large as the hidden states is without a name."""
    hidden_states = batch.tokens * HIDDEN
    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with profile._named_calls(), torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    events = profiler.events()
    creators = creators_of(events)
    assert sum(profile.cpu_times(events)[0].values()) <= seconds
    without_name = {
        (event.name, *map(tuple, event.input_shapes))
        for event in events
        if part_of(event, creators) == "other" and max(map(math.prod, filter(None, event.input_shapes)), default=0) >= hidden_states
    }
    assert not without_name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", [peers.PEERS["transformers"], peers.OURS], ids=lambda peer: peer.title)
def test_what_is_large_has_a_name_in_inference(peer, dtype, tmp_path):
    with torch.inference_mode():
        run = peer.make(peers.Subject(config_for("tiny"), "cpu", tmp_path, "tiny"), dtype)
        batch = padded_batch(BATCH)
        is_named(lambda: run(batch), BATCH)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", [finetune.TASK, pretrain.TASK], ids=lambda task: task.name)
def test_what_is_large_has_a_name_in_training(task, dtype):
    config = config_for("tiny", **task.config)
    models = [training.model_of(task, library, "tiny", config) for library in (transformers, fastbert)]
    steps, _ = training.make_steps(*models, training.Options("tiny", (BATCH,), dtype, peers=()), lambda _: None)
    assert set(steps) == {"transformers", "fastbert"}
    parts = ((1.0, task.with_labels(padded_batch(BATCH))),)
    for step in steps.values():
        is_named(lambda step=step: step(parts), BATCH)


def test_a_run_that_fails_is_said_and_the_others_go_on():
    def fails():
        raise RuntimeError("out of memory\nand more")

    said = []
    found = profile.profiles(
        {"first": (fails, "float32"), "second": (lambda: torch.ones(100).tanh(), "float32")}, "cpu", said.append
    )
    assert list(found) == ["second"] and said == ["not profiled: first: RuntimeError: out of memory"]


def test_nothing_of_the_profiler_stays():
    before = native.matmul, PackedDense.__call__, EmbeddingTables.embed
    with pytest.raises(ZeroDivisionError):
        profile.profiled(lambda: 1 / 0, "cpu", "float32")
    with pytest.raises(ZeroDivisionError):
        profile._traced(lambda: 1 / 0, "cpu", "float32")
    assert (native.matmul, PackedDense.__call__, EmbeddingTables.embed) == before
    assert not torch._C._autograd._profiler_enabled()


def test_parts_of_a_run():
    assert profile.of_run({"gelu": 0.5, "linear": 1.0, "loss": 0.0}, 2.0) == {"linear": 1.0, "gelu": 0.5, "outside": 0.5}
    # More under the profiler than the run took without it.
    assert profile.of_run({"gelu": 1.0, "linear": 3.0}, 2.0) == {"linear": 1.5, "gelu": 0.5, "outside": 0.0}
    assert profile.of_run({}, 2.0) == {"outside": 2.0}


@pytest.mark.skipif(not native.AVAILABLE, reason=str(native.unavailable_reason()))
def test_native_ends_of_an_encoder_have_names():
    model = fastbert.BertModel(config_for("tiny")).eval()
    ids = torch.ones(2, 9, dtype=torch.int64)

    def run():
        with torch.no_grad():
            model(ids)

    run()
    _, (parts, operators) = profile._traced(run, "cpu", "float32")
    assert {"fastbert::embedding_layer_norm", "fastbert::matmul"} <= set(operators)
    assert parts["embeddings"] > 0 and parts["linear"] > 0


@pytest.mark.skipif(not native.AVAILABLE, reason=str(native.unavailable_reason()))
def test_gelu_that_rides_on_products_is_theirs_too(monkeypatch):
    monkeypatch.setattr(products, "choice", lambda *_: "fastbert")
    leaves = [torch.ones(shape, requires_grad=True) for shape in ((9, 8), (32, 8), (32,), (8, 32))]
    _, (parts, operators) = profile._traced(lambda: feed_forward(*leaves).sum().backward(), "cpu", "float32")
    assert {"fastbert::matmul", "fastbert::matmul_gelu"} <= set(operators)
    assert parts["linear + gelu"] > 0 and parts["linear"] > 0


@pytest.mark.parametrize(("dtype", "rest"), [("float32", "layer norm"), ("int8", "layer norm + copies")])
def test_a_layer_that_counts_itself(monkeypatch, dtype, rest):
    work = {"linear": 0.5, "attention": 0.25, "rest": 0.125}
    monkeypatch.setattr(native.encoder_layer, "work_counted", lambda: contextlib.nullcontext(work))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    _, (parts, _) = profile._traced(lambda: None, "cpu", dtype)
    assert dict(parts) == {"linear + gelu": 0.5, "attention": 0.25, rest: 0.125}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    _, (parts, _) = profile._traced(lambda: None, "cpu", dtype)
    assert parts["attention"] == 0.0625  # seconds of all threads together


def test_operators_without_what_they_call():
    x = torch.randn(200, 200)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.nn.functional.linear(x, x, x[0])
        torch.nn.functional.gelu(x)
    parts, operators = profile.cpu_times(profiler.events())
    events = {event.name: event for event in profiler.events()}
    assert parts["gelu"] * 1e6 == pytest.approx(events["aten::gelu"].self_cpu_time_total)
    assert operators["aten::linear"] * 1e6 == pytest.approx(
        events["aten::linear"].cpu_time_total - sum(child.cpu_time_total for child in events["aten::linear"].cpu_children)
    )
    # Not 2.0: what lies in each other is counted once.
    top = sum(event.cpu_time_total for event in profiler.events() if event.cpu_parent is None)
    assert sum(parts.values()) * 1e6 == pytest.approx(top)


def gpu_event(name: str, device=DeviceType.CPU, kernels=(), annotation=False, parent=None, microseconds=0.0):
    return types.SimpleNamespace(
        name=name, device_type=device, is_user_annotation=annotation, is_async=False, scope=0, sequence_nr=-1, thread=1,
        fwd_thread=1, cpu_parent=parent, cpu_children=[], time_range=types.SimpleNamespace(start=0.0),
        kernels=[types.SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        self_device_time_total=microseconds,
    )  # fmt: skip


def test_kernels_of_a_gpu():
    """As torch 2.13 builds them: kernels hang at the operators that launched them, and are events of their own as well."""
    step = gpu_event("Optimizer.step#AdamW.step", annotation=True, kernels=[("Optimizer.step#AdamW.step", 40.0)])
    linear = gpu_event("aten::linear")
    events = [
        step,
        gpu_event("aten::_fused_adamw_", kernels=[("adamw", 30.0)], parent=step),
        linear,
        gpu_event("aten::addmm", kernels=[("sm90_xmma_gemm", 20.0), ("splitKreduce", 2.0)], parent=linear),
        gpu_event("fastbert::linear_gelu", kernels=[("_pass_kernel", 10.0)]),
        gpu_event("cudaLaunchKernel"),
        *(
            gpu_event(name, DeviceType.CUDA, microseconds=spent)
            for name, spent in [
                ("adamw", 30.0),
                ("sm90_xmma_gemm", 20.0),
                ("splitKreduce", 2.0),
                ("_pass_kernel", 10.0),
                ("x", 5.0),
            ]
        ),
        gpu_event("Optimizer.step#AdamW.step", DeviceType.CUDA, annotation=True, microseconds=40.0),
    ]
    parts, operators = profile.device_times(events)
    expected = {"optimizer": 30e-6, "linear": 22e-6, "gelu": 10e-6, "other": 5e-6}
    assert {part: spent for part, spent in parts.items() if spent} == pytest.approx(expected)
    assert operators == pytest.approx({"aten::_fused_adamw_": 30e-6, "aten::addmm": 22e-6, "fastbert::linear_gelu": 10e-6})
