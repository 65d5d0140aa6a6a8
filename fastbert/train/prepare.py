"""Before the first step: the corpus as tokens, the tokenizer, and the model with its initial weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fastbert import BertConfig, BertForMaskedLM, BertForPreTraining
from fastbert.data.batches import PackedBatch, PretrainingBatches, held_out_batches
from fastbert.data.corpus import CorpusReport, Document, embedded_documents, read_documents
from fastbert.data.tokenizer import load_tokenizer, train_wordpiece
from fastbert.data.tokens import TokenizedCorpus, tokenize_documents

from .errors import SettingsError
from .settings import DEFAULT_VOCAB_SIZE, Phase, PretrainSettings

PretrainingModel = BertForPreTraining | BertForMaskedLM
Say = Callable[[str], None]
POSITIONS = 512
# Enough for about 20,000 masked tokens: a standard error of 0.02 nats, however large the corpus is.
HELD_OUT_TOKENS = 1 << 17


@dataclass(frozen=True)
class PreparedData:
    """Batches to train on, by the number of the phase, and batches held out, those of the last phase; ``facts`` are counts and a
    fingerprint of the corpus, JSON-ready."""

    tokenizer: PreTrainedTokenizerFast
    batches: dict[int, PretrainingBatches]
    held_out: list[PackedBatch]
    facts: dict[str, Any]


def prepare_data(settings: PretrainSettings, say: Say, checkpoint: Path | None) -> PreparedData:
    """Reads and tokenizes the corpus; a continued run takes the tokenizer of its ``checkpoint``.

    Raises ``CorpusError`` for text that cannot be used and ``TokenizerError`` for a tokenizer, naming the file, and
    :class:`SettingsError` where lengths do not fit the tokenizer.
    """
    documents, report = _documents(settings, say)
    tokenizer = _tokenizer(settings, documents, say, checkpoint)
    corpus = _tokenize(documents, tokenizer)
    train, held_out = corpus.split(settings.effective_held_out_fraction, settings.seed)
    shape = {"tokens_per_batch": settings.tokens_per_batch, "seed": settings.seed}
    batches = {phase.number: _batches(train, tokenizer, phase, shape) for phase in settings.phases}
    held_out_limit = max(1, HELD_OUT_TOKENS // settings.tokens_per_batch)
    scored_length = settings.phases[-1].max_seq_length
    scored = held_out_batches(held_out, tokenizer, **shape, max_seq_length=scored_length, max_batches=held_out_limit)
    facts = {
        "embedded": not settings.corpus,
        "documents": report.documents,
        "words": report.words,
        "characters": report.characters,
        "tokens": corpus.num_tokens,
        "train_documents": train.num_documents,
        "train_tokens": train.num_tokens,
        "held_out_documents": held_out.num_documents,
        "held_out_tokens": held_out.num_tokens,
        "scored_tokens": sum(batch.num_tokens for batch in scored),
        "vocab_size": len(tokenizer),
        "fingerprint": fingerprint(corpus),
    }
    say(
        f"Tokens: {facts['train_tokens']:,} to train on, {facts['held_out_tokens']:,} held out "
        f"(vocabulary of {facts['vocab_size']:,}, {batches[1].num_batches():,} batches an epoch)"
    )
    return PreparedData(tokenizer, batches, scored, facts)


def _batches(
    corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast, phase: Phase, shape: dict[str, Any]
) -> PretrainingBatches:
    try:
        return PretrainingBatches(corpus, tokenizer, max_seq_length=phase.max_seq_length, **shape)
    except ValueError as error:
        length = "--max-seq-length" if phase.number == 1 else "--second-phase-seq-length"
        raise SettingsError(f"{length}, --tokens-per-batch: {error}") from error


def fingerprint(corpus: TokenizedCorpus) -> str:
    """SHA-256 over the token ids and their sentence and document bounds: another corpus or tokenizer gives another one."""
    digest = hashlib.sha256()
    for array in (corpus.ids, corpus.sentence_offsets, corpus.document_offsets):
        digest.update(array.tobytes())
    return digest.hexdigest()


def build_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast, checkpoint: Path | None) -> PretrainingModel:
    """The model for the objective, in float32 on the CPU: of the ``checkpoint``'s shape for a continued run, from ``--model`` else.

    Fresh weights follow torch's seed. Raises :class:`SettingsError` where tokenizer, lengths and model do not fit together,
    and for a checkpoint of another architecture.
    """
    if checkpoint is not None:
        return _model_class(settings)(BertConfig.from_pretrained(checkpoint))
    if settings.continues_checkpoint:
        return _pretrained_model(settings, tokenizer)
    size = settings.model_size()
    return _model_class(settings)(
        BertConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=size.num_hidden_layers,
            hidden_size=size.hidden_size,
            num_attention_heads=size.num_attention_heads,
            intermediate_size=size.intermediate_size,
            max_position_embeddings=max(POSITIONS, settings.longest_sequence),
            hidden_dropout_prob=settings.effective_dropout,
            attention_probs_dropout_prob=settings.effective_dropout,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU where torch can use one. Raises :class:`SettingsError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _documents(settings: PretrainSettings, say: Say) -> tuple[list[Document], CorpusReport]:
    if settings.corpus:
        documents = list(read_documents(settings.corpus, text_column=settings.text_column))
        report = CorpusReport.from_documents(documents)
        say(f"Corpus: {report}")
        return documents, report
    documents, report = embedded_documents()
    say("No --corpus given: using the English prose that comes with Python and its packages (docstrings and documentation).")
    say(f"Corpus: {report}")
    return documents, report


def _tokenizer(settings: PretrainSettings, documents: list[Document], say: Say, checkpoint: Path | None) -> PreTrainedTokenizerFast:
    name = checkpoint or settings.tokenizer or (settings.model if settings.continues_checkpoint else None)
    if name is not None:
        return load_tokenizer(name)
    vocab_size = settings.vocab_size or DEFAULT_VOCAB_SIZE
    say(f"Training a WordPiece vocabulary of at most {vocab_size:,} entries on the corpus ...")
    texts = (paragraph for document in documents for paragraph in document.paragraphs)
    return train_wordpiece(texts, vocab_size, lowercase=True)


def _tokenize(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> TokenizedCorpus:
    with tqdm(total=len(documents), desc="tokenize", unit="document", disable=None) as bar:
        return tokenize_documents(documents, tokenizer, progress=lambda done, tokens: bar.update(done - bar.n))


def _model_class(settings: PretrainSettings) -> type[PretrainingModel]:
    return BertForMaskedLM if settings.objective == "mlm" else BertForPreTraining


def _pretrained_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> PretrainingModel:
    try:
        model = _model_class(settings).from_pretrained(
            settings.model,
            dtype=torch.float32,
            hidden_dropout_prob=settings.effective_dropout,
            attention_probs_dropout_prob=settings.effective_dropout,
        )
    except ValueError as error:
        raise SettingsError(f"--model {settings.model}: {error}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise SettingsError(
            f"the tokenizer has {len(tokenizer)} entries, --model {settings.model} has {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    if settings.longest_sequence > model.config.max_position_embeddings:
        raise SettingsError(
            f"sequences have up to {settings.longest_sequence} tokens, --model {settings.model} has positions for "
            f"{model.config.max_position_embeddings} tokens"
        )
    return model
