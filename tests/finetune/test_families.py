"""Question answering and multiple choice from files to a folder that predicts; the other families: ``test_finetune.py``."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
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


@pytest.mark.parametrize("family", ["questions", "choices"])
def test_what_lora_predicts_is_what_its_folder_predicts(toy_model: Path, tmp_path: Path, family: str) -> None:
    """And what PEFT makes of the adapter, with transformers' model."""
    peft = pytest.importorskip("peft")
    if family == "questions":
        for split, count in (("train", 24), ("dev", 8)):
            (tmp_path / f"{split}-v2.0.json").write_text(json.dumps(squad(count, len(split))))
        task, score = "question-answering", "score"
    else:
        row = json.dumps({"context": "the film", "choices": ["was good", "was bad"], "label": 1})
        (tmp_path / "train.jsonl").write_text(f"{row}\n" * 24)
        (tmp_path / "dev.jsonl").write_text(f"{row}\n" * 4)
        task, score = "multiple-choice", "probability"
    folder = tmp_path / "run"
    finetune(settings(task, toy_model, tmp_path, folder, mode="lora", max_seq_length=24, epochs=2), lambda line: None)
    predict = Predictor.from_pretrained(folder, device="cpu")
    written = [json.loads(line) for line in (folder / "predictions_dev.jsonl").read_text().splitlines()]
    now = predict.predict(predict.read(next(tmp_path.glob("dev*"))))
    assert [row[score] for row in written] == pytest.approx([row[score] for row in now], abs=1e-5)

    mapping = json.loads((folder / "adapter" / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping["parent_library"] == "transformers.models.bert.modeling_bert"
    model_class = getattr(transformers, mapping["base_model_class"])
    adapted = peft.PeftModel.from_pretrained(model_class.from_pretrained(toy_model), folder / "adapter").eval()
    batch = predict.loaded.tokenizer([["who was it ?", "the film"], ["a", "good book"]], padding=True, return_tensors="pt")
    if family == "choices":
        batch = {name: values.unsqueeze(0) for name, values in batch.items()}
    with torch.no_grad():
        expected, found = model_class.from_pretrained(folder).eval()(**batch)[0], adapted(**batch)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


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
