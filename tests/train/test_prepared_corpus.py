"""Training on a folder of ``fastbert prepare``: its tokenizer, its held-out text, its shards, and what it has decided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fastbert.data.errors import TokenizerError
from fastbert.data.shards import open_shards
from fastbert.prepare.run import prepare
from fastbert.prepare.settings import PrepareSettings
from fastbert.runs.errors import SettingsError, TrainingInterrupted
from fastbert.train.pretrain import pretrain

from .runs import quiet, rows_without_speed, same_weights, stop_at


def prepared(corpus: Path, folder: Path, **changes) -> str:
    values = {"vocab_size": 200, "held_out_fraction": 0.2, "tokens_per_shard": 2000, "workers": 1}
    prepare(PrepareSettings(corpus=(str(corpus),), output=str(folder), **{**values, **changes}), quiet)
    return str(folder)


@pytest.fixture(scope="module")
def folder(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared(toy_corpus, tmp_path_factory.mktemp("corpora") / "prepared")


DECIDED = {"vocab_size": None, "held_out_fraction": None}


def test_a_run_on_shards(toy_settings, folder, tmp_path, monkeypatch):
    """Stopped in the middle and continued, too."""
    shards = open_shards(folder)
    assert len(shards) > 2
    straight = toy_settings(output=str(tmp_path / "straight"), corpus=(folder,), **DECIDED)
    result = pretrain(straight, quiet)
    assert result.data["train_tokens"] == shards.num_tokens and result.data["held_out_tokens"] == shards.held_out.num_tokens
    assert result.data["documents"] == 60 and result.data["fingerprint"] == shards.fingerprint
    assert AutoTokenizer.from_pretrained(straight.output).get_vocab() == shards.load_tokenizer().get_vocab()
    assert "60 documents" in (Path(straight.output) / "README.md").read_text(encoding="utf-8")

    stopped = toy_settings(output=str(tmp_path / "stopped"), corpus=(folder,), **DECIDED)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(TrainingInterrupted):
            pretrain(stopped, quiet)
    pretrain(toy_settings(output=stopped.output, corpus=(folder,), resume=True, **DECIDED), quiet)
    assert same_weights(straight.output, stopped.output)
    assert rows_without_speed(straight.output) == rows_without_speed(stopped.output)


def test_what_the_folder_has_decided_is_refused(toy_settings, folder, toy_corpus):
    with pytest.raises(SettingsError, match=r"--vocab-size, --held-out-fraction, --text-column: decided when"):
        pretrain(toy_settings(corpus=(folder,), text_column="body"), quiet)
    for sources in ((folder, folder), (str(toy_corpus), folder)):
        with pytest.raises(SettingsError, match="stands alone"):
            pretrain(toy_settings(corpus=sources, **DECIDED), quiet)


def test_another_tokenizer_is_refused(toy_settings, folder, toy_corpus, tmp_path):
    settings = toy_settings(corpus=(folder,), tokenizer=folder, steps=1, **DECIDED)
    assert pretrain(settings, quiet).steps == 1
    text = tmp_path / "other.txt"
    text.write_text("\n\n".join(f"Quite other words, number {n} of many." for n in range(30)), encoding="utf-8")
    other = prepared(text, tmp_path / "other")
    with pytest.raises(TokenizerError, match="prepared with the tokenizer"):
        pretrain(toy_settings(output=str(tmp_path / "run2"), corpus=(folder,), tokenizer=other, **DECIDED), quiet)
    with pytest.raises(SettingsError, match="cannot resume"):
        pretrain(toy_settings(corpus=(other,), tokenizer=folder, steps=1, resume=True, **DECIDED), quiet)


@pytest.mark.parametrize(
    ("fraction", "documents", "objective", "least"), [(0.0, 0, "mlm", 1), (0.0, 0, "mlm-nsp", 2), (0.035, 1, "mlm-nsp", 2)]
)
def test_held_out_text_is_needed(toy_settings, toy_corpus, tmp_path, fraction, documents, objective, least):
    folder = prepared(toy_corpus, tmp_path / "prepared", held_out_fraction=fraction)
    message = f"prepared with {documents} held-out documents; .* at least {least} with --objective {objective}: prepare it anew"
    with pytest.raises(SettingsError, match=message):
        pretrain(toy_settings(corpus=(folder,), objective=objective, **DECIDED), quiet)
    assert not Path(toy_settings().output).exists()


def test_a_corpus_prepared_anew_is_another_text(toy_settings, toy_corpus, tmp_path, monkeypatch):
    folder = prepared(toy_corpus, tmp_path / "prepared")
    stop_at(monkeypatch, 2)
    with pytest.raises(TrainingInterrupted):
        pretrain(toy_settings(corpus=(folder,), **DECIDED), quiet)
    prepared(toy_corpus, tmp_path / "prepared", held_out_fraction=0.3, overwrite=True)
    with pytest.raises(SettingsError, match="cannot resume with another text"):
        pretrain(toy_settings(corpus=(folder,), resume=True, **DECIDED), quiet)
    assert json.loads((Path(toy_settings().output) / "run.json").read_text())["results"] is None
