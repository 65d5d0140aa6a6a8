"""Model cards of fine-tuned folders: what the Hub reads, and what people read."""

from __future__ import annotations

import copy
import os
import re

import pytest
import transformers
from huggingface_hub import ModelCard
from transformers.pipelines import SUPPORTED_TASKS

from fastbert.finetune.model_card import model_card, write_card
from fastbert.tasks.registry import TASK_NAMES

FACTS = {
    "task": "sentiment",
    "base_model": "google-bert/bert-base-uncased",
    "main_metric": "accuracy",
    "labels": ["neg", "pos|"],
    "data": {
        "train": {
            "source": "/data/train.tsv", "examples": 6734, "tokens": 90210, "truncated": 3, "labels": {"neg": 3000, "pos|": 3734},
        },
        "dev": {"source": "/data/dev.tsv", "examples": 872, "tokens": None, "truncated": 0, "labels": {"neg": 872}},
        "test": {"source": "someone/reviews:full, split test", "examples": 100},
    },
    "scores": {
        "dev": {
            "accuracy": {"mean": 0.9123, "std": 0.0042, "values": [0.9081, 0.9165]},
            "f1": {"mean": 0.9, "std": 0.01, "values": [0.89, 0.91]},
        },
        "test": {"accuracy": {"mean": 0.9, "std": 0.0142, "values": [0.91, 0.89]}},
    },
    "seeds": [0, 7],
    "best_seed": 7,
    "settings": {"learning_rate": 5e-05, "epochs": 3.0, "mode": "full", "metric": None, "label_column": ["label"]},
    "speed": {"seconds": 1234.5, "examples_per_second": 61.25, "tokens_per_second": 2345.6, "machine": "2 cores of a CPU"},
    "command": "fastbert finetune --task sentiment --data sst2",
    "versions": {"fastbert": "0.1.0", "torch": "2.13.0"},
    "pictures": {"learning_curves.png": "Loss and accuracy against the steps"},
    "notes": ["New weights, not in the checkpoint: classifier.bias"],
}  # fmt: skip


@pytest.fixture
def facts() -> dict:
    return copy.deepcopy(FACTS)


def test_what_the_hub_reads(facts):
    data = ModelCard(model_card(facts)).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "google-bert/bert-base-uncased", "transformers", "text-classification"
    )  # fmt: skip
    assert data.tags == ["bert", "fastbert", "sentiment"] and data.metrics == ["accuracy", "f1"]
    results = {(result.dataset_split, result.metric_type): result.metric_value for result in data.eval_results}
    assert results == {("dev", "accuracy"): 0.9165, ("dev", "f1"): 0.91, ("test", "accuracy"): 0.89}
    assert [result.dataset_name for result in data.eval_results] == ["dev.tsv", "dev.tsv", "someone/reviews:full, split test"]


def test_what_people_read(facts):
    text = model_card(facts)
    for expected in (
        "# bert-base-uncased for sentiment",
        "| accuracy | 0.9165 (0.9123 ± 0.0042) | 0.8900 (0.9000 ± 0.0142) |",
        "| f1 | 0.9100 (0.9000 ± 0.0100) |  |",
        "2 trainings (seeds 0, 7). This one is that of seed 7, the best in accuracy on dev",
        "| train | `train.tsv` | 6,734 | 90,210 | 3 |",
        "| dev | `dev.tsv` | 872 |  | 0 |",
        "| pos\\| | 3,734 | 0 |",
        "| test | `someone/reviews:full, split test` | 100 |  |  |",
        "| learning rate | 5e-05 |",
        "| label column | label |",
        "1,234 s of training",
        "61.2 examples/s",
        "2,346 real tokens/s",
        "2 cores of a CPU",
        "![Loss and accuracy against the steps](learning_curves.png)",
        "fastbert predict --model PATH_OF_THIS_FOLDER",
        "- New weights, not in the checkpoint: classifier.bias",
        FACTS["command"],
        "fastbert 0.1.0, torch 2.13.0",
        'pipeline("text-classification"',
    ):
        assert expected in text, expected
    assert "| metric |" not in text, "settings that were not given say nothing"
    assert "/data/" not in text, "paths of the machine stay there"


def test_one_seed_has_no_deviation(facts):
    facts |= {"seeds": [7], "best_seed": 7, "scores": {"dev": {"accuracy": {"mean": 0.9, "std": None, "values": [0.9]}}}}
    text = model_card(facts)
    assert "| accuracy | 0.9000 |" in text and "±" not in text and "trainings" not in text


def test_the_least_that_must_be_known(facts):
    for name in ("labels", "speed", "pictures", "notes"):
        del facts[name]
    facts["data"] = {split: {"source": of["source"], "examples": of["examples"]} for split, of in facts["data"].items()}
    text = model_card(facts)
    assert "### Labels" not in text and "| train | `train.tsv` | 6,734 |  |  |" in text


def test_a_folder_is_no_name_on_the_hub(facts, tmp_path):
    facts["base_model"] = str(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    text = model_card(facts)
    assert ModelCard(text).data.base_model is None and "folder `mine`" in text and str(tmp_path) not in text


def test_many_labels_are_cut(facts):
    facts["labels"] = [f"label{number}" for number in range(77)]
    facts["data"]["train"]["labels"] = dict.fromkeys(facts["labels"], 5)
    del facts["data"]["dev"]["labels"]
    text = model_card(facts)
    assert "| label49 | 5 |" in text and "label50" not in text and "and 27 more" in text


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_task_has_a_card_whose_lines_run(facts, task):
    """The Hub knows the name of its task, and transformers the pipeline or the class that it says to load."""
    text = model_card({**facts, "task": task})
    card = ModelCard(text)
    assert card.data.pipeline_tag in ("text-classification", "token-classification", "question-answering", "multiple-choice")
    assert {result.task_type for result in card.data.eval_results} == {card.data.pipeline_tag}
    pipelines = re.findall(r'^pipeline\("([\w-]+)"', text, re.MULTILINE)
    classes = re.findall(r"^(\w+)\.from_pretrained", text, re.MULTILINE)
    assert len(pipelines + classes) == 1
    assert all(name in SUPPORTED_TASKS for name in pipelines) and all(hasattr(transformers, name) for name in classes)


def test_pipelines_cut_texts_where_training_did(facts):
    facts["settings"]["max_seq_length"] = 128
    cut = 'pipeline("text-classification", model="PATH_OF_THIS_FOLDER", truncation=True, max_length=128)'
    assert cut in model_card(facts)
    assert "truncation" not in model_card({**facts, "task": "ner"}), "an option that token classification has not"


def test_written_whole(facts, tmp_path):
    (tmp_path / "README.md").write_text("old", encoding="utf-8")
    assert write_card(facts, tmp_path).read_text(encoding="utf-8") == model_card(facts)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_file_whose_name_is_no_text(facts, tmp_path):
    facts["data"]["train"]["source"] = os.fsdecode(b"/data/tr\xe4ning.tsv")
    assert r"tr\udce4ning.tsv" in write_card(facts, tmp_path).read_text(encoding="utf-8")
