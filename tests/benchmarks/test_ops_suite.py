"""fastbert bench --suite ops, at toy size: who takes part, in which order, what a record says; and the same by pytest-benchmark."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from torch.nn import functional as F

import fastbert.ops
from benchmarks import attention_cases, harness, matmul_cases, op_cases, op_contenders, ops, test_ops, work
from benchmarks.harness import interleaved_kernels
from benchmarks.op_cases import OPS, SCALES, Case, Contender, cases
from fastbert.ops import backends

from ..conftest import REPOSITORY
from . import toy_runs
from .toy_runs import LIMITS

PEERS = [peer for peer in op_contenders.PEERS if peer != "torch-compile"]


@pytest.fixture(autouse=True)
def toy_sizes(monkeypatch, one_thread):
    monkeypatch.setattr(ops, "ceilings", lambda device, dtype: LIMITS)
    monkeypatch.setattr(ops, "DEFAULT_SCALES", {"cpu": "toy"})


def invoke(*arguments: str):
    return toy_runs.invoke("--suite", "ops", *arguments)


def document_of(result) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


def first_case(op: str, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(0)
    return next(iter(cases(op, SCALES["toy"], "cpu", dtype)))


def measured(case: Case, offers: dict) -> dict[str, list[dict]]:
    records = ops.measure(case, offers, "cpu", {"float32": LIMITS}, 3, float("inf"))
    return {name: [r for r in records if r["contender"] == name] for name in offers}


@pytest.fixture(scope="module")
def document() -> dict:
    """Of all ops in both dtypes, without torch.compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "ceilings", lambda device, dtype: LIMITS)
        patch.setattr(ops, "DEFAULT_SCALES", {"cpu": "toy"})
        result = invoke("--rounds", "1", "--peers", *PEERS)
    assert result.exit_code == 0, result.output
    return document_of(result)


def test_every_op_has_records_of_every_direction(document):
    assert set(fastbert.ops.__all__) | set(backends.OPS) <= set(OPS) == set(work._OPS)
    assert (document["suite"], document["failed"], document["not_asked_for"]) == ("ops", {}, ["torch-compile"])
    for dtype in ops.DTYPES:
        for op in OPS:
            ours = [
                r for r in document["results"] if (r["op"], r["dtype"]) == (op, dtype) and r["contender"].startswith("fastbert")
            ]
            directions = {r.get("direction") for r in ours if "median_s" in r}
            nothing_mixed = op in backends.MIXED_OPS and dtype == "float32"
            expected = set() if nothing_mixed else {"forward"} if op in backends.INFERENCE_OPS else {"forward", "backward", "both"}
            assert directions == expected, op
            for record in ours:
                if "median_s" in record:
                    assert record["share_of_ceiling"] > 0 and record["error"] <= ops.LARGEST_ERROR[dtype]


def test_peers_have_the_ratio_of_what_auto_picks(document):
    for record in document["results"]:
        picks = record["contender"] == f"fastbert {document['machine']['backends'].get(record['op'])}"
        if "median_s" in record and record["op"] in backends.OPS and record["dtype"] == "float32":
            assert ("fastbert_ratio" in record) != picks
            assert picks or record["fastbert_ratio"]["median"] > 0
    eager = [r for r in document["results"] if r["contender"] == "torch eager" and "median_s" in r]
    assert {r["op"] for r in eager} == set(OPS)


MISSING = (
    ("flash-attn", "attention", "pip install flash-attn"),
    ("varlen_attn", "attention", "CUDA devices only"),
    ("sdpa cudnn", "attention", "CUDA devices only"),
    ("Liger LayerNorm", "add_layer_norm", "pip install liger-kernel"),
    ("Liger LayerNorm", "embedding_layer_norm", "pip install liger-kernel"),
    ("Liger GELU", "gelu_layer_norm", "GEGLU"),
    ("Liger GELU", "linear_gelu", "GEGLU"),
    ("Liger cross-entropy", "mlm_loss", "pip install liger-kernel"),
    ("Liger fused linear cross-entropy", "mlm_loss", "pip install liger-kernel"),
)


def test_who_is_missing_says_why(document):
    installed = {name for name in ("flash_attn", "liger_kernel") if importlib.util.find_spec(name)}
    for contender, op, reason in MISSING:
        records = [r for r in document["results"] if (r["contender"], r["op"]) == (contender, op)]
        expected = "CUDA devices only" if installed and reason.startswith("pip") else reason
        assert records and all(expected in r["not_supported"] for r in records), contender


def test_a_refusal_of_torchs_attention_has_its_reason(document):
    """On a CPU its flash attention has no dropout."""
    refused = [r for r in document["results"] if r["contender"] == "sdpa flash" and r["dropout_p"]]
    assert refused and all("dropout" in r["not_supported"].lower() for r in refused)


def test_contenders_take_turns():
    called = []

    def steps(name):
        return [lambda: called.append(name) or name.upper(), lambda given: called.append(given)]

    seconds = interleaved_kernels({name: steps(name) for name in "ab"}, "cpu", rounds=10, limit_s=0.0)
    assert called == ["a", "A", "b", "B"] * 4  # the first are not counted
    assert [[len(of_step) for of_step in of_steps] for of_steps in seconds.values()] == [[3, 3], [3, 3]]


def test_contenders_take_turns_on_a_gpu(monkeypatch):
    """With events that count what was done before them: the cache is overwritten outside of what they measure."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(done)

        def elapsed_time(self, after):
            return 1e3 * (after.at - self.at)

    cold = types.SimpleNamespace(zero_=lambda: done.append("cold"))
    monkeypatch.setattr(harness.torch, "empty", lambda *_, **__: cold)
    for name, value in (("Event", Event), ("synchronize", lambda: done.append("synchronize")), ("_sleep", lambda cycles: None)):
        monkeypatch.setattr(torch.cuda, name, value)

    def steps(name):
        return [lambda: done.append(name) or name.upper(), lambda given: done.append(given)]

    seconds = interleaved_kernels({name: steps(name) for name in "ab"}, "cuda", rounds=7)
    assert seconds == {name: [[1.0] * 7] * 2 for name in "ab"}
    turn = ["cold", "a", "cold", "A", "cold", "b", "cold", "B"]
    # A round that is not counted, one that tells how long to sleep, then at most 20 steps at once.
    assert done[:4] == ["a", "A", "b", "B"]
    assert done[4:] == ["synchronize", "a", "A", "b", "B", "synchronize", *turn * 5, "synchronize", *turn * 2, "synchronize"]


def test_both_directions_are_summed_round_by_round(monkeypatch):
    def taken(turns, *_):
        times = {"torch eager": 2.0}
        return {name: [[times.get(name, 1.0) * s for s in of] for of in ([1.0, 2.0, 3.0], [30.0, 20.0, 11.0])] for name in turns}

    monkeypatch.setattr(ops, "interleaved_kernels", taken)
    case = first_case("linear_gelu")
    picked = case.picked("cpu")
    offers = {picked: dict(case.contenders("cpu"))[picked], "torch eager": case.peers["torch eager"]}
    records = measured(case, offers)
    forward, backward, both = records[picked]
    assert (both["direction"], both["median_s"], both["rounds"]) == ("both", 22.0, 3)
    assert records["torch eager"][2]["fastbert_ratio"] == {"of": picked, "median": 2.0, "q25": 2.0, "q75": 2.0}
    floors = [work.floor_seconds(work.work("linear_gelu", d, **case.shape, element_size=4), LIMITS) for d in work.DIRECTIONS]
    assert both["share_of_ceiling"] == pytest.approx(sum(floors) / 22.0)
    assert forward["share_of_ceiling"] == pytest.approx(floors[0] / 2.0)
    assert backward["share_of_matmul_rate"] == pytest.approx(work.flops("linear_gelu", "backward", **case.shape) / 20.0 / 1e12)


def test_a_wrong_peer_is_not_timed():
    case = first_case("add_layer_norm")
    wrong = Contender(lambda x, *rest: case.ours("reference")(x, *rest) * 1.01, case.leaves, case.dout)
    (record,) = measured(case, {"torch eager": lambda: wrong})["torch eager"]
    assert "wrong by" in record["failed"] and "median_s" not in record


def test_a_wrong_result_of_fastbert_fails(monkeypatch):
    op = op_cases.add_layer_norm

    def wrong(*tensors, backend, **options):
        return op(*tensors, backend=backend, **options) * (1.0 if backend == "reference" else 1.5)

    monkeypatch.setattr(op_cases, "add_layer_norm", wrong)
    result = invoke("--ops", "add_layer_norm", "--rounds", "1", "--dtype", "float32", "--peers", "torch-eager")
    assert result.exit_code == 1
    failed = document_of(result)["failed"]
    picked = backends.select("add_layer_norm", "auto", "cpu", torch.float32)
    assert "wrong by" in failed[f"add_layer_norm 12 rows, 64, float32: fastbert {picked}"]


def test_who_fails_while_timed_leaves_the_race():
    case = first_case("gelu_layer_norm")
    calls = []

    def runs_twice(*leaves):
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError("no more")
        return case.ours("reference")(*leaves)

    records = measured(
        case,
        {
            "torch eager": case.peers["torch eager"],
            "fragile": lambda: Contender(runs_twice, case.leaves, case.dout),
        },
    )
    (fragile,) = records["fragile"]
    assert fragile["failed"] == "while it was timed: MemoryError: no more"
    assert [r["direction"] for r in records["torch eager"]] == ["forward", "backward", "both"]


def test_nothing_begins_after_the_limit():
    case = first_case("gelu_layer_norm")
    (record,) = ops.measure(case, {"torch eager": case.peers["torch eager"]}, "cpu", {"float32": LIMITS}, 3, 0.0)
    assert record["not_run"] == "the time limit is reached"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "softmax"], "--ops softmax: there are embedding_layer_norm, attention,"),
        (["--batches", "32x128"], "--batches: the suite ops measures ops at sizes of its own"),
        (["--model", "large", "--data", "."], "--data, --model: the suite ops measures ops"),
        (["--peers", "openvino"], "--peers openvino: the suite ops has torch-eager,"),
        (["--dtype", "int8"], "--dtype int8: the suite ops has float32, bfloat16"),
        (["--suite", "inference", "--ops", "attention"], "--ops: the suite inference measures models; --suite ops measures ops"),
    ],
)
def test_wrong_usage(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in document_of(result)["error"]


# --- packages for GPUs, which nobody can run here: functions with their signatures in their place --------------------------


def _layer_norm(X, W, B, eps):
    return F.layer_norm(X, W.shape, W, B, eps)


def _cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
    return F.cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction)


def _fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
    return F.cross_entropy(F.linear(input, weight, bias), target, ignore_index=ignore_index)


def _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None):
    bounds = cu_seq_q.tolist()
    parts = [
        F.scaled_dot_product_attention(*(t[a:b].transpose(0, 1) for t in (query, key, value))).transpose(0, 1)
        for a, b in zip(bounds, bounds[1:])
    ]
    assert max_q == max_k == max(b - a for a, b in zip(bounds, bounds[1:]))
    return torch.cat(parts)


def _qkvpacked(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False):
    return _varlen(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


@pytest.mark.parametrize(
    ("op", "contender"),
    [
        ("attention", "flash-attn"),
        ("attention", "varlen_attn"),
        ("add_layer_norm", "Liger LayerNorm"),
        ("embedding_layer_norm", "Liger LayerNorm"),
        ("gelu_layer_norm", "Liger LayerNorm"),
        ("mlm_loss", "Liger cross-entropy"),
        ("mlm_loss", "Liger fused linear cross-entropy"),
    ],
)
def test_packages_for_gpus_are_called_as_they_ask(monkeypatch, op, contender):
    liger = types.ModuleType("liger_kernel.transformers.functional")
    liger.liger_layer_norm, liger.liger_cross_entropy = _layer_norm, _cross_entropy
    liger.liger_fused_linear_cross_entropy = _fused_linear_cross_entropy
    flash_attn, varlen = types.ModuleType("flash_attn"), types.ModuleType("torch.nn.attention.varlen")
    flash_attn.flash_attn_varlen_qkvpacked_func, varlen.varlen_attn = _qkvpacked, _varlen
    for module in (liger, flash_attn, varlen):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for parent in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    for module in (op_cases, matmul_cases):
        monkeypatch.setattr(module, "liger", lambda device, make: make)
    monkeypatch.setattr(attention_cases, "gpu_package", lambda package, install, device, make, *reasons: make)
    monkeypatch.setattr(attention_cases, "_CUDA_ONLY", "")
    case = first_case(op, torch.bfloat16)
    assert ops.largest_error(case.peers[contender](), ops.reference(case)) < ops.LARGEST_ERROR["bfloat16"]


def test_why_a_package_for_gpus_takes_no_part():
    offer = op_contenders.gpu_package("json", "nothing", "cuda", first_case)
    assert offer is first_case
    assert op_contenders.gpu_package("json", "nothing", "cpu", first_case) == "it runs on CUDA devices only"
    assert (
        op_contenders.gpu_package("no_such_package", "it", "cuda", first_case)
        == "no_such_package is not installed (pip install it)"
    )


@pytest.mark.timeout(200)
def test_by_pytest_benchmark():
    options = ["--scale", "toy", "--benchmark-disable", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "benchmarks/test_ops.py", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTBERT_CALIBRATION": "off"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    summary = done.stdout.splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1]) > 80, summary


def test_a_record_of_pytest_benchmark_has_its_share_of_the_ceiling(monkeypatch):
    monkeypatch.setattr(test_ops, "limits_of", lambda dtype: LIMITS)
    ran = []
    benchmark = types.SimpleNamespace(
        pedantic=lambda run, setup, **_: ran.append(run(*setup()[0])),
        enabled=True,
        extra_info={},
        stats=types.SimpleNamespace(stats=types.SimpleNamespace(median=0.5)),
    )
    config = types.SimpleNamespace(getoption={"--scale": "toy"}.get)
    test_ops.test_op(benchmark, config, "gelu_layer_norm", "torch eager", "float32", "backward")
    required = work.work("gelu_layer_norm", "backward", rows=12, hidden=64, element_size=4)
    assert len(ran) == 1 and benchmark.extra_info["error"] < ops.LARGEST_ERROR["float32"]
    assert benchmark.extra_info["share_of_ceiling"] == pytest.approx(work.floor_seconds(required, LIMITS) / 0.5)


def test_a_document_is_saved(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    options = ["--ops", "linear", "--rounds", "1", "--dtype", "float32", "--peers", "torch-eager"]
    result = invoke(*options, "--save", "mine")
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "mine" / "ops-linear.json").read_text())
    assert saved["results"] == document_of(result)["results"] and saved["benchmark"] == "ops"
