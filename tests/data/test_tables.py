from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.tables import Table, read_table

COLA_HEADER = ("source", "label", "mark", "sentence")


def write(path: Path, content: str | bytes) -> Source:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return Source(path)


def values(table: Table) -> list[tuple[Any, ...]]:
    return [tuple(row[column] for column in table.columns) for row in table.rows]


# --- what is read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "A.TSV"])
def test_tsv_has_no_quoting(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / name, '\ufefftext\tlabel\n"He said\t1\r\n so "it" is" \t0\n\u2028x\x85y\t1\n\n \n')
    table = read_table(source)
    assert (table.source, table.columns) == (str(tmp_path / name), ("text", "label"))
    assert values(table) == [('"He said', "1"), (' so "it" is" ', "0"), ("\u2028x\x85y", "1")]
    assert table.places == ["line 2", "line 3", "line 4"]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_has_quoting_and_lines_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / name, 'text,label\n"a, ""b""\nsecond\r\nthird",1\nplain,0\n"\n",1\nlast,0\n\n')
    table = read_table(source)
    assert values(table) == [('a, "b"\nsecond\r\nthird', "1"), ("plain", "0"), ("\n", "1"), ("last", "0")]
    assert table.places == ["line 2", "line 5", "line 6", "line 8"]


def test_quoting_can_be_chosen(tmp_path: Path) -> None:
    assert values(read_table(write(tmp_path / "a.tsv", 'a\tb\n"x\ty"\tz\n'), quoted=True)) == [("x\ty", "z")]
    assert values(read_table(write(tmp_path / "a.csv", 'a,b\n"x,y"\n'), quoted=False)) == [('"x', 'y"')]


@pytest.mark.parametrize("quoted", [False, True])
def test_a_file_without_header_line(tmp_path: Path, quoted: bool) -> None:
    source = write(tmp_path / "a.tsv", "\ufeffgj04\t1\t\tThe ship sank.\nbc01\t0\t*\tShip the sank.\n")
    table = read_table(source, header=COLA_HEADER, quoted=quoted)
    assert values(table) == [("gj04", "1", "", "The ship sank."), ("bc01", "0", "*", "Ship the sank.")]
    assert (table.columns, table.places) == (COLA_HEADER, ["line 1", "line 2"])


@pytest.mark.parametrize("quoted", [False, True])
def test_a_cell_may_be_long(tmp_path: Path, quoted: bool) -> None:
    text = "word " * 50_000
    assert values(read_table(write(tmp_path / "a.csv", f"text\n{text}\n"), quoted=quoted)) == [(text,)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_has_a_row_a_line_also_a_blank_one_in_the_middle(tmp_path: Path, name: str) -> None:
    table = read_table(write(tmp_path / name, "\ufeffOne.\tStill.\n\nTwo.\r\n\n\n"))
    assert (table.columns, table.places) == (("text",), ["line 1", "line 2", "line 3"])
    assert values(table) == [("One.\tStill.",), ("",), ("Two.",)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    rows = [{"text": "Caf\u00e9", "label": 1}, {"label": 0.5, "text": None}, {"text": "x", "label": 2}]
    table = read_table(write(tmp_path / name, "\n\n".join(map(json.dumps, rows))))
    assert values(table) == [("Caf\u00e9", 1), (None, 0.5), ("x", 2)]
    assert table.places == ["line 1", "line 3", "line 5"]


@pytest.mark.parametrize("document", [[{"a": "x", "b": [1]}, {"a": "y", "b": []}], {"a": ["x", "y"], "b": [[1], []]}])
def test_json_by_rows_and_by_columns(tmp_path: Path, document: Any) -> None:
    table = read_table(write(tmp_path / "a.json.gz", json.dumps(document, indent=1)))
    assert (table.columns, table.places, values(table)) == (("a", "b"), ["row 1", "row 2"], [("x", [1]), ("y", [])])


def label_set() -> Any:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "tags": datasets.Sequence(names)})
    return datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 1], [], None]}, features=features)


LABEL_SET = [("a", "yes", ["no", "yes"]), ("b", "no", []), ("c", None, None)]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None], "score": [0.5, 2.0]}), tmp_path / "a.parquet")
    table = read_table(Source(tmp_path / "a.parquet"))
    assert (table.columns, table.places, values(table)) == (("text", "score"), ["row 1", "row 2"], [("a", 0.5), (None, 2.0)])
    label_set().to_parquet(tmp_path / "b.parquet")
    assert values(read_table(Source(tmp_path / "b.parquet"))) == LABEL_SET


def test_a_hugging_face_dataset_gives_the_names_of_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, calls = label_set(), []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or dataset.select([2, 0, 1]))
    table = read_table(Source(dataset="glue:sst2", split="validation"))
    assert values(table) == [LABEL_SET[2], *LABEL_SET[:2]]  # select leaves the rows in the file's order and keeps indices
    assert (table.source, table.places[0]) == ("glue:sst2, split validation", "row 1")
    read_table(Source(dataset="someone/set", split="train"))
    assert calls == [(("glue", "sst2"), {"split": "validation"}), (("someone/set", None), {"split": "train"})]


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("glue/CoLA/train.tsv", 8551, 4),
        ("glue/CoLA/dev.tsv", 1043, 4),
        ("glue/CoLA/test.tsv", 1063, 2),
        ("glue/SST-2/train.tsv", 67349, 2),
        ("glue/SST-2/dev.tsv", 872, 2),
        ("glue/SST-2/test.tsv", 1821, 2),
        ("glue/MRPC/train.tsv", 3668, 5),
        ("glue/MRPC/dev.tsv", 408, 5),
        ("glue/MRPC/test.tsv", 1725, 5),
        ("glue/STS-B/train.tsv", 5749, 10),
        ("glue/STS-B/dev.tsv", 1500, 10),
        ("glue/STS-B/test.tsv", 1379, 9),
        ("glue/QNLI/dev.tsv", 5463, 4),
        ("glue/QNLI/train_sample.tsv", 10475, 4),
        ("glue/MNLI/dev_matched.tsv", 9815, 4),
        ("glue/QQP/train_sample.tsv", 23496, 6),
        ("glue/WNLI/train.tsv", 635, 4),
        ("glue/WNLI/dev.tsv", 71, 4),
        ("glue/WNLI/test.tsv", 146, 3),
        ("glue/RTE/format_sample.tsv", 20, 4),
        ("nli/snli/dev.tsv", 9842, 4),
        ("text_classification/trec/train.tsv", 5452, 3),
        ("text_classification/trec/test.tsv", 500, 3),
        ("text_classification/ag_news/test.tsv", 7600, 2),
        ("text_classification/ag_news/train_sample.tsv", 10001, 2),
        ("text_classification/imdb/train_4k.tsv.gz", 4000, 3),
        ("text_classification/imdb/test_4k.tsv.gz", 4000, 3),
    ],
)
def test_published_row_counts(data_folder: Path, name: str, rows: int, columns: int) -> None:
    header = COLA_HEADER if name in ("glue/CoLA/train.tsv", "glue/CoLA/dev.tsv") else None
    table = read_table(Source(data_folder / name), header=header)
    assert (len(table), len(table.columns)) == (rows, columns)
    assert not table.columns[0].startswith("\ufeff")


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "a\tb\nx\ty\nx\ty\tz\n", r"a\.tsv, line 3: has 3 fields, the header names 2 \('a', 'b'\)"),
        ("a.tsv", "a\tb\nx\ty\n\nx\ty\n", r"line 3: has 1 field, the header names 2"),
        ("a.csv", 'a,b\n"x\ny",1\nz\n', r"a\.csv, line 4: has 1 field, the header names 2"),
        ("a.csv", 'a,b\nx,1\n"y,2\nz,3\n', r"line 3: the quotes of a cell are never closed"),
        ("a.csv", 'a,b\n"x"y,1\n', r"line 2: not valid CSV"),
        ("a.tsv", "a\tb\ta\nx\ty\tz\n", r"line 1, column 'a': stands twice in the header \('a', 'b', 'a'\)"),
        ("a.tsv", "a\t\tb\nx\ty\tz\n", r"line 1: column 2 has no name \('a', '', 'b'\)"),
        ("a.tsv", "a\tb\n", r"a\.tsv: there are no rows$"),
        ("a.tsv", "a\tb\r1\t2\r", r"a\.tsv: there are no rows; its lines end in CR alone, expected LF or CRLF"),
        ("a.tsv", "", r"a\.tsv: the file is empty"),
        ("a.txt", "\n \n", r"a\.txt: there are no rows"),
        ("a.tsv", b"a\tb\nx\ty\ncaf\xe9\tz\n", r"line 3: not UTF-8 \(byte 0xe9 at byte 4"),
        ("a.csv", b"a,b\nx,y\ncaf\xe9,z\n", r"line 3: not UTF-8 \(byte 0xe9 at byte 4"),
        ("a.jsonl", '{"a": 1}\n{"a": 2\n', r"line 2: not valid JSON \(.*, column \d+\)"),
        ("a.jsonl", '{"a": 1}\n\n[2]\n', r"line 3: expected a JSON object, found a list"),
        ("a.jsonl", '{"a": 1, "b": 2}\n{"b": 2}\n', r"line 2, column 'a': is not there; the row at line 1 has 'a', 'b'"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2}\n', r"line 2, column 'b': is new; the row at line 1 has 'a'"),
        ("a.jsonl", '{"a": null}\n{"a": "x"}\n{"a": 7}\n{"a": "y"}', r"line 3, column 'a': holds a number, but a string at line 2"),
        ("a.jsonl", '{"a": 1}\n{"a": true}\n', r"line 2, column 'a': holds true or false, but a number at line 1"),
        ("a.jsonl", '{"a": NaN}\n', r"line 1: not valid JSON \(NaN is no JSON number"),
        ("a.jsonl", '{"a": 1, "a": 2}\n', r"line 1: not valid JSON \('a' stands twice"),
        ("a.jsonl", '{"a": ["x"]}\n{"a": ["\\ud83d"]}\n', r"line 2, column 'a': holds a lone surrogate"),
        ("a.jsonl", "", r"a\.jsonl: there are no rows"),
        ("a.json", '[{"a": 1},\n {"a": 2]', r"a\.json: not valid JSON \(.*, line 2, column \d+\)"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', r"a\.json: not valid JSON \(Extra data.*a file of JSON Lines is named \.jsonl"),
        ("a.json", '[{"a": 1}, "x"]', r"row 2: expected a JSON object, found a string"),
        ("a.json", '"x"', r"a\.json: expected a JSON list of objects, found a string"),
        ("a.json", '{"a": [1, 2], "b": [1]}', r"a\.json: the columns must be equally long: 'a' has 2, 'b' has 1 values"),
        ("a.json", '{"a": [1], "b": "x"}', r"column 'b': expected a list, one value per row, found a string"),
        ("a.json", "{}", r"a\.json: there are no rows"),
        ("a.parquet", b"PAR1 not parquet", r"a\.parquet: not a readable Parquet file"),
        ("a.xlsx", b"PK", r"a\.xlsx: unknown file type; a table is one of \.tsv, \.csv, \.txt, \.jsonl, \.json, \.parquet"),
        ("a.parquet.gz", b"PK", r"a\.parquet\.gz: unknown file type"),
    ],
)
def test_a_bad_file_is_named_with_place_and_column(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path / name, content))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.tsv").mkdir()
    with pytest.raises(DataError, match=r"a\.tsv: no such file"):
        read_table(Source(tmp_path / "a.tsv"))
    with pytest.raises(DataError, match=r"b\.tsv: a folder, expected a file"):
        read_table(Source(tmp_path / "b.tsv"))


def test_a_header_is_for_tsv_and_csv_and_must_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: only TSV and CSV files can be without a header line"):
        read_table(write(tmp_path / "a.jsonl", '{"a": 1}\n'), header=["a"])
    with pytest.raises(DataError, match=r"a\.tsv, line 1: has 2 fields, the header names 4"):
        read_table(write(tmp_path / "a.tsv", "index\tsentence\n"), header=COLA_HEADER)


def test_parquet_columns_have_one_name_each(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'a': stands twice"):
        read_table(Source(tmp_path / "a.parquet"))
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xe9")]
    )
    parquet.write_table(pyarrow.table({"a": text}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="column 'a': not UTF-8"):
        read_table(Source(tmp_path / "b.parquet"))


def test_label_numbers_need_names(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    label_set().to_parquet(tmp_path / "a.parquet")
    schema = parquet.read_schema(tmp_path / "a.parquet")
    table = pyarrow.table({"text": ["a"], "label": [2], "tags": [[0]]}, schema=schema)
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet, column 'label': a label number has no name; 2 have one"):
        read_table(Source(tmp_path / "b.parquet"))


def test_a_dataset_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    for failure in (ValueError('Unknown split "dev"'), datasets.exceptions.DatasetGenerationError("a damaged file")):

        def load_dataset(*args: Any, failure: Exception = failure, **kwargs: Any) -> None:
            raise failure

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        with pytest.raises(DataError, match=f"glue:sst2, split dev: loading the Hugging Face dataset failed .*{failure}"):
            read_table(Source(dataset="glue:sst2", split="dev"))
