"""Domain adaptation: a checkpoint that knows the domain's text better, and a report of what that is worth."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError

import fastbert
from fastbert.data.errors import CorpusError
from fastbert.data.tokens import TokenizedCorpus
from fastbert.finetune import adapt as module
from fastbert.finetune import run as finetune_module
from fastbert.finetune.adapt import ADAPTATION_NAME, adapt, effect, sequences
from fastbert.finetune.run import finetune
from fastbert.finetune.settings import FinetuneSettings
from fastbert.runs.errors import SettingsError, TrainingError

from ..toys import BAD, GOOD, NOUNS


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 documents in which every noun has one adjective."""
    draw = random.Random(0)
    adjective = dict(zip(NOUNS, GOOD + BAD, strict=False))
    documents = []
    for _ in range(40):
        nouns = draw.choices(NOUNS, k=12)
        documents.append(" ".join(f"the {noun} is {adjective[noun]} ." for noun in nouns))
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def run(toy_model, corpus, output, **changes):
    said: list[str] = []
    options = {"steps": 60, "max_seq_length": 32, "batch_size": 8, "learning_rate": 1e-2, "say": said.append, **changes}
    return adapt(str(toy_model), [str(corpus)], output, **options), said


def test_documents_are_cut_into_sequences_of_about_the_same_length(toy_tokenizer):
    sizes = [1, 30, 31, 100, 5]
    ids = np.arange(sum(sizes)).astype(np.uint16)
    # Sentences of one token each.
    corpus = TokenizedCorpus(ids, np.arange(len(ids) + 1), np.cumsum([0, *sizes]))
    rows = sequences(corpus, toy_tokenizer, 32)
    lengths = [len(row["input_ids"]) - 2 for row in rows]
    assert lengths == [1, 30, 16, 15, 25, 25, 25, 25, 5]
    assert np.array_equal(np.concatenate([row["input_ids"][1:-1] for row in rows]), ids)
    assert {int(row["input_ids"][0]) for row in rows} == {toy_tokenizer.cls_token_id}
    assert {int(row["input_ids"][-1]) for row in rows} == {toy_tokenizer.sep_token_id}


def test_it_learns_the_domain_and_leaves_a_checkpoint(toy_model, corpus, tmp_path):
    output = tmp_path / "adapted"
    result, said = run(toy_model, corpus, output)
    assert result.after["loss"] < result.before["loss"] - 0.5
    assert result.after["accuracy"] > result.before["accuracy"]
    assert result.steps == 60 and result.documents == 40 and result.tokens_per_second > 0
    assert result.held_out_tokens / (result.train_tokens + result.held_out_tokens) == pytest.approx(0.05, abs=0.03)
    assert "loss" in said[-1] and f"{result.after['loss']:.3f}" in said[-1]
    assert json.loads((output / ADAPTATION_NAME).read_text(encoding="utf-8")) == result.to_dict()

    # The checkpoint had no head, and was told so; what it had besides the encoder is still there.
    (note,) = result.notes
    assert "cls.predictions.transform.dense.weight" in note and "table of word embeddings" in note
    assert any(note in line for line in said)
    before, after = (fastbert.BertModel.from_pretrained(folder) for folder in (toy_model, output))
    assert torch.equal(before.pooler.dense.weight, after.pooler.dense.weight)
    assert not torch.equal(before.encoder.layer[0].output.dense.weight, after.encoder.layer[0].output.dense.weight)
    theirs, loading = transformers.BertForMaskedLM.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"]
    assert len(transformers.AutoTokenizer.from_pretrained(output)) == theirs.config.vocab_size
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())

    # It goes on from there, and this time there is a head.
    again, _ = run(output, corpus, tmp_path / "again", steps=1)
    assert again.notes == []
    assert again.before == pytest.approx(result.after)


def test_before_and_after_are_scored_on_the_same_masks(toy_model, corpus, tmp_path):
    result, _ = run(toy_model, corpus, tmp_path / "adapted", steps=2, learning_rate=1e-30)
    assert result.after == result.before


def test_an_epoch_where_no_steps_are_named(toy_model, corpus, tmp_path):
    result, _ = run(toy_model, corpus, tmp_path / "adapted", steps=None)
    assert result.epochs == 1.0
    assert 1 < result.steps < 60


def test_a_new_head_learns_alone_at_first(toy_model, corpus, tmp_path, monkeypatch):
    before = fastbert.BertModel.from_pretrained(toy_model).state_dict()

    def same_encoder(folder: Path) -> bool:
        return all(torch.equal(x, before[name]) for name, x in fastbert.BertModel.from_pretrained(folder).state_dict().items())

    with monkeypatch.context() as patched:
        patched.setattr(module, "HEAD_FIRST", 1.0)
        run(toy_model, corpus, tmp_path / "head", steps=6)
    assert same_encoder(tmp_path / "head")
    scales = transformers.BertForMaskedLM.from_pretrained(tmp_path / "head").cls.predictions.transform.LayerNorm.weight
    assert not torch.equal(scales, torch.ones_like(scales))
    run(toy_model, corpus, tmp_path / "few", steps=2)
    assert not same_encoder(tmp_path / "few")
    # A head that was there already needs no such time.
    with monkeypatch.context() as patched:
        patched.setattr(module, "HEAD_FIRST", 1.0)
        run(tmp_path / "head", corpus, tmp_path / "both", steps=6)
    assert not same_encoder(tmp_path / "both")


def test_an_interrupted_run_leaves_no_checkpoint(toy_model, corpus, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.BertForMaskedLM, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(toy_model, corpus, tmp_path / "adapted", steps=1)
    assert not (tmp_path / "adapted").exists()


def test_a_full_disk_is_named_and_nothing_is_left(toy_model, corpus, tmp_path, monkeypatch):
    def full(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(module.BertForMaskedLM, "save_pretrained", full)
    with pytest.raises(TrainingError, match="adapted cannot be written to: .*No space left on device .* MB are free there"):
        run(toy_model, corpus, tmp_path / "adapted", steps=1)
    assert not [path for path in tmp_path.iterdir() if "adapted" in path.name]


def test_what_cannot_be_adapted(toy_model, corpus, tmp_path):
    roberta = tmp_path / "roberta"
    transformers.RobertaConfig().save_pretrained(roberta)
    for path in toy_model.glob("*token*"):
        (roberta / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SettingsError, match="'roberta'"):
        run(roberta, corpus, tmp_path / "adapted")
    with pytest.raises(SettingsError, match="positions for 64 tokens"):
        run(toy_model, corpus, tmp_path / "adapted", max_seq_length=65)
    with pytest.raises(CorpusError, match="nowhere.txt: no such file"):
        run(toy_model, tmp_path / "nowhere.txt", tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


def test_effect_is_the_difference_of_means():
    without = {"dev": {"accuracy": {"mean": 0.5, "std": 0.1, "values": [0.4, 0.6]}}}
    adapted = {"dev": {"accuracy": {"mean": 0.75, "std": 0.0, "values": [0.75, 0.75]}}}
    said: list[str] = []
    scores = effect(without, adapted, said.append)["dev"]["accuracy"]
    assert scores["difference"] == 0.25 and scores["differences"] == pytest.approx([0.35, 0.15])
    assert said == ["dev accuracy: 0.5000 without adaptation, 0.7500 with it (+0.2500)"]


def test_finetune_adapts_first_and_reports_the_effect(toy_model, sentiment_folder, corpus, tmp_path, monkeypatch):
    values = {
        "task": "sentiment", "model": str(toy_model), "data": str(sentiment_folder), "output": str(tmp_path / "run"), "epochs": 1,
        "batch_size": 16, "learning_rate": 1e-2, "device": "cpu", "adapt": (str(corpus),), "adapt_steps": 3,
    }  # fmt: skip
    result = finetune(FinetuneSettings(**values), lambda line: None)
    assert result.adaptation["steps"] == 3
    plain = finetune(
        FinetuneSettings(**{**values, "adapt": (), "adapt_steps": None, "output": str(tmp_path / "plain")}), lambda line: None
    )
    accuracy = result.adaptation["effect"]["dev"]["accuracy"]
    assert accuracy["without"] == plain.scores["dev"]["accuracy"]["mean"]
    assert accuracy["adapted"] == result.scores["dev"]["accuracy"]["mean"]
    adapted = fastbert.BertModel.from_pretrained(tmp_path / "run" / "adapted")
    assert not torch.equal(adapted.pooler.dense.weight, fastbert.BertModel.from_pretrained(tmp_path / "run").pooler.dense.weight)
    written = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert written["results"]["adaptation"] == result.adaptation
    assert written["settings"]["model"] == str(toy_model)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    after = f"to {result.adaptation['after']['loss']:.3f}"
    assert f"went on with `{corpus.name}`: 3 steps on {result.adaptation['train_tokens']:,} tokens" in card and after in card

    # A corpus that cannot be read ends a run before anything is trained.
    monkeypatch.setattr(finetune_module, "train_seed", None)
    with pytest.raises(CorpusError, match="nowhere"):
        finetune(FinetuneSettings(**{**values, "adapt": ("nowhere.txt",), "output": str(tmp_path / "bad")}), lambda line: None)
    # A run that is continued does nothing again.
    monkeypatch.setattr(finetune_module, "adapt", None)
    more = finetune(FinetuneSettings(**values, resume=True, seeds=(0,)), lambda line: None)
    assert more.adaptation == result.adaptation


@pytest.fixture
def to_adapt(toy_model, sentiment_folder, corpus, tmp_path) -> FinetuneSettings:
    return FinetuneSettings(
        task="sentiment", model=str(toy_model), data=str(sentiment_folder), output=str(tmp_path / "run"), max_steps=1,
        batch_size=16, device="cpu", adapt=(str(corpus),), adapt_steps=1,
    )  # fmt: skip


@pytest.fixture
def adapted_run(to_adapt) -> FinetuneSettings:
    """Of a run that is finished."""
    finetune(to_adapt, lambda line: None)
    return to_adapt


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(settings: FinetuneSettings) -> list[str]:
    said: list[str] = []
    finetune(replace(settings, resume=True), said.append)
    return said


def test_a_run_is_not_resumed_on_another_corpus(adapted_run, corpus, monkeypatch):
    monkeypatch.setattr(finetune_module, "adapt", None)
    resume(adapted_run)
    text, before = corpus.read_text(encoding="utf-8"), contents(Path(adapted_run.output))
    # As many documents and tokens, and one document more.
    for changed, documents in ((text.replace("film", "book", 1), 40), (text + "\nthe end .\n", 41)):
        corpus.write_text(changed, encoding="utf-8")
        with pytest.raises(SettingsError) as refusal:
            resume(adapted_run)
        message = str(refusal.value)
        assert f"--adapt {corpus} is no longer what {Path(adapted_run.output) / 'adapted'} was adapted to" in message
        assert "It had 40 documents" in message and f"it now has {documents} documents" in message
        assert "put the earlier text back, or --overwrite starts the run anew" in message
        assert contents(Path(adapted_run.output)) == before
    corpus.write_bytes(b"\xff\n\nthe end .\n")
    with pytest.raises(CorpusError, match="corpus.txt"):
        resume(adapted_run)
    corpus.write_text(text.replace(" ", "  "), encoding="utf-8")  # the same tokens
    resume(adapted_run)


def test_a_corpus_that_cannot_be_compared_is_no_obstacle(adapted_run, corpus, monkeypatch):
    """It is gone, or the run is of a version that kept no fingerprint: what was adapted before is taken."""
    monkeypatch.setattr(finetune_module, "adapt", None)
    folder = Path(adapted_run.output) / "adapted"
    corpus.rename(corpus.with_name("elsewhere.txt"))
    assert f"--adapt {corpus}: no file or folder to compare with; {folder} is taken as it was adapted before" in resume(adapted_run)
    document = json.loads((folder / ADAPTATION_NAME).read_text(encoding="utf-8"))
    del document["fingerprint"]
    (folder / ADAPTATION_NAME).write_text(json.dumps(document), encoding="utf-8")
    corpus.write_text("another\n\ntext\n", encoding="utf-8")
    assert not any(str(corpus) in line for line in resume(adapted_run))


def test_an_adaptation_that_was_stopped_begins_anew_with_the_corpus_as_it_is(to_adapt, corpus, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module.BertForMaskedLM, "save_pretrained", interrupted)
        finetune(to_adapt, lambda line: None)
    corpus.write_text(corpus.read_text(encoding="utf-8") + "\nthe end .\n", encoding="utf-8")
    said = resume(to_adapt)
    assert "The run was stopped before the checkpoint was adapted: that begins anew, with the corpus as it is now" in said
    written = json.loads((Path(to_adapt.output) / "adapted" / ADAPTATION_NAME).read_text(encoding="utf-8"))
    assert written["documents"] == 41
    resume(to_adapt)  # and that text is what it is compared with from now on
