"""fastbert bench: the document and its exit codes, at toy size. tests/test_benchmarks*.py have what it measures with."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import harness, inference, ops, peers, profile, training
from benchmarks.reports.documents import documents
from fastbert.cli import bench
from fastbert.cli.command import CommandFailure

from ..benchmarks.toy_runs import LIMITS, TOY, invoke, use_toy_sizes


@pytest.fixture(autouse=True)
def toy_sizes(monkeypatch):
    use_toy_sizes(monkeypatch)


def document_of(result) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


def test_inference(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    result = invoke("--suite", "inference", *TOY, "--save", "mine")
    assert result.exit_code == 0, result.output
    document = document_of(result)
    assert (document["command"], document["suite"], document["failed"]) == ("bench", "inference", {})
    for measured in document["results"].values():
        assert set(measured["contenders"]) == {"transformers float32", "fastbert float32"}
        assert measured["ratios"]["fastbert float32"]["transformers float32"]["median"] > 0
        assert measured["gemms_alone"]["float32"]["median_s"] > 0
    assert "GEMMs alone float32" in result.stderr
    assert "profile" not in document and "where the time goes" not in result.stderr
    saved = json.loads((tmp_path / "mine" / "inference-bert-tiny.json").read_text())
    assert saved["results"] == document["results"] and saved["command"].startswith("fastbert")


@pytest.mark.parametrize("suite", ["finetune", "pretrain"])
def test_training(suite):
    result = invoke("--suite", suite, *TOY[:6])
    assert result.exit_code == 0, result.output
    runs = document_of(result)["runs"]
    assert set(runs) == {"float32", "bfloat16"}
    for run in runs.values():
        (measured,) = run["results"].values()
        expected = {"transformers", "transformers padded to the longest, oneDNN", "fastbert"}
        assert expected <= measured.keys()
        assert ("transformers sorted in micro-batches, oneDNN" in measured) == (suite == "finetune")
        assert measured["fastbert"]["peak_bytes"] > 0


@pytest.mark.parametrize("suite", ["inference", "finetune"])
def test_profiles_are_made_when_all_timing_is_over(suite, monkeypatch):
    order = []
    for module in (inference, training):
        measure = module.measure
        monkeypatch.setattr(module, "measure", lambda *given, measure=measure: (order.append("timed"), measure(*given))[1])
    entry = {"dtype": "float32", "seconds": 1.0, "parts": {"linear": 0.75, "outside": 0.25}, "operators": {}}
    monkeypatch.setattr(profile, "profiled", lambda run, device, dtype: (order.append("profiled"), {**entry, "dtype": dtype})[1])
    dtypes = ["float32"] if suite == "inference" else ["float32", "bfloat16"]
    result = invoke("--suite", suite, *TOY[:-1], *dtypes, "--profile")
    assert result.exit_code == 0, result.output
    timed = order.index("profiled")
    assert set(order[:timed]) == {"timed"} and set(order[timed:]) == {"profiled"}
    document = document_of(result)
    for dtype, run in document.get("runs", {"float32": document}).items():
        assert run["profile"].keys() == run["floors"].keys() == run["results"].keys()
        for contenders in run["profile"].values():
            assert {name.split()[0] for name in contenders} == {"transformers", "fastbert"}
            assert all(profiled["dtype"] == dtype for profiled in contenders.values())
    assert "where the time goes" in result.stderr and "| linear | 750.0 | 750.0 |" in result.stderr


# By suite: its module, options for two or more pieces of work, and which of them a document has.
_TWO_DTYPES = [*TOY[:-1], "float32", "bfloat16"]
_PIECES = {
    "inference": (inference, TOY, lambda document: list(document["results"])),
    "finetune": (training, _TWO_DTYPES, lambda document: [dtype for dtype, run in document["runs"].items() if run["results"]]),
    "pretrain": (training, _TWO_DTYPES, lambda document: [dtype for dtype, run in document["runs"].items() if run["results"]]),
    "ops": (
        ops,
        ["--ops", "gelu_layer_norm", "--rounds", "1", "--threads", "1", "--peers", "torch-eager"],
        lambda document: list(dict.fromkeys((record["case"], record["hidden"], record["dtype"]) for record in document["results"])),
    ),
}


@pytest.mark.parametrize("suite", _PIECES)
def test_what_was_measured_outlives_an_interrupted_or_failed_run(suite, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(ops, "ceilings", lambda device, dtype: LIMITS)
    monkeypatch.setattr(ops, "DEFAULT_SCALES", {"cpu": "toy"})
    module, options, pieces_of = _PIECES[suite]
    arguments = ["--suite", suite, *options, "--save", "mine", "--output", str(tmp_path / "report")]
    assert invoke(*arguments).exit_code == 0
    (complete,) = (tmp_path / "mine").iterdir()
    reported, before = tmp_path / "report" / complete.name, complete.read_bytes()
    pieces = pieces_of(json.loads(before))
    assert len(pieces) > 1
    partials = [path.with_name(f"{path.stem}.partial.json") for path in (complete, reported)]

    def stopped_at(number: int, error: BaseException):
        """The measurement of piece ``number`` and what comes after it."""
        measure, calls = module.measure, []

        def stopped(*given):
            calls.append(1)
            if len(calls) > number:
                raise error
            return measure(*given)

        monkeypatch.setattr(module, "measure", stopped)
        result = invoke(*arguments)
        monkeypatch.setattr(module, "measure", measure)
        return result

    result = stopped_at(0, KeyboardInterrupt())
    assert result.exit_code == 130 and "until then" not in result.stderr
    assert not any(path.exists() for path in partials)
    for number, error, exit_code in ((1, KeyboardInterrupt(), 130), (len(pieces) - 1, RuntimeError("crash"), 1)):
        result = stopped_at(number, error)
        assert result.exit_code == exit_code
        for path in partials:
            assert f"what was measured until then: {path}" in result.stderr
            document = json.loads(path.read_text())
            assert len(pieces_of(document)) == number and set(pieces_of(document)) < set(pieces)
            assert document["unfinished"] and document["benchmark"] == suite and document["command"].startswith("fastbert")
            assert document.keys() - {"unfinished"} == json.loads(before).keys()
        assert complete.read_bytes() == before
        assert list(documents(tmp_path / "mine")) == [complete.stem]
        assert list(documents(partials[0])) == [f"{complete.stem}.partial"]  # as it is asked for
    assert invoke(*arguments).exit_code == 0
    assert not any(path.exists() for path in partials)
    assert complete.read_bytes() != before and "unfinished" not in json.loads(complete.read_text())


def test_a_wrong_result_is_not_timed_and_fails(monkeypatch):
    def wrong(subject, dtype):
        return lambda batch: torch.zeros(*batch["input_ids"].shape, subject.config.hidden_size)

    monkeypatch.setattr(inference, "OURS", peers.Peer("fastbert", wrong, peers.OURS.dtypes))
    result = invoke("--suite", "inference", *TOY)
    assert result.exit_code == 1
    document = document_of(result)
    assert "outputs differ" in document["failed"]["1 x 32: fastbert float32"]
    assert all(set(result["contenders"]) == {"transformers float32"} for result in document["results"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "glue"], "--suite is 'glue', expected one of inference, finetune, pretrain"),
        (["--suite", "finetune", "--dtype", "int8"], "--dtype int8: the suite finetune has float32, bfloat16"),
        (["--suite", "pretrain", "--peers", "openvino"], "--peers openvino: the suite pretrain has transformers,"),
        (["--peers", "tensorflow"], "--peers tensorflow: the suite inference has transformers,"),
        (["--model", "huge"], "model 'huge' is neither one of tiny, mini"),
        (["--batches", "32x", "--model", "tiny"], "batch '32x': expected such as 32x128"),
        (["--batches", "128", "--model", "tiny"], "batch '128': expected SEQUENCESxTOKENS"),
        (["--batches", "0x128", "--model", "tiny"], "batch '0x128': expected SEQUENCESxTOKENS"),
        (["--batches", "novels", "--model", "tiny"], "there are no lengths named novels; there are cola"),
        (["--batches", "1x513", "--model", "tiny"], "--batches: 513 tokens, and tiny takes 512 at most"),
        (["--device", "tpu"], "--device is 'tpu', expected cpu or cuda"),
        (["--threads", "100000", "--model", "tiny"], "--threads 100000: this machine has"),
        *(
            (["--suite", "ops", "--save", folder], f"--save {folder!r} is no folder below benchmarks/results")
            for folder in ("../../x", "zen5/../..", "", ".", "/tmp/x")
        ),
    ],
)
def test_wrong_usage(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in document_of(result)["error"]


def test_without_a_checkout(tmp_path):
    with pytest.raises(CommandFailure, match="they are in the repository, not in the package") as failure:
        bench.benchmarks(tmp_path)
    assert failure.value.exit_code == 1
