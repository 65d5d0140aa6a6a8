"""The text of a run as token ids, to train on and held out: read and tokenized in memory, or mapped from a prepared folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fastbert.data.corpus import CorpusReport, Document, embedded_documents, read_documents
from fastbert.data.shards import is_prepared, open_shards
from fastbert.data.tokenizer import load_tokenizer, train_wordpiece
from fastbert.data.tokens import TokenizedCorpus, tokenize_documents
from fastbert.runs import Say
from fastbert.runs.command_settings import option
from fastbert.runs.errors import SettingsError

from .settings import DEFAULT_VOCAB_SIZE, PretrainSettings


@dataclass(frozen=True)
class CorpusTokens:
    """``train`` and ``held_out``: one corpus or its shards; ``facts``: counts and a fingerprint of the corpus, JSON-ready."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenizedCorpus | Sequence[TokenizedCorpus]
    held_out: TokenizedCorpus | Sequence[TokenizedCorpus]
    facts: dict[str, Any]


def corpus_tokens(settings: PretrainSettings, say: Say, checkpoint: Path | None) -> CorpusTokens:
    """What ``--corpus`` names; a continued run takes the tokenizer of its ``checkpoint``.

    Raises ``CorpusError`` for text that cannot be used, ``TokenizerError`` for a tokenizer, also where a prepared corpus was made
    with another one, and :class:`SettingsError` for options that a prepared corpus has decided.
    """
    prepared = [source for source in settings.corpus if is_prepared(source)]
    if not prepared:
        return _read(settings, say, checkpoint)
    if len(settings.corpus) > 1:
        raise SettingsError(
            f"--corpus: {prepared[0]} is a folder of fastbert prepare, which stands alone; prepare all texts together instead"
        )
    return _open_prepared(settings, say, checkpoint)


def fingerprint(corpus: TokenizedCorpus) -> str:
    """SHA-256 over the token ids and their sentence and document bounds: another corpus or tokenizer gives another one."""
    digest = hashlib.sha256()
    for array in (corpus.ids, corpus.sentence_offsets, corpus.document_offsets):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _open_prepared(settings: PretrainSettings, say: Say, checkpoint: Path | None) -> CorpusTokens:
    folder = settings.corpus[0]
    if given := settings.not_default("vocab_size", "held_out_fraction", "text_column"):
        raise SettingsError(
            f"{', '.join(map(option, given))}: decided when {folder} was prepared; leave it out here, or prepare the corpus anew"
        )
    train = open_shards(folder)
    held_out = train.held_out
    least = _least_documents(settings)
    if held_out.num_documents < least:
        raise SettingsError(
            f"--corpus {folder} was prepared with {held_out.num_documents} held-out documents; every run is scored on held-out "
            f"text, which takes at least {least} with --objective {settings.objective}: prepare it anew with a larger "
            "--held-out-fraction"
        )
    name = _tokenizer_name(settings, checkpoint)
    tokenizer = train.load_tokenizer() if name is None else load_tokenizer(name)
    train.check_tokenizer(tokenizer)
    say(f"Corpus: {folder}, prepared: {train} to train on in {len(train)} shards")
    facts = {
        "embedded": False,
        **{name: train.facts[name] for name in ("documents", "words", "characters")},
        "tokens": train.num_tokens + held_out.num_tokens,
        **_split_facts(train, held_out),
        "fingerprint": train.fingerprint,
    }
    return CorpusTokens(tokenizer, train, held_out, facts)


def _read(settings: PretrainSettings, say: Say, checkpoint: Path | None) -> CorpusTokens:
    name = _tokenizer_name(settings, checkpoint)
    tokenizer = None if name is None else load_tokenizer(name)  # before any text is read: it may not be there
    documents, report = _documents(settings, say)
    if tokenizer is None:
        tokenizer = _train_tokenizer(settings, documents, say)
    least = _least_documents(settings)
    corpus = _tokenize(documents, tokenizer, least)
    train, held_out = corpus.split(settings.effective_held_out_fraction, settings.seed, least_documents=least)
    facts = {
        "embedded": not settings.corpus,
        "documents": report.documents,
        "words": report.words,
        "characters": report.characters,
        "tokens": corpus.num_tokens,
        **_split_facts(train, held_out),
        "fingerprint": fingerprint(corpus),
    }
    return CorpusTokens(tokenizer, train, held_out, facts)


def _least_documents(settings: PretrainSettings) -> int:
    """On either side: the second sentence of a pair may be another document's."""
    return 2 if settings.objective == "mlm-nsp" else 1


def _split_facts(train: Any, held_out: Any) -> dict[str, int]:
    return {
        "train_documents": train.num_documents,
        "train_tokens": train.num_tokens,
        "held_out_documents": held_out.num_documents,
        "held_out_tokens": held_out.num_tokens,
    }


def _documents(settings: PretrainSettings, say: Say) -> tuple[list[Document], CorpusReport]:
    if settings.corpus:
        least = _least_documents(settings)
        documents = list(read_documents(settings.corpus, text_column=settings.text_column, least_documents=least))
        report = CorpusReport.from_documents(documents)
        say(f"Corpus: {report}")
        return documents, report
    documents, report = embedded_documents()
    say("No --corpus given: using the English prose that comes with Python and its packages (docstrings and documentation).")
    say(f"Corpus: {report}")
    return documents, report


def _tokenizer_name(settings: PretrainSettings, checkpoint: Path | None) -> str | Path | None:
    """Where the tokenizer comes from; None for one that the corpus brings or that is trained on it."""
    return checkpoint or settings.tokenizer or (settings.model if settings.continues_checkpoint else None)


def _train_tokenizer(settings: PretrainSettings, documents: list[Document], say: Say) -> PreTrainedTokenizerFast:
    vocab_size = settings.vocab_size or DEFAULT_VOCAB_SIZE
    say(f"Training a WordPiece vocabulary of at most {vocab_size:,} entries on the corpus ...")
    texts = (paragraph for document in documents for paragraph in document.paragraphs)
    return train_wordpiece(texts, vocab_size, lowercase=True)


def _tokenize(documents: list[Document], tokenizer: PreTrainedTokenizerFast, least_documents: int) -> TokenizedCorpus:
    with tqdm(total=len(documents), desc="tokenize", unit="document", disable=None) as bar:
        return tokenize_documents(
            documents, tokenizer, progress=lambda done, tokens: bar.update(done - bar.n), least_documents=least_documents
        )
