"""Whether two measurements agree: ratios within their stated spread, and not otherwise."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.reports import agreement
from benchmarks.reports.agreement import Comparison, Ratio

from . import toy_documents as toys


@pytest.fixture
def folders(tmp_path):
    """Old and new, the same to begin with: no spread but the 10% between runs."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, toys.inference())
        write(tmp_path / name, toys.finetune())
    return tmp_path / "old", tmp_path / "new"


def write(folder, document):
    (folder / f"{document['benchmark']}.json").write_text(json.dumps(document))


def main(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["agreement", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        agreement.main()
    captured = capsys.readouterr()
    return end.value.code, captured.out + captured.err


def test_the_same_agrees(folders, monkeypatch, capsys):
    code, said = main(monkeypatch, capsys, *folders)
    # fastbert in three dtypes, against its own and float32; in two dtypes fastbert and fastbert packed.
    assert code == 0 and "8 of 8 ratios agree within their stated spread" in said
    assert "inference, base, 4 x 8: fastbert int8 / transformers float32" in said and "only in" not in said
    assert "OpenVINO" not in said and "4.00x (3.60-4.40)" in said


@pytest.mark.parametrize(("factor", "code"), [(0.81, 0), (0.79, 1), (1.19, 0), (1.3, 1)])
def test_a_ratio_agrees_within_its_spread(folders, monkeypatch, capsys, factor, code):
    """The quartiles are 20% apart."""
    document = toys.inference()
    ratio = document["results"]["4 x 8"]["ratios"]["fastbert bfloat16"]["transformers bfloat16"]
    ratio.update({key: value * factor for key, value in ratio.items()})
    write(folders[1], document)
    found, said = main(monkeypatch, capsys, *folders)
    assert found == code and f"{8 - code} of 8 ratios agree" in said
    (line,) = [line for line in said.splitlines() if "fastbert bfloat16 / transformers bfloat16" in line and "inference" in line]
    assert f"{factor - 1:+.1%}" in line and ("DISAGREES" in line) == bool(code)


@pytest.mark.parametrize(
    ("old", "new", "spread"),
    [
        ((4.0, 3.9, 4.1), (4.3, 4.2, 4.4), 0.4),  # 10% of the old median
        ((4.0, 3.5, 4.5), (4.3, 4.2, 4.4), 1.0),  # the old quartiles
        ((4.0, 3.9, 4.1), (4.3, 3.8, 4.4), 0.6),  # the new ones
    ],
)
def test_the_spread_is_the_largest_of_three(old, new, spread):
    comparison = Comparison(Ratio(*old), Ratio(*new))
    assert comparison.spread == pytest.approx(spread) and comparison.agrees
    assert comparison.difference == pytest.approx(0.075)
    below = Comparison(Ratio(*old), Ratio(*(value - 0.3 - 1.01 * spread for value in new)))
    assert not below.agrees


def test_what_one_folder_alone_has_is_listed(folders, monkeypatch, capsys):
    (folders[1] / "finetune.json").unlink()
    write(folders[1], toys.pretrain())
    code, said = main(monkeypatch, capsys, *folders)
    assert code == 0 and "4 of 4 ratios agree" in said
    assert f"only in {folders[0]}: finetune, base, MNLI lengths, padded to 128: fastbert bfloat16 / transformers bfloat16" in said
    assert f"only in {folders[1]}: pretrain, base, 16 x 128: fastbert packed float32 / transformers float32" in said


def test_two_files(folders, monkeypatch, capsys):
    code, said = main(monkeypatch, capsys, folders[0] / "finetune.json", folders[1] / "finetune.json")
    assert code == 0 and "4 of 4 ratios agree" in said
    code, said = main(monkeypatch, capsys, folders[0] / "finetune.json", folders[1] / "inference.json")
    assert code == 1 and "there is no ratio of fastbert to transformers in both" in said


def test_a_batch_in_two_documents_counts_once(folders):
    twice = toys.inference()
    for ratio in twice["results"]["4 x 8"]["ratios"]["fastbert float32"].values():
        ratio.update(median=99.0)
    (folders[0] / "inference-by-length.json").write_text(json.dumps(twice))
    assert 99.0 not in {ratio.median for ratio in agreement.ratios(folders[0]).values()}


def test_wrong_usage(folders, monkeypatch, capsys):
    code, said = main(monkeypatch, capsys, folders[0], folders[0] / "missing")
    assert code == 2 and "missing does not exist: expected a folder" in said
