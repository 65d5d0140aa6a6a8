"""Before the first step: the corpus in batches, and the model with its initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedTokenizerFast

from fastbert import BertConfig, BertForMaskedLM, BertForPreTraining
from fastbert.data.batches import PackedBatch, PretrainingBatches
from fastbert.data.errors import CorpusError
from fastbert.data.hub import no_waiting_for_the_hub
from fastbert.data.tokens import TokenizedCorpus
from fastbert.runs import Say
from fastbert.runs.errors import SettingsError
from fastbert.runs.model import check_sizes

from .corpus_tokens import corpus_tokens
from .settings import Phase, PretrainSettings

PretrainingModel = BertForPreTraining | BertForMaskedLM
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
    """The corpus in batches; a continued run takes the tokenizer of its ``checkpoint``.

    Raises what :func:`corpus_tokens` raises, and :class:`SettingsError` where lengths or masks do not fit the tokenizer.
    """
    corpus = corpus_tokens(settings, say, checkpoint)
    tokenizer, last_phase = corpus.tokenizer, settings.phases[-1]
    batches = {phase.number: _batches(corpus.train, tokenizer, settings, phase) for phase in settings.phases}
    held_out_limit = max(1, HELD_OUT_TOKENS // settings.tokens_per_batch)
    held_out = list(islice(_batches(corpus.held_out, tokenizer, settings, last_phase).epoch(0), held_out_limit))
    if not held_out:
        raise CorpusError(
            f"no sentence pair can be made of the held-out text ({corpus.held_out}), whose documents are single tokens: give more "
            "text, or a larger --held-out-fraction"
        )
    facts = {**corpus.facts, "scored_tokens": sum(batch.num_tokens for batch in held_out), "vocab_size": len(tokenizer)}
    say(
        f"Tokens: {facts['train_tokens']:,} to train on, {facts['held_out_tokens']:,} held out "
        f"(vocabulary of {facts['vocab_size']:,}{_epoch_text(batches[1])})"
    )
    return PreparedData(tokenizer, batches, held_out, facts)


def _epoch_text(batches: PretrainingBatches) -> str:
    """Of a corpus of several blocks, which would have to be planned one after the other, nothing is said."""
    return f", {batches.num_batches():,} batches an epoch" if batches.num_blocks() == 1 else ""


def _batches(
    corpus: TokenizedCorpus | Sequence[TokenizedCorpus],
    tokenizer: PreTrainedTokenizerFast,
    settings: PretrainSettings,
    phase: Phase,
) -> PretrainingBatches:
    try:
        return PretrainingBatches(
            corpus,
            tokenizer,
            max_seq_length=phase.max_seq_length,
            tokens_per_batch=settings.tokens_per_batch,
            seed=settings.seed,
            objective=settings.objective,
            masking=settings.masking,
            mlm_probability=settings.mlm_probability,
            static_pairs=settings.static_pairs,
        )
    except ValueError as error:
        length = "--max-seq-length" if phase.number == 1 else "--second-phase-seq-length"
        raise SettingsError(f"{length}, --tokens-per-batch, --masking: {error}") from error


def check_model(settings: PretrainSettings) -> None:
    """Looks at ``--model``, where it is a checkpoint, before any text is read.

    Raises :class:`SettingsError` where it is not there, is none of BERT's, has too few positions or segments, or cannot train.
    """
    if not settings.continues_checkpoint:
        return
    name = f"--model {settings.model}"
    try:
        with no_waiting_for_the_hub(settings.model):
            config = AutoConfig.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        why = (
            "cannot be loaded"
            if Path(settings.model).exists()
            else "no such folder, and loading it from the Hugging Face hub failed"
        )
        raise SettingsError(f"{name}: {why} ({str(error).splitlines()[0]})") from error
    if config.model_type != "bert":
        raise SettingsError(f"{name} holds a model of type {config.model_type!r}, which is not BERT's")
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method")
        raise SettingsError(f"{name} holds quantized weights ({method}), which cannot train: give the model it was made of")
    if settings.longest_sequence > config.max_position_embeddings:
        raise SettingsError(
            f"sequences have up to {settings.longest_sequence} tokens, {name} has positions for "
            f"{config.max_position_embeddings} tokens"
        )
    if settings.objective == "mlm-nsp" and config.type_vocab_size < 2:
        raise SettingsError(f"{name} knows no second segment (type_vocab_size 1): give --objective mlm")


def build_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast, checkpoint: Path | None) -> PretrainingModel:
    """The model for the objective, in float32 on the CPU: of the ``checkpoint``'s shape for a continued run, from ``--model`` else.

    Fresh weights follow torch's seed. Raises :class:`SettingsError` where tokenizer and model do not fit together, and for a
    checkpoint that cannot be read.
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


def _model_class(settings: PretrainSettings) -> type[PretrainingModel]:
    return BertForMaskedLM if settings.objective == "mlm" else BertForPreTraining


def _pretrained_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> PretrainingModel:
    try:
        with no_waiting_for_the_hub(settings.model):
            model, loading = _model_class(settings).from_pretrained(
                settings.model,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                hidden_dropout_prob=settings.effective_dropout,
                attention_probs_dropout_prob=settings.effective_dropout,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingsError(f"--model {settings.model}: {error}") from error
    check_sizes(settings.model, loading)
    if len(tokenizer) > model.config.vocab_size:
        raise SettingsError(
            f"the tokenizer has {len(tokenizer)} entries, --model {settings.model} has {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    return model
