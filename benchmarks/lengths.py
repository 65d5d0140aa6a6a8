"""How long the texts are that BERT is used on: histograms of token counts, embedded in ``lengths.json``.

    python -m benchmarks.lengths --data FOLDER --tokenizer FOLDER/vocab/bert-base-uncased

counts them anew, from a folder with GLUE's files (glue/MNLI/dev_matched.tsv, ...), SQuAD's (qa/squad_v1.1/) and Wikipedia's text
(pretrain/wikipedia/), and writes the sets that it found there into ``lengths.json``. Counts are of WordPiece tokens with [CLS] and
[SEP], cut where the task's usual scripts cut: 128 for GLUE, windows of 384 that overlap by 128 for SQuAD, 512 for Wikipedia's
paragraphs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .harness import write_json

EMBEDDED = Path(__file__).with_name("lengths.json")
GLUE_LENGTH, SQUAD_LENGTH, SQUAD_STRIDE, WIKIPEDIA_LENGTH = 128, 384, 128, 512
MLPERF = "mlperf"


@dataclass(frozen=True)
class Lengths:
    """counts: how many texts have how many tokens; padded_to: where the usual scripts pad and cut; source: what was counted."""

    title: str
    padded_to: int
    source: str
    counts: dict[int, int]

    def quantiles(self, sequences: int) -> tuple[int, ...]:
        """The lengths of a batch that looks like the whole set: at the middles of ``sequences`` equal parts, ascending."""
        lengths = np.array(sorted(self.counts))
        up_to = np.cumsum([self.counts[length] for length in lengths])
        middles = (np.arange(sequences) + 0.5) / sequences * up_to[-1]
        return tuple(int(length) for length in lengths[np.searchsorted(up_to, middles)])

    @property
    def mean(self) -> float:
        return sum(length * count for length, count in self.counts.items()) / sum(self.counts.values())


@functools.cache
def embedded() -> dict[str, Lengths]:
    """The sets by the names that workloads use ("mnli", "squad", ...)."""
    read = json.loads(EMBEDDED.read_text(encoding="utf-8"))
    sets = {name: Lengths(**{**entry, "counts": {int(n): c for n, c in entry["counts"].items()}}) for name, entry in read.items()}
    # Sequence pairs for pretraining: evenly spread with the mean 254 that MLPerf's Wikipedia at 512 tokens has.
    spread = Lengths(
        "MLPerf Wikipedia", WIKIPEDIA_LENGTH, "evenly spread around MLPerf's mean of 254", dict.fromkeys(range(8, 501), 1)
    )
    return {**sets, MLPERF: spread}


# --- counting ------------------------------------------------------------------------------------------------------------


def _texts(folder: Path, task: str, file: str) -> list[tuple[str, ...]]:
    from fastbert.data.sources import Source
    from fastbert.tasks.glue_data import read_glue
    from fastbert.tasks.glue_tasks import glue_task

    examples, _ = read_glue(glue_task(task), Source(folder / file))
    return [tuple(filter(None, (example.text, example.text_pair))) for example in examples]


def _glue(task: str, file: str) -> Callable[[Path, Any], Counter]:
    def count(folder: Path, tokenizer: Any) -> Counter:
        pairs = _texts(folder, task, file)
        encoded = tokenizer(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=GLUE_LENGTH)
        return Counter(map(len, encoded["input_ids"]))

    return count


def _squad(folder: Path, tokenizer: Any) -> Counter:
    from fastbert.data.sources import Source
    from fastbert.data.squad import read_squad

    questions = read_squad(Source(folder / "qa/squad_v1.1/dev-v1.1.json.gz"))
    encoded = tokenizer(
        [q.question for q in questions], [q.context for q in questions], truncation="only_second", max_length=SQUAD_LENGTH,
        stride=SQUAD_STRIDE, return_overflowing_tokens=True,
    )  # fmt: skip
    return Counter(map(len, encoded["input_ids"]))


def _wikipedia(folder: Path, tokenizer: Any) -> Counter:
    from fastbert.data.corpus import read_documents

    paragraphs = (p for document in read_documents([folder / "pretrain/wikipedia"]) for p in document.paragraphs)
    return Counter(len(ids) for ids in _encoded(tokenizer, paragraphs))


def _encoded(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    return tokenizer(list(texts), truncation=True, max_length=WIKIPEDIA_LENGTH)["input_ids"]


# name -> (title, padded to, source, how to count)
_SETS: dict[str, tuple[str, int, str, Callable[[Path, Any], Counter]]] = {
    "cola": ("CoLA", GLUE_LENGTH, "CoLA's dev sentences", _glue("cola", "glue/CoLA/dev.tsv")),
    "sst2": ("SST-2", GLUE_LENGTH, "SST-2's dev sentences", _glue("sst2", "glue/SST-2/dev.tsv")),
    "mrpc": ("MRPC", GLUE_LENGTH, "MRPC's dev pairs", _glue("mrpc", "glue/MRPC/dev.tsv")),
    "stsb": ("STS-B", GLUE_LENGTH, "STS-B's dev pairs", _glue("stsb", "glue/STS-B/dev.tsv")),
    "qqp": ("QQP", GLUE_LENGTH, "23,496 of QQP's train pairs", _glue("qqp", "glue/QQP/train_sample.tsv")),
    "mnli": ("MNLI", GLUE_LENGTH, "MNLI's matched dev pairs", _glue("mnli", "glue/MNLI/dev_matched.tsv")),
    "qnli": ("QNLI", GLUE_LENGTH, "QNLI's dev pairs", _glue("qnli", "glue/QNLI/dev.tsv")),
    "wnli": ("WNLI", GLUE_LENGTH, "WNLI's train pairs", _glue("wnli", "glue/WNLI/train.tsv")),
    "squad": ("SQuAD", SQUAD_LENGTH, "windows of SQuAD 1.1's dev questions", _squad),
    "wikipedia": ("Wikipedia", WIKIPEDIA_LENGTH, "paragraphs of 1,408 Wikipedia articles", _wikipedia),
}


def counted(folder: Path, tokenizer: Any) -> dict[str, Lengths]:
    """The sets whose files are in ``folder``; FileNotFoundError where none is."""
    found = {}
    for name, (title, padded_to, source, count) in _SETS.items():
        try:
            found[name] = Lengths(title, padded_to, source, dict(sorted(count(folder, tokenizer).items())))
        except FileNotFoundError:
            continue
    if not found:
        raise FileNotFoundError(f"{folder} has none of the sets {', '.join(_SETS)}: expected glue/, qa/ or pretrain/ in it")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="folder or Hub name")
    given = parser.parse_args()
    from transformers import AutoTokenizer

    found = counted(given.data, AutoTokenizer.from_pretrained(given.tokenizer))
    kept = {name: lengths for name, lengths in embedded().items() if name != MLPERF} if EMBEDDED.exists() else {}
    write_json(EMBEDDED, {name: dataclasses.asdict(lengths) for name, lengths in {**kept, **found}.items()})
    for name, lengths in found.items():
        print(f"{name:<10} {sum(lengths.counts.values()):>7,} of {lengths.mean:>5.1f} tokens on average: {lengths.source}")


if __name__ == "__main__":
    main()
