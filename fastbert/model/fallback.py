"""Which calls of a model run transformers' own forward pass, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from ..ops.registration import has_no_data, transform_reasons
from .attention_interface import is_known_attention
from .layer import FusedLayer
from .packing import begins_with_padding
from .plain import base_was_changed, is_watched

# Whether output_hidden_states takes indices of hidden states. Older versions take any list for True, or count layers from 0.
_TAKES_INDICES = hasattr(output_capturing, "selected_hidden_states")
CAUSAL = "is_causal asks for attention to earlier tokens alone"
MASK_IN_COMPILED_CODE = "torch.compile cannot know how many tokens a mask leaves; pass no mask, or packed inputs (cu_seq_lens_q)"


def model_fallback_reasons(
    model: nn.Module,
    *,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    past_key_values: Any = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | int | list[int] | None = None,
    is_causal: bool | None = None,
) -> list[str]:
    """Why a call runs transformers' own forward pass, padding included; empty where it runs packed."""
    config = model.config
    reasons = []
    attention = config._attn_implementation
    if attention == "eager":
        reasons.append("attn_implementation is 'eager' (the one that returns attention weights)")
    elif not is_known_attention(attention):
        reasons.append(f"attn_implementation is {attention!r}, under which somebody registered a function of their own")
    layers = model.encoder.layer
    if is_causal is None:  # transformers' default for the argument, and what attention reads where there is none
        is_causal = getattr(config, "is_causal", None)
    if not config.is_decoder and (is_causal or (is_causal is None and any(_is_causal(layer) for layer in layers))):
        reasons.append(CAUSAL)
    if output_attentions or (output_attentions is None and getattr(config, "output_attentions", False)):
        reasons.append("output_attentions asks for attention weights, which fused attention never stores")
    if not (_TAKES_INDICES or output_hidden_states is None or isinstance(output_hidden_states, bool)):
        reasons.append("output_hidden_states is no flag, which this version of transformers reads in its own way")
    if len(layers) > 0 and layers[0]._forward_pre_hooks and _reads_first_state(config, output_hidden_states):
        reasons.append("a hook may change what the first layer is called with, which is hidden_states[0]")
    if config.is_decoder or encoder_hidden_states is not None or past_key_values is not None:
        reasons.append("the model runs as a decoder (causal mask, key-value cache or cross-attention)")
    if attention_mask is not None and attention_mask.dim() != 2:
        reasons.append(f"attention_mask has {attention_mask.dim()} dimensions; padding is known from (batch, length) ones")
    if torch.jit.is_tracing():
        reasons.append("torch.jit.trace would freeze the sequence lengths of its example")
    if torch.compiler.is_compiling():
        if attention_mask is not None:
            reasons.append(MASK_IN_COMPILED_CODE)
        if torch.onnx.is_in_onnx_export():
            reasons.append("ONNX has none of fastbert's operators")
    reasons += transform_reasons()
    if has_no_data():
        reasons.append("tensors have no numbers to look at (FakeTensorMode, make_fx)")
    if nn.modules.module._has_any_global_hook():
        reasons.append("hooks for all modules are registered (torch.nn.modules.module.register_module_..._hook)")
    if is_watched(model.encoder) or base_was_changed(type(model.encoder)):
        reasons.append("the encoder has hooks, or its forward was replaced")
    if base_was_changed(type(model)):
        reasons.append("the forward of transformers' class was replaced")
    foreign = {type(layer).__qualname__ for layer in layers if not isinstance(layer, FusedLayer)}
    if foreign:
        reasons.append(f"encoder layers are of another class: {', '.join(sorted(foreign))}")
    if not reasons and begins_with_padding(attention_mask):
        reasons.append("a sequence begins with padding, which transformers pools as its first token")
    return reasons


def _is_causal(layer: nn.Module) -> bool:
    """Past nn.Module's lookup of attributes, which of twelve layers would take 40 us of every call."""
    attention = layer._modules.get("attention")
    inner = None if attention is None else attention._modules.get("self")
    return inner is not None and bool(inner.__dict__.get("is_causal", False))


def _reads_first_state(config: Any, output_hidden_states: bool | int | list[int] | None) -> bool:
    asked = {} if output_hidden_states is None else {"output_hidden_states": output_hidden_states}
    wanted = hidden_states_wanted(config, asked)
    selected = selected_states(wanted, config)
    return bool(wanted) and (selected is None or 0 in selected)


def hidden_states_wanted(config: Any, arguments: dict[str, Any]) -> bool | int | list[int] | None:
    """What ``output_hidden_states`` is in a call with these keyword arguments; what is false in Python asks for none."""
    return arguments.get("output_hidden_states", getattr(config, "output_hidden_states", False))


def selected_states(wanted: bool | int | list[int] | None, config: Any) -> set[int] | None:
    """The indices of the hidden states that are asked for, from 0, the embeddings; None where ``wanted`` is a flag."""
    if wanted is None or isinstance(wanted, bool):
        return None
    indices, num_layers = [wanted] if isinstance(wanted, int) else wanted, config.num_hidden_layers
    return {i % (num_layers + 1) for i in indices if -num_layers - 1 <= i <= num_layers}
