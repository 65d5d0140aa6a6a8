"""transformers' Trainer with fastbert's models, through both doors and with padded and packed batches."""

from __future__ import annotations

import copy
import functools
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

from fastbert import DataCollatorWithPacking

from ..data.helpers import story
from ..model.helpers import NUM_LABELS, rows_of_layers
from .helpers import DOORS, fast, plain, small_tokenizer

NAMES = ("BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM", "BertForQuestionAnswering")
COLLATORS = ("padded", "packed")


@pytest.fixture(autouse=True, scope="module")
def _fewer_objects_to_collect():
    """Each training collects garbage, which takes a second for what a test session has imported and keeps."""
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def examples(name: str, count: int, seed: int = 0) -> list[dict]:
    """``count`` features for the class ``name``, of 4 to 60 tokens, with labels; those of a masked language model are fixed."""
    tokenizer, draw = small_tokenizer(), np.random.default_rng(seed)
    features = []
    for number in range(count):
        text = story(seed * 1000 + number, 1).paragraphs[0]
        words = text.split()[: int(draw.integers(1, 30))]
        feature = dict(tokenizer(" ".join(words), truncation=True, max_length=60))
        ids = feature["input_ids"]
        inner = draw.integers(0, NUM_LABELS, len(ids) - 2).tolist()
        if name == "BertForTokenClassification":
            feature["labels"] = [-100, *inner, -100]
        elif name == "BertForMaskedLM":
            feature["labels"] = [token if i % 3 == 1 else -100 for i, token in enumerate(ids)]
        elif name == "BertForQuestionAnswering":
            start, end = sorted(draw.integers(0, len(ids), 2).tolist())
            feature |= {"start_positions": start, "end_positions": end}
        else:
            feature["label"] = int(draw.integers(NUM_LABELS))
        features.append(feature)
    return features


def collator(kind: str, name: str):
    if kind == "packed":
        return DataCollatorWithPacking()
    per_token = name in ("BertForTokenClassification", "BertForMaskedLM")
    return (DataCollatorForTokenClassification if per_token else DataCollatorWithPadding)(small_tokenizer())


def small(name: str, **changes) -> nn.Module:
    """transformers' class ``name`` for :func:`examples`, without dropout."""
    torch.manual_seed(4)
    sizes = {"vocab_size": len(small_tokenizer()), "max_position_embeddings": 64, "num_hidden_layers": 2}
    return plain(name, **{**sizes, **changes})


def trainer_for(model: nn.Module, folder: Path, kind: str = "padded", *, trainer_class=Trainer, **changes) -> Trainer:
    """A Trainer of ``model``, which has the name of transformers' class; ``changes`` are of TrainingArguments or of Trainer."""
    name = type(model).__name__
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1, "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.1, "seed": 7, "max_steps": 4,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 5,
    }  # fmt: skip
    of_trainer = {
        "train_dataset": examples(name, 24), "eval_dataset": examples(name, 12, seed=1), "data_collator": collator(kind, name),
    }  # fmt: skip
    for key, value in changes.items():
        (arguments if key in TrainingArguments.__dataclass_fields__ else of_trainer)[key] = value
    return trainer_class(model, TrainingArguments(**arguments), **of_trainer)


def logged(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def train(model: nn.Module, folder: Path, kind: str = "padded", **changes) -> list[float]:
    """Trains ``model`` and returns the logged losses."""
    trainer = trainer_for(model, folder, kind, **changes)
    trainer.train()
    return logged(trainer)


def assert_same_parameters(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=0.0, msg=lambda text, name=name: f"{name}: {text}")


def plain_loop(model: nn.Module, batches: list[dict]) -> list[float]:
    """What :func:`train` does, written out: SGD on whole batches, gradients clipped to norm 1."""
    optimizer, losses = torch.optim.SGD(model.train().parameters(), lr=0.1), []
    for batch in batches:
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


# --- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COLLATORS)
@pytest.mark.parametrize("door", DOORS)
def test_gradient_accumulation(door, kind, tmp_path):
    """Loss and parameters are those of one batch of four times the size, and of a loop without Trainer."""
    theirs = small("BertForSequenceClassification")
    whole, accumulated, looped = (fast(theirs, door) for _ in range(3))
    expected = train(whole, tmp_path, kind)
    got = train(accumulated, tmp_path, kind, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_same_parameters(accumulated, whole, 1e-5)
    trainer = trainer_for(looped, tmp_path, "padded")
    transformers.set_seed(7)
    loader = trainer.get_train_dataloader()
    np.testing.assert_allclose(plain_loop(looped, [*loader, *loader][:4]), expected, rtol=1e-5)
    assert not torch.equal(next(whole.parameters()), next(theirs.parameters())), "something was learnt"


@pytest.mark.parametrize("kind", COLLATORS)
@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "BertForTokenClassification", "RobertaForTokenClassification", "ElectraForMaskedLM"]
)
def test_gradient_accumulation_of_token_losses(name, kind, tmp_path):
    """Every labelled token counts the same, in whichever of the small batches it is."""
    theirs = small(name) if name.startswith("Bert") else small(name, max_position_embeddings=70)
    whole, accumulated = (fast(theirs, "accelerate") for _ in range(2))
    bert = "Bert" + name[name.index("For") :]
    packed = DataCollatorWithPacking(position_ids_start=theirs.config.pad_token_id + 1 if name.startswith("Roberta") else 0)
    data = {"train_dataset": examples(bert, 24), "data_collator": packed if kind == "packed" else collator(kind, bert)}
    expected = train(whole, tmp_path, kind, **data)
    got = train(accumulated, tmp_path, kind, per_device_train_batch_size=2, gradient_accumulation_steps=4, **data)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_same_parameters(accumulated, whole, 1e-5)


@pytest.mark.parametrize(("door", "kind"), [("class", "padded"), ("class", "packed"), ("accelerate", "packed")])
@pytest.mark.parametrize("name", NAMES)
def test_training_is_that_of_transformers(name, door, kind, tmp_path):
    theirs = small(name)
    ours = fast(theirs, door)
    if name == "BertForQuestionAnswering":  # transformers gives padding a share of the probability: compared with our padded batch
        theirs = fast(theirs, door)
    expected, got = train(theirs, tmp_path), train(ours, tmp_path, kind)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_same_parameters(ours, theirs, 1e-5)


class WeightedTrainer(Trainer):
    """The loss of transformers' documentation: classes weighted, from logits that are read although labels were passed."""

    weights = torch.tensor([1.0, 3.0, 0.5])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        logits = outputs.get("logits")
        weights = self.weights if logits.shape[-1] == NUM_LABELS else torch.linspace(0.5, 2.0, logits.shape[-1])
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), inputs["labels"].view(-1), weight=weights)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("kind", COLLATORS)
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMaskedLM"])
@pytest.mark.parametrize(
    "changes", [{"trainer_class": WeightedTrainer}, {"label_smoothing_factor": 0.2}], ids=["weights", "smooth"]
)
def test_losses_made_from_logits(changes, name, kind, tmp_path):
    theirs = small(name)
    ours = fast(theirs, "class")
    expected, got = train(theirs, tmp_path, **changes), train(ours, tmp_path, kind, **changes)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_same_parameters(ours, theirs, 1e-5)


def test_gradient_checkpointing(tmp_path, monkeypatch):
    """The same parameters bit for bit, dropout included, from twice the forward passes."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    models = [fast(small("BertForSequenceClassification", **dropout), "class") for _ in range(2)]
    calls, counts = rows_of_layers(monkeypatch), []
    for model, checkpointing in zip(models, (False, True), strict=True):
        calls.clear()
        train(model, tmp_path, gradient_checkpointing=checkpointing)
        counts.append(len(calls))
    assert counts == [8, 16]
    assert_same_parameters(*models, 0.0)


def test_bfloat16_autocast_learns(tmp_path):
    theirs = small("BertForSequenceClassification")
    expected = train(fast(theirs, "class"), tmp_path, max_steps=1)
    ours = fast(theirs, "class")
    losses = train(ours, tmp_path, bf16=True, max_steps=20, optim="adamw_torch", learning_rate=2e-3)
    assert next(ours.parameters()).dtype == torch.float32
    assert losses[0] != expected[0] and abs(losses[0] - expected[0]) < 0.02 * expected[0]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


# --- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COLLATORS)
def test_resumed_training_gives_the_same_bits(kind, tmp_path):
    """Dropout is on."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
    through, resumed = (fast(small("BertForSequenceClassification", **dropout), "class") for _ in range(2))
    losses = train(through, tmp_path, kind, **settings)
    trainer = trainer_for(resumed, tmp_path, kind, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(trainer) == losses
    assert_same_parameters(resumed, through, 0.0)


@pytest.mark.parametrize("door", DOORS)
def test_saved_models_are_plain_checkpoints(door, tmp_path):
    ours = fast(small("BertForSequenceClassification"), door)
    trainer = trainer_for(ours, tmp_path / "run", processing_class=small_tokenizer())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(loaded) is transformers.BertForSequenceClassification
    batch = collator("padded", "BertForSequenceClassification")(examples("BertForSequenceClassification", 6))
    torch.testing.assert_close(ours.eval()(**batch).logits, loaded.eval()(**batch).logits, atol=2e-5, rtol=2e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == small_tokenizer().get_vocab()


@pytest.mark.parametrize("kind", COLLATORS)
def test_the_best_model_and_early_stopping(kind, tmp_path):
    scores = iter([0.5, 0.9, 0.3, 0.4, 0.8])
    ours = fast(small("BertForSequenceClassification"), "class")
    trainer = trainer_for(
        ours, tmp_path, kind, max_steps=10, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", compute_metrics=lambda prediction: {"score": next(scores)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best, last = (transformers.BertForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{n}") for n in (2, 4))
    assert_same_parameters(ours, best, 0.0)
    assert not torch.equal(best.classifier.weight, last.classifier.weight)


# --- evaluation ----------------------------------------------------------------------------------------------------------


def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Of all that is labelled, in whatever rows it comes."""
    real = prediction.label_ids != -100
    logits, labels = prediction.predictions[real], prediction.label_ids[real]
    of_label = np.take_along_axis(logits, labels[:, None], axis=1)
    return {"accuracy": float((logits.argmax(-1) == labels).mean()), "count": len(labels), "logit": float(of_label.mean())}


@pytest.mark.parametrize("kind", COLLATORS)
@pytest.mark.parametrize("name", NAMES[:3])
def test_evaluate_and_predict(name, kind, tmp_path):
    """12 examples in batches of 5, 5 and 2: metrics, losses and predictions are those of transformers."""
    theirs = small(name)
    ours = fast(theirs, "class")
    trainers = [trainer_for(model, tmp_path, k, compute_metrics=metrics) for model, k in ((theirs, "padded"), (ours, kind))]
    expected, got = (trainer.evaluate() for trainer in trainers)
    for key in ("eval_accuracy", "eval_count", "eval_logit", "eval_loss"):
        np.testing.assert_allclose(got[key], expected[key], rtol=1e-5)

    data = examples(name, 12, seed=1)
    expected, got = (trainer.predict(data) for trainer in trainers)
    np.testing.assert_allclose(got.metrics["test_loss"], expected.metrics["test_loss"], rtol=1e-5)
    if name == "BertForSequenceClassification":
        assert got.predictions.shape == (12, NUM_LABELS)
        np.testing.assert_array_equal(got.label_ids, expected.label_ids)
        np.testing.assert_allclose(got.predictions, expected.predictions, atol=2e-5)
    else:
        assert got.predictions.shape[0] == (12 if kind == "padded" else 3), "a row per sequence, or per packed batch"
        labelled, theirs_labelled = got.label_ids != -100, expected.label_ids != -100
        np.testing.assert_array_equal(got.label_ids[labelled], expected.label_ids[theirs_labelled])
        np.testing.assert_allclose(got.predictions[labelled], expected.predictions[theirs_labelled], atol=2e-5)


# --- without Trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COLLATORS)
@pytest.mark.parametrize("door", DOORS)
def test_a_loop_with_accelerate(door, kind):
    accelerate = pytest.importorskip("accelerate")
    name = "BertForSequenceClassification"
    ours = fast(small(name), door)
    expected = copy.deepcopy(ours)
    loader = torch.utils.data.DataLoader(examples(name, 20), batch_size=8, collate_fn=collator(kind, name))
    plain_loop(expected, list(loader))

    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(ours, torch.optim.SGD(ours.parameters(), lr=0.1), loader)
    for batch in batches:
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_parameters(ours, expected, 1e-6)

    model.eval()
    gathered = []
    with torch.no_grad():
        for batch in batches:
            gathered.append(accelerator.gather_for_metrics((model(**batch).logits, batch["labels"])))
    logits, labels = (torch.cat(parts) for parts in zip(*gathered, strict=True))
    assert labels.tolist() == [feature["label"] for feature in examples(name, 20)]
    padded = collator("padded", name)(examples(name, 20))
    torch.testing.assert_close(logits, expected.eval()(**padded).logits, atol=2e-5, rtol=2e-5)
