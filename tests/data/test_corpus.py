from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import pytest

from fastbert.data.corpus import (
    BadTextError,
    CorpusError,
    CorpusReport,
    Document,
    Reading,
    corpus_parts,
    read_documents,
    read_part,
)

TWO_DOCUMENTS = "First line.\nSecond line.\n\nAnother document.\n"


def paragraphs(*sources: str | Path, **options: str) -> list[list[str]]:
    return [document.paragraphs for document in read_documents(sources, **options)]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def write_parquet(path: Path, **columns: list) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


# --- what is read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_text_has_a_paragraph_a_line_and_blank_lines_close_documents(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\ufeff\n One. \r\nTwo.\r\n\r\n \t \nThree.\n\n\nFour.")
    assert paragraphs(path) == [["One.", "Two."], ["Three."], ["Four."]]
    assert {document.source for document in read_documents([path])} == {str(path)}


def test_the_end_of_a_file_closes_a_document(tmp_path: Path) -> None:
    assert paragraphs(write(tmp_path / "a.txt", "One.\n"), write(tmp_path / "b.txt", "Two.")) == [["One."], ["Two."]]


def test_a_folder_is_read_recursively_in_order_and_other_files_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "b" / "deep" / "x.txt", "Third.")
    write(tmp_path / "b" / "a.jsonl", '{"text": "Second."}\n')
    write(tmp_path / "a.txt.gz", "First.")
    for name in ("index.tsv", "notes.md", ".hidden.txt", ".cache/y.txt"):
        write(tmp_path / name, b"\xff never read")
    assert paragraphs(tmp_path) == [["First."], ["Second."], ["Third."]]


def test_links_in_a_folder_are_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "deep" / "b.txt", "Second.")
    write(tmp_path / "corpus" / "a.txt", "First.")
    (tmp_path / "corpus" / "more").symlink_to(elsewhere)
    (elsewhere / "deep" / "round").symlink_to(tmp_path / "corpus")
    assert paragraphs(tmp_path / "corpus") == [["First."], ["Second."]]
    (elsewhere / "gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(CorpusError, match=r"more.gone\.txt: a symbolic link to a file that is not there"):
        paragraphs(tmp_path / "corpus")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_row_of_json_lines_is_a_document(tmp_path: Path, name: str) -> None:
    rows = [{"body": "One.\nTwo.\n", "id": 1}, {"body": " \n", "id": 2}, {"body": "Thr\u00e9e.", "id": 3}]
    path = write(tmp_path / name, "\n\n".join(map(json.dumps, rows)))
    assert paragraphs(path, text_column="body") == [["One.", "Two."], ["Thr\u00e9e."]]


def test_a_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    texts = [f"Text {number}.\n\nMore of {number}." for number in range(2500)]
    path = write_parquet(tmp_path / "rows.parquet", id=list(range(2500)), text=texts)
    assert paragraphs(path) == [[f"Text {number}.", f"More of {number}."] for number in range(2500)]


def test_a_name_that_is_no_path_is_a_hugging_face_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["One.\nTwo.", "", "Three."]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert paragraphs("someone/wiki:20231101.en") == [["One.", "Two."], ["Three."]]
    assert paragraphs("wikitext") == [["One.", "Two."], ["Three."]]
    streamed = {"split": "train", "streaming": True}
    assert calls == [(("someone/wiki", "20231101.en"), streamed), (("wikitext", None), streamed)]


def test_report_counts(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", TWO_DOCUMENTS)
    write(tmp_path / "b.txt", "Last one.")
    report = CorpusReport.from_documents(read_documents([tmp_path]))
    assert report.sources == {str(tmp_path / "a.txt"): 2, str(tmp_path / "b.txt"): 1}
    assert (report.documents, report.paragraphs, report.words, report.characters) == (3, 4, 8, 49)
    assert "3 documents, 4 paragraphs, 8 words" in str(report)
    many = CorpusReport.from_documents(Document(f"file {number}", ["text"]) for number in range(20))
    assert "and 14 more sources" in str(many)


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\nfine\ncaf\xe9 au lait\n", r"a\.txt, line 4: not UTF-8 \(byte 0xe9 at byte 4 of the line"),
        ("a.txt.gz", b"fine\n\nfine\n\xff\n", r"a\.txt\.gz, line 4: not UTF-8 \(byte 0xff"),
        ("a.txt", "text".encode("utf-16"), r"line 1: not UTF-8 \(byte 0xff"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y"\n', r"a\.jsonl, line 2: not valid JSON \(.*, column \d+\)"),
        ("a.jsonl", '{"text": "x"}\n\n["y"]\n', r"line 3: expected a JSON object with 'text', found list"),
        ("a.jsonl", '{"text": "x"}\n{"body": "y", "id": 1}\n', r"line 2: no column 'text'; it has 'body', 'id'"),
        ("a.jsonl", '{"text": "x"}\n{"text": 7}\n', r"line 2: column 'text' must hold a string, found int"),
        ("a.jsonl.gz", '{"text": "x"}\n{"text": null}\n', r"line 2: column 'text' must hold a string, found NoneType"),
        ("a.jsonl", '{"text": "x"}\n{"text": "\\ud83d"}\n', r"line 2: column 'text' holds a lone surrogate"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y", "id": ' + "1" * 5000 + "}\n", r"line 2: JSON that Python cannot read \(.*digits"),
        ("a.jsonl", '{"text": "x"}\n' + "[" * 200_000, r"line 2: JSON that Python cannot read \(.*recursion"),
        ("a.parquet", b"PAR1 not parquet", r"a\.parquet, row 1: not a readable Parquet file"),
        ("a.parquet", b"", r"a\.parquet, row 1: not a readable Parquet file"),
        ("a.csv", "text\nx\n", r"a\.csv: unknown file type; a corpus is made of \.txt, \.txt\.gz, \.jsonl"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    with pytest.raises(CorpusError, match=message):
        paragraphs(write(tmp_path / name, content))


def test_documents_before_the_bad_line_are_read(tmp_path: Path) -> None:
    documents = read_documents([write(tmp_path / "a.txt", b"One.\n\nTwo.\n\n\xff\n")])
    assert [next(documents).paragraphs, next(documents).paragraphs] == [["One."], ["Two."]]
    with pytest.raises(CorpusError, match="line 5"):
        next(documents)


def test_a_truncated_gzip_file_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    random.seed(0)
    text = "\n\n".join(" ".join(random.choices(TWO_DOCUMENTS.split(), k=30)) for _ in range(2000))
    whole = gzip.compress(text.encode())
    path = tmp_path / "cut.txt.gz"
    for kept in (0, 5, 12, len(whole) // 3, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(CorpusError, match=r"cut\.txt\.gz, line \d+: the gzip data end too early"):
            paragraphs(path)
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(CorpusError) as error:
        paragraphs(path)
    line = int(str(error.value).split("line ")[1].split(":")[0])
    assert 0.2 < line / (2 * 2000) < 0.45


def test_damaged_gzip_data_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(TWO_DOCUMENTS.encode() * 50)
    flipped = bytearray(whole)
    flipped[-6] ^= 0xFF  # in the CRC
    for data in (b"plain text\n\nnot gzip\n", whole + b"garbage", bytes(flipped), whole[:12] + b"\xff\xff" + whole[14:]):
        path = tmp_path / "bad.txt.gz"
        path.write_bytes(data)
        with pytest.raises(CorpusError, match=r"bad\.txt\.gz, line \d+: damaged gzip data"):
            paragraphs(path)


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", title=["x", "y"], n=[1, 2])
    with pytest.raises(CorpusError, match=r"a\.parquet: no column 'text'; it has 'title', 'n'"):
        paragraphs(path)
    with pytest.raises(CorpusError, match=r"row 1: column 'n' must hold a string, found int"):
        paragraphs(path, text_column="n")
    with pytest.raises(CorpusError, match=r"row 3: column 'text' must hold a string, found NoneType"):
        paragraphs(write_parquet(tmp_path / "b.parquet", text=["x", "y", None]))


def test_parquet_columns_that_cannot_be_text(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    twice = pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(CorpusError, match=r"twice\.parquet: 2 columns are called 'text', expected one"):
        paragraphs(tmp_path / "twice.parquet")
    for value, problem in ((0, "must hold a string, found datetime"), (10**15, r"holds no text \(timestamp")):
        parquet.write_table(pyarrow.table({"text": pyarrow.array([value], pyarrow.timestamp("s"))}), tmp_path / "days.parquet")
        with pytest.raises(CorpusError, match=rf"days\.parquet, row 1: column 'text' {problem}"):
            paragraphs(tmp_path / "days.parquet")


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["x", "y"] * 500)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"a\.parquet, row 1: not a readable Parquet file"):
        paragraphs(path)


@pytest.mark.parametrize("source", ["/no/such/folder", "missing.txt", "data/missing.jsonl.gz", Path("wikitext"), "a b"])
def test_a_missing_file_is_named(source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=f"{source}: no such file or folder"):
        paragraphs(source)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "index.tsv", "a\tb\n")
    with pytest.raises(CorpusError, match=r"the folder holds no file of a known type \(\.txt, "):
        paragraphs(tmp_path)


def test_one_document_is_enough_where_nobody_asks_for_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "book.txt", "One.\nTwo.")
    assert [document.paragraphs for document in read_documents([path], least_documents=1)] == [["One.", "Two."]]
    with pytest.raises(CorpusError, match="has no text .*: there is nothing to train on"):
        list(read_documents([write(tmp_path / "empty.txt", "\n")], least_documents=1))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([], "the corpus has no text .no source was given.: next sentence prediction needs at least two documents"),
        (["", " \n\n"], r"the corpus has no text \(.*0\.txt, .*1\.txt\)"),
        (["Just one.\nDocument.\n", ""], "the corpus has only one document .*a blank line or the file's end closes a document"),
    ],
)
def test_fewer_than_two_documents_are_refused(tmp_path: Path, contents: list[str], message: str) -> None:
    files = [write(tmp_path / f"{number}.txt", content) for number, content in enumerate(contents)]
    with pytest.raises(CorpusError, match=message):
        paragraphs(*files)


def test_a_single_path_in_place_of_a_sequence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a sequence of paths"):
        list(read_documents(str(tmp_path)))


@pytest.mark.parametrize(
    "error", [ConnectionError("no network"), ValueError("Unknown split"), RuntimeError("scripts are not supported")]
)
def test_a_dataset_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CorpusError, match=f"nobody/nothing: no such file or folder, and loading .* failed .*{error}"):
        paragraphs("nobody/nothing")


def test_a_dataset_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def rows(*args, **kwargs):
        yield {"text": "One."}
        raise ConnectionError("connection lost")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(CorpusError, match="name, row 2: reading the Hugging Face dataset failed .*connection lost"):
        paragraphs("name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [{"text": "One."}, {"text": ["Two."]}])
    with pytest.raises(CorpusError, match="name, row 2: column 'text' must hold a string, found list"):
        paragraphs("name")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CorpusError, match=r"wikitext: no such file or folder; .* pip install 'fastbert\[train\]'"):
        paragraphs("wikitext")
    with pytest.raises(CorpusError, match=r"a\.parquet: reading Parquet needs pyarrow: pip install 'fastbert\[train\]'"):
        paragraphs(write(tmp_path / "a.parquet", b""))


# --- by rules: bad text, long lines, long documents -------------------------------------------------------------------------


def read_by(path: Path | str, **rules: int | bool) -> tuple[list[list[str]], dict[str, int]]:
    """Documents, and what was left out or cut."""
    reading = Reading(**rules)
    found = [document.paragraphs for part in corpus_parts([path]) for document in read_part(part, reading)]
    return found, {name: count for name, count in reading.left_out.items() if count}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_documents_of_bad_utf8_may_be_left_out(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"One.\nbad \xff here\nmore of it\n\nTwo.\n\n\xfe\n\xfe\n\nThree.\nlast \xe2\x82")
    assert read_by(path, skip_bad_text=True) == ([["Two."]], {"bad_text": 3})
    with pytest.raises(BadTextError, match="line 2: not UTF-8"):
        read_by(path)


def test_rows_that_are_no_text_may_be_left_out(tmp_path: Path) -> None:
    rows = [b'{"text": "One."}', b'{"text": "\\ud800"}', b'{"text": 3}', b"{", b'"text"', b'{"other": ""}', b'{"text": "\xff"}']
    path = write(tmp_path / "rows.jsonl", b"\n".join([*rows, b'{"text": ""}', b'{"text": "Two."}']))
    assert read_by(path, skip_bad_text=True) == ([["One."], ["Two."]], {"bad_text": 6, "empty": 1})


def test_rows_of_parquet_that_are_no_text_may_be_left_out(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array([b"One.", b"\xff", None, b"Two."]).cast(pyarrow.binary())
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 4, column.buffers())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "rows.parquet")
    assert read_by(tmp_path / "rows.parquet", skip_bad_text=True) == ([["One."], ["Two."]], {"bad_text": 2})
    with pytest.raises(BadTextError, match="row 2: column 'text' is not UTF-8"):
        read_by(tmp_path / "rows.parquet")


def test_damage_that_is_no_bad_text_is_never_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", "One.\n\nTwo.\n" * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match="truncated") as caught:
        read_by(path, skip_bad_text=True)
    assert not isinstance(caught.value, BadTextError)


@pytest.mark.parametrize("longest", [4, 7, 10, 64])
def test_long_lines_come_in_pieces_that_hold_all_of_them(tmp_path: Path, longest: int) -> None:
    words = ["sea", "\u00fcber", "\u6d77" * 9, "\U0001f6a2" * 3, "x" * 30, "a", "ships"] * 5
    lines = [" ".join(words), "short", "\t".join(words), "", "".join(words)]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    found, counts = read_by(path, longest_line=longest)
    pieces = [paragraph for paragraphs in found for paragraph in paragraphs]
    assert "".join("".join(pieces).split()) == "".join("".join(lines).split())
    assert counts == {"cut_lines": 4 if longest == 4 else 3}  # of four bytes "short" is a long one
    assert max(len(piece.encode()) for piece in pieces) <= 2 * longest
    assert len(found) == 2
    if longest == 64:  # every word fits
        assert all(piece.split() == [word for word in piece.split() if word in words or word == "short"] for piece in found[0])


def test_white_space_within_a_long_line_closes_no_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "One" + " " * 50 + "two." + " " * 30 + "\nThree.\n \nFour.")
    assert read_by(path, longest_line=8) == ([["One", "two.", "Three."], ["Four."]], {"cut_lines": 1})


def test_long_paragraphs_of_rows_are_divided_at_white_space(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "aa bb cc dd\nee " + "f" * 9}))
    assert read_by(path, longest_line=6) == ([["aa bb", "cc dd", "ee", "ffffff", "fff"]], {"cut_lines": 2})


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_long_documents_are_divided_between_paragraphs(tmp_path: Path, name: str) -> None:
    texts = ["\n".join("abcdefgh"), "x", "y" * 9 + "\nz"]
    content = "\n\n".join(texts) if name == "a.txt" else "\n".join(json.dumps({"text": text}) for text in texts)
    found = read_by(write(tmp_path / name, content), longest_document=3)
    assert found == ([["a", "b", "c"], ["d", "e", "f"], ["g", "h"], ["x"], ["y" * 9], ["z"]], {"cut_documents": 2})


def test_consecutive_rows_make_a_document(tmp_path: Path) -> None:
    rows = ["One.", "Two.\nThree.", "", "Four.", "Five."]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in rows))
    assert read_by(path, rows_per_document=2) == ([["One.", "Two.", "Three."], ["Four."], ["Five."]], {})
    path = write(tmp_path / "b.jsonl", '{"text": "One."}\n{\n{"text": "Two."}\n{"text": "Three."}')
    assert read_by(path, rows_per_document=2, skip_bad_text=True) == ([["Two.", "Three."]], {"bad_text": 1})


@pytest.mark.parametrize(
    ("name", "loaded", "documents"),
    [
        ("wikipedia", ("wikimedia/wikipedia", "20231101.en"), 2500),
        ("wikipedia:20231101.de", ("wikimedia/wikipedia", "20231101.de"), 2500),
        ("bookcorpus", ("SamuelYang/bookcorpus", None), 3),
        ("someone/bookcorpus", ("someone/bookcorpus", None), 2500),
    ],
)
def test_the_datasets_of_berts_paper_are_known_by_their_names(
    monkeypatch: pytest.MonkeyPatch, name: str, loaded: tuple, documents: int
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": [f"Sentence {row}." for row in range(2500)]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = list(read_documents([name]))
    assert calls == [(loaded, {"split": "train", "streaming": True})]
    assert len(found) == documents and sum(len(document.paragraphs) for document in found) == 2500
