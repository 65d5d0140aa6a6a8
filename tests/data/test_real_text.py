"""Wikipedia and a book, through bert-base's own vocabulary, to batches. The text is not part of the repository."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertForPreTraining

from fastbert.data.batches import PretrainingBatches
from fastbert.data.corpus import CorpusReport, Document, read_documents
from fastbert.data.masking import IGNORE_INDEX
from fastbert.data.sentences import split_sentences
from fastbert.data.tokenizer import load_tokenizer
from fastbert.data.tokens import tokenize_documents


@pytest.fixture(scope="module")
def sources(data_folder: Path) -> list[Path]:
    pretrain = data_folder / "pretrain"
    files = [pretrain / "wikipedia" / "wiki_a.txt.gz", pretrain / "books" / "carroll-alice.txt.gz"]
    missing = [file for file in [*files, data_folder / "vocab" / "bert-base-uncased"] if not file.exists()]
    if missing:
        pytest.skip(f"real text is missing: {missing[0]}")
    return files


@pytest.fixture(scope="module")
def documents(sources: list[Path]) -> list[Document]:
    return list(read_documents(sources))


def test_counts(documents: list[Document], sources: list[Path], data_folder: Path) -> None:
    report = CorpusReport.from_documents(documents)
    rows = (data_folder / "pretrain" / "wikipedia" / "docs.tsv").read_text(encoding="utf-8").splitlines()
    titles = [row.split("\t")[3] for row in rows if row.startswith("wiki_a.txt.gz\t")]
    assert [document.paragraphs[0] for document in documents[:-1]] == titles
    assert report.sources == {str(sources[0]): len(titles), str(sources[1]): 1}
    assert "Alice" in documents[-1].paragraphs[0].title()
    books = {document.source for document in read_documents([data_folder / "pretrain" / "books"])}
    assert len(books) == len(list((data_folder / "pretrain" / "books").glob("*.txt.gz"))), "a book is a document"


def test_sentences_read_well(documents: list[Document]) -> None:
    alice = [sentence for paragraph in documents[-1].paragraphs for sentence in split_sentences(paragraph)]
    lengths = np.array([len(sentence.split()) for sentence in alice])
    assert 1000 < len(alice) < 3000
    assert 10 < lengths.mean() < 25
    assert lengths.max() < 250
    assert sum(sentence[0].islower() for sentence in alice) < 0.02 * len(alice)


def test_from_text_to_batches(documents: list[Document], data_folder: Path) -> None:
    folder = data_folder / "vocab" / "bert-base-uncased"
    tokenizer = load_tokenizer(folder)
    chosen = [*documents[:40], documents[-1]]
    corpus = tokenize_documents(chosen, tokenizer)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    paragraphs = [paragraph for document in chosen for paragraph in document.paragraphs]
    whole = [encoding.ids for encoding in backend.encode_batch(paragraphs, add_special_tokens=False)]
    assert corpus.ids.tolist() == [token for ids in whole for token in ids], "no text is lost between paragraph and token"
    assert np.mean(corpus.ids == tokenizer.unk_token_id) < 0.001
    train, held_out = corpus.split(0.05, seed=0)
    assert 0.025 < held_out.num_tokens / corpus.num_tokens < 0.075
    for max_seq_length, tokens_per_batch in ((512, 4096), (512, 8192), (128, 16384), (128, 4096)):
        batches = PretrainingBatches(train, tokenizer, max_seq_length=max_seq_length, tokens_per_batch=tokens_per_batch, seed=0)
        assert batches.fill() > 0.98
    made = list(islice(batches.epoch(0), 40))
    labels = torch.cat([batch.next_sentence_label for batch in made])
    assert abs(labels.float().mean() - 0.5) < 3 * 0.5 / len(labels) ** 0.5
    asked = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in made)
    assert asked / sum(batch.num_tokens for batch in made) == pytest.approx(0.147, abs=0.003)


def test_a_transformers_model_takes_padded_batches(documents: list[Document], data_folder: Path) -> None:
    tokenizer = load_tokenizer(data_folder / "vocab" / "bert-base-uncased")
    corpus = tokenize_documents(documents[:10], tokenizer)
    batch = next(PretrainingBatches(corpus, tokenizer, max_seq_length=64, tokens_per_batch=512, seed=0).epoch(0))
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    loss = BertForPreTraining(config)(**batch.padded(tokenizer.pad_token_id)).loss
    assert loss.item() == pytest.approx(np.log(len(tokenizer)) + np.log(2), abs=0.4)
