from __future__ import annotations

from pathlib import Path

import pytest

from fastbert.data.sources import Source
from fastbert.data.squad import read_squad
from fastbert.tasks.squad_metric import normalize_answer, squad_scores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Rhine,\n a river!", "rhine river"),
        ("an Anthem; a-z the", "anthem az"),
        ("(The) U.S.", "us"),
        ("$12 \u201cnearly\u201d", "12 \u201cnearly\u201d"),
        (" A. ", ""),
    ],
)
def test_normalization(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_best_over_the_answers_of_each_question() -> None:
    predicted = ["the Rhine river", "in October 1973", "Bonn", "to be or not to be"]
    answers = [["river Rhine", "Rhine"], ["October", "October 1973."], ["Berlin", "Paris"], ["to be"]]
    scores = squad_scores(predicted, answers)
    # Two words of two in another order; two of three words and two; none; of six words "to be" once, and two.
    assert scores == pytest.approx({"exact_match": 0.0, "f1": (1.0 + 0.8 + 0.0 + 0.5) / 4})
    assert squad_scores(["october 1973"], answers[1:2]) == {"exact_match": 1.0, "f1": 1.0}
    assert squad_scores(["Rhine", ""], [["x", "The Rhine"], ["y"]]) == {"exact_match": 0.5, "f1": 0.5}


def test_questions_without_answer() -> None:
    scores = squad_scores(["", "something", "Rhine river", ""], [[], [], ["Rhine"], ["Bonn"]])
    assert scores == pytest.approx(
        {
            "exact_match": 1 / 4,
            "f1": (1 + 0 + 2 / 3 + 0) / 4,
            "has_answer_exact_match": 0.0,
            "has_answer_f1": (2 / 3) / 2,
            "no_answer_accuracy": 0.5,
        }
    )
    assert squad_scores(["the"], [[]]) == {"exact_match": 1.0, "f1": 1.0, "no_answer_accuracy": 1.0}


def test_an_answer_of_which_nothing_is_left() -> None:
    assert squad_scores(["."], [["."]]) == {"exact_match": 1.0, "f1": 0.0}  # the script of 1.1
    assert squad_scores([".", ""], [["."], []])["f1"] == 1.0  # that of 2.0
    assert squad_scores([".", ""], [[".", "Rhine"], []])["has_answer_exact_match"] == 0.0  # 2.0 leaves "." out


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 questions"):
        squad_scores(["x"], [["x"], ["y"]])
    with pytest.raises(ValueError, match="no questions"):
        squad_scores([], [])


def test_the_answers_of_the_dev_set_are_right(data_folder: Path) -> None:
    questions = read_squad(Source(data_folder / "qa/squad_v1.1/dev-v1.1.json.gz"))
    answers = [[text for text, _ in question.answers or ()] for question in questions]
    assert squad_scores([right[0] for right in answers], answers) == {"exact_match": 1.0, "f1": 1.0}
    # The second answer against the others: people, whom Rajpurkar et al. (2016) found at 0.803 and 0.905 on an earlier dev set.
    several = [right for right in answers if len(right) > 1]
    human = squad_scores([right[1] for right in several], [right[:1] + right[2:] for right in several])
    assert human == pytest.approx({"exact_match": 0.815, "f1": 0.910}, abs=1e-3)
