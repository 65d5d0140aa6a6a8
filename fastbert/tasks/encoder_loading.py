"""An encoder and its tokenizer out of a checkpoint, for inference, as fast as fastbert can make them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from fastbert.data.errors import DataError, TokenizerError
from fastbert.model.accelerate import accelerate
from fastbert.model.int8_checkpoint import METHOD as INT8
from fastbert.model.quantize import quantize
from fastbert.train.errors import SettingsError
from fastbert.train.prepare import pick_device

from .embedding_settings import DTYPES


def load_encoder(
    name: str, *, dtype: str | None = None, device: str = "auto", words: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[str]]:
    """The encoder of a checkpoint (a folder, or a name on the Hugging Face hub) in evaluation mode, its tokenizer, and notes of
    why it is not fast; a head on top of it is left out.

    dtype: "float32" (None), "bfloat16" or "int8"; what was saved in int8 stays so. device: "auto" is a GPU where there is one.
    words: texts will come as lists of words. Raises SettingsError for settings that cannot work, DataError for a checkpoint that
    cannot be used.
    """
    target = str(pick_device(device))
    config, tokenizer = _load_config(name), _load_tokenizer(name, words)
    if len(tokenizer) > config.vocab_size:
        raise TokenizerError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}: they do not belong together, or "
            "tokens were added without model.resize_token_embeddings"
        )
    model, notes = _load_model(name, config, dtype, target)
    return model, tokenizer, notes


def _load_config(name: str) -> transformers.PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: no model that can be loaded ({_first_line(error)})") from error
    if config.is_encoder_decoder:
        raise DataError(f"{name}: a model of type {config.model_type!r} has an encoder and a decoder; embeddings need an encoder")
    return config


def _load_tokenizer(name: str, words: bool) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if words and getattr(tokenizer, "add_prefix_space", True) is False:
            # A byte-level tokenizer takes words only with the space before each that it was trained with.
            tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{name}: no tokenizer that can be loaded ({_first_line(error)})") from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{name}: {type(tokenizer).__name__} is not backed by the tokenizers library")
    return tokenizer


def _load_model(
    name: str, config: transformers.PretrainedConfig, dtype: str | None, device: str
) -> tuple[PreTrainedModel, list[str]]:
    """The encoder in evaluation mode, fast where it can be, and notes of why it is not."""
    saved_in_int8 = (getattr(config, "quantization_config", None) or {}).get("quant_method") == INT8
    if dtype not in (None, *DTYPES):
        raise SettingsError(f"--dtype {dtype} is not known; known are {', '.join(DTYPES)}")
    if saved_in_int8 and dtype not in (None, "int8"):
        raise SettingsError(f"--dtype {dtype}: {name} was saved in int8, which does not become {dtype} again")
    if dtype == "int8" and device != "cpu":
        raise SettingsError("--dtype int8 is for CPUs: --device cpu")
    options: dict[str, Any] = {"dtype": torch.bfloat16 if dtype == "bfloat16" else torch.float32, "config": config}
    model_class = AutoModel._model_mapping.get(type(config), None)
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    verbosity = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_error()  # what is missing is reported below, and a head that is left over is no loss
        model, loading = AutoModel.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: the model cannot be loaded ({_first_line(error)})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if missing := sorted(key for key in loading["missing_keys"] if not key.startswith("pooler.")):
        raise DataError(f"{name}: the checkpoint lacks weights of {type(model).__name__}: {', '.join(missing[:3])}, ...")
    model.eval()
    notes = []
    try:
        accelerate(model)
    except TypeError as error:
        notes = [f"padded batches in transformers' own code: {error}"]
    if dtype == "int8" and not saved_in_int8:
        try:
            quantize(model)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"--dtype int8: {error}") from error
    return model.to(device), notes


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
