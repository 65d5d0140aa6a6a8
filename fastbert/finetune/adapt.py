"""Domain adaptation: a checkpoint's masked language model goes on with raw text of the domain before it is fine-tuned.

Gururangan et al., "Don't Stop Pretraining" (2020): what such text teaches is there when labels are few. The corpus is read as
``fastbert pretrain`` reads it; documents are cut into sequences, their masks drawn anew in every epoch, and 5% of the text is held
out to measure the loss before and after, on the same masks. A checkpoint that has no masked-LM head any more gets a new one, which
learns alone in the first fifth of the steps: gradients through random weights would distort the encoder (Kumar et al., "Fine-Tuning
can Distort Pretrained Features", 2022).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from fastbert import BertForMaskedLM, BertModel
from fastbert.data.collator import DataCollatorWithPacking
from fastbert.data.corpus import corpus_parts, read_documents
from fastbert.data.hub import no_waiting_for_the_hub
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer
from fastbert.data.tokens import TokenizedCorpus, tokenize_documents
from fastbert.runs import Say
from fastbert.runs.errors import SettingsError
from fastbert.runs.folder import write_json
from fastbert.runs.full_disk import write_errors
from fastbert.runs.model import check_sizes
from fastbert.tasks.model import check_vocabulary, load_config, quiet_transformers
from fastbert.train.corpus_tokens import fingerprint

ADAPTATION_NAME = "adaptation.json"
MASKED = 0.15
HELD_OUT_FRACTION = 0.05
# About 10,000 masked tokens, on which before and after are compared mask by mask.
HELD_OUT_TOKENS = 1 << 16
LONGEST = 128
# Of the steps, those in which a new head learns alone.
HEAD_FIRST = 0.2
_EVALUATION_SEED = 20181011


@dataclass(frozen=True)
class Adaptation:
    """``before``, ``after``: loss (nats) and accuracy of the masked tokens held out; ``tokens_per_second``: of training; ``notes``:
    what the user should know about the model; ``fingerprint``: of the corpus in the checkpoint's tokens."""

    corpus: list[str]
    fingerprint: str
    documents: int
    train_tokens: int
    held_out_tokens: int
    steps: int
    epochs: float
    seconds: float
    tokens_per_second: float
    before: dict[str, float]
    after: dict[str, float]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def adapt(
    name: str,
    corpus: Sequence[str],
    output: Path,
    *,
    steps: int | None = None,
    max_seq_length: int = LONGEST,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
    seed: int = 0,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    say: Say = print,
) -> Adaptation:
    """Trains the masked language model of checkpoint ``name`` on ``corpus`` (files, folders or a dataset: ``read_documents``) and
    leaves it in ``output``, with its tokenizer and what is returned as ``adaptation.json``, for ``--model`` to take.

    ``steps``: None for an epoch; ``dtype``: float32, or bfloat16 for autocast. ``output`` appears when all is done. Raises
    CorpusError for text that cannot be used and SettingsError for a checkpoint that is no BERT, or that has fewer positions than
    ``max_seq_length``.
    """
    set_seed(seed)
    tokenizer = load_tokenizer(name)
    model, notes = _masked_lm(name, tokenizer, max_seq_length)
    for note in notes:
        say(f"  {note}")
    tokens = _tokens(corpus, tokenizer)
    train, held_out = tokens.split(HELD_OUT_FRACTION, seed, least_documents=1)
    say(f"Adapting {name} to {', '.join(map(str, corpus))}: {tokens}, {held_out.num_tokens:,} of them held out")
    model.to(device)
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=MASKED)
    scored = _held_out_batches(sequences(held_out, tokenizer, max_seq_length), collate, batch_size)
    before = _scores(model, scored)

    rows = sequences(train, tokenizer, max_seq_length)
    new = output.with_name(f".{output.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(new),
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            max_steps=steps or -1,
            learning_rate=learning_rate,
            warmup_steps=0.1,
            weight_decay=0.01,
            logging_steps=0.1,
            save_strategy="no",
            seed=seed,
            bf16=dtype == "bfloat16",
            use_cpu=torch.device(device).type == "cpu",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[_Lines(say), *([_HeadFirst()] if notes else [])],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    with quiet_transformers():
        trainer.train()
    seconds = time.perf_counter() - started
    epochs = float(trainer.state.epoch or 0)
    result = Adaptation(
        corpus=[str(source) for source in corpus],
        fingerprint=fingerprint(tokens),
        documents=tokens.num_documents,
        train_tokens=train.num_tokens,
        held_out_tokens=held_out.num_tokens,
        steps=trainer.state.global_step,
        epochs=epochs,
        seconds=seconds,
        tokens_per_second=epochs * sum(len(row["input_ids"]) for row in rows) / seconds,
        before=before,
        after=_scores(model, scored),
        notes=notes,
    )
    try:
        with write_errors(output), quiet_transformers():
            model.save_pretrained(new)
            save_tokenizer(tokenizer, new)
            write_json(new / ADAPTATION_NAME, result.to_dict())
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(output, ignore_errors=True)
    os.replace(new, output)
    say(
        f"Masked tokens of the held-out text: loss {before['loss']:.3f} before, {result.after['loss']:.3f} after "
        f"{result.steps:,} steps; {before['accuracy']:.1%} and {result.after['accuracy']:.1%} of them right "
        f"({result.tokens_per_second:,.0f} tokens/s)"
    )
    return result


def check_corpus(adapted: Path, name: str, corpus: Sequence[str], say: Say) -> None:
    """Raises SettingsError where ``corpus`` is no longer the text that checkpoint ``name`` was adapted to in ``adapted``: nothing
    reads it any more, but the model would be taken for one of the new text. Raises CorpusError where it has become unreadable.

    A corpus that is gone, or that is no file but a dataset, is not compared, and neither is one of an earlier version of fastbert,
    which kept no fingerprint.
    """
    before = json.loads((adapted / ADAPTATION_NAME).read_text(encoding="utf-8"))
    if "fingerprint" not in before:
        return
    if absent := [str(source) for source in corpus if not Path(source).exists()]:
        say(f"--adapt {' '.join(absent)}: no file or folder to compare with; {adapted} is taken as it was adapted before")
        return
    tokens = _tokens(corpus, load_tokenizer(name))
    if fingerprint(tokens) != before["fingerprint"]:
        num_tokens = before["train_tokens"] + before["held_out_tokens"]
        raise SettingsError(
            f"cannot resume with another text: --adapt {' '.join(map(str, corpus))} is no longer what {adapted} was adapted to. "
            f"It had {before['documents']:,} documents and {num_tokens:,} tokens, it now has {tokens.num_documents:,} documents "
            f"and {tokens.num_tokens:,} tokens: put the earlier text back, or --overwrite starts the run anew"
        )


def check_adaptation(name: str, corpus: Sequence[str], max_seq_length: int) -> None:
    """Raises what :func:`adapt` raises of the checkpoint, and of sources that stand for nothing, without reading the text."""
    _masked_lm(name, load_tokenizer(name), max_seq_length)
    list(corpus_parts(corpus))


def _tokens(corpus: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> TokenizedCorpus:
    return tokenize_documents(read_documents(corpus, least_documents=1), tokenizer, least_documents=1)


def sequences(corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> list[dict[str, np.ndarray]]:
    """The documents as sequences [CLS] ... [SEP] of at most ``max_seq_length`` tokens, those of a document about equally long."""
    bounds = corpus.sentence_offsets[corpus.document_offsets]
    around = np.array([[tokenizer.cls_token_id], [tokenizer.sep_token_id]])
    rows = []
    for start, end in zip(bounds[:-1], bounds[1:]):
        ids = corpus.ids[start:end]
        pieces = -(-len(ids) // (max_seq_length - 2))
        rows += [{"input_ids": np.concatenate([around[0], piece, around[1]])} for piece in np.array_split(ids, pieces)]
    return rows


def effect(without: Mapping[str, Any], adapted: Mapping[str, Any], say: Say) -> dict[str, dict[str, dict[str, Any]]]:
    """What adaptation did to fine-tuning: for each split and metric the means ``without`` and ``adapted`` and their ``difference``.

    Both arguments are ``FinetuneResult.scores`` of the same seeds.
    """
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for split, metrics in without.items():
        report[split] = {}
        for metric, scores in metrics.items():
            pair = scores["mean"], adapted[split][metric]["mean"]
            differences = [b - a for a, b in zip(scores["values"], adapted[split][metric]["values"], strict=True)]
            report[split][metric] = {
                "without": pair[0],
                "adapted": pair[1],
                "difference": pair[1] - pair[0],
                "differences": differences,
            }
            say(f"{split} {metric}: {pair[0]:.4f} without adaptation, {pair[1]:.4f} with it ({pair[1] - pair[0]:+.4f})")
    return report


def _masked_lm(name: str, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> tuple[BertForMaskedLM, list[str]]:
    """(model, notes). Its pooler, which a masked language model does not need, is the checkpoint's: fine-tuning will ask for it."""
    config = load_config(name)
    if config.model_type != "bert":
        raise SettingsError(f"--adapt goes on with BERT's masked language model; --model {name} is of type {config.model_type!r}")
    check_vocabulary(name, config, tokenizer)
    if max_seq_length > config.max_position_embeddings:
        raise SettingsError(
            f"--max-seq-length is {max_seq_length}, --model {name} has positions for {config.max_position_embeddings} tokens"
        )
    with quiet_transformers(), no_waiting_for_the_hub(name):
        options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, loading = BertForMaskedLM.from_pretrained(name, **options)
        encoder, loading_encoder = BertModel.from_pretrained(name, **options)
    check_sizes(name, loading)
    check_sizes(name, loading_encoder)
    notes = []
    new = sorted(key for key in loading["missing_keys"] if key.startswith("cls."))
    if new:
        tied = "; its decoder is the table of word embeddings" if config.tie_word_embeddings else ""
        notes.append(f"{name} has no head of a masked language model: a new one, with random weights ({', '.join(new)}){tied}")
    if not any(key.startswith("pooler.") for key in loading_encoder["missing_keys"]):
        model.bert.pooler = encoder.pooler
    return model, notes


class _Lines(TrainerCallback):
    def __init__(self, say: Say) -> None:
        self.say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.say(f"  step {state.global_step:,} of {state.max_steps:,}: masked-LM loss {float(logs['loss']):.3f}")


class _HeadFirst(TrainerCallback):
    """Freezes the encoder for the first steps, once the optimizer has taken note of its parameters."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.requires_grad_(False)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step >= HEAD_FIRST * state.max_steps:
            model.base_model.requires_grad_(True)


def _held_out_batches(rows: list[dict[str, np.ndarray]], collate: DataCollatorWithPacking, batch_size: int) -> list[dict[str, Any]]:
    """Masked once, from a seed of their own: the loss before and after is that of the same tokens."""
    kept: list[dict[str, np.ndarray]] = []
    tokens = 0
    for number in np.random.default_rng(_EVALUATION_SEED).permutation(len(rows)):
        if tokens >= HELD_OUT_TOKENS:
            break
        kept.append(rows[number])
        tokens += len(rows[number]["input_ids"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_EVALUATION_SEED)
        return [collate(kept[first : first + batch_size]) for first in range(0, len(kept), batch_size)]


@torch.inference_mode()
def _scores(model: BertForMaskedLM, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Mean loss and accuracy of the masked tokens of ``batches``."""
    training = model.training
    model.eval()
    sums = np.zeros(3)
    for batch in batches:
        output = model(**{key: x.to(model.device) if isinstance(x, Tensor) else x for key, x in batch.items()})
        count = int(output.mlm_count)
        sums += (float(output.loss) * count if count else 0.0, int(output.mlm_correct), count)
    model.train(training)
    return {"loss": float(sums[0] / sums[2]), "accuracy": float(sums[1] / sums[2])}
