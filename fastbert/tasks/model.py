"""A checkpoint, its tokenizer and the head of a task: fastbert's classes where there are some for it, transformers' elsewhere."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from fastbert.data.collator import DataCollatorWithPacking
from fastbert.data.hub import no_waiting_for_the_hub
from fastbert.data.tokenizer import load_tokenizer
from fastbert.model.accelerate import accelerate
from fastbert.model.encoder import PackedEncoder
from fastbert.model.int8_checkpoint import METHOD as INT8
from fastbert.model.quantize import quantize
from fastbert.runs.errors import SettingsError, first_line
from fastbert.runs.model import check_sizes

from .choices import pad_choices
from .task import Task, unnamed

Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
# Longest sequence of a model that has no positions of its own to run out of.
_UNLIMITED = 512


@dataclass(frozen=True)
class TaskModel:
    """``packed``: whether batches are rows without padding; ``collate``: what makes them; ``notes``: what the user should know
    about the model (a new head, why it is not fast); ``new``: the weights that its checkpoint has not."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    packed: bool
    collate: Collate
    notes: tuple[str, ...]
    new: tuple[str, ...] = ()


def load_model(name: str, task: Task, *, fast: bool = True) -> TaskModel:
    """The model of ``task`` on the CPU in float32, from a folder or a name on the Hugging Face hub.

    ``task`` knows its labels, or takes those of a fine-tuned checkpoint. With ``fast`` False it stays transformers' own, on padded
    batches. Raises SettingsError naming the model where it cannot be loaded or has no such head.
    """
    config = load_config(name)
    tokenizer = load_task_tokenizer(name, config, task)
    changes = task.config()
    auto_class = getattr(transformers, task.auto_class)
    try:
        # A fine-tuned checkpoint may have another number of labels: its head is then a new one, which the notes say.
        with quiet_transformers(), no_waiting_for_the_hub(name):
            model, loading = auto_class.from_pretrained(
                name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **changes
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SettingsError(f"--model {name} cannot be loaded as {task.auto_class}: {first_line(error)}") from error
    check_sizes(name, loading, f"{model.base_model_prefix}.")
    new = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    notes = [f"New weights, not in the checkpoint: {', '.join(new)}"] if new else other_head(config, changes)
    if fast:
        notes += accelerated(model)
    check_vocabulary(name, model.config, tokenizer)
    # It is saved with the model, for whoever says truncation=True: a checkpoint's own may know no limit.
    tokenizer.model_max_length = longest_sequence(model.config, tokenizer)
    packed = fast and not task.pads and takes_packed_rows(model)
    return TaskModel(model, tokenizer, packed, collator(model, tokenizer, task.family, packed), tuple(notes), tuple(new))


def other_head(config: PretrainedConfig, changes: dict[str, Any]) -> list[str]:
    """A note on a head of the checkpoint that fits in size and was trained on something else than what ``changes`` say."""
    held, wanted, problem = tuple(config.id2label.values()), tuple(changes["id2label"].values()), changes["problem_type"]
    if wanted not in (held, unnamed(len(wanted))):
        labels = [textwrap.shorten(", ".join(map(str, names)), 80, placeholder=" ...") for names in (held, wanted)]
        other = f"labels {labels[0]}; the task's are {labels[1]}"
    elif problem is not None and config.problem_type not in (None, problem):
        other = f"{config.problem_type}; the task is {problem}"
    else:
        return []
    return [f"The head is the checkpoint's, of another task: {other}. Training begins with its weights"]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and warnings: a command says itself, in its own words, what they are about."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def accelerated(model: PreTrainedModel) -> list[str]:
    """Makes ``model`` fast in place; returns a note of why it is not, where it cannot be."""
    try:
        accelerate(model)
    except TypeError as error:
        return [f"transformers' own code, on padded batches: {error}"]
    return []


def stays_int8(name: str, config: PretrainedConfig, dtype: str | None) -> bool:
    """Whether the checkpoint was saved in int8. Raises SettingsError where it was and another ``dtype`` than that is asked for."""
    saved = (config.to_dict().get("quantization_config") or {}).get("quant_method") == INT8
    if saved and dtype not in (None, "int8"):
        raise SettingsError(f"--dtype {dtype}: {name} was saved in int8, which does not become {dtype} again")
    return saved


def quantized(model: PreTrainedModel) -> None:
    """Makes the encoder's matmuls int8, in place. Raises SettingsError where they cannot be."""
    try:
        quantize(model)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"--dtype int8: {error}") from error


def check_vocabulary(name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > config.vocab_size:
        raise SettingsError(f"--model {name} has {config.vocab_size} entries in its vocabulary, its tokenizer {len(tokenizer)}")


def takes_packed_rows(model: PreTrainedModel) -> bool:
    """Whether ``model`` is ours and takes several sequences in one row."""
    return isinstance(model.base_model, PackedEncoder)


def collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: str, packed: bool) -> Collate:
    """Packs where the model takes packed rows; elsewhere the collator of the family, which pads to the longest."""
    if packed:
        return DataCollatorWithPacking(position_ids_start=model.base_model.first_position)
    padding = {"words": DataCollatorForTokenClassification, "choices": pad_choices}
    return padding.get(family, DataCollatorWithPadding)(tokenizer)


def load_config(name: str) -> PretrainedConfig:
    """Raises SettingsError where there is none."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise SettingsError(f"--model {name}: the folder holds no config.json, so it is no model of transformers")
    try:
        with no_waiting_for_the_hub(name):
            return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).exists():
            raise SettingsError(f"--model {name} cannot be loaded: {first_line(error)}") from error
        raise SettingsError(
            f"--model {name}: no such folder, and loading it from the Hugging Face hub failed ({first_line(error)})"
        ) from error


def load_task_tokenizer(name: str, config: PretrainedConfig, task: Task) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint for the texts of ``task``."""
    return load_fast_tokenizer(name, config, words=task.family == "words")


def load_fast_tokenizer(name: str, config: PretrainedConfig, *, words: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, for texts or for lists of ``words``, without the padding and the truncation that may be baked
    into it."""
    if config.model_type == "bert":
        return load_tokenizer(name)
    options = {"add_prefix_space": True} if words else {}
    try:
        with no_waiting_for_the_hub(name):
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--model {name}: its tokenizer cannot be loaded ({first_line(error)})") from error
    if not tokenizer.is_fast:
        raise SettingsError(f"--model {name}: {type(tokenizer).__name__} is not backed by the tokenizers library")
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def longest_sequence(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the model takes at most, [CLS] and [SEP] included."""
    positions = getattr(config, "max_position_embeddings", None) or _UNLIMITED
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1
    return min(positions, tokenizer.model_max_length)


def check_length(max_seq_length: int, longest: int, name: str) -> None:
    if max_seq_length > longest:
        raise SettingsError(f"--max-seq-length is {max_seq_length}; --model {name} takes {longest} tokens at most")
