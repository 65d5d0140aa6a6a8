"""``"auto"`` obeys measurements: of the GPU's architecture, the op, its direction, dtype and sizes, and of nothing else."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import fastbert
from fastbert.ops import add_layer_norm, backends, cuda, measured_backends
from fastbert.ops.measured_backends import Entry

from ..model.helpers import small_config
from .helpers import DEVICE, gradients

FORWARD = Entry("sm_90", "add_layer_norm", "forward", "float32", ((4, None), (768, 1024)), "cuda", "results/gpu.json", "abc1234")
BACKWARD = dataclasses.replace(FORWARD, direction="backward")
needs_kernels = pytest.mark.skipif(
    bool(backends.not_supported_reasons("cuda", "add_layer_norm", DEVICE, torch.float32)), reason="there are no CUDA kernels here"
)


@pytest.fixture
def measured(monkeypatch):
    """measured(entry, ...): what was measured, on a GPU like the one that the tests' tensors are said to be on."""

    def use(*entries: Entry) -> None:
        monkeypatch.setattr(measured_backends, "ENTRIES", entries)
        monkeypatch.setattr(measured_backends, "architecture", lambda device: "sm_90")
        measured_backends.entries_for.cache_clear()

    yield use
    measured_backends.entries_for.cache_clear()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernels of the cuda backend that are called, in order."""
    called: list[str] = []

    def noted(name):
        function = getattr(cuda, name)
        return lambda *arguments: called.append(name) or function(*arguments)

    for name in ("add_layer_norm_forward", "add_layer_norm_backward"):
        monkeypatch.setattr(cuda, name, noted(name))
    return called


def inputs(rows: int, hidden: int) -> list[torch.Tensor]:
    return [torch.randn(*shape) for shape in ((rows, hidden), (hidden,), (rows, hidden), (hidden,), (hidden,))]


def chosen(op: str = "add_layer_norm", dtype: torch.dtype = torch.float32, direction: str = "forward", **sizes: int) -> str:
    return backends.choose(op, "auto", torch.device(DEVICE), dtype, direction, **sizes)


@needs_kernels
@pytest.mark.parametrize("entries", [(FORWARD, BACKWARD), (FORWARD,), (BACKWARD,)], ids=["both", "forward", "backward"])
def test_what_was_measured_runs(measured, calls, entries):
    """Each direction by itself: a backward pass takes up what another backend's forward pass has left."""
    leaves, dout = inputs(5, 768), torch.randn(5, 768)

    def run(backend):
        return gradients(lambda *leaves: add_layer_norm(*leaves, 1e-12, backend=backend), leaves, dout, torch.float32, DEVICE)

    truth = run("reference")
    measured(*entries)
    results = run("auto")
    assert calls == [f"add_layer_norm_{entry.direction}" for entry in entries]
    for result, expected in zip(results, truth, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    run("reference")
    assert len(calls) == len(entries)  # a backend that is asked for by name is never replaced


@needs_kernels
def test_compiled_code_chooses_when_it_runs(measured, calls):
    """Not while it is traced: the sizes of fake tensors decide nothing."""
    compiled = torch.compile(lambda *leaves: add_layer_norm(*leaves, 1e-12), backend="aot_eager", dynamic=True)
    measured(FORWARD)
    for rows, expected in ((3, 0), (4, 1), (5, 2), (3, 2)):
        compiled(*(leaf.to(DEVICE) for leaf in inputs(rows, 768)))
        assert len(calls) == expected


@needs_kernels
def test_a_measurement_holds_for_what_it_names_alone(measured, monkeypatch):
    default = chosen(rows=4, hidden=768)
    assert default != "cuda"
    measured(FORWARD)
    assert chosen(rows=4, hidden=768) == chosen(rows=10**9, hidden=1024) == "cuda"
    for sizes in ({"rows": 3, "hidden": 768}, {"rows": 4, "hidden": 760}, {"rows": 4, "hidden": 1032}):
        assert chosen(**sizes) == default
    assert chosen(rows=4, hidden=770) == default  # between what was measured, but the kernels take multiples of 8
    assert chosen(direction="backward", rows=4, hidden=768) == default
    assert chosen(dtype=torch.bfloat16, rows=4, hidden=768) == backends.select("add_layer_norm", "auto", DEVICE, torch.bfloat16)
    assert chosen("gelu_layer_norm", rows=4, hidden=768) == backends.select("gelu_layer_norm", "auto", DEVICE, torch.float32)
    measured(dataclasses.replace(FORWARD, architecture="sm_80"))
    assert chosen(rows=4, hidden=768) == default
    measured(FORWARD)
    monkeypatch.setattr(measured_backends, "architecture", lambda device: "sm_80")
    assert chosen(rows=4, hidden=768) == default


def test_a_backend_that_is_not_here_is_not_chosen(measured, monkeypatch):
    measured(FORWARD)
    monkeypatch.setattr(backends, "_reasons", lambda backend, *_: ["it was not built"] if backend == "cuda" else [])
    assert chosen(rows=4, hidden=768) == backends.select("add_layer_norm", "auto", DEVICE, torch.float32)


@needs_kernels
def test_explain_and_doctor_name_the_source(measured):
    measured(FORWARD, dataclasses.replace(FORWARD, architecture="sm_80"))
    named = "add_layer_norm forward, float32, rows from 4, hidden 768 to 1024 on sm_90: cuda (results/gpu.json, commit abc1234)"
    explanation = fastbert.explain(fastbert.BertModel(small_config()).to(DEVICE))
    assert explanation.ops["add_layer_norm"]["measured"] == [named] and explanation.ops["gelu_layer_norm"]["measured"] == []
    assert f"but {named}" in str(explanation)
    assert backends.report()["measured"][0] == named and len(backends.report()["measured"]) == 2


def test_architecture_is_that_of_the_tensors_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 1 else (8, 6))
    measured_backends.architecture.cache_clear()
    try:
        assert measured_backends.architecture(torch.device("cuda", 1)) == "sm_90"
        assert measured_backends.architecture(torch.device("cuda", 0)) == "sm_86"
        assert measured_backends.architecture(torch.device("cpu")) is None
    finally:
        measured_backends.architecture.cache_clear()


def test_every_op_with_cuda_kernels_can_be_in_the_table():
    assert set(cuda.OPS) <= measured_backends.SIZES.keys() <= set(backends.OPS)


def test_a_file(tmp_path):
    content = {
        "architecture": "sm_90", "op": "attention", "direction": "backward", "dtype": "bfloat16", "backend": "cuda",
        "sizes": {"max_seqlen": [128, 512], "rows": [4096, None], "head_dim": [64, 64]}, "times_faster": [1.1, 1.2],
        "source": {"file": "a.json", "commit": "b"},
    }  # fmt: skip
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"margin": 0.03, "results": ["a.json"], "entries": [content]}), encoding="utf-8")
    (entry,) = measured_backends.read(path)
    assert entry.holds({"rows": 5000, "head_dim": 64, "max_seqlen": 512})
    assert not entry.holds({"rows": 5000, "head_dim": 32, "max_seqlen": 512})
    for broken in ({**content, "direction": "sideways"}, {**content, "sizes": {}}, {"op": "attention"}):
        path.write_text(json.dumps({"entries": [broken]}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"table\.json is no table of measured backends"):
            measured_backends.read(path)
