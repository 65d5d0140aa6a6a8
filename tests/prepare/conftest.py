"""A corpus of two files and the folder of a tokenizer, shared by the tests of ``fastbert prepare``."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbert.data.tokenizer import train_wordpiece

from ..data.helpers import story


@pytest.fixture(scope="session")
def stories() -> list[list[str]]:
    return [story(number, paragraphs=1 + number % 7).paragraphs for number in range(60)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, stories: list[list[str]]) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece((paragraph for paragraphs in stories for paragraph in paragraphs), 300).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path, stories: list[list[str]]) -> tuple[str, ...]:
    paths = []
    for name, part in (("a.txt", stories[:25]), ("b.txt", stories[25:])):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join("\n".join(paragraphs) for paragraphs in part), encoding="utf-8")
        paths.append(str(path))
    return tuple(paths)
