"""A pretraining step (forward, backward, AdamW): fastbert beside transformers (sdpa) on the same weights and batches.

    python -m benchmarks.pretrain [--model mini] [--batches 16x128 mnli] [--rounds 5] [--device cpu] [--save FOLDER]
    python -m benchmarks.pretrain --model base --dtype bfloat16 --batches 256x128 64x512 256xmnli 64xmlperf --packed
    python -m benchmarks.pretrain --model base --dtype bfloat16 --batches 8x128 --graphed    # as a CUDA graph, too

MLM + NSP with 15% of the tokens labelled, dropout 0.1; tokens/s counts real tokens. The last line of stdout is one JSON document;
--save keeps it in benchmarks/results/FOLDER.
"""

from __future__ import annotations

import torch

from .training import Task, main

LABELLED = 0.15


def with_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator, device = torch.Generator().manual_seed(1), batch["input_ids"].device
    chosen = (torch.rand(batch["input_ids"].shape, generator=generator) < LABELLED).to(device) & (batch["attention_mask"] == 1)
    words = torch.randint(1, int(batch["input_ids"].max()) + 1, chosen.shape, generator=generator).to(device)
    next_sentence = torch.randint(2, (len(chosen),), generator=generator).to(device)
    return {**batch, "labels": torch.where(chosen, words, -100), "next_sentence_label": next_sentence}


TASK = Task("pretrain", "BertForPreTraining", with_labels, LABELLED)
BATCHES = ("16x128", "mnli")

if __name__ == "__main__":
    main(TASK, __doc__, BATCHES)
