"""The BERT of Hugging Face transformers, only faster: same classes, same checkpoints, same numbers.

``from transformers import BertModel`` becomes ``from fastbert import BertModel``. Names are imported when they are first used:
transformers takes seconds to import, and the command line must not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BertConfig": "transformers",
    "BertModel": "fastbert.model.bert",
    "BertForPreTraining": "fastbert.model.lm_heads",
    "BertForMaskedLM": "fastbert.model.lm_heads",
    "BertLMHeadModel": "fastbert.model.lm_heads",
    "BertForNextSentencePrediction": "fastbert.model.heads",
    "BertForSequenceClassification": "fastbert.model.heads",
    "BertForMultipleChoice": "fastbert.model.heads",
    "BertForTokenClassification": "fastbert.model.heads",
    "BertForQuestionAnswering": "fastbert.model.heads",
    "accelerate": "fastbert.model.accelerate",
    "restore": "fastbert.model.accelerate",
    "quantize": "fastbert.model.quantize",
    "explain": "fastbert.model.explain",
    "refresh": "fastbert.model.refresh",
    "register": "fastbert.model.register",
    "unregister": "fastbert.model.register",
    "DataCollatorWithPacking": "fastbert.data.collator",
    "Predictor": "fastbert.tasks.predictor",
    "Embedder": "fastbert.features.embedder",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from transformers import BertConfig

    from .data.collator import DataCollatorWithPacking
    from .features.embedder import Embedder
    from .model.accelerate import accelerate, restore
    from .model.bert import BertModel
    from .model.explain import explain
    from .model.heads import (
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )
    from .model.lm_heads import BertForMaskedLM, BertForPreTraining, BertLMHeadModel
    from .model.quantize import quantize
    from .model.refresh import refresh
    from .model.register import register, unregister
    from .tasks.predictor import Predictor


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
