"""A toy corpus and the settings of a run that takes a second."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbert.train.settings import PretrainSettings

NOUNS = "time water light house river stone paper table garden winter summer music"
OTHERS = "little great early green young small happy quiet walks sleeps sings reads writes opens closes"
WORDS = f"{NOUNS} {OTHERS}".split()


@pytest.fixture(autouse=True)
def always_one_thread(one_thread: None, rough_pictures: None) -> None:
    """For all tests of this folder."""


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of three paragraphs of sentences, in which every word is followed by one of three."""
    choice = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "toy.txt"
    documents = []
    for _ in range(60):
        paragraphs = []
        for _ in range(3):
            sentences = []
            for _ in range(4):
                word = choice.randrange(len(WORDS))
                sentence = []
                for _ in range(choice.randint(5, 12)):
                    sentence.append(WORDS[word])
                    word = (3 * word + choice.randrange(3)) % len(WORDS)
                sentences.append(" ".join(sentence).capitalize() + ".")
            paragraphs.append(" ".join(sentences))
        documents.append("\n".join(paragraphs))
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def toy_settings(toy_corpus: Path, tmp_path: Path) -> Callable[..., PretrainSettings]:
    """Settings of a one-layer model and a few small batches; keywords change them."""

    def make(**changes) -> PretrainSettings:
        values = {
            "output": str(tmp_path / "run"),
            "corpus": (str(toy_corpus),),
            "vocab_size": 200,
            "model": "tiny",
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "max_seq_length": 32,
            "tokens_per_batch": 256,
            "steps": 8,
            "log_steps": 3,
            "save_steps": 3,
            "learning_rate": 5e-3,
            "held_out_fraction": 0.2,
            "device": "cpu",
        }
        return PretrainSettings(**{**values, **changes})

    return make
