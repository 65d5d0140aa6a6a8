"""Markdown of rows: what each table has, and that it has no more than its rows know."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.reports import losses, tables
from benchmarks.reports.rows import op_rows_of, rows_of

from . import toy_documents as toys


def cells(table: str) -> list[list[str]]:
    """Of the lines below the heading."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.7648, "3,765"), (0.1, "100"), (0.0616, "61.6"), (0.0098, "9.8"), (0.000123456, "0.123")]
)
def test_milliseconds(seconds, text):
    assert tables.milliseconds(seconds) == text


def test_other_cells():
    assert (tables.memory(1_234_000_000), tables.memory(45_600_000)) == ("1.2 GB", "46 MB")
    assert (tables.times(2.489), tables.times(2.489, 2.4, 2.59)) == ("2.49x", "2.49x (2.40-2.59)")


def test_a_table_leaves_empty_columns_out():
    assert tables.markdown(("a", "b", "c"), [["x|y", None, "1"], ["z", None, None]]) == (
        "| a | c |\n| --- | ---: |\n| x\\|y | 1 |\n| z |  |"
    )


def test_a_batch():
    table = tables.batch_table(rows_of(toys.inference()))
    assert table.splitlines()[0] == (
        "| contender | dtype | ms (quartiles) | tokens/s | sequences/s | against transformers, same dtype | "
        "against transformers float32 | MFU | of the limit | memory |"
    )
    lines = {(line[0], line[1]): line[2:] for line in cells(table)}
    assert lines["**fastbert**", "bfloat16"] == [
        "80.0 (72.0-88.0)", "400", "50.0", "3.75x (3.38-4.12)", "5.00x (4.50-5.50)", "12%", "25%", "80 MB",
    ]  # fmt: skip
    assert lines["transformers", "float32"][3:5] == ["", ""]
    # Against float32 stands where the dtype is another one.
    assert lines["**fastbert**", "float32"][3:5] == ["4.00x (3.60-4.40)", ""]
    assert ("transformers", "int8") not in lines and ("CTranslate2", "float32") not in lines


def test_a_batch_of_an_earlier_document_has_fewer_columns():
    headings = tables.batch_table(rows_of(toys.earliest_inference())).splitlines()[0]
    assert headings == "| contender | dtype | ms (quartiles) | against transformers, same dtype | MFU |"


def test_energy_is_shown_where_it_is_known():
    document = toys.inference()
    document["results"]["4 x 8"]["contenders"]["fastbert float32"]["joules"] = 1.25
    table = tables.batch_table(rows_of(document))
    assert table.splitlines()[0].endswith("| memory | J |") and "| 100 MB | 1.25 |" in table


def test_who_has_no_figures_and_why():
    rows = rows_of(toys.inference(("4 x 8", "1 x 32")))
    lines = ["transformers int8: not in int8 on cpu", "flash-attn's BERT: not on cpu, only on cuda"]
    assert tables.without_figures(rows) == [*lines, "CTranslate2 float32: RuntimeError: toy"]
    once = [row for row in rows if not (row.contender == "CTranslate2" and row.batch == "4 x 8")]
    assert tables.without_figures(once)[2] == "CTranslate2 float32: RuntimeError: toy (1 x 32)"
    assert tables.without_figures(rows_of(toys.finetune())) == [
        "transformers Liger float32, bfloat16: not on cpu, only on cuda",
        "transformers compiled float32, bfloat16: RuntimeError: toy",
    ]


def test_contenders():
    assert cells(tables.contenders_table(toys.inference())) == [["fastbert", "fastbert 0.1.0", "fastbert.BertModel"]]
    assert tables.contenders_table(toys.earliest_inference()) is None


def test_ops():
    rows = op_rows_of(toys.ops())
    lines = cells(tables.ops_table(rows))
    assert [line[1:3] for line in lines] == [
        [contender, direction]
        for direction in ("forward", "backward", "both")
        for contender in ("**fastbert native**", "torch eager")
    ]
    # A column of FLOP/s that are all 0 is none.
    case = "add_layer_norm 8 rows, 64, dropout 0.1, bfloat16"
    assert lines[0] == [case, "**fastbert native**", "forward", "0.1 (0.09-0.11)", "2.0", "50%", ""]
    assert lines[1] == [case, "torch eager", "forward", "0.2 (0.18-0.22)", "2.0", "50%", "2.00x (1.80-2.20)"]
    assert tables.ops_without_figures(rows) == [
        "fastbert triton bfloat16: no CUDA device (add_layer_norm)", "torch.compile bfloat16: RuntimeError: toy (add_layer_norm)"
    ]  # fmt: skip


def test_limits():
    assert cells(tables.limits_table(toys.earliest_inference())) == [["float32", "1", "0.1"]]
    assert [line[0] for line in cells(tables.limits_table(toys.inference()))] == ["float32", "bfloat16", "int8"]
    assert cells(tables.limits_table(toys.finetune()))[1] == ["bfloat16", "1", "oneDNN 1", "0.1"]
    assert [line[0] for line in cells(tables.limits_table(toys.ops()))] == ["bfloat16", "int8"]


def test_where_fastbert_is_not_the_fastest():
    """OpenVINO is in int8; against transformers all is well."""
    (loss,) = losses.losses(rows_of(toys.inference()))
    assert (loss.ours.contender, loss.ours.dtype, loss.fastest.contender) == ("fastbert", "int8", "OpenVINO")
    table = losses.table([("abacus", loss)])
    assert cells(table) == [["abacus", "inference", "base", "4 x 8", "fastbert int8", "60.0", "OpenVINO int8", "50.0"]]


def test_where_fastbert_is_hardly_faster_than_transformers():
    seconds = {"transformers": {"float32": 0.119}, "fastbert": {"float32": 0.1}}
    (loss,) = losses.losses(rows_of(toys.inference(seconds=seconds)))
    assert loss.fastest is None and loss.ours.ratio == pytest.approx(1.19)
    assert losses.losses(rows_of(toys.inference(seconds={**seconds, "transformers": {"float32": 0.121}}))) == []


def test_where_fastbert_has_no_result():
    document = toys.inference()
    measured = document["results"]["4 x 8"]
    del measured["contenders"]["fastbert float32"]
    measured["failed"]["fastbert float32"] = "RuntimeError: wrong"
    found = [loss for loss in losses.losses(rows_of(document)) if loss.ours.dtype == "float32"]
    assert "| no result: RuntimeError: wrong | ONNX Runtime float32 | 200 |" in losses.table([("abacus", *found)])


def test_a_packed_fastbert_is_no_other_contender():
    assert losses.losses(rows_of(toys.finetune())) == []


def test_ops_where_another_is_faster():
    (loss,) = losses.op_losses(op_rows_of(toys.ops()))
    assert (loss.direction, loss.contender) == ("backward", "torch eager")
    assert cells(losses.op_table([("abacus", loss)]))[0][2:] == ["backward", "torch eager", "0.3", "0.80x (0.72-0.88)"]


def named(contender: str, **changes) -> list:
    """The rows with another name in place of torch eager's."""
    rows = op_rows_of(toys.ops())
    return [dataclasses.replace(row, contender=contender, **changes) for row in rows if row.contender == "torch eager"]


def test_ops_that_do_other_work_are_no_losses():
    assert losses.op_losses(named("plain linear")) == [] == losses.op_losses(named("Liger cross-entropy", op="mlm_loss"))
    slower = named("Liger cross-entropy", op="mlm_loss", fastbert_ratio=0.9)
    assert [row.direction for row in losses.op_losses(slower)] == ["both"]
    assert [row.direction for row in losses.op_losses(named("Liger LayerNorm"))] == ["backward"]
    # Another backend of fastbert's than its own choice is no other contender.
    assert losses.op_losses([dataclasses.replace(row, ours=True) for row in named("fastbert cuda")]) == []


def test_of_several_faster_ops_the_fastest_is_named():
    rows = [*named("torch eager"), *named("sdpa flash", median_s=1e-5, fastbert_ratio=0.1)]
    assert {row.contender for row in losses.op_losses(rows)} == {"sdpa flash"} and len(losses.op_losses(rows)) == 3
