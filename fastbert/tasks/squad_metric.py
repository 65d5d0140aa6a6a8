"""SQuAD's exact match and F1, as its evaluation scripts for 1.1 and 2.0 define them (Rajpurkar et al., 2016 and 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case without ASCII punctuation and English articles, single blanks between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def squad_scores(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match and f1 from 0 to 1, means over questions of the best over a question's answers.

    predicted: (n,), "" for no answer; answers: those that count as right, none where the context has no answer.

    Data with a question that has no answer are SQuAD 2.0: there are then also has_answer_exact_match, has_answer_f1 (where some
    question has one) and no_answer_accuracy. The two scripts differ in an answer of which normalization leaves nothing, such as
    ".": in 1.1 a prediction of that kind is an exact match with an F1 of 0, in 2.0 such an answer does not count where there are
    others, and equals no answer where there are none.

    Raises ValueError for no questions, and for as many predictions as there are not questions.
    """
    if len(predicted) != len(answers):
        raise ValueError(f"there are {len(predicted)} predictions for {len(answers)} questions")
    if not answers:
        raise ValueError("there are no questions to score")
    second_version = any(not right for right in answers)
    exact, f1 = [], []
    for text, right in zip(predicted, answers):
        words = normalize_answer(text).split()
        candidates = [normalize_answer(answer).split() for answer in right]
        if second_version:
            candidates = [candidate for candidate in candidates if candidate] or [[]]
        exact.append(float(words in candidates))
        f1.append(max(_f1(words, candidate, nothing=float(second_version)) for candidate in candidates))
    scores = {"exact_match": _mean(exact), "f1": _mean(f1)}
    if second_version:
        answered = [bool(right) for right in answers]
        if any(answered):
            scores["has_answer_exact_match"] = _mean([score for score, has in zip(exact, answered) if has])
            scores["has_answer_f1"] = _mean([score for score, has in zip(f1, answered) if has])
        scores["no_answer_accuracy"] = _mean([score for score, has in zip(exact, answered) if not has])
    return scores


def _f1(predicted: list[str], right: list[str], *, nothing: float) -> float:
    """Of words, each counted as often as it stands there; ``nothing``: of no words for no words."""
    if not predicted and not right:
        return nothing
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
