"""What the CPU's benchmarks measure with: ceilings, peak memory, goals, and the other engines, which compute BERT."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from benchmarks import ceilings, cpu_goals, goals, memory, peers, training
from benchmarks.finetune import TASK
from benchmarks.harness import quiet
from benchmarks.inference import LARGEST_DIFFERENCE, Contender, difference
from benchmarks.peers import with_torch
from benchmarks.workloads import STANDARD, Workload, config_for, padded_batch, workload, workloads


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_ceiling_is_the_fastest_librarys(monkeypatch):
    rates = {"MKL": 1.0, "oneDNN": 3.0, "oneDNN prepacked": 2.0}
    monkeypatch.setattr(ceilings, "matmul_rates", lambda *_: rates)
    monkeypatch.setattr(ceilings, "kernel_seconds", lambda *_, **__: [4.0, 2.0])
    found = ceilings.ceilings("cpu", torch.float32)
    assert (found["matmul_flops"], found["matmul_flops_by_library"]) == (3.0, rates)
    assert found["copy_bytes"] == 2 * 4 * (1 << 25) / 2.0


def test_gemms_alone_are_four_per_layer_with_weights_of_their_own(monkeypatch):
    called = []
    monkeypatch.setattr(ceilings, "matmuls", lambda x, w: {"any": lambda: called.append((tuple(x.shape), tuple(w.shape)))})
    alone = ceilings.GemmsAlone(config_for("tiny"), "cpu", torch.float32)
    alone.for_tokens(10)()
    layer = [((10, 128), (384, 128)), ((10, 128), (128, 128)), ((10, 128), (512, 128)), ((10, 512), (128, 512))]
    assert called == layer * 2
    assert len({w.data_ptr() for w in alone.weights}) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_is_that_of_the_call_alone():
    kept = torch.ones(20_000_000)
    torch.ones(50_000_000)  # an earlier and higher peak
    needed = memory.peak_bytes(lambda: (torch.ones(10_000_000), torch.ones(5_000_000)), "cpu")
    assert 59e6 < needed < 70e6  # the kernel counts pages in batches
    assert len(kept) == 20_000_000


def fake_results(times_faster: float) -> dict:
    ratios = {theirs: {"median": times_faster} for theirs in ("transformers float32", "OpenVINO float32")}
    return {
        batch: {"ratios": {f"fastbert {d}": ratios for d in ("float32", "bfloat16", "int8")}}
        for batch in (w.name for w in workloads(STANDARD))
    }


@pytest.mark.parametrize(("times_faster", "met"), [(30.0, True), (0.5, False)])
def test_goals_of_inference(times_faster, met):
    rows = goals.compare(cpu_goals.INFERENCE_GOALS, fake_results(times_faster))
    assert len(rows) == 16
    assert [row["name"] for row in rows if row["met"] is not met] == []
    assert all(row["met"] is None for row in goals.compare(cpu_goals.INFERENCE_GOALS, {}))


@pytest.mark.parametrize("suite", ["finetune", "pretrain"])
def test_goals_of_training(suite):
    batch = "16 x 128" if suite == "pretrain" else "MNLI lengths, padded to 128"
    times_faster = {name: {"median": 8.0} for name in ("transformers", cpu_goals.PADDED_TO_LONGEST)}
    runs = {dtype: {batch: {"times_faster": times_faster}} for dtype in ("float32", "bfloat16")}
    rows = goals.compare(cpu_goals.TRAINING_GOALS[suite], runs)
    assert [row["measured"] for row in rows] == [8.0] * len(rows) and all(row["met"] for row in rows)
    assert all(row["met"] is None for row in goals.compare(cpu_goals.TRAINING_GOALS[suite], {}))


@pytest.mark.parametrize("budget", [1, 89, 256, 10_000])
def test_token_budget_groups(budget):
    lengths = list(workload("mnli").lengths)
    groups = [lengths[group] for group in peers.token_budget_groups(lengths, budget)]
    assert sum(groups, []) == lengths
    assert all(len(group) == 1 or len(group) * group[-1] <= budget for group in groups)
    # None could take the next group's first sequence.
    assert all((len(group) + 1) * following[0] > budget for group, following in zip(groups, groups[1:], strict=False))


def test_micro_batches_are_the_batch():
    batch = TASK.with_labels(padded_batch(workload("mnli")))
    parts = training.batches_of(batch, TASK, padded=True)[training.SORTED]
    assert len(parts) > 2 and sum(weight for weight, _ in parts) == pytest.approx(1.0)
    tokens = sum(int(part["attention_mask"].sum()) for _, part in parts)
    assert tokens == workload("mnli").tokens
    assert sum(part["input_ids"].numel() for _, part in parts) < 1.4 * tokens
    assert sum(len(part["labels"]) for _, part in parts) == 32


@pytest.mark.parametrize("rounds", [False, True])
def test_float32_precision_is_changed_for_one_contender_only(rounds, monkeypatch):
    """And not where float32 would then be multiplied in bfloat16."""
    monkeypatch.setattr(with_torch, "onednn_rounds_float32", lambda: rounds)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), peers.onednn_float32_matmul():
        assert torch.get_float32_matmul_precision() == (before if rounds else "medium")
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    torch.manual_seed(0)
    return peers.Subject(config_for("tiny"), "cpu", tmp_path_factory.mktemp("engines"), "tiny")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["transformers-eager", "transformers-sorted", "onnxruntime", "openvino", "ctranslate2"])
def test_peers_compute_the_same(name, dtype, subject):
    peer = peers.PEERS[name]
    if dtype not in peer.dtypes["cpu"]:
        pytest.skip(f"{name} does not compute in {dtype}")
    if peer.why_not_installed() or (name == "openvino" and dtype == "int8" and not importlib.util.find_spec("nncf")):
        pytest.skip(f"what {name} needs is not installed")
    try:
        with quiet():
            run = peer.make(subject, dtype)
    except peers.NotAvailable as reason:
        pytest.skip(str(reason))
    with torch.inference_mode():
        for toy in (Workload("mixed", (5, 40, 17, 40, 33), 40), Workload("equal", (64,) * 3, 64)):
            batch = padded_batch(toy)
            real = batch["attention_mask"].unsqueeze(-1)
            expected = subject.model(**batch).last_hidden_state * real
            found = difference(Contender(name, dtype, run, ours=False), batch, expected, real)
            assert found["largest_difference"] <= LARGEST_DIFFERENCE[dtype]


def test_quiet_gives_the_terminal_back(capfd):
    with pytest.raises(ZeroDivisionError), quiet():
        print("lost")
        raise ZeroDivisionError
    print("kept")
    assert capfd.readouterr().out == "kept\n"
