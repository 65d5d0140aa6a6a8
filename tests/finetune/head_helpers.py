"""Small models of every family of tasks and every relative of BERT, and rows for them."""

from __future__ import annotations

import random
from typing import Any

import torch
import transformers

import fastbert

from ..model.helpers import NUM_LABELS, VOCABULARY, small_config

FAMILIES = {
    "text": "SequenceClassification", "words": "TokenClassification", "questions": "QuestionAnswering", "choices": "MultipleChoice",
}  # fmt: skip
RELATIVES = ("bert", "roberta", "electra")
CHOICES = 2
_PREFIXES = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra"}


def model_of(kind: str, family: str, **changes) -> torch.nn.Module:
    """An accelerated model of three layers, the head's own dropout off."""
    prefix = _PREFIXES[kind]
    changes = {"classifier_dropout": 0.0, "num_labels": 2 if family == "questions" else NUM_LABELS, **changes}
    arguments = small_config(**changes).to_diff_dict()
    arguments.pop("model_type", None)
    if kind == "electra":
        arguments |= {"embedding_size": 24, "summary_last_dropout": 0.0}
    config = getattr(transformers, f"{prefix}Config")(**arguments)
    return fastbert.accelerate(getattr(transformers, f"{prefix}For{FAMILIES[family]}")(config))


def rows_of(family: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Features with labels, of 3 to 20 tokens a sequence."""
    draw = random.Random(seed)

    def sequence() -> dict[str, list[int]]:
        length = draw.randint(3, 20)
        types = [0] * (length // 2) + [1] * (length - length // 2)
        return {"input_ids": [draw.randrange(2, VOCABULARY) for _ in range(length)], "token_type_ids": types}

    rows = []
    for _ in range(count):
        if family == "choices":
            several = [sequence() for _ in range(CHOICES)]
            row: dict[str, Any] = {name: [one[name] for one in several] for name in several[0]}
            row["labels"] = draw.randrange(CHOICES)
        else:
            row = sequence()
            length = len(row["input_ids"])
            if family == "text":
                row["labels"] = draw.randrange(NUM_LABELS)
            elif family == "words":
                row["labels"] = [draw.choice([-100, *range(NUM_LABELS)]) for _ in range(length)]
            else:
                row["start_positions"], row["end_positions"] = draw.randrange(length), draw.randrange(length)
        rows.append(row)
    return rows


def padded(rows: list[dict[str, Any]], family: str, pad_id: int) -> dict[str, torch.Tensor]:
    """The batch that transformers' models take, padded to its longest sequence."""
    lists = {name: [one for row in rows for one in (row[name] if family == "choices" else [row[name]])] for name in _INPUTS}
    longest = max(map(len, lists["input_ids"]))

    def table(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([list(value) + [fill] * (longest - len(value)) for value in values])

    batch = {
        "input_ids": table(lists["input_ids"], pad_id),
        "token_type_ids": table(lists["token_type_ids"], 0),
        "attention_mask": table([[1] * len(ids) for ids in lists["input_ids"]], 0),
    }
    if family == "choices":
        batch = {name: x.view(len(rows), CHOICES, longest) for name, x in batch.items()}
    if family == "words":
        return batch | {"labels": table([row["labels"] for row in rows], -100)}
    targets = ("start_positions", "end_positions") if family == "questions" else ("labels",)
    return batch | {name: torch.tensor([row[name] for row in rows]) for name in targets}


_INPUTS = ("input_ids", "token_type_ids")
