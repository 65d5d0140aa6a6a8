"""An encoder and its tokenizer out of a checkpoint, for inference, as fast as fastbert can make them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from fastbert.data.hub import no_waiting_for_the_hub
from fastbert.runs.errors import SettingsError, first_line
from fastbert.runs.model import check_sizes, pick_device
from fastbert.tasks.model import (
    accelerated,
    check_vocabulary,
    load_config,
    load_fast_tokenizer,
    quantized,
    quiet_transformers,
    stays_int8,
)

from .settings import DTYPES


def load_encoder(
    name: str, *, dtype: str | None = None, device: str = "auto", words: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """The encoder of a checkpoint (a folder, or a name on the Hugging Face hub) in evaluation mode, its tokenizer, and notes of
    why it is not fast; a head on top of it is left out.

    dtype: "float32" (None), "bfloat16" or "int8"; what was saved in int8 stays so. device: "auto" is a GPU where there is one.
    words: texts will come as lists of words. Raises SettingsError for settings that cannot work and checkpoints that cannot be
    used.
    """
    target = str(pick_device(device))
    config = load_config(name)
    if config.is_encoder_decoder:
        raise SettingsError(
            f"--model {name}: its type {config.model_type!r} has an encoder and a decoder; embeddings need an encoder"
        )
    tokenizer = load_fast_tokenizer(name, config, words=words)
    check_vocabulary(name, config, tokenizer)
    model, notes = _load_model(name, config, dtype, target)
    return model, tokenizer, notes


def _load_model(
    name: str, config: transformers.PretrainedConfig, dtype: str | None, device: str
) -> tuple[PreTrainedModel, list[str]]:
    """The encoder in evaluation mode, fast where it can be, and notes of why it is not."""
    if dtype not in (None, *DTYPES):
        raise SettingsError(f"--dtype {dtype} is not known; known are {', '.join(DTYPES)}")
    saved_in_int8 = stays_int8(name, config, dtype)
    if dtype == "int8" and device != "cpu":
        raise SettingsError("--dtype int8 is for CPUs: --device cpu")
    options: dict[str, Any] = {"dtype": torch.bfloat16 if dtype == "bfloat16" else torch.float32, "config": config}
    model_class = AutoModel._model_mapping.get(type(config), None)
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    try:
        # What is missing is reported below, and a head that is left over is no loss.
        with quiet_transformers(), no_waiting_for_the_hub(name):
            model, loading = AutoModel.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingsError(f"--model {name} cannot be loaded as an encoder: {first_line(error)}") from error
    check_sizes(name, loading)
    if missing := sorted(key for key in loading["missing_keys"] if not key.startswith("pooler.")):
        raise SettingsError(f"--model {name} lacks weights of {type(model).__name__}: {', '.join(missing[:3])}, ...")
    model.eval()
    notes = accelerated(model)
    if dtype == "int8" and not saved_in_int8:
        quantized(model)
    return model.to(device), notes
