from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbert.data.errors import DataError
from fastbert.data.sources import Source
from fastbert.data.squad import Question, read_squad

CONTEXT = "K\u00f6ln lies on the Rhine. The Rhine is long."
SQUAD: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "K\u00f6ln",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "a1",
                            "question": "What lies there?",
                            "answers": [{"text": "K\u00f6ln", "answer_start": 0}, {"text": "The Rhine", "answer_start": 24}],
                            "is_impossible": False,
                        },
                        {"id": "a2", "question": "Who?", "answers": [], "is_impossible": True, "plausible_answers": [{}]},
                    ],
                }
            ],
        },
        {"paragraphs": [{"context": "Second.", "qas": [{"id": 3, "question": "And?"}]}]},
    ],
}


def write(path: Path, document: Any) -> Source:
    data = json.dumps(document).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return Source(path)


@pytest.mark.parametrize("name", ["dev-v2.0.json", "dev-v2.0.json.gz"])
def test_squad_json(tmp_path: Path, name: str) -> None:
    assert read_squad(write(tmp_path / name, SQUAD)) == [
        Question("question 'a1'", "a1", "What lies there?", CONTEXT, (("K\u00f6ln", 0), ("The Rhine", 24))),
        Question("question 'a2'", "a2", "Who?", CONTEXT, ()),
        Question("question '3'", "3", "And?", "Second.", None),
    ]


def test_answers_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    damaged = json.loads(json.dumps(SQUAD).replace('"answer_start": 24', '"answer_start": "x"'))
    questions = read_squad(write(tmp_path / "test.json", damaged), labelled=False)
    assert [(question.id, question.answers) for question in questions] == [("a1", None), ("a2", None), ("3", None)]


def rows() -> list[dict[str, Any]]:
    return [
        {"id": "a1", "question": "What?", "context": CONTEXT, "answers": {"text": ["K\u00f6ln"], "answer_start": [0]}},
        {"id": "a2", "question": "Who?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
    ]


def test_tables_of_the_form_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    expected = [("a1", "What?", (("K\u00f6ln", 0),)), ("a2", "Who?", ())]
    dataset = datasets.Dataset.from_list(rows())
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: dataset)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows())))
    for source, place in ((Source(dataset="squad_v2", split="train"), "row 2"), (Source(tmp_path / "a.jsonl"), "line 2")):
        questions = read_squad(source)
        assert [(question.id, question.question, question.answers) for question in questions] == expected
        assert questions[1].place == place


def test_a_table_without_ids_and_answers(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("question\tcontext\nWhat?\tThis.\nWho?\tShe.\n")
    assert read_squad(Source(tmp_path / "a.tsv")) == [
        Question("line 2", "1", "What?", "This.", None),
        Question("line 3", "2", "Who?", "She.", None),
    ]


def test_the_real_files(data_folder: Path) -> None:
    dev = read_squad(Source(data_folder / "qa/squad_v1.1/dev-v1.1.json.gz"))
    assert (len(dev), len({question.context for question in dev})) == (10570, 2067)
    assert sum(len(question.answers or ()) for question in dev) == 34726  # 3.3 answers a question
    assert len(read_squad(Source(data_folder / "qa/squad_v1.1/train-sample-v1.1.json.gz"))) == 11877


def changed(change: Callable[[Any], None]) -> Any:
    document = copy.deepcopy(SQUAD)
    change(document)
    return document


def paragraph(document: Any) -> Any:
    return document["data"][0]["paragraphs"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: paragraph(d)["qas"][0]["answers"][1].update(answer_start=23),
            r"dev\.json, question 'a1', column 'answers': answer_start 23: expected 'The Rhine', found ' The Rhin' in the context; "
            "it first stands at 24",
        ),
        (
            lambda d: paragraph(d)["qas"][0]["answers"][0].update(text="Bonn"),
            "found 'K\u00f6ln' in the context; it is nowhere in it",
        ),
        (
            lambda d: paragraph(d)["qas"][0]["answers"][0].update(answer_start=-43),
            "answer_start -43: expected '.*', found ''",
        ),
        (lambda d: paragraph(d)["qas"][0]["answers"][0].update(answer_start="0"), "'answer_start': expected int, found str"),
        (lambda d: paragraph(d)["qas"][0]["answers"][0].pop("text"), "question 'a1', column 'text': is not there"),
        (lambda d: paragraph(d)["qas"][0]["answers"][0].update(text=" "), "question 'a1', column 'answers': an answer is empty"),
        (lambda d: paragraph(d)["qas"][0].update(answers=[]), "question 'a1', column 'answers': an empty list; where there is no"),
        (lambda d: paragraph(d)["qas"][0].update(is_impossible=True), "question 'a1', .*'K\u00f6ln', but is_impossible says"),
        (lambda d: paragraph(d)["qas"][0].update(is_impossible="yes"), "'is_impossible': expected bool, found str"),
        (lambda d: paragraph(d)["qas"][1].update(id="a1"), "question 'a1', column 'id': 'a1' comes twice, first at question 'a1'"),
        (lambda d: paragraph(d)["qas"][1].update(question=" "), "question 'a2', column 'question': is empty"),
        (lambda d: paragraph(d)["qas"][1].pop("id"), "article 1, paragraph 1, question 2, column 'id': is not there"),
        (lambda d: d["data"][1]["paragraphs"][0].update(context=""), "question '3', column 'context': is empty"),
        (lambda d: paragraph(d).pop("context"), "article 1, paragraph 1, column 'context': is not there; there are 'qas'"),
        (lambda d: d["data"][1].update(paragraphs={}), "article 2, column 'paragraphs': expected list, found dict"),
        (lambda d: d["data"].append("x"), "article 3: expected an object with 'paragraphs', found str"),
        (lambda d: d.pop("data"), "column 'data': is not there; there are 'version'"),
        (lambda d: d["data"].clear(), r"dev\.json: there are no questions"),
    ],
)
def test_a_bad_question_is_named(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_squad(write(tmp_path / "dev.json", changed(change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "line 2, column 'question': expected str, found NoneType"),
        ({"answers": {"text": ["K\u00f6ln"], "answer_start": []}}, "line 2, column 'answers': 1 texts and 0 answer_start"),
        ({"answers": {"text": ["Rhine"], "answer_start": [0]}}, "line 2, column 'answers': answer_start 0: expected 'Rhine'"),
        ({"answers": ["K\u00f6ln"]}, "line 2, column 'answers': holds a list, but an object at line 1"),
        ({"id": "a1"}, "line 2, column 'id': 'a1' comes twice, first at line 1"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    first, second = rows()
    (tmp_path / "a.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(second | change))
    with pytest.raises(DataError, match=message):
        read_squad(Source(tmp_path / "a.jsonl"))


def test_what_is_no_squad_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("question\tpassage\nWhat?\tThis.\n")
    with pytest.raises(DataError, match=r"a\.tsv, column 'context': is not there; there are 'question', 'passage'"):
        read_squad(Source(tmp_path / "a.tsv"))
    (tmp_path / "b.json").write_text("{\n")
    with pytest.raises(DataError, match=r"b\.json: not valid JSON \(.*, line 2, column 1\)"):
        read_squad(Source(tmp_path / "b.json"))
    with pytest.raises(DataError, match=r"c\.json: no such file"):
        read_squad(Source(tmp_path / "c.json"))
    with pytest.raises(DataError, match="expected an object with 'data', found list"):
        read_squad(write(tmp_path / "d.json", []))


@pytest.mark.parametrize("column", ["context", "question"])
def test_half_of_a_surrogate_pair_is_named(tmp_path: Path, column: str) -> None:
    document = copy.deepcopy(SQUAD)
    paragraph = document["data"][0]["paragraphs"][0]
    (paragraph if column == "context" else paragraph["qas"][0])[column] += "\ud800"
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataError, match=f"question 'a1', column '{column}': holds a lone surrogate"):
        read_squad(Source(path))
