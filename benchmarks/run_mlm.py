"""What transformers' run_mlm.py does to a text before it trains on it: the peer of ``prepare`` and of ``pretraining_whole``.

Imported by processes of their own, whose time is taken; so it imports no more than they need.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase


def grouped_blocks(tokenizer: PreTrainedTokenizerBase, files: list[str], *, cache: str, cores: int, block: int) -> Dataset:
    """The lines of ``files`` tokenized, joined and cut into blocks of ``block`` tokens, each step on ``cores`` processes."""
    text = load_dataset("text", data_files=files, cache_dir=cache, split="train")

    def tokenize(rows: dict[str, list[str]]) -> Any:
        lines = [line for line in rows["text"] if line and not line.isspace()]
        return tokenizer(lines, return_special_tokens_mask=True)

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: [item for row in rows[name] for item in row] for name in rows}
        total = len(joined["input_ids"]) // block * block
        return {name: [items[start : start + block] for start in range(0, total, block)] for name, items in joined.items()}

    tokens = text.map(tokenize, batched=True, num_proc=cores, remove_columns=["text"])
    return tokens.map(group, batched=True, num_proc=cores)
