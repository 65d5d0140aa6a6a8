"""From tokens to batches: fastbert's loader beside transformers' way, on the same text.

    python -m benchmarks.batches --data FOLDER [--settings 128/4096 512/4096 ...] [--rounds 5] [--save FOLDER]

The text is the Wikipedia and the books of FOLDER/pretrain, in ids of bert-base-uncased's vocabulary. "transformers" is a
datasets.Dataset of sequences ([CLS], sentences of a document while they fit, [SEP]) behind a shuffling torch DataLoader with
DataCollatorForLanguageModeling, padded to the fixed length of the setting. It offers no pairs for next sentence prediction, no
spans, and whole words only of rows that were padded before. "fastbert, mlm" has the same sequences, but for a few that are divided
to fill what the others' batches have left, "fastbert, mlm-nsp" sentence pairs; a round of it is a whole epoch, its planning
included. Tokens per second are real ones, special tokens included; fill is their share of what a batch has room for. The last
line of stdout is one JSON document; --save keeps it in benchmarks/results/FOLDER.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from fastbert.data.batches import PretrainingBatches
from fastbert.data.corpus import read_documents
from fastbert.data.loader import Position, step_batches
from fastbert.data.masking import MASKINGS
from fastbert.data.passages import make_passages
from fastbert.data.tokenizer import load_tokenizer
from fastbert.data.tokens import TokenizedCorpus, tokenize_documents

from .harness import interleaved, paired_ratio, quiet, summary, write_results
from .machine import installed, machine

SETTINGS = ("128/4096", "512/4096", "512/8192", "128/16384")
TEXTS = ("wikipedia", "books")
THEIRS = "transformers"

Tokens = Callable[[], tuple[int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--files", nargs="+", metavar="NAME", help="of FOLDER/pretrain/*/, instead of all")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="LENGTH/TOKENS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=200, help="of transformers, in a round")
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()

    tokenizer = load_tokenizer(given.data / "vocab" / "bert-base-uncased")
    files = [file for text in TEXTS for file in sorted((given.data / "pretrain" / text).glob("*.txt.gz"))]
    chosen = [file for file in files if given.files is None or file.name in given.files]
    corpus = tokenize_documents(read_documents(chosen), tokenizer)
    print(f"{corpus}", file=sys.stderr)
    results = {}
    for setting in given.settings:
        max_seq_length, tokens_per_batch = map(int, setting.split("/"))
        results[setting] = measure(corpus, tokenizer, max_seq_length, tokens_per_batch, given)
    document = {
        "machine": machine(),
        "settings": {
            "files": len(chosen),
            "documents": corpus.num_documents,
            "tokens": corpus.num_tokens,
            "datasets": installed("datasets"),
        },
        "results": results,
    }
    write_results("batches", document, given.save)


def measure(
    corpus: TokenizedCorpus,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    tokens_per_batch: int,
    given: argparse.Namespace,
) -> dict[str, Any]:
    """Plans, and one line for each contender of a setting."""
    options = {"max_seq_length": max_seq_length, "tokens_per_batch": tokens_per_batch, "seed": 0}
    made: dict[str, PretrainingBatches] = {
        f"fastbert, {objective}, {masking}": PretrainingBatches(corpus, tokenizer, objective=objective, masking=masking, **options)
        for objective in ("mlm", "mlm-nsp")
        for masking in MASKINGS
    }
    runs: dict[str, Tokens] = {name: _epochs(batches) for name, batches in made.items()}
    pairs = made["fastbert, mlm-nsp, token"]
    runs["fastbert, mlm-nsp, token, 1 worker"] = _epochs(pairs, workers=1)
    with quiet():
        rows = _dataset(corpus, tokenizer, max_seq_length)
        runs[THEIRS] = _transformers(rows, tokenizer, max_seq_length, tokens_per_batch, given.batches)
    counts: dict[str, list[tuple[int, int]]] = {name: [] for name in runs}
    timed = {name: (lambda name=name, run=run: counts[name].append(run())) for name, run in runs.items()}
    with quiet():
        seconds = interleaved(timed, given.rounds)
    per_token = {name: [s / real for s, (real, _) in zip(seconds[name], counts[name][-len(seconds[name]) :])] for name in runs}
    theirs = per_token[THEIRS]
    contenders = {}
    for name in runs:
        fill = statistics.mean(real / room for real, room in counts[name])
        contenders[name] = {
            **summary(seconds[name]),
            "tokens_per_second": 1 / statistics.median(per_token[name]),
            "fill": fill,
            "times_transformers": paired_ratio(theirs, per_token[name]),
        }
        print(
            f"{max_seq_length}/{tokens_per_batch}  {name:<36}{contenders[name]['tokens_per_second']:>14,.0f} tokens/s"
            f"{fill:>8.2%} fill {contenders[name]['times_transformers']['median']:>7.1f}x",
            file=sys.stderr,
        )
    return {"plan": _plan(pairs, corpus, given.rounds), "contenders": contenders}


def _plan(batches: PretrainingBatches, corpus: TokenizedCorpus, rounds: int) -> dict[str, float]:
    """What a block costs before its first batch, pairs and packing together."""
    seconds = []
    for epoch in range(100, 100 + rounds):
        start = time.perf_counter()
        count = batches.num_batches(epoch)
        seconds.append(time.perf_counter() - start)
    return {**summary(seconds), "batches": count, "ns_per_token": 1e9 * statistics.median(seconds) / corpus.num_tokens}


def _epochs(batches: PretrainingBatches, workers: int = 0) -> Tokens:
    """A run makes the next epoch and returns its (real tokens, tokens that its full batches have room for)."""
    epochs = iter(range(10**9))

    def run() -> tuple[int, int]:
        epoch = next(epochs)
        real = room = 0
        for step in step_batches(batches, Position(epoch), workers=workers):
            if step.position.epoch > epoch:
                break
            real += step.batches[0].num_tokens
            room += batches.tokens_per_batch
        return real, room

    return run


def _dataset(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> Any:
    """The rows of transformers: ids, and which of them are special, as its examples prepare them."""
    import datasets

    passages = make_passages(corpus, max_seq_length)
    ids = passages.assemble(0, len(passages), cls_id=tokenizer.cls_token_id, sep_id=tokenizer.sep_token_id)
    rows = np.split(ids, passages.offsets[1:-1])
    special = [[1] + [0] * (len(row) - 2) + [1] for row in rows]
    return datasets.Dataset.from_dict({"input_ids": rows, "special_tokens_mask": special})


def _transformers(
    rows: Any, tokenizer: PreTrainedTokenizerFast, max_seq_length: int, tokens_per_batch: int, batches: int
) -> Tokens:
    collate = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=max_seq_length)
    loader = torch.utils.data.DataLoader(rows, tokens_per_batch // max_seq_length, shuffle=True, collate_fn=collate)

    def run() -> tuple[int, int]:
        real = room = 0
        for batch in islice(loader, batches):
            real += int((batch["input_ids"] != tokenizer.pad_token_id).sum())
            room += batch["input_ids"].numel()
        return real, room

    return run


if __name__ == "__main__":
    main()
