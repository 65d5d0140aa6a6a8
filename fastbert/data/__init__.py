"""Text to packed pretraining batches, one module a step.

``corpus`` (documents of paragraphs) -> ``sentences`` -> ``tokenizer`` (WordPiece) -> ``tokens`` (the corpus as numpy arrays)
-> ``pairs`` (sentence pairs for next sentence prediction) -> ``masking`` (masked language model) -> ``batches``.
Everything random is drawn from (seed, epoch, batch) and nothing else, so a run can be repeated and resumed. ``collator`` packs
the batches of transformers' Trainer.
"""

from __future__ import annotations

from typing import Any

__all__ = ["DataCollatorWithPacking"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastbert.data' has no attribute {name!r}")
    from .collator import DataCollatorWithPacking  # transformers takes seconds to import

    return DataCollatorWithPacking
