"""What the files of sentence-transformers beside a checkpoint say about its embeddings: pooling, normalization, longest text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers.utils import cached_file

from .embed import Embedder

_MODES = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}


def checkpoint_hint(name: str, embedder: Embedder) -> str | None:
    """How ``embedder`` differs from what the checkpoint ``name`` (a folder, or on the hub) was trained to give as embeddings of
    texts; None where it does not, or the checkpoint is none of sentence-transformers."""
    modules = _read(name, "modules.json")
    if embedder.level != "sequence" or not isinstance(modules, list):
        return None
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    pooling = _pooling(_read(name, f"{modules[kinds.index('Pooling')].get('path')}/config.json")) if "Pooling" in kinds else []
    longest = (_read(name, "sentence_bert_config.json") or {}).get("max_seq_length")
    others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]

    changes = []
    if pooling != [embedder.pooling] and len(pooling) == 1 and pooling[0] in _MODES.values():
        changes.append(f"--pooling {pooling[0]}")
    elif pooling != [embedder.pooling] and pooling:
        others.append(f"pooling by {' and '.join(pooling)}")
    if "Normalize" in kinds and not embedder.normalize:
        changes.append("--normalize")
    if longest is not None and longest != embedder.max_seq_length:
        changes.append(f"--max-seq-length {longest}")
    if not (changes or others):
        return None
    hint = "This is a checkpoint of sentence-transformers"
    if changes:
        hint += f"; the embeddings that it was trained for come with {' '.join(changes)}"
    return hint + (f"; only sentence-transformers itself has its {', '.join(others)}" if others else "")


def _pooling(config: dict[str, Any] | None) -> Sequence[str]:
    """The modes of its pooling, by our names where there is one."""
    config = config or {}
    if "pooling_mode" in config:  # since sentence-transformers 5
        mode = config["pooling_mode"]
        return [mode] if isinstance(mode, str) else list(mode)
    prefix = "pooling_mode_"
    names = [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value is True]
    return [_MODES.get(name, name) for name in names]


def _read(name: str, file: str) -> Any:
    """A JSON file of the checkpoint; None where there is none, or it is none."""
    try:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
        if path is None:
            return None
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return None
