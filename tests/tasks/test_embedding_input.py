"""The texts of ``fastbert embed``: where they come from, and what is said about those that are none."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.tables import Table
from fastbert.tasks.embedding_input import read_texts


def test_several_inputs_stand_one_behind_the_other(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nTwo.\n", encoding="utf-8")
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"label\ttext\n1\tThree.\n0\tFour.\n"))
    (tmp_path / "c.jsonl").write_text('{"sentence": "Five."}\n', encoding="utf-8")
    texts = read_texts([str(tmp_path / name) for name in ("a.txt", "b.tsv.gz", "c.jsonl")])
    assert texts.texts == ["One.", "Two.", "Three.", "Four.", "Five."] and texts.pairs is None
    assert str(texts.error(1, "is bad")) == f"{tmp_path / 'a.txt'}, line 2: is bad"
    assert str(texts.error(3, "is bad")) == f"{tmp_path / 'b.tsv.gz'}, line 3: is bad"
    assert str(texts.error(4, "is bad")) == f"{tmp_path / 'c.jsonl'}, line 1: is bad"


def test_pairs_and_columns(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('id,first,second\n1,"One, two.",Three.\n2,Four.,Five.\n', encoding="utf-8")
    texts = read_texts([str(path)], text_column="first", text_pair_column="second")
    assert (texts.texts, texts.pairs) == (["One, two.", "Four."], ["Three.", "Five."])
    with pytest.raises(DataError, match=r"no column 'text'; it has 'id', 'first', 'second' \(--text-column names one\)"):
        read_texts([str(path)])
    with pytest.raises(DataError, match="no column 'third'.*--text-pair-column"):
        read_texts([str(path)], text_column="first", text_pair_column="third")


def test_words(tmp_path):
    rows = [{"tokens": ["A", "word"]}, {"tokens": ["Two"]}]
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_texts([str(path)], words_column="tokens").texts == [["A", "word"], ["Two"]]
    (tmp_path / "words.txt").write_text("A  word\nTwo\n", encoding="utf-8")
    assert read_texts([str(tmp_path / "words.txt")], words_column="text").texts == [["A", "word"], ["Two"]]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", "One.\n \nTwo.\n", {}, "a.txt, line 2, column 'text': the text is empty"),
        ("a.jsonl", '{"text": "One."}\n{"text": null}\n', {}, "a.jsonl, line 2, column 'text': the text is empty"),
        ("a.jsonl", '{"text": 1}\n', {}, "a.jsonl, line 1, column 'text': expected a text, found 1"),
        ("a.tsv", "text\tb\nx\t\n", {"text_pair_column": "b"}, "a.tsv, line 2, column 'b': the text is empty"),
        ("a.jsonl", '{"w": ["x", ""]}\n', {"words_column": "w"}, "a.jsonl, line 1, column 'w': expected a list of words"),
        ("a.jsonl", '{"w": []}\n', {"words_column": "w"}, "a.jsonl, line 1, column 'w': there are no words"),
        ("a.jsonl", '{"w": 3}\n', {"words_column": "w"}, "a.jsonl, line 1, column 'w': expected a list of words"),
        ("a.txt", "", {}, "a.txt: there are no rows"),
    ],
)
def test_texts_that_are_none(tmp_path, name, content, options, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_texts([str(tmp_path / name)], **options)
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    for name in ("none.txt", "none/at/all"):
        with pytest.raises(DataError, match="no such file"):
            read_texts([str(tmp_path / name)])


def test_names_of_datasets(monkeypatch, tmp_path):
    asked = []

    def read(source):
        asked.append(source)
        return Table(str(source), ("text",), [{"text": "One."}], ["row 1"])

    monkeypatch.setattr("fastbert.tasks.embedding_input.read_table", read)
    read_texts(["someone/reviews:full", "gone.jsonl", "a/b/c"], split="test")
    assert asked == [
        Source(dataset="someone/reviews:full", split="test"), Source(Path("gone.jsonl")), Source(Path("a/b/c")),
    ]  # fmt: skip


def test_standard_input(monkeypatch):
    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    give("\ufeffOne.\r\nTwo.\n\n".encode())
    texts = read_texts(["-"])
    assert texts.texts == ["One.", "Two."]
    assert str(texts.error(1, "is bad")) == "standard input, line 2: is bad"
    for content, message in ((b"One.\nTw\xff.\n", "standard input, line 2: not UTF-8"), (b"", "no lines"), (b"A\n\nB\n", "line 2")):
        give(content)
        with pytest.raises(DataError, match=message):
            read_texts(["-"])


def test_the_fingerprint_tells_texts_apart(tmp_path):
    prints = set()
    for number, rows in enumerate(
        ([("ab", "c")], [("a", "bc")], [("ab", "c"), ("a", "b")], [("a", "b"), ("ab", "c")], [("ab", "d")])
    ):
        path = tmp_path / f"{number}.tsv"
        path.write_text("text\tpair\n" + "".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8")
        prints.add(read_texts([str(path)], text_pair_column="pair").fingerprint())
    assert len(prints) == 5
    (tmp_path / "copy.tsv").write_bytes((tmp_path / "0.tsv").read_bytes())
    assert read_texts([str(tmp_path / "copy.tsv")], text_pair_column="pair").fingerprint() in prints
