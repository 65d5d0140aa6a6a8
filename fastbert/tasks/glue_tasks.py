"""The nine tasks of GLUE (Wang et al. 2019, https://gluebenchmark.com/tasks): their columns, labels, metrics and file names.

Everything that the tasks differ in stands in :data:`GLUE_TASKS`; nothing here imports torch, transformers or numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastbert.runs.errors import SettingsError


@dataclass(frozen=True)
class GlueTask:
    """``name``: as ``--task`` gives it; ``title``: GLUE's own, which is also the name of its folder.

    ``texts``: the columns of the text or the pair, the same in every split. ``label``: the column of train and dev, which test
    files lack. ``labels``: the classes by their number, in the order of GLUE's official label set; empty where the task is to
    give a number within ``label_range``. ``metrics``: GLUE's, under the names of :mod:`fastbert.tasks.metrics`; a task's score is
    their mean. ``main_metric``: the one that chooses the best checkpoint (STS-B's is the mean of both).
    ``header``: the columns of train and dev where these files have no header line. ``index``: the column of test files that
    numbers their rows. ``dev``: the names of the splits that are scored. ``test``: the test splits and, for each, the name of
    its file in a submission. ``broken_rows``: whether GLUE's own files hold rows that a line end within a text has cut in two.
    """

    name: str
    title: str
    texts: tuple[str] | tuple[str, str]
    metrics: tuple[str, ...]
    main_metric: str
    label: str = "label"
    labels: tuple[str, ...] = ("0", "1")
    label_range: tuple[float, float] | None = None
    header: tuple[str, ...] | None = None
    index: str = "index"
    dev: tuple[str, ...] = ("dev",)
    test: tuple[tuple[str, str], ...] = ()
    broken_rows: bool = False

    @property
    def submissions(self) -> dict[str, str]:
        """For each test split the name of its file in a submission, without ``.tsv``."""
        return dict(self.test or (("test", self.title),))

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", *self.dev, *self.submissions)


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_ACCURACY = {"metrics": ("accuracy",), "main_metric": "accuracy"}
_F1_ACCURACY = {"metrics": ("f1", "accuracy"), "main_metric": "f1"}

# The diagnostic set: a test set for the MNLI model, which does not count for the GLUE score. GLUE's download script puts it into a
# folder beside MNLI's, the data server calls it AX.tsv.
AX_SPLIT = "ax"
AX_PATHS = ("diagnostic/diagnostic.tsv", "AX/diagnostic.tsv", "AX/test.tsv", "AX/AX.tsv", "AX.tsv")

# In the order of GLUE's leaderboard.
GLUE_TASKS = (
    GlueTask(
        "cola", "CoLA", ("sentence",), ("matthews_correlation",), "matthews_correlation",
        header=("source", "label", "original_mark", "sentence"),
    ),
    GlueTask("sst2", "SST-2", ("sentence",), **_ACCURACY),
    GlueTask("mrpc", "MRPC", ("#1 String", "#2 String"), **_F1_ACCURACY, label="Quality"),
    GlueTask("stsb", "STS-B", _PAIR, ("pearson", "spearman"), "pearson_spearman", label="score", labels=(), label_range=(0.0, 5.0)),
    GlueTask("qqp", "QQP", ("question1", "question2"), **_F1_ACCURACY, label="is_duplicate", index="id", broken_rows=True),
    GlueTask(
        "mnli", "MNLI", _PAIR, **_ACCURACY, label="gold_label", labels=("entailment", "neutral", "contradiction"),
        dev=("dev_matched", "dev_mismatched"), test=(("test_matched", "MNLI-m"), ("test_mismatched", "MNLI-mm"), (AX_SPLIT, "AX")),
    ),
    GlueTask("qnli", "QNLI", ("question", "sentence"), **_ACCURACY, labels=_ENTAILMENT),
    GlueTask("rte", "RTE", _PAIR, **_ACCURACY, labels=_ENTAILMENT),
    GlueTask("wnli", "WNLI", _PAIR, **_ACCURACY),
)  # fmt: skip

# All files of a submission, in the order of the leaderboard: the server refuses a zip without one of them.
SUBMISSION_NAMES = tuple(name for task in GLUE_TASKS for name in task.submissions.values())


def _key(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


_BY_KEY = {_key(task.title): task for task in GLUE_TASKS}


def is_glue_task(name: str) -> bool:
    return _key(name) in _BY_KEY


def glue_task(name: str) -> GlueTask:
    """The task of a name in any spelling: ``sst2``, ``sst-2``, ``SST-2``, ``SST_2``.

    Raises SettingsError for a name that is none of the nine.
    """
    if not is_glue_task(name):
        raise SettingsError(f"{name!r} is no task of GLUE; there are {', '.join(task.name for task in GLUE_TASKS)}")
    return _BY_KEY[_key(name)]
