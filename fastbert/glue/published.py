"""What others reached on GLUE's test sets, as they published it, to stand beside scores of one's own.

Two sources. The first rows of the leaderboard (https://gluebenchmark.com/leaderboard) with GLUE's own figures: Matthews
correlation of CoLA, accuracy of SST-2, F1/accuracy of MRPC and QQP, Pearson/Spearman correlation of STS-B, and the GLUE score over
all tasks; the other tasks' columns are not at hand. And BERT's paper (Devlin et al. 2019, https://arxiv.org/abs/1810.04805,
Table 1, scored by the same server): F1 for QQP and MRPC, Spearman correlation for STS-B, Matthews correlation for CoLA, accuracy
for the rest. WNLI is left out there, and the average counts MNLI's two test sets as two of nine columns: it is no GLUE score.
"""

from __future__ import annotations

from dataclasses import dataclass

LEADERBOARD = "GLUE leaderboard, https://gluebenchmark.com/leaderboard, test sets"
BERT_PAPER = "Devlin et al. 2019, Table 1, https://arxiv.org/abs/1810.04805, test sets"


@dataclass(frozen=True)
class PublishedRow:
    """Scores of one model on the test sets, on the scale to 100.

    ``figures``: for each task (by its name) what was published, metric to figure; MNLI's metrics are ``accuracy`` (matched) and
    ``accuracy_mismatched``. ``average``: as published. ``rank``: on the leaderboard, from 1.
    """

    model: str
    team: str
    source: str
    average: float
    figures: dict[str, dict[str, float]]
    rank: int | None = None


def _leader(
    rank: int, team: str, model: str, score: float, cola: float, sst2: float, mrpc: tuple, stsb: tuple, qqp: tuple
) -> PublishedRow:
    figures = {
        "cola": {"matthews_correlation": cola},
        "sst2": {"accuracy": sst2},
        "mrpc": {"f1": mrpc[0], "accuracy": mrpc[1]},
        "stsb": {"pearson": stsb[0], "spearman": stsb[1]},
        "qqp": {"f1": qqp[0], "accuracy": qqp[1]},
    }
    return PublishedRow(model, team, LEADERBOARD, score, figures, rank)


def _bert(
    model: str, mnli: tuple[float, float], qqp: float, qnli: float, sst2: float, cola: float, stsb: float, mrpc: float, rte: float,
    average: float,
) -> PublishedRow:  # fmt: skip
    figures = {
        "cola": {"matthews_correlation": cola},
        "sst2": {"accuracy": sst2},
        "mrpc": {"f1": mrpc},
        "stsb": {"spearman": stsb},
        "qqp": {"f1": qqp},
        "mnli": {"accuracy": mnli[0], "accuracy_mismatched": mnli[1]},
        "qnli": {"accuracy": qnli},
        "rte": {"accuracy": rte},
    }
    return PublishedRow(model, "Google AI Language", BERT_PAPER, average, figures)


BERT_ROWS = (
    _bert("BERT-base", (84.6, 83.4), 71.2, 90.5, 93.5, 52.1, 85.8, 88.9, 66.4, 79.6),
    _bert("BERT-large", (86.7, 85.9), 72.1, 92.7, 94.9, 60.5, 86.5, 89.3, 70.1, 82.1),
)

LEADERBOARD_ROWS = (
    _leader(1, "Microsoft Alexander v-team", "Turing ULR v6", 91.3, 73.3, 97.5, (94.2, 92.3), (93.5, 93.1), (76.4, 90.9)),
    _leader(2, "JDExplore d-team", "Vega v1", 91.3, 73.8, 97.9, (94.5, 92.6), (93.5, 93.1), (76.7, 91.1)),
    _leader(3, "Microsoft Alexander v-team", "Turing NLR v5", 91.2, 72.6, 97.6, (93.8, 91.7), (93.7, 93.3), (76.4, 91.1)),
    _leader(4, "DIRL Team", "DeBERTa + CLEVER", 91.1, 74.7, 97.6, (93.3, 91.1), (93.4, 93.1), (76.5, 91.0)),
    _leader(5, "ERNIE Team - Baidu", "ERNIE", 91.1, 75.5, 97.8, (93.9, 91.8), (93.0, 92.6), (75.2, 90.9)),
    _leader(6, "AliceMind & DIRL", "StructBERT + CLEVER", 91.0, 75.3, 97.7, (93.9, 91.9), (93.5, 93.1), (75.6, 90.8)),
    _leader(7, "DeBERTa Team - Microsoft", "DeBERTa / TuringNLRv4", 90.8, 71.5, 97.5, (94.0, 92.0), (92.9, 92.6), (76.2, 90.8)),
    _leader(8, "HFL iFLYTEK", "MacALBERT + DKM", 90.7, 74.8, 97.0, (94.5, 92.6), (92.8, 92.6), (74.7, 90.6)),
    _leader(9, "PING-AN Omni-Sinitic", "ALBERT + DAAF + NAS", 90.6, 73.5, 97.2, (94.0, 92.0), (93.0, 92.4), (76.1, 91.0)),
    _leader(10, "T5 Team - Google", "T5", 90.3, 71.6, 97.5, (92.8, 90.4), (93.1, 92.8), (75.1, 90.6)),
    _leader(11, "Microsoft D365 AI & MSR AI & GATECH", "MT-DNN-SMART", 89.9, 69.5, 97.5, (93.7, 91.6), (92.9, 92.5), (73.9, 90.2)),
    _leader(12, "Huawei Noah's Ark Lab", "NEZHA-Large", 89.8, 71.7, 97.3, (93.3, 91.0), (92.4, 91.9), (75.2, 90.7)),
    _leader(13, "LG AI Research", "ANNA", 89.8, 68.7, 97.0, (92.7, 90.1), (93.0, 92.8), (75.3, 90.5)),
)
