from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastbert.data.conll import Sentence, read_conll, read_sentences, to_bio
from fastbert.data.errors import DataError
from fastbert.data.sources import Source

CONLLU = """# sent_id = 1
# text = Don't stop\t#here
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\tVB\t_\t3\taux\t3:aux\t_
2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_
2.1\tever\tever\tADV\t_\t_\t_\t_\t_\t_
3\tstop\tstop\tVERB\tVB\t_\t0\troot\t0:root\t_

1\t#\t#\tSYM\tNN\t_\t0\troot\t0:root\t_
2\tNew York\tNew York\tPROPN\tNNP\t_\t1\tdep\t1:dep\t_
"""
NUMBERED = "# text = in Tampa\n1\tin\tO\t-\t-\n2\tTampa\tB-LOC\t-\tann\n\n# text = # 7\n1\t#\tO\t-\t-\n2\t7\tO\t-\t-\n"


def write(path: Path, content: str | bytes) -> Source:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return Source(path)


def pairs(sentences: list[Sentence]) -> list[list[tuple[str, str]]]:
    return [list(zip(sentence.words, sentence.tags or (), strict=True)) for sentence in sentences]


# --- what is read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\t", " ", "  "])
@pytest.mark.parametrize("name", ["a.conll", "a.txt.gz", "a.iob2"])
def test_a_word_a_line_and_a_blank_line_between_sentences(tmp_path: Path, name: str, separator: str) -> None:
    text = "\ufeff\nEU_B-ORG\n\u00a0_O\r\n \n\n#_O\n1_O\n\t\n"
    sentences = read_conll(write(tmp_path / name, text.replace("_", separator)))
    assert pairs(sentences) == [[("EU", "B-ORG"), ("\u00a0", "O")], [("#", "O"), ("1", "O")]]
    assert [(sentence.place, sentence.lines) for sentence in sentences] == [("line 2", (2, 3)), ("line 6", (6, 7))]


def test_conll_2003(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\n-DOCSTART- -X- -X- O\n\nPeter NNP I-NP I-PER \n"
    source = write(tmp_path / "train.txt", text)
    assert pairs(read_conll(source)) == [[("EU", "I-ORG"), ("rejects", "O")], [("Peter", "I-PER")]]
    assert [sentence.place for sentence in read_conll(source)] == ["line 3", "line 8"]
    assert pairs(read_conll(source, tag_column=1)) == [[("EU", "NNP"), ("rejects", "VBZ")], [("Peter", "NNP")]]
    assert pairs(read_conll(source, word_column=-4, tag_column=-2))[1] == [("Peter", "I-NP")]


def test_numbered_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "dev.iob2", NUMBERED)
    assert pairs(read_conll(source)) == [[("in", "O"), ("Tampa", "B-LOC")], [("#", "O"), ("7", "O")]]
    assert [sentence.lines for sentence in read_conll(source)] == [(2, 3), (6, 7)]
    assert pairs(read_conll(source, tag_column=4))[0] == [("in", "-"), ("Tampa", "ann")]


def test_numbers_may_be_words(tmp_path: Path) -> None:
    source = write(tmp_path / "a.conll", "1\tCD\tO\n2\tCD\tO\nmen\tNNS\tO\n\n2\tCD\tO\n")
    assert pairs(read_conll(source)) == [[("1", "O"), ("2", "O"), ("men", "O")], [("2", "O")]]


@pytest.mark.parametrize("name", ["a.conllu", "a.conllu.gz"])
def test_conllu(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / name, CONLLU)
    tagged = [[("Do", "AUX"), ("n't", "PART"), ("stop", "VERB")], [("#", "SYM"), ("New York", "PROPN")]]
    assert pairs(read_conll(source)) == tagged
    assert [sentence.lines for sentence in read_conll(source)] == [(4, 5, 7), (9, 10)]
    assert pairs(read_conll(source, word_column="lemma", tag_column="XPOS"))[0] == [("do", "VB"), ("not", "RB"), ("stop", "VB")]


def test_comments_ahead_of_sentences_of_columns(tmp_path: Path) -> None:
    tabs = read_conll(write(tmp_path / "a.conll", "# id 1\tdomain=en\tx\na\tO\n# O\tO\n\n# id 2\nb\tO\n"))
    assert pairs(tabs) == [[("a", "O"), ("# O", "O")], [("b", "O")]]
    blanks = read_conll(write(tmp_path / "b.conll", "# sent = 1\n# O\na O\n\n# sent = 2\nb O\n"))
    assert pairs(blanks) == [[("#", "O"), ("a", "O")], [("b", "O")]]


def test_tags_are_not_read_where_nobody_asks(tmp_path: Path) -> None:
    for content in ("One\ntwo\n\n#\n", "One\tO\ntwo\t\n\n#\tO\n"):
        sentences = read_conll(write(tmp_path / "a.conll", content), labelled=False)
        assert [(sentence.words, sentence.tags) for sentence in sentences] == [(("One", "two"), None), (("#",), None)]
    untagged = read_conll(write(tmp_path / "a.conllu", CONLLU.replace("AUX", "_")), labelled=False)
    assert untagged[0].words == ("Do", "n't", "stop")


@pytest.mark.parametrize(
    ("name", "sentences", "words", "tags"),
    [
        ("ner/wnut17/train.conll", 3394, 62730, 13),
        ("ner/wnut17/dev.conll", 1009, 15733, 13),
        ("ner/wnut17/test.conll", 1287, 23394, 13),
        ("ner/uner_english_ewt/en_ewt-ud-dev.iob2", 2001, 25149, 7),
        ("ner/uner_english_ewt/en_ewt-ud-test.iob2", 2077, 25097, 7),
        ("pos/ud_english_ewt/en_ewt-ud-train.conllu.gz", 12544, 204577, 17),
        ("pos/ud_english_ewt/en_ewt-ud-dev.conllu.gz", 2001, 25147, 17),
        ("pos/ud_english_ewt/en_ewt-ud-test.conllu.gz", 2077, 25094, 17),
    ],
)
def test_published_counts(data_folder: Path, name: str, sentences: int, words: int, tags: int) -> None:
    read = read_conll(Source(data_folder / name))
    assert (len(read), sum(len(sentence.words) for sentence in read)) == (sentences, words)
    assert len({tag for sentence in read for tag in sentence.tags or ()}) == tags
    if name.startswith("ner"):
        assert to_bio(read, name) == read


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conll", "a\tO\nb\tO\n\nc\tX\tO\n", r"a\.conll, line 4: has 3 columns \(split by TAB\), expected 2"),
        ("a.conll", "a\tO\nb\tO\nc O\n", r"line 3: has 1 column \(split by TAB\), expected 2"),
        ("a.conll", "a X O\nb O\nc X O\n", r"line 2: has 2 columns \(split by blanks\), expected 3"),
        ("a.conll", "a\tO\n# more\nb\tO\n", r"line 2: has 1 column"),
        ("a.conll", "a\tO\nb\t\n", r"line 2: the tag of 'b' is missing"),
        ("a.conll", "a\tO\n\tO\n", r"line 2: the word is empty"),
        ("a.conll", "a\nb\n", r"a\.conll: there is one column, expected a word and its tag"),
        ("a.conll", "\n \n", r"a\.conll: there are no sentences"),
        ("a.conll", "", r"a\.conll: there are no sentences"),
        ("a.conll", "-DOCSTART- O\n\n", r"a\.conll: there are no sentences"),
        ("a.conll", b"a\tO\ncaf\xe9\tO\n", r"line 2: not UTF-8 \(byte 0xe9"),
        ("a.iob2", NUMBERED.replace("2\tTampa", "3\tTampa"), r"line 3: the word has the number 3, expected 2"),
        ("a.iob2", NUMBERED.replace("B-LOC", " "), r"line 3: the tag of 'Tampa' is missing"),
        ("a.conllu", CONLLU.replace("AUX", "_"), r"a\.conllu, line 4: the tag of 'Do' is missing"),
        ("a.conllu", CONLLU.replace("3\tstop", "4\tstop"), r"line 7: the word has the number 4, expected 3"),
        ("a.conllu", CONLLU.replace("3\tstop", "x\tstop"), r"line 7: expected the number of a word, found 'x'"),
        ("a.conllu", CONLLU.replace("\troot\t0:root", "\troot"), r"line 7: has 9 columns \(split by TAB\), expected 10"),
        ("a.jsonl", "{}", r"a\.jsonl: a table, expected CoNLL columns"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_conll(write(tmp_path / name, content))


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    source = write(tmp_path / "a.conll", "a\tO\n")
    for options, message in (
        ({"tag_column": 2}, r"a\.conll: no column 2; there are 2, counted from 0"),
        ({"word_column": -3}, r"no column -3"),
        ({"tag_column": "UPOS"}, r"no column 'UPOS'; its 2 columns have numbers, from 0"),
    ):
        with pytest.raises(DataError, match=message):
            read_conll(source, **options)
    with pytest.raises(DataError, match=r"a\.conllu: no column 'POS'; it has ID, FORM, LEMMA, UPOS"):
        read_conll(write(tmp_path / "a.conllu", CONLLU), tag_column="POS")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.conll: no such file"):
        read_conll(Source(tmp_path / "a.conll"))
    with pytest.raises(DataError, match="a folder, expected a file"):
        read_conll(Source(tmp_path))
    with pytest.raises(DataError, match="read from files, not from a dataset"):
        read_conll(Source(dataset="conll2003", split="train"))


# --- schemes of entity tags ------------------------------------------------------------------------------------------------


def tagged(*sentences: str) -> list[Sentence]:
    split = [tuple(tags.split()) for tags in sentences]
    return [Sentence(tags, tags, "line 1", tuple(range(10 * i + 1, 10 * i + 1 + len(tags)))) for i, tags in enumerate(split)]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-LOC I-LOC O B-LOC B-LOC I-LOC B-PER", "O B-LOC I-LOC O B-LOC B-LOC I-LOC B-PER"),  # BIO stays
        ("I-LOC I-LOC B-LOC I-LOC I-PER O I-creative-work", "B-LOC I-LOC B-LOC I-LOC B-PER O B-creative-work"),  # IOB1
        ("S-LOC B-LOC E-LOC B-PER I-PER E-PER S-PER O", "B-LOC B-LOC I-LOC B-PER I-PER I-PER B-PER O"),  # BIOES
        ("U-LOC B-LOC L-LOC B-PER I-PER L-PER U-PER O", "B-LOC B-LOC I-LOC B-PER I-PER I-PER B-PER O"),  # BILOU
        ("B-LOC E-LOC I-LOC E-LOC S-LOC I-LOC", "B-LOC I-LOC B-LOC I-LOC B-LOC B-LOC"),  # nothing goes on after E and S
        ("O O", "O O"),
    ],
)
def test_tags_as_bio(tags: str, expected: str) -> None:
    first, second = to_bio(tagged(tags, "I-LOC"), "dev.conll")
    assert first.tags == tuple(expected.split())
    assert second.tags == ("B-LOC",)  # no entity goes on in the next sentence
    assert first.words == tuple(tags.split())


def test_tags_of_no_scheme_are_refused() -> None:
    for tag in ("LOC", "B-", "X-LOC", "b-LOC", "B_LOC", "o"):
        with pytest.raises(DataError, match=f"dev.conll, line 12: the tag '{tag}' fits no scheme"):
            to_bio(tagged("O B-LOC", f"O {tag}"), "dev.conll")
    with pytest.raises(DataError, match=r"dev.conll, line 11: a tag with U- \(BILOU\), but one with S- \(BIOES\) at line 2"):
        to_bio(tagged("O S-LOC", "U-LOC"), "dev.conll")
    untagged = [Sentence(("a",), None, "line 1", (1,))]
    assert to_bio(untagged, "dev.conll") == untagged


# --- files and tables ------------------------------------------------------------------------------------------------------


def test_sentences_of_files_have_the_tags_that_are_there(tmp_path: Path) -> None:
    columns = write(tmp_path / "a.conll", "EU NNP I-ORG\nso RB O\n")
    assert pairs(read_sentences(columns)) == [[("EU", "B-ORG"), ("so", "O")]]
    assert pairs(read_sentences(columns, entities=False)) == [[("EU", "I-ORG"), ("so", "O")]]
    assert pairs(read_sentences(columns, tag_column="1")) == [[("EU", "NNP"), ("so", "RB")]]
    assert read_sentences(write(tmp_path / "b.conll", "EU\nso\n")) == [Sentence(("EU", "so"), None, "line 1", (1, 2))]
    with pytest.raises(DataError, match=r"a\.conll, line 1: the tag 'NNP' fits no scheme"):
        read_sentences(columns, tag_column="-2", entities=True)
    conllu = write(tmp_path / "a.conllu", CONLLU)
    assert pairs(read_sentences(conllu, tag_column="XPOS"))[1] == [("#", "NN"), ("New York", "NNP")]
    untagged = CONLLU
    for tag in ("AUX", "PART", "ADV", "VERB", "SYM", "PROPN"):
        untagged = untagged.replace(f"\t{tag}\t", "\t_\t")
    assert [sentence.tags for sentence in read_sentences(write(tmp_path / "b.conllu", untagged))] == [None, None]
    with pytest.raises(DataError, match="line 4: the tag of 'Do' is missing"):
        read_sentences(write(tmp_path / "c.conllu", CONLLU.replace("AUX", "_")))


ROWS = [
    {"id": 1, "tokens": ["EU", "so"], "ner_tags": ["I-ORG", "O"], "pos_tags": ["NNP", "RB"]},
    {"id": 2, "tokens": ["#"], "ner_tags": ["O"], "pos_tags": ["SYM"]},
]


def table(path: Path, rows: list[dict[str, Any]]) -> Source:
    return write(path, "\n".join(map(json.dumps, rows)))


def test_sentences_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = table(tmp_path / "a.jsonl", ROWS)
    entities = [Sentence(("EU", "so"), ("B-ORG", "O"), "line 1"), Sentence(("#",), ("O",), "line 2")]
    assert read_sentences(source, entities=True) == entities
    assert read_sentences(source, tag_column="ner_tags") == entities
    assert pairs(read_sentences(source, entities=False)) == [[("EU", "NNP"), ("so", "RB")], [("#", "SYM")]]
    numbers = [{"words": ["a", "b"], "tags": [3, 0]}]
    assert read_sentences(table(tmp_path / "b.jsonl", numbers)) == [Sentence(("a", "b"), ("3", "0"), "line 1")]
    assert [sentence.tags for sentence in read_sentences(source, labelled=False)] == [None, None]
    assert read_sentences(table(tmp_path / "c.jsonl", [{"words": ["a"]}])) == [Sentence(("a",), None, "line 1")]

    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-ORG"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    dataset = datasets.Dataset.from_dict({"tokens": [["EU", "so"]], "ner_tags": [[1, 0]]}, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: dataset)
    named = read_sentences(Source(dataset="conll2003", split="train"))
    assert named == [Sentence(("EU", "so"), ("B-ORG", "O"), "row 1")]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {}, r"a\.jsonl: ner_tags and pos_tags could both be meant; name the column"),
        (ROWS, {"tag_column": "chunks"}, r"no column 'chunks'; it has id, tokens, ner_tags, pos_tags"),
        (ROWS, {"word_column": "id", "entities": True}, "line 1, column 'id': holds 1, expected a list of words"),
        (ROWS, {"tag_column": "pos_tags", "entities": True}, "line 1, word 1: the tag 'NNP' fits no scheme"),
        ([{"tokens": ["a"]}], {"labelled": True}, r"no column of tags \(ner_tags, pos_tags, upos, tags, labels\); it has tokens"),
        ([{"text": "a b"}], {}, r"no column of words \(tokens, words\); it has text"),
        ([{"tokens": ["a", None]}], {}, r"line 1, column 'tokens': holds \['a', None\], expected a list of words"),
        ([{"tokens": ["a", "b"], "tags": ["O"]}], {}, "line 1, column 'tags': has 1 tags for the 2 words of column 'tokens'"),
        ([{"tokens": ["a"], "tags": "O"}], {}, "line 1, column 'tags': holds 'O', expected a list of tags"),
    ],
)
def test_a_bad_table_of_sentences_is_named(tmp_path: Path, rows: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_sentences(table(tmp_path / "a.jsonl", rows), **options)
