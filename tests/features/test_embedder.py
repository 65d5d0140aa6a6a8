"""Embeddings of texts: those of transformers, one text at a time, whatever the pooling, the model and the batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import fastbert
from fastbert.features import embedder as embed_module
from fastbert.features.embedder import Embedder, TextError
from fastbert.runs.errors import SettingsError

from .helpers import LENGTH, TEXTS, WORDS, plain_embedding, plain_layers, save_checkpoint

POOLINGS = ("mean", "cls", "max", "last-4")
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 against float64, five layers, values up to 4


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert"])
def any_checkpoint(request, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_sequences_are_those_of_transformers(any_checkpoint, pooling):
    embedder = Embedder.from_pretrained(str(any_checkpoint), pooling=pooling, tokens_per_batch=40, device="cpu")
    assert embedder.packed is ("distilbert" not in any_checkpoint.name)
    assert bool(embedder.notes) is not embedder.packed
    got = embedder(TEXTS)
    expected = np.stack([plain_embedding(plain_layers(any_checkpoint, text)[0], pooling) for text in TEXTS])
    assert got.dtype == np.float32 and got.shape == (len(TEXTS), embedder.dim)
    np.testing.assert_allclose(got, expected, **CLOSE)
    unit = Embedder.from_pretrained(str(any_checkpoint), pooling=pooling, normalize=True, device="cpu")(TEXTS)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), **CLOSE)


@pytest.mark.parametrize("pooling", [None, "last-4"])
def test_tokens_are_those_of_transformers(any_checkpoint, pooling):
    embedder = Embedder.from_pretrained(str(any_checkpoint), pooling=pooling, level="token", tokens_per_batch=40, device="cpu")
    rows = embedder(TEXTS)
    for row, text in zip(rows, TEXTS, strict=True):
        layers, _ = plain_layers(any_checkpoint, text)
        np.testing.assert_allclose(row, layers[-1] if pooling is None else np.concatenate(layers[-4:], axis=1), **CLOSE)


def test_pairs_are_read_together(checkpoint):
    pairs = TEXTS[::-1]
    got = Embedder.from_pretrained(str(checkpoint), device="cpu")(TEXTS, pairs)
    expected = [plain_embedding(plain_layers(checkpoint, *both)[0], "mean") for both in zip(TEXTS, pairs)]
    np.testing.assert_allclose(got, expected, **CLOSE)
    assert not np.allclose(got, Embedder.from_pretrained(str(checkpoint), device="cpu")(TEXTS), atol=1e-3)


def test_words_have_the_row_of_their_first_piece(checkpoint):
    words = [["word1", "word2word3", "unknown"], ["word4"], [*WORDS]]
    embedder = Embedder.from_pretrained(str(checkpoint), level="token", words=True, device="cpu")
    rows = embedder(words)
    assert [len(row) for row in rows] == [3, 1, LENGTH - 2], "words that were cut off have no row"
    layers, encoded = plain_layers(checkpoint, words[0])
    assert encoded.word_ids() == [None, 0, 1, 1, 2, None]
    np.testing.assert_allclose(rows[0], layers[-1][[1, 2, 4]], **CLOSE)
    chunk = embedder.embed(words, names=True)
    assert chunk.names[:4] == ["word1", "word2word3", "unknown", "word4"] and chunk.truncated == 1
    # At the level of sequences words are a text.
    means = Embedder.from_pretrained(str(checkpoint), words=True, device="cpu")(words)
    np.testing.assert_allclose(means[0], layers[-1].mean(0), **CLOSE)


def test_a_word_of_characters_that_the_tokenizer_drops_has_a_row(checkpoint):
    embedder = Embedder.from_pretrained(str(checkpoint), level="token", words=True, device="cpu")
    chunk = embedder.embed([["word1", "\u200b", "word2"], ["\u200b", "word3"]], names=True)
    assert chunk.counts.tolist() == [3, 2]
    unknown = embedder([["word1", "unknown", "word2"]])[0]
    np.testing.assert_allclose(chunk.rows[:3], unknown, **CLOSE)


def test_a_last_word_of_dropped_characters_has_a_row_unless_it_was_cut_off(checkpoint):
    embedder = Embedder.from_pretrained(str(checkpoint), level="token", words=True, device="cpu")
    assert [len(row) for row in embedder([["word1", "\u200b"], ["\u200b"], [*WORDS, "\u200b"]])] == [2, 1, LENGTH - 2]


def test_names_of_tokens(checkpoint):
    embedder = Embedder.from_pretrained(str(checkpoint), level="token", device="cpu")
    chunk = embedder.embed(["word1 word2word3.", "word4"], names=True)
    assert chunk.names == ["[CLS]", "word1", "word2", "##word3", ".", "[SEP]", "[CLS]", "word4", "[SEP]"]
    assert chunk.counts.tolist() == [6, 3] and chunk.tokens == 9


def test_batches_and_chunks_change_nothing(checkpoint, monkeypatch):
    texts = TEXTS * 20
    expected = Embedder.from_pretrained(str(checkpoint), device="cpu")(texts)
    for tokens in (1, 30, 100):
        got = Embedder.from_pretrained(str(checkpoint), tokens_per_batch=tokens, device="cpu")(texts)
        np.testing.assert_allclose(got, expected, **CLOSE)
    monkeypatch.setitem(embed_module.CHUNK_CHARACTERS, "sequence", 300)
    embedder = Embedder.from_pretrained(str(checkpoint), device="cpu")
    bounds = embedder.chunk_bounds(texts, None)
    assert len(bounds) > 10 and bounds[0] == 0 and bounds[-1] == len(texts) and sorted(set(bounds)) == bounds
    np.testing.assert_allclose(embedder(texts), expected, **CLOSE)
    rows = Embedder.from_pretrained(str(checkpoint), level="token", device="cpu")(texts)
    np.testing.assert_allclose([row.mean(0) for row in rows], expected, **CLOSE)


def test_truncation_is_counted(checkpoint):
    embedder = Embedder.from_pretrained(str(checkpoint), max_seq_length=5, device="cpu")
    chunk = embedder.embed(TEXTS)
    assert chunk.truncated == 4 and chunk.tokens == 4 * 5 + 3 + 4
    np.testing.assert_allclose(chunk.rows[0], plain_embedding(plain_layers(checkpoint, TEXTS[0], length=5)[0], "mean"), **CLOSE)


def test_any_sequence_of_texts(checkpoint):
    embedder = Embedder.from_pretrained(str(checkpoint), device="cpu")
    np.testing.assert_array_equal(embedder(np.array(TEXTS)), embedder(TEXTS))
    np.testing.assert_array_equal(embedder(iter(TEXTS), iter(TEXTS)), embedder(TEXTS, TEXTS))
    with pytest.raises(ValueError, match="6 texts and 5 text_pairs"):
        embedder(TEXTS, TEXTS[1:])


@pytest.mark.parametrize(
    ("texts", "pairs", "error", "message"),
    [
        (["word1", ["word2", "word3"]], None, TypeError, r"texts\[1\] is \['word2', 'word3'\], expected a string"),
        ([["word1"], "word2"], None, TypeError, r"texts\[1\] is 'word2', expected a list of words, as the first one is"),
        ([["word1"], ["word2", 3]], None, TypeError, r"texts\[1\] is \['word2', 3\], expected a list of words"),
        (["word1", None], None, TypeError, r"texts\[1\] is None, expected a string"),
        (["word1"], [None], TypeError, r"text_pairs\[0\] is None, expected a string"),
        (["word1"], "a", TypeError, "text_pairs must be a sequence of texts, not a single string"),
        ([["word1"]], ["a"], TypeError, "text_pairs are for texts that are strings"),
        (["word1", "\ud800"], None, TextError, "text 1 holds a lone surrogate"),
    ],
)
def test_what_is_no_text_is_named(checkpoint, texts, pairs, error, message):
    with pytest.raises(error, match=message):
        Embedder.from_pretrained(str(checkpoint), device="cpu")(texts, pairs)


def test_no_texts(checkpoint):
    assert Embedder.from_pretrained(str(checkpoint), device="cpu")([]).shape == (0, 32)
    assert Embedder.from_pretrained(str(checkpoint), level="token", device="cpu")([]) == []
    with pytest.raises(TypeError, match="single string"):
        Embedder.from_pretrained(str(checkpoint), device="cpu")("a text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "median"}, "known are mean, cls, max, last-4"),
        ({"level": "word"}, "known are sequence, token"),
        ({"level": "token", "pooling": "mean"}, "one per token"),
        ({"max_seq_length": LENGTH + 1}, f"takes {LENGTH} tokens at most"),
        ({"max_seq_length": 2}, "at least 3"),
        ({"tokens_per_batch": 0}, "at least 1"),
        ({"dtype": "float16"}, "known are float32"),
    ],
)
def test_refusals(checkpoint, settings, message):
    with pytest.raises(SettingsError, match=message):
        Embedder.from_pretrained(str(checkpoint), device="cpu", **settings)


def test_checkpoints_that_cannot_be_used(checkpoint, tmp_path):
    with pytest.raises(SettingsError, match="at least 4 layers, this one has 3"):
        Embedder.from_pretrained(str(save_checkpoint(tmp_path / "small", layers=3)), pooling="last-4")
    with pytest.raises(SettingsError, match="no such folder"):
        Embedder.from_pretrained(str(tmp_path / "none" / "at" / "all"))
    model = transformers.AutoModel.from_pretrained(checkpoint)
    weights = {name: value for name, value in model.state_dict().items() if "layer.2" not in name}
    model.save_pretrained(tmp_path / "partial", state_dict=weights)
    transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "partial")
    with pytest.raises(SettingsError, match="lacks weights of BertModel: encoder.layer.2"):
        Embedder.from_pretrained(str(tmp_path / "partial"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens([f"new{number}" for number in range(3)])
    tokenizer.save_pretrained(tmp_path / "partial")
    with pytest.raises(SettingsError, match="in its vocabulary, its tokenizer"):
        Embedder.from_pretrained(str(tmp_path / "partial"))


def test_weights_of_other_sizes_than_the_configuration_says_are_named(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "other")
    path = tmp_path / "other/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 40}))
    with pytest.raises(SettingsError, match=r"encoder.layer.0.intermediate.dense.bias is \(\d+,\) in the checkpoint and \(40,"):
        Embedder.from_pretrained(str(tmp_path / "other"))


def test_int8_needs_a_model_that_fastbert_knows(tmp_path):
    folder = save_checkpoint(tmp_path, "distilbert")
    with pytest.raises(SettingsError, match="--dtype int8: .*DistilBert"):
        Embedder.from_pretrained(str(folder), dtype="int8")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_dtypes(checkpoint, dtype, tmp_path):
    exact = Embedder.from_pretrained(str(checkpoint), device="cpu")
    rough = Embedder.from_pretrained(str(checkpoint), dtype=dtype, device="cpu")
    assert (exact.dtype, rough.dtype) == ("float32", dtype)
    expected, got = exact(TEXTS), rough(TEXTS)
    assert got.dtype == np.float32 and 0 < np.abs(got - expected).max() < 0.1 * np.abs(expected).max()
    if dtype == "int8":
        rough.model.save_pretrained(tmp_path)
        rough.tokenizer.save_pretrained(tmp_path)
        again = Embedder.from_pretrained(str(tmp_path), device="cpu")
        assert again.dtype == "int8"
        np.testing.assert_array_equal(again(TEXTS), got)
        with pytest.raises(SettingsError, match="saved in int8"):
            Embedder.from_pretrained(str(tmp_path), dtype="bfloat16")


def test_damaged_weights_are_found(checkpoint):
    embedder = Embedder.from_pretrained(str(checkpoint), device="cpu")
    with torch.no_grad():
        embedder.model.embeddings.word_embeddings.weight[embedder.tokenizer.vocab["word4"]] = float("nan")
    with pytest.raises(TextError, match="NaN") as caught:
        embedder.embed(TEXTS[:2])
    assert caught.value.index == 1


def test_the_fingerprint_tells_models_apart(checkpoint, tmp_path):
    embedder = Embedder.from_pretrained(str(checkpoint), device="cpu")
    first = embedder.fingerprint()
    embedder(TEXTS)
    assert embedder.fingerprint() == first
    assert Embedder.from_pretrained(str(checkpoint), pooling="cls", device="cpu").fingerprint() == first
    assert Embedder.from_pretrained(str(checkpoint), dtype="bfloat16", device="cpu").fingerprint() != first
    with torch.no_grad():
        embedder.model.encoder.layer[4].output.dense.bias[0] += 1
    second = embedder.fingerprint()
    embedder.tokenizer.add_special_tokens({"additional_special_tokens": ["word1"]})
    third = embedder.fingerprint()
    embedder.model.config.layer_norm_eps = 1e-3
    assert len({first, second, third, embedder.fingerprint()}) == 4


def test_other_auto_classes_stay_what_they_are(checkpoint):
    Embedder.from_pretrained(str(checkpoint), device="cpu")
    assert type(transformers.AutoModel.from_pretrained(checkpoint)) is transformers.BertModel
    fastbert.register()
    try:
        assert Embedder.from_pretrained(str(checkpoint), device="cpu").packed
    finally:
        fastbert.unregister()


@pytest.fixture(scope="module")
def sentences(data_folder) -> list[str]:
    lines = (data_folder / "glue/SST-2/train.tsv").read_text(encoding="utf-8").split("\n")[1:101]
    long = (data_folder / "qa").is_dir() and " ".join(lines)  # is cut
    return [*(line.split("\t")[0] for line in lines), *([long] if long else [])]


@pytest.mark.parametrize("normalize", [True, False])
def test_mean_is_that_of_sentence_transformers(minilm, sentences, normalize):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    assert [type(module).__name__ for module in theirs] == ["Transformer", "Pooling", "Normalize"]
    model = theirs if normalize else sentence_transformers.SentenceTransformer(modules=[theirs[0], theirs[1]], device="cpu")
    expected = model.encode(sentences, show_progress_bar=False)
    embedder = Embedder.from_pretrained(str(minilm), normalize=normalize, max_seq_length=model.max_seq_length, device="cpu")
    np.testing.assert_allclose(embedder(sentences), expected, rtol=0, atol=1e-5)


def test_a_text_of_which_the_tokenizer_keeps_nothing(checkpoint):
    embedder = Embedder.from_pretrained(str(checkpoint), device="cpu")
    with pytest.raises(TextError, match="has nothing that the tokenizer keeps") as caught:
        embedder(["good", "\u200d"])
    assert caught.value.index == 1


@pytest.mark.parametrize("pair", [("good", "\u200d"), ("\u200d", "good")])
def test_a_text_of_a_pair_of_which_the_tokenizer_keeps_nothing(any_checkpoint, pair):
    """Also where both together have more tokens than the special ones."""
    embedder = Embedder.from_pretrained(str(any_checkpoint), device="cpu")
    texts, pairs = zip(("good", "word1 ..."), pair)
    for refuse in (embedder, embedder.check_texts):
        with pytest.raises(TextError, match="has nothing that the tokenizer keeps") as caught:
            refuse(texts, pairs)
        assert caught.value.index == 1
    assert len(embedder(["...", "good"], ["good", "..."])) == 2
