"""A small English corpus and a tokenizer trained on it, shared by the data tests."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from fastbert.data.corpus import Document
from fastbert.data.tokenizer import train_wordpiece
from fastbert.data.tokens import TokenizedCorpus, tokenize_documents

from .helpers import story


@pytest.fixture(scope="session")
def stories() -> list[Document]:
    return [story(number, paragraphs=1 + number % 7) for number in range(60)]


@pytest.fixture(scope="session")
def tokenizer(stories: list[Document]) -> PreTrainedTokenizerFast:
    return train_wordpiece((paragraph for document in stories for paragraph in document.paragraphs), 400)


@pytest.fixture(scope="session")
def corpus(stories: list[Document], tokenizer: PreTrainedTokenizerFast) -> TokenizedCorpus:
    return tokenize_documents(stories, tokenizer)
