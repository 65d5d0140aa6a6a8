"""Question answering and multiple choice from files to a folder that predicts; the other families: ``test_finetune.py``."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastbert.finetune.run import finetune
from fastbert.finetune.settings import FinetuneSettings
from fastbert.tasks.predictor import Predictor

from ..toys import BAD, GOOD, NOUNS, PEOPLE, VERBS


def settings(task: str, checkpoint: Path, data: Path, output: Path, **changes: Any) -> FinetuneSettings:
    values = {"epochs": 8, "batch_size": 16, "learning_rate": 1e-2, "device": "cpu", **changes}
    return FinetuneSettings(task=task, model=str(checkpoint), data=str(data), output=str(output), **values)


def squad(count: int, seed: int) -> dict[str, Any]:
    """The answer is the one person that the context names; every fourth names none."""
    draw = random.Random(seed)
    paragraphs = []
    for number in range(count):
        words = draw.choices(NOUNS + VERBS, k=draw.randint(5, 40))
        answers = []
        if number % 4:
            place, person = draw.randrange(len(words)), draw.choice(PEOPLE)
            words[place] = person
            answers.append({"text": person, "answer_start": " ".join(words).index(person)})
        entry = {"id": str(number), "question": "who was it ?", "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": " ".join(words), "qas": [entry]})
    return {"version": "v2.0", "data": [{"title": "toy", "paragraphs": paragraphs}]}


def test_question_answering(toy_model: Path, tmp_path: Path) -> None:
    for split, count in (("train", 160), ("dev", 40)):
        (tmp_path / f"{split}-v2.0.json").write_text(json.dumps(squad(count, len(split))))
    said: list[str] = []
    result = finetune(
        settings("question-answering", toy_model, tmp_path, tmp_path / "run", max_seq_length=24, epochs=10), said.append
    )
    scores = {name: values["mean"] for name, values in result.scores["dev"].items()}
    assert scores["f1"] > 0.9 and scores["has_answer_f1"] > 0.9 and scores["no_answer_accuracy"] > 0.9
    assert "packed rows" in "\n".join(said)

    predict = Predictor.from_pretrained(tmp_path / "run", device="cpu")
    context = "the film left the garden . " * 5 + "Clara visited the river"
    found, none = predict([("who was it ?", context), {"question": "who was it ?", "context": "the film left the garden"}])
    assert (found["answer"], found["start"], found["end"]) == ("Clara", context.index("Clara"), context.index("Clara") + 5)
    assert (none["answer"], none["start"]) == ("", None)
    loaded = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run")
    assert loaded.config.num_labels == 2


def test_multiple_choice(toy_model: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    for split, count in (("train", 96), ("dev", 32), ("test", 8)):
        rows = []
        for _ in range(count):
            label = draw.randrange(3)
            choices = [f"{draw.choice(GOOD if number == label else BAD)} {draw.choice(NOUNS)}" for number in range(3)]
            row = {"context": f"the {draw.choice(NOUNS)}", "question": "was a", "choices": choices}
            rows.append(row if split == "test" else {**row, "label": "ABC"[label]})
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = finetune(settings("multiple-choice", toy_model, tmp_path, tmp_path / "run"), lambda line: None)
    assert result.scores["dev"]["accuracy"]["mean"] > 0.9
    predictions = (tmp_path / "run" / "predictions_test.jsonl").read_text().splitlines()
    assert len(predictions) == 8 and set(json.loads(predictions[0])) >= {"label", "choice", "probability", "probabilities"}

    predict = Predictor.from_pretrained(tmp_path / "run", device="cpu")
    two, four = predict([("the film", ["awful song", "great play"])]) + predict([("a book", ["bad", "cold", "poor", "lovely"])])
    assert (two["label"], two["choice"], four["choice"]) == (1, "great play", "lovely")
    assert sum(four["probabilities"]) == pytest.approx(1)
