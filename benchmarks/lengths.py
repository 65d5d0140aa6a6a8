"""How long the texts are that BERT is used on: histograms of token counts, embedded in ``lengths.json``.

    python -m benchmarks.lengths --data FOLDER --tokenizer FOLDER/vocab/bert-base-uncased

counts them anew, from a folder with GLUE's files (glue/MNLI/dev_matched.tsv, ...), SQuAD's (qa/squad_v1.1/) and Wikipedia's text
(pretrain/wikipedia/), and writes the sets that it found there into ``lengths.json``. Counts are of WordPiece tokens with [CLS] and
[SEP], cut where the task's usual scripts cut: 128 for GLUE, windows of 384 that overlap by 128 for SQuAD, 512 for Wikipedia's
paragraphs. Of GLUE's tasks RTE is missing: where these were counted there were twenty of its pairs, too few to stand for it.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.runs.whole_file import whole_file

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
        # The middle of part i is (2i + 1) / (2 sequences) of all texts; multiplied out, integers compare exactly.
        middles = (2 * np.arange(sequences) + 1) * up_to[-1]
        return tuple(int(length) for length in lengths[np.searchsorted(2 * sequences * up_to, middles)])

    @property
    def mean(self) -> float:
        return sum(length * count for length, count in self.counts.items()) / sum(self.counts.values())


@functools.cache
def embedded() -> dict[str, Lengths]:
    """The sets by the names that workloads use ("mnli", "squad", ...)."""
    sets = read_sets(EMBEDDED)
    # Sequence pairs for pretraining: evenly spread with the mean 254 that MLPerf's Wikipedia at 512 tokens has.
    spread = Lengths(
        "MLPerf Wikipedia", WIKIPEDIA_LENGTH, "evenly spread around MLPerf's mean of 254", dict.fromkeys(range(8, 501), 1)
    )
    return {**sets, MLPERF: spread}


def read_sets(path: Path) -> dict[str, Lengths]:
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Lengths(
            entry["title"], entry["padded_to"], entry["source"], dict(zip(entry["lengths"], entry["counts"], strict=True))
        )
        for name, entry in entries.items()
    }


def write_sets(path: Path, sets: Mapping[str, Lengths]) -> None:
    """Lengths and their counts as two lists, each on one line."""
    entries = []
    for name, of in sets.items():
        fields = {"title": of.title, "padded_to": of.padded_to, "source": of.source}
        fields |= {"lengths": list(of.counts), "counts": list(of.counts.values())}
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items())
        entries.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    with whole_file(path) as beside:
        beside.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


# --- counting ------------------------------------------------------------------------------------------------------------

Count = Callable[[Path, Any], Iterable[list[int]]]  # (file or folder, tokenizer) -> token ids of each text


@dataclass(frozen=True)
class Counted:
    """A set that can be counted from ``path`` in a folder of data."""

    title: str
    padded_to: int
    source: str
    path: str
    encode: Count


def _glue(task: str) -> Count:
    def encode(path: Path, tokenizer: Any) -> list[list[int]]:
        from fastbert.data.sources import Source
        from fastbert.tasks.glue_data import read_glue
        from fastbert.tasks.glue_tasks import glue_task

        examples = read_glue(glue_task(task), Source(path), labelled=False)
        texts = [tuple(text for text in (example.text, example.text_pair) if text is not None) for example in examples]
        return tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=GLUE_LENGTH)["input_ids"]

    return encode


def _squad(path: Path, tokenizer: Any) -> list[list[int]]:
    from fastbert.data.sources import Source
    from fastbert.data.squad import read_squad

    questions = read_squad(Source(path), labelled=False)
    return tokenizer(
        [q.question for q in questions], [q.context for q in questions], truncation="only_second", max_length=SQUAD_LENGTH,
        stride=SQUAD_STRIDE, return_overflowing_tokens=True,
    )["input_ids"]  # fmt: skip


def _wikipedia(path: Path, tokenizer: Any) -> list[list[int]]:
    from fastbert.data.corpus import read_documents

    paragraphs = [paragraph for document in read_documents([path]) for paragraph in document.paragraphs]
    return tokenizer(paragraphs, truncation=True, max_length=WIKIPEDIA_LENGTH)["input_ids"]


SETS = {
    "cola": Counted("CoLA", GLUE_LENGTH, "CoLA's dev sentences", "glue/CoLA/dev.tsv", _glue("cola")),
    "sst2": Counted("SST-2", GLUE_LENGTH, "SST-2's dev sentences", "glue/SST-2/dev.tsv", _glue("sst2")),
    "mrpc": Counted("MRPC", GLUE_LENGTH, "MRPC's dev pairs", "glue/MRPC/dev.tsv", _glue("mrpc")),
    "stsb": Counted("STS-B", GLUE_LENGTH, "STS-B's dev pairs", "glue/STS-B/dev.tsv", _glue("stsb")),
    "qqp": Counted("QQP", GLUE_LENGTH, "23,496 of QQP's train pairs", "glue/QQP/train_sample.tsv", _glue("qqp")),
    "mnli": Counted("MNLI", GLUE_LENGTH, "MNLI's matched dev pairs", "glue/MNLI/dev_matched.tsv", _glue("mnli")),
    "qnli": Counted("QNLI", GLUE_LENGTH, "QNLI's dev pairs", "glue/QNLI/dev.tsv", _glue("qnli")),
    "wnli": Counted("WNLI", GLUE_LENGTH, "WNLI's train pairs", "glue/WNLI/train.tsv", _glue("wnli")),
    "squad": Counted("SQuAD", SQUAD_LENGTH, "windows of SQuAD 1.1's dev questions", "qa/squad_v1.1/dev-v1.1.json.gz", _squad),
    "wikipedia": Counted("Wikipedia", WIKIPEDIA_LENGTH, "paragraphs of 1,408 Wikipedia articles", "pretrain/wikipedia", _wikipedia),
}


def counted(folder: Path, tokenizer: Any, names: Iterable[str] | None = None) -> dict[str, Lengths]:
    """The sets of those names, counted from ``folder``; None: all whose files are there.

    Raises FileNotFoundError naming the file that is missing, and DataError for one that is not in its set's format.
    """
    chosen = [name for name, of in SETS.items() if (folder / of.path).exists()] if names is None else list(names)
    if not chosen and names is None:
        raise FileNotFoundError(f"{folder} has none of the sets {', '.join(SETS)}: expected such as {folder / SETS['mnli'].path}")
    found = {}
    for name in chosen:
        of = SETS[name]
        if not (folder / of.path).exists():
            raise FileNotFoundError(f"the lengths named {name} are counted from {folder / of.path}, which does not exist")
        counts = Counter(map(len, of.encode(folder / of.path, tokenizer)))
        found[name] = Lengths(of.title, of.padded_to, of.source, dict(sorted(counts.items())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="folder or Hub name")
    given = parser.parse_args()
    from fastbert.data.tokenizer import load_tokenizer

    found = counted(given.data, load_tokenizer(given.tokenizer))
    kept = read_sets(EMBEDDED) if EMBEDDED.exists() else {}
    write_sets(EMBEDDED, {**kept, **found})
    for name, lengths in found.items():
        print(f"{name:<10} {sum(lengths.counts.values()):>7,} of {lengths.mean:>5.1f} tokens on average: {lengths.source}")


if __name__ == "__main__":
    main()
