"""A checkpoint that says how its embeddings are made: the command tells who makes others."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fastbert.features.sentence_transformers_settings import checkpoint_hint

START = "This is a checkpoint of sentence-transformers"
TRAINED = f"{START}; the embeddings that it was trained for come with"


def embedder(**settings) -> SimpleNamespace:
    return SimpleNamespace(**{"level": "sequence", "pooling": "mean", "normalize": False, "max_seq_length": 512, **settings})


def save(folder, *modules: str, pooling: dict | None = None, longest: int | None = None) -> str:
    entries = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}" if i else ""} for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries), encoding="utf-8")
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    if longest is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}), encoding="utf-8")
    return str(folder)


def test_minilm(minilm):
    assert checkpoint_hint(str(minilm), embedder()) == f"{TRAINED} --normalize --max-seq-length 256"
    assert checkpoint_hint(str(minilm), embedder(normalize=True, max_seq_length=256)) is None
    cls = embedder(normalize=True, max_seq_length=256, pooling="cls")
    assert checkpoint_hint(str(minilm), cls) == f"{TRAINED} --pooling mean"
    assert checkpoint_hint(str(minilm), embedder(level="token", pooling=None)) is None


@pytest.mark.parametrize("pooling", [{"pooling_mode": "cls"}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}])
def test_both_forms_of_the_pooling_file(tmp_path, pooling):
    name = save(tmp_path, "Transformer", "Pooling", pooling=pooling)
    assert checkpoint_hint(name, embedder()) == f"{TRAINED} --pooling cls"
    assert checkpoint_hint(name, embedder(pooling="cls")) is None


def test_what_only_sentence_transformers_has(tmp_path):
    name = save(tmp_path, "Transformer", "Pooling", "Dense", pooling={"pooling_mode": ["mean", "max"]})
    assert checkpoint_hint(name, embedder()) == f"{START}; only sentence-transformers itself has its Dense, pooling by mean and max"


def test_other_checkpoints(tmp_path):
    assert checkpoint_hint(str(tmp_path), embedder()) is None
    (tmp_path / "modules.json").write_text("{", encoding="utf-8")
    assert checkpoint_hint(str(tmp_path), embedder()) is None
