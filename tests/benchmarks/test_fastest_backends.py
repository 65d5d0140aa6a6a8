"""The table of measured backends says what the results say, and no more."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch

from benchmarks import fastest_backends, ops
from benchmarks.fastest_backends import table
from benchmarks.op_cases import SCALES, cases
from fastbert.ops import backends, measured_backends

from ..conftest import REPOSITORY

FILE = "benchmarks/results/toy/gpu.json"
MACHINE = {"gpu": "Abacus", "compute_capability": [9, 0], "commit": "abc1234"}


def record(times_faster: float, direction: str = "forward", dropout_p: float = 0.0, op: str = "add_layer_norm", **sizes: int):
    case = {"op": op, "case": str(sizes), "hidden": 768, "dropout_p": dropout_p, "dtype": "bfloat16", "direction": direction}
    seconds = {"fastbert triton": 1e-3 * times_faster, "fastbert cuda": 1e-3, "torch eager": 1e-6}
    return [{**case, "sizes": sizes, "contender": name, "median_s": median} for name, median in seconds.items()]


def document(*records: list[dict[str, Any]], **machine: Any) -> dict[str, Any]:
    """As make gpu writes it, the records of each op in a step of its own."""
    steps = {
        f"ops {i}": {"result": {"benchmark": "ops", "machine": {**MACHINE, **machine}, "results": of_step}}
        for i, of_step in enumerate(records)
    }
    return {"benchmark": "gpu", "steps": {"build": {"result": None}, "tests": {"result": {"passed": 3}}, **steps}}


def sizes_of(*records: list[dict[str, Any]]) -> list[dict[str, list[int | None]]]:
    return [entry["sizes"] for entry in table({FILE: document(*records)})["entries"]]


def test_an_entry_says_what_was_faster_and_who_says_so(tmp_path):
    found = table({FILE: document(record(1.5, rows=64, hidden=768), record(1.2, rows=64, hidden=1024))})
    assert found["results"] == [FILE]
    assert found["entries"] == [
        {
            "architecture": "sm_90",
            "op": "add_layer_norm",
            "direction": "forward",
            "dtype": "bfloat16",
            "sizes": {"rows": [64, None], "hidden": [768, 1024]},
            "backend": "cuda",
            "times_faster": [1.2, 1.5],
            "source": {"file": FILE, "commit": "abc1234"},
        }
    ]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    (entry,) = measured_backends.read(path)
    assert entry.holds({"rows": 64, "hidden": 800}) and not entry.holds({"rows": 64, "hidden": 1032})


def test_the_margin_decides():
    assert sizes_of(record(1.02, rows=64, hidden=768)) == []
    assert len(sizes_of(record(1.04, rows=64, hidden=768))) == 1
    assert table({FILE: document(record(1.04, rows=64, hidden=768))}, margin=0.05)["entries"] == []


def test_every_case_of_the_same_sizes_must_be_faster():
    faster, slower = record(1.5, rows=64, hidden=768), record(0.9, dropout_p=0.1, rows=64, hidden=768)
    assert sizes_of(faster, slower) == []
    found = table({"a.json": document(faster), "b.json": document(record(0.9, rows=64, hidden=768))})
    assert found["entries"] == [] and found["results"] == ["a.json", "b.json"]
    assert len(table({"a.json": document(faster), "b.json": document(slower, compute_capability=[8, 0])})["entries"]) == 1


def test_directions_are_apart():
    found = table({FILE: document(record(1.5, rows=64, hidden=768), record(0.9, "backward", rows=64, hidden=768))})
    assert [entry["direction"] for entry in found["entries"]] == ["forward"]


def test_ranges_end_where_it_was_slower():
    won = [record(1.5, rows=64, hidden=hidden) for hidden in (256, 768, 1024, 4096)]
    assert sizes_of(*won, record(1.0, rows=64, hidden=512)) == [
        {"rows": [64, None], "hidden": [256, 256]},
        {"rows": [64, None], "hidden": [768, 4096]},
    ]


def test_rows_begin_where_it_was_faster_from_there_on():
    by_rows = {1: 1.5, 8: 0.9, 64: 1.5, 4096: 1.3}
    records = [record(times, rows=rows, hidden=768) for rows, times in by_rows.items()]
    assert sizes_of(*records) == [{"rows": [64, None], "hidden": [768, 768]}]
    assert sizes_of(*records, record(1.0, rows=65536, hidden=768)) == []
    wider = [record(times, rows=rows, hidden=1024) for rows, times in {64: 0.9, 4096: 1.3}.items()]
    assert sizes_of(*records, *wider) == [
        {"rows": [64, None], "hidden": [768, 768]},
        {"rows": [4096, None], "hidden": [768, 1024]},
    ]


def test_head_dims_do_not_mix():
    shapes = [(64, 128), (64, 512), (128, 512)]
    records = [record(1.5, op="attention", rows=64, head_dim=d, max_seqlen=length) for d, length in shapes]
    assert sizes_of(*records) == [
        {"rows": [64, None], "head_dim": [64, 64], "max_seqlen": [128, 512]},
        {"rows": [64, None], "head_dim": [128, 128], "max_seqlen": [512, 512]},
    ]


def test_what_failed_was_not_faster():
    broken = record(1.5, rows=64, hidden=768)
    broken[1] = {**{k: v for k, v in broken[1].items() if k not in ("median_s", "direction")}, "failed": "wrong by 10%"}
    assert sizes_of(broken) == []


def test_results_of_no_gpu_or_no_commit():
    won = record(1.5, rows=64, hidden=768)
    cpu = {"benchmark": "ops", "machine": {"gpu": None, "commit": "abc1234"}, "results": won}
    assert table({FILE: cpu, "other.json": {"benchmark": "finetune"}}) == {"margin": 0.03, "results": [], "entries": []}
    with pytest.raises(ValueError, match="code that no commit has: abc1234-dirty"):
        table({FILE: document(won, commit="abc1234-dirty")})


def test_results_must_be_committed(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text("{}", encoding="utf-8")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    with pytest.raises(ValueError, match="not committed"):
        fastest_backends.read_committed(path)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "results"], check=True)
    assert fastest_backends.read_committed(path) == {}
    path.write_text('{"benchmark": "ops"}', encoding="utf-8")
    with pytest.raises(ValueError, match="not committed"):
        fastest_backends.read_committed(path)


def test_the_table_in_the_package_is_made_of_the_results_that_it_names():
    committed = json.loads(measured_backends.PATH.read_text(encoding="utf-8"))
    documents = {file: json.loads((REPOSITORY / file).read_text(encoding="utf-8")) for file in committed["results"]}
    assert committed == table(documents, committed["margin"])
    assert len(measured_backends.ENTRIES) == len(committed["entries"])


@pytest.mark.parametrize("op", measured_backends.SIZES)
def test_what_the_ops_measure_has_the_sizes_that_they_choose_by(op, monkeypatch):
    """The same numbers as the op itself gives when it asks which backend is to run."""
    asked = []

    def choose(op, backend, device, dtype, direction, **sizes):
        asked.append((direction, sizes))
        return "reference"

    for case in cases(op, SCALES["toy"], "cpu", torch.float32):
        (recorded,) = ops.measure(case, {"fastbert cuda": "it is not here"}, "cpu", {}, 1, 0.0)
        asked.clear()
        with monkeypatch.context() as patched:
            patched.setattr(backends, "choose", choose)
            torch.autograd.grad(case.ours("reference")(*case.leaves), case.leaves, case.dout)
        assert asked == [("forward", case.sizes), ("backward", case.sizes)]
        assert recorded["sizes"] == case.sizes
