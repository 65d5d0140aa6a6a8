"""A toy checkpoint with its tokenizer, and toy data whose labels a model of one layer learns in seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers

import fastbert
from fastbert.data.tokenizer import train_wordpiece

GOOD = ["good", "fine", "great", "lovely", "bright", "warm"]
BAD = ["bad", "poor", "awful", "boring", "dark", "cold"]
NOUNS = ["film", "book", "song", "play", "story", "house", "garden", "river"]
PEOPLE = ["Anna", "Bob", "Clara", "David"]
PLACES = ["Paris", "Rome", "Oslo", "Lima"]
VERBS = ["saw", "visited", "left", "liked"]


@pytest.fixture(scope="session")
def toy_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = GOOD + BAD + NOUNS + PEOPLE + PLACES + VERBS + ["the", "a", "is", "was", "and", "not", "who", "where", "?", ".", ","]
    return train_wordpiece([" ".join(words)] * 3, 400)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: transformers.PreTrainedTokenizerFast) -> Path:
    """A BERT of one layer with random weights."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(toy_tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    fastbert.BertModel(config).save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    return folder


def sentiment_lines(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, "pos" or "neg"): the adjective decides."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        label = draw.choice(["pos", "neg"])
        adjective = draw.choice(GOOD if label == "pos" else BAD)
        words = ["the", draw.choice(NOUNS), draw.choice(["is", "was"]), adjective, *draw.choices(NOUNS, k=draw.randint(0, 6))]
        lines.append((" ".join(words), label))
    return lines


def write_sentiment(folder: Path) -> Path:
    """train.tsv, dev.tsv and test.tsv (without labels) of 96, 32 and 8 rows."""
    folder.mkdir()
    for split, count in (("train", 96), ("dev", 32)):
        rows = "".join(f"{text}\t{label}\n" for text, label in sentiment_lines(count, len(split)))
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + rows, encoding="utf-8")
    texts = "".join(f"{text}\n" for text, _ in sentiment_lines(8, 9))
    (folder / "test.tsv").write_text("sentence\n" + texts, encoding="utf-8")
    return folder


@pytest.fixture
def sentiment_folder(tmp_path: Path) -> Path:
    """Files of :func:`write_sentiment`."""
    return write_sentiment(tmp_path / "sentiment")


@pytest.fixture
def entity_folder(tmp_path: Path) -> Path:
    """CoNLL files: people and places by name."""
    folder = tmp_path / "entities"
    folder.mkdir()
    for split, count in (("train", 96), ("dev", 24)):
        draw = random.Random(len(split))
        lines = []
        for _ in range(count):
            person, place = draw.choice(PEOPLE), draw.choice(PLACES)
            sentence = [(person, "B-PER"), (draw.choice(VERBS), "O"), ("the", "O"), (place, "B-LOC"), (draw.choice(NOUNS), "I-LOC")]
            lines += [f"{word}\t{tag}" for word, tag in sentence] + [""]
        (folder / f"{split}.conll").write_text("\n".join(lines), encoding="utf-8")
    return folder
