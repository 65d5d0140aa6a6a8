"""Rows of documents of every kind and age, and documents of folders."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks.reports.documents import ReportError, documents, others
from benchmarks.reports.rows import digest, op_rows_of, rows_of

from . import toy_documents as toys


def by_contender(document: dict) -> dict:
    return {(row.contender, row.dtype): row for row in rows_of(document)}


def test_inference():
    rows = by_contender(toys.inference())
    ours = rows["fastbert", "bfloat16"]
    assert (ours.suite, ours.model, ours.batch, ours.ours, ours.reason) == ("inference", "base", "4 x 8", True, None)
    assert (ours.sequences, ours.tokens, ours.rounds) == (4, 32, 5)
    assert (ours.median_s, ours.q25_s, ours.q75_s) == pytest.approx((0.08, 0.072, 0.088))
    assert (ours.tokens_per_s, ours.sequences_per_s) == (400, 50)
    assert (ours.ratio, ours.ratio_q25, ours.ratio_q75) == pytest.approx((3.75, 3.375, 4.125))
    assert (ours.float32_ratio, ours.float32_ratio_q25) == pytest.approx((5.0, 4.5))
    assert (ours.share_of_matmul_rate, ours.share_of_limit) == (0.125, 0.25)
    assert (ours.peak_bytes, ours.joules) == (80_000_000, None)
    assert (ours.flops, ours.bytes, ours.matmul_flops, ours.copy_bytes) == (10_000_000, 500_000, 1e9, 1e8)


def test_ratios_of_inference_are_paired_where_the_document_pairs_them():
    rows = by_contender(toys.inference())
    assert rows["transformers", "float32"].ratio is None and rows["transformers", "float32"].float32_ratio is None
    # In its own dtype there is no transformers.
    assert rows["fastbert", "int8"].ratio is None and rows["fastbert", "int8"].float32_ratio == pytest.approx(0.4 / 0.06)
    assert rows["ONNX Runtime", "float32"].ratio_q25 == pytest.approx(1.8)
    # Of a peer in bfloat16 the documents have the pair with float32 alone.
    peer = rows["OpenVINO", "bfloat16"]
    assert (peer.ratio, peer.ratio_q25, peer.ratio_q75) == (pytest.approx(2.0), None, None)
    assert peer.float32_ratio_q75 == pytest.approx(1.1 * 0.4 / 0.15)


def test_reasons():
    rows = by_contender(toys.inference())
    assert rows["transformers", "int8"].reason == "not in int8 on cpu" and rows["transformers", "int8"].median_s is None
    assert rows["CTranslate2", "float32"].reason == "RuntimeError: toy"
    assert rows["flash-attn's BERT", ""].reason == "not on cpu, only on cuda"
    rows = by_contender(toys.finetune())
    assert rows["transformers compiled", "bfloat16"].reason == "RuntimeError: toy"
    assert rows["transformers Liger", "float32"].reason == "not on cpu, only on cuda"


def test_training_of_the_command_line():
    rows = by_contender(toys.finetune())
    assert len(rows) == 2 * 6
    for dtype in ("float32", "bfloat16"):
        ours, packed = rows["fastbert", dtype], rows["fastbert packed", dtype]
        assert (ours.suite, ours.ours, packed.ours, rows["transformers", dtype].ours) == ("finetune", True, True, False)
        assert (ours.ratio, packed.ratio_q75) == pytest.approx((4.0, 5.5))
        assert (ours.peak_bytes, ours.flops) == (200_000_000, 10_000_000)
        assert ours.share_of_matmul_rate == pytest.approx(0.05)
    # The race in bfloat16 has no transformers in float32.
    assert rows["fastbert", "float32"].float32_ratio == 4.0 and rows["fastbert", "bfloat16"].float32_ratio is None


def test_training_of_one_dtype_and_of_an_earlier_version():
    now = by_contender({"benchmark": "pretrain", "command": "", **toys.race("bfloat16")})["fastbert", "bfloat16"]
    assert (now.suite, now.ratio, now.share_of_limit) == ("pretrain", pytest.approx(4.0), pytest.approx(0.1))
    earlier = by_contender(toys.earlier_race())["fastbert", "float32"]
    assert (earlier.model, earlier.peak_bytes, earlier.share_of_limit, earlier.flops) == ("mini", 200_000_000, None, None)


def test_earlier_inference():
    ours = by_contender(toys.earlier_inference())["fastbert", "float32"]
    assert (ours.model, ours.ratio, ours.flops) == ("base", pytest.approx(4.0), 10_000_000)
    missing = ("sequences", "tokens", "tokens_per_s", "sequences_per_s", "share_of_limit", "peak_bytes", "joules", "bytes")
    assert [name for name in missing if getattr(ours, name) is not None] == []
    rows = by_contender(toys.earliest_inference())
    assert set(rows) == {("transformers", "float32"), ("fastbert", "float32")}
    ours, theirs = rows["fastbert", "float32"], rows["transformers", "float32"]
    assert (ours.ratio, ours.share_of_matmul_rate, ours.median_s) == (4.1, 0.7, 0.1)
    assert (theirs.ratio, theirs.share_of_matmul_rate) == (None, None)


def test_ops():
    rows = op_rows_of(toys.ops())
    assert [(row.contender, row.direction) for row in rows[2:4]] == [("fastbert native", "both"), ("torch eager", "forward")]
    first, theirs = rows[0], rows[3]
    assert (first.op, first.case, first.hidden, first.dropout_p, first.dtype) == ("add_layer_norm", "8 rows", 64, 0.1, "bfloat16")
    assert (first.ours, first.median_s, first.bytes_per_s, first.share_of_ceiling) == (True, 1e-4, 2e9, 0.5)
    assert first.fastbert_ratio is None and not theirs.ours
    assert (theirs.fastbert_ratio, theirs.fastbert_ratio_q25, theirs.fastbert_ratio_q75) == pytest.approx((2.0, 1.8, 2.2))
    assert [row.reason for row in rows[6:]] == ["no CUDA device", "RuntimeError: toy"]


def test_a_digest_changes_with_every_figure():
    rows = rows_of(toys.inference())
    assert digest(rows) == digest(rows_of(json.loads(json.dumps(toys.inference()))))
    changed = [dataclasses.replace(rows[0], rounds=6), *rows[1:]]
    assert digest(changed) != digest(rows) and digest(rows[1:]) != digest(rows)


def test_documents_of_a_folder(tmp_path):
    gpu = {"benchmark": "gpu", "steps": {"pretrain base": {"result": toys.earlier_race()}, "build": {"result": None}}}
    found = {"pretrain": toys.pretrain(), "inference-1x32": toys.inference(), "inference": toys.inference(), "gpu": gpu}
    for name, document in {**found, "ops": toys.ops(), "embed": {"benchmark": "embed", "command": "python"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    assert list(documents(tmp_path)) == ["inference", "inference-1x32", "gpu-pretrain-base", "pretrain", "ops"]
    assert others(tmp_path) == {"embed": "python", "gpu": None}
    assert list(documents(tmp_path / "pretrain.json")) == ["pretrain"]


def test_documents_that_are_none(tmp_path):
    with pytest.raises(ReportError, match="missing does not exist: expected a folder"):
        documents(tmp_path / "missing")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ReportError, match="a.json is no JSON document"):
        documents(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ReportError, match="a.json: expected a JSON document of a benchmark, got list"):
        documents(tmp_path)
