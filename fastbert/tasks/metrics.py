"""Scores of predictions: scikit-learn's, scipy's and seqeval's, as plain numbers from 0 to 1 (correlations from -1).

A correlation of something that never changes is undefined; it counts as 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastbert.runs.errors import SettingsError

# Those of each kind that are better when higher; the first is the usual one.
CLASSIFICATION = ("accuracy", "f1", "f1_macro", "matthews_correlation")
MULTI_LABEL = ("f1_micro", "f1_macro", "accuracy")
REGRESSION = ("pearson_spearman", "pearson", "spearman")
ENTITIES = ("f1", "precision", "recall", "accuracy")
TAGS = ("accuracy", "f1_macro")


def classification_scores(predicted: NDArray[np.integer], labels: NDArray[np.integer], num_labels: int) -> dict[str, float]:
    """accuracy, f1 (of class 1 where there are two classes, else the mean over classes), f1_macro, matthews_correlation.

    predicted, labels: (n,) class numbers. A class that is in neither counts as 0 in the means, which are over all ``num_labels``.
    """
    metrics = optional("sklearn.metrics")
    classes = list(range(num_labels))
    f1_macro = metrics.f1_score(labels, predicted, labels=classes, average="macro", zero_division=0)
    f1 = metrics.f1_score(labels, predicted, labels=classes, zero_division=0) if num_labels == 2 else f1_macro
    varied = np.ptp(labels) > 0 and np.ptp(predicted) > 0  # of one class throughout scikit-learn warns
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1": float(f1),
        "f1_macro": float(f1_macro),
        "matthews_correlation": float(metrics.matthews_corrcoef(labels, predicted)) if varied else 0.0,
    }


def multi_label_scores(predicted: NDArray[np.bool_], labels: NDArray[np.bool_]) -> dict[str, float]:
    """f1_micro, f1_macro and accuracy (the share of examples of which all labels are right). predicted, labels: (n, k)."""
    metrics = optional("sklearn.metrics")
    # Of a single column scikit-learn makes two classes, among which "not the label" would count, too; of several it counts columns.
    counted = [1] if labels.shape[1] == 1 else None
    return {
        "f1_micro": float(metrics.f1_score(labels, predicted, labels=counted, average="micro", zero_division=0)),
        "f1_macro": float(metrics.f1_score(labels, predicted, labels=counted, average="macro", zero_division=0)),
        "accuracy": float((predicted == labels).all(axis=1).mean()),
    }


def regression_scores(predicted: NDArray[np.floating], values: NDArray[np.floating]) -> dict[str, float]:
    """pearson and spearman (0 where either side is constant), their mean, and the mean squared error. predicted, values: (n,)."""
    stats = optional("scipy.stats")
    correlations = {"pearson": 0.0, "spearman": 0.0}
    if len(values) > 1 and np.ptp(predicted) > 0 and np.ptp(values) > 0:
        correlations = {
            "pearson": float(stats.pearsonr(predicted, values)[0]),
            "spearman": float(stats.spearmanr(predicted, values)[0]),
        }
    return {
        **correlations,
        "pearson_spearman": sum(correlations.values()) / 2,
        "mean_squared_error": float(np.square(predicted - values).mean()),
    }


def entity_scores(predicted: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of whole entities, as CoNLL counts them (type and both ends right): precision, recall, f1; accuracy is of single words.

    predicted, tags: BIO tags of each sentence, of equal lengths.
    """
    seqeval = optional("seqeval.metrics")
    predicted, tags = [list(x) for x in predicted], [list(x) for x in tags]
    return {
        "precision": float(seqeval.precision_score(tags, predicted, zero_division=0)),
        "recall": float(seqeval.recall_score(tags, predicted, zero_division=0)),
        "f1": float(seqeval.f1_score(tags, predicted, zero_division=0)),
        "accuracy": float(seqeval.accuracy_score(tags, predicted)),
    }


def optional(module: str):
    """A module of the packages that scores need. Raises SettingsError, saying what to install, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(name := module.partition(".")[0], name)
        raise SettingsError(f"scores need {package}: pip install 'fastbert[eval]'") from error
