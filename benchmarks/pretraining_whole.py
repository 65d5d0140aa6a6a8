"""From raw text to a pretrained checkpoint, as whole processes: fastbert's two commands beside datasets and transformers' Trainer.

    python -m benchmarks.pretraining_whole --corpus PATH... --tokenizer FOLDER [--steps 60] [--rounds 2] [--save FOLDER]

"fastbert" is ``fastbert prepare`` and ``fastbert pretrain --objective mlm``, each with the start of Python. "transformers" is one
process that does what transformers' run_mlm.py does: load_dataset of the text, ``map`` with the tokenizer and with the grouping
into blocks of 128 on all cores, BertForMaskedLM (sdpa) in Trainer with DataCollatorForLanguageModeling and AdamW. Both take as
many steps of 4,096 tokens (32 blocks); next sentences are left out on both sides, as the collator has none. They take turns.

Beside whole seconds: those before training (data) and those of the steps. fastbert's rest is the start of two processes and the
scores on held-out text before and after, which the other side does not have.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .harness import interleaved, paired_ratio, summary, write_results
from .machine import installed, machine

OURS, THEIRS = "fastbert", "transformers"
BLOCK, BLOCKS = 128, 32

RUN_MLM = """
import json, sys, time
started = time.perf_counter()
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, DataCollatorForLanguageModeling, Trainer, TrainerCallback
from transformers import TrainingArguments
from benchmarks.run_mlm import grouped_blocks

output, vocabulary, cores, steps, block, blocks, sizes, *files = sys.argv[1:]
tokenizer = BertTokenizer.from_pretrained(vocabulary)
examples = grouped_blocks(tokenizer, files, cache=output + "/cache", cores=int(cores), block=int(block))
data_seconds = time.perf_counter() - started

class Clock(TrainerCallback):
    def on_train_begin(self, *arguments, **named):
        self.begin = time.perf_counter()
    def on_train_end(self, *arguments, **named):
        self.seconds = time.perf_counter() - self.begin

clock = Clock()
arguments = TrainingArguments(
    output, max_steps=int(steps), per_device_train_batch_size=int(blocks), learning_rate=1e-3, warmup_steps=int(steps) // 10,
    weight_decay=0.01, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
)
model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **json.loads(sizes)))
trainer = Trainer(model, arguments, DataCollatorForLanguageModeling(tokenizer), examples, callbacks=[clock])
trainer.train()
trainer.save_model(output)
with open(output + "/seconds.json", "w") as file:
    json.dump({"data": data_seconds, "training": clock.seconds}, file)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True, type=Path, help="files and folders of .txt.gz")
    parser.add_argument("--tokenizer", required=True, help="folder")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()
    stages: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    seconds = interleaved(
        {side: lambda side=side: stages[side].append(RUNS[side](given)) for side in RUNS}, given.rounds, uncounted_rounds=0
    )
    results: dict[str, Any] = {}
    tokens = given.steps * BLOCK * BLOCKS
    for side, times in seconds.items():
        medians = {stage: summary([run[stage] for run in stages[side]])["median_s"] for stage in ("data", "training")}
        results[side] = {**summary(times), "stages": medians, "training_tokens_per_s": tokens / medians["training"]}
        shown = f"data {medians['data']:.1f} s, steps {medians['training']:.1f} s"
        print(f"{side:<14}{results[side]['median_s']:>8.1f} s: {shown}", flush=True)
    ratio = paired_ratio(seconds[THEIRS], seconds[OURS])
    document = {
        "machine": machine(), "peers": {name: installed(name) for name in ("datasets", "transformers")}, "steps": given.steps,
        "tokens": tokens, "model": given.model, "results": results, "ratio": ratio,
    }  # fmt: skip
    print(f"fastbert is {ratio['median']:.2f}x as fast from text to checkpoint")
    write_results("pretraining_whole", document, given.save)


def ours(given: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        fastbert(
            "prepare", "--corpus", *given.corpus, "--tokenizer", given.tokenizer, "--output", f"{folder}/data",
            "--held-out-fraction", 0.05,
        )  # fmt: skip
        data = time.perf_counter() - start
        run = fastbert(
            "pretrain", "--corpus", f"{folder}/data", "--objective", "mlm", "--model", given.model, "--steps", given.steps,
            "--tokens-per-batch", BLOCK * BLOCKS, "--max-seq-length", BLOCK, "--learning-rate", 1e-3, "--output", f"{folder}/run",
            "--save-steps", given.steps,
        )  # fmt: skip
        return {"data": data, "training": run["seconds"]}


def fastbert(*words: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "fastbert.cli", *map(str, words), "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def theirs(given: argparse.Namespace) -> dict[str, float]:
    from fastbert.train.settings import PretrainSettings

    size = PretrainSettings(model=given.model).model_size()
    files = [str(file) for path in given.corpus for file in (sorted(path.rglob("*.txt.gz")) if path.is_dir() else [path])]
    with tempfile.TemporaryDirectory() as folder:
        words = [folder, given.tokenizer, machine()["cores"], given.steps, BLOCK, BLOCKS, json.dumps(vars(size)), *files]
        run = subprocess.run([sys.executable, "-c", RUN_MLM, *map(str, words)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr[-2000:])
        return json.loads(Path(folder, "seconds.json").read_text(encoding="utf-8"))


RUNS = {OURS: ours, THEIRS: theirs}


if __name__ == "__main__":
    main()
