"""A fine-tuning step (forward, backward, AdamW) of sequence classification with 3 labels, as for MNLI: fastbert beside
transformers (sdpa) on the same weights and batches.

    python -m benchmarks.finetune [--model mini] [--batches 32x128 mnli] [--rounds 5] [--device cpu] [--save FOLDER]
    python -m benchmarks.finetune --model base --dtype bfloat16 --packed

Batches of 32 sequences: 128 tokens each, and MNLI's lengths padded to 128 (``workloads`` has the names of models and batches).
Tokens/s counts real tokens. The last line of stdout is one JSON document; --save keeps it in benchmarks/results/FOLDER.
"""

from __future__ import annotations

import torch

from .training import Task, main


def with_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (len(batch["input_ids"]),), generator=generator)
    return {**batch, "labels": labels.to(batch["input_ids"].device)}


_HEAD = {"num_labels": 3, "problem_type": "single_label_classification"}  # whatever a checkpoint was fine-tuned for
TASK = Task("finetune", "BertForSequenceClassification", with_labels, config=_HEAD)
BATCHES = ("32x128", "mnli")

if __name__ == "__main__":
    main(TASK, __doc__, BATCHES)
