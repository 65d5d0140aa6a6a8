"""A toy GLUE download: all nine tasks with the columns, labels and quirks of GLUE's own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..toys import BAD, GOOD, NOUNS

_TREES = ["genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]


def sentence(number: int, good: bool) -> str:
    """Words of which one tells the class."""
    words = [NOUNS[(number * step) % len(NOUNS)] for step in (1, 3, 7)]
    return " ".join([words[0], (GOOD if good else BAD)[number % 6], *words[1:]])


def write_tsv(path: Path, rows: Sequence[Sequence[object]], *, bom: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig" if bom else "utf-8")
    return path


def write_toy_glue(root: Path, *, train: int = 24, dev: int = 12, test: int = 6) -> Path:
    """Fills ``root``; QQP's training set has a row cut in two by a line end and one with an empty question."""
    sizes = {"train": train, "dev": dev, "test": test}
    for split, size in sizes.items():
        texts = [(sentence(number, number % 2 == 0), sentence(number + 3, number % 3 == 0)) for number in range(size)]
        binary = [number % 2 for number in range(size)]
        words = [("entailment", "not_entailment")[label] for label in binary]
        labelled = split != "test"

        if labelled:
            write_tsv(
                root / f"CoLA/{split}.tsv", [("gj04", label, "" if label else "*", a) for label, (a, _) in zip(binary, texts)]
            )
            rows = [("sentence", "label"), *((f"{a} ", label) for label, (a, _) in zip(binary, texts))]
        else:
            rows = [("index", "sentence"), *((number, a) for number, (a, _) in enumerate(texts))]
            write_tsv(root / f"CoLA/{split}.tsv", rows)
        write_tsv(root / f"SST-2/{split}.tsv", rows)

        first = "Quality" if labelled else "index"
        rows = [(label if labelled else number, 7, 8, f'"{a}', b) for number, (label, (a, b)) in enumerate(zip(binary, texts))]
        write_tsv(root / f"MRPC/{split}.tsv", [(first, "#1 ID", "#2 ID", "#1 String", "#2 String"), *rows], bom=labelled)

        header = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
        rows = [[number, *"gfyoss", a, b] for number, (a, b) in enumerate(texts)]
        if labelled:
            header, rows = [*header, "score"], [[*row, f"{5 * row[0] / size:.3f}"] for row in rows]
        write_tsv(root / f"STS-B/{split}.tsv", [header, *rows])

        if labelled:
            rows = [(number, 1, 2, a, b, label) for number, (label, (a, b)) in enumerate(zip(binary, texts))]
            if split == "train":
                rows = [*rows, (90, 1, 2, "", "house", 0), (91, 1, 2, "cut in"), ("two", "river", 0)]
            write_tsv(root / f"QQP/{split}.tsv", [("id", "qid1", "qid2", "question1", "question2", "is_duplicate"), *rows])
        else:
            rows = [(number, a, b) for number, (a, b) in enumerate(texts)]
            write_tsv(root / f"QQP/{split}.tsv", [("id", "question1", "question2"), *rows])

        for name in ("train",) if split == "train" else (f"{split}_matched", f"{split}_mismatched"):
            header = ["index", "promptID", "pairID", *_TREES, "sentence1", "sentence2"]
            rows = [[number, "p", "q", *"gabcd", a, b] for number, (a, b) in enumerate(texts)]
            if labelled:
                header = [*header, "label1", "gold_label"]
                labels = ("neutral", "contradiction", "entailment")
                rows = [[*row, labels[0], labels[(number + name.endswith("mismatched")) % 3]] for number, row in enumerate(rows)]
            write_tsv(root / f"MNLI/{name}.tsv", [header, *rows])

        for title, columns, labels in (
            ("QNLI", ("question", "sentence"), words),
            ("RTE", ("sentence1", "sentence2"), words),
            ("WNLI", ("sentence1", "sentence2"), binary),
        ):
            header = ["index", *columns, *(["label"] if labelled else [])]
            rows = [[number, a, b, *([labels[number]] if labelled else [])] for number, (a, b) in enumerate(texts)]
            write_tsv(root / f"{title}/{split}.tsv", [header, *rows])
    rows = [(number, sentence(number, True), sentence(number, False)) for number in range(test)]
    write_tsv(root / "diagnostic/diagnostic.tsv", [("index", "sentence1", "sentence2"), *rows])
    return root
