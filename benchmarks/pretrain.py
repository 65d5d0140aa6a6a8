"""A pretraining step (forward, backward, AdamW): fastbert beside transformers (sdpa) on the same weights and batches.

    python -m benchmarks.pretrain [--size mini] [--rounds 5] [--device cpu] [--save FOLDER]

MLM + NSP with 15% of the tokens labelled, float32, dropout 0.1. Before anything is timed both losses are computed without
dropout and must agree. Tokens/s counts real tokens. The last line of stdout is one JSON document; --save keeps it in
benchmarks/results/FOLDER.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import transformers

import fastbert
from fastbert.train.optimizer import build_optimizer

from .harness import ceilings, interleaved, machine, paired_ratio, summary, write_results
from .workloads import MNLI_LENGTHS, SIZES, VOCABULARY, config_for, padded_batch, training_flops

BATCHES = {"16 x 128": ((128,) * 16, 128), "MNLI lengths, padded to 128": (MNLI_LENGTHS, 128)}
LABELLED = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", metavar="FOLDER")
    arguments = parser.parse_args()
    device = arguments.device

    limits = ceilings(device, torch.float32)
    print(f"bert-{arguments.size}, float32; matmul {limits['matmul_flops'] / 1e9:,.0f} GFLOP/s in this run; real tokens/s")
    print(f"{'batch':<30}{'transformers':>14}{'fastbert':>12}{'ratio':>9}{'of matmul rate':>16}")
    results = {}
    for name, (lengths, padded_to) in BATCHES.items():
        batch = labelled_batch(lengths, padded_to, device)
        torch.manual_seed(0)
        config = config_for(arguments.size)
        theirs = transformers.BertForPreTraining(config).to(device)
        ours = fastbert.BertForPreTraining(config).to(device)
        ours.load_state_dict(theirs.state_dict())
        difference = loss_difference(ours, theirs, batch)
        contenders = {"transformers": training_step(theirs, batch), "fastbert": training_step(ours, batch)}
        seconds = interleaved(contenders, arguments.rounds, device)
        tokens = sum(lengths)
        rates = {key: tokens / summary(value)["median_s"] for key, value in seconds.items()}
        ratio = paired_ratio(seconds["transformers"], seconds["fastbert"])
        share = training_flops(config, lengths, LABELLED) / tokens * rates["fastbert"] / limits["matmul_flops"]
        results[name] = {
            **{key: {**summary(value), "tokens_per_s": rates[key]} for key, value in seconds.items()},
            "ratio": ratio,
            "share_of_matmul_rate": share,
            "relative_loss_difference": difference,
        }
        print(f"{name:<30}{rates['transformers']:>14,.0f}{rates['fastbert']:>12,.0f}{ratio['median']:>8.2f}x{share:>15.0%}")
    document = {"machine": machine(), "size": arguments.size, "dtype": "float32", "ceilings": limits, "results": results}
    write_results("pretrain", document, arguments.save)


def labelled_batch(lengths: tuple[int, ...], padded_to: int, device: str) -> dict[str, torch.Tensor]:
    batch = padded_batch(lengths, padded_to, device)
    generator = torch.Generator().manual_seed(1)
    chosen = (torch.rand(batch["input_ids"].shape, generator=generator) < LABELLED).to(device) & (batch["attention_mask"] == 1)
    words = torch.randint(1000, VOCABULARY, chosen.shape, generator=generator).to(device)
    next_sentence = torch.randint(2, (len(lengths),), generator=generator).to(device)
    return {**batch, "labels": torch.where(chosen, words, -100), "next_sentence_label": next_sentence}


def training_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    model.train()
    optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.01)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_difference(ours: torch.nn.Module, theirs: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Relative, without dropout. Raises RuntimeError where the two do not compute the same."""
    with torch.no_grad():
        losses = [model.eval()(**batch).loss.item() for model in (ours, theirs)]
    difference = abs(losses[0] - losses[1]) / abs(losses[1])
    if not difference <= 1e-4:
        raise RuntimeError(f"losses differ by {difference:.1e}, more than 1e-4: nothing is measured")
    return difference


if __name__ == "__main__":
    main()
