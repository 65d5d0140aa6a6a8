"""BertModel: transformers' encoder with padding taken out once before the first layer and put back once after the last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.bert import modeling_bert as hf

from .embeddings import embed
from .inputs import check_inputs
from .layer import BertLayer
from .outputs import BertModelOutput, Deferred
from .packing import Packing
from .swap import replaces, use_fast_classes


class CheckedLoading:
    """Mixin: ``from_pretrained`` refuses checkpoints of another architecture instead of filling in random weights."""

    # Trainer scales the loss for gradient accumulation itself where a model says that it does not: transformers' classes do
    # not use num_items_in_batch but let Trainer believe so, which makes loss and gradients too large by the accumulation steps.
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        if pretrained_model_name_or_path is not None:
            found = config if config is not None and not isinstance(config, str) else None
            model_type = getattr(found, "model_type", None)
            if found is None:
                hub = {k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs}
                model_type = hf.BertConfig.get_config_dict(config or pretrained_model_name_or_path, **hub)[0].get("model_type")
            if model_type not in (None, "bert"):
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds a model of type {model_type!r}, {cls.__name__} loads 'bert'; "
                    f"its weights would not fit (transformers.AutoModel loads any type)"
                )
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class PackedHead(CheckedLoading):
    """Mixin of every head: whatever transformers' constructor built, its encoder works on packed rows."""

    def __init__(self, config):
        super().__init__(config)
        use_fast_classes(self)


@replaces(hf.BertModel)
class BertModel(CheckedLoading, hf.BertModel):
    """transformers' BertModel: the same arguments, outputs, state dict and configuration.

    Differences: padding positions of ``last_hidden_state`` and ``hidden_states`` are 0. Given ``cu_seq_lens_q`` (and
    ``max_length_q``) the inputs (1, total) hold several sequences one after the other: they do not see each other, their
    positions start at 0 unless ``position_ids`` says otherwise, and ``pooler_output`` is (num_sequences, hidden).
    """

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        use_fast_classes(self.encoder)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        check_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)
        reasons = model_fallback_reasons(
            self,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=past_key_values,
            output_attentions=kwargs.get("output_attentions"),
        )
        if reasons:
            if kwargs.get("cu_seq_lens_q") is not None:
                raise ValueError(f"packed inputs (cu_seq_lens_q) need the packed forward pass, but {'; '.join(reasons)}")
            return super().forward(
                input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return self._packed_forward(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)

    def _packed_forward(self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs):
        tokens = inputs_embeds if input_ids is None else input_ids
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        packing = self._packing(tokens, attention_mask, cu_seqlens, kwargs.get("max_length_q"))
        hidden_states = embed(self, packing, input_ids, token_type_ids, position_ids, inputs_embeds)

        config = self.config
        wanted = kwargs.get("output_hidden_states", getattr(config, "output_hidden_states", False))
        recorded = _HiddenStates(wanted, config.num_hidden_layers)
        recorded.add(hidden_states)
        for layer in self.encoder.layer:
            hidden_states = layer(hidden_states, packing)
            recorded.add(hidden_states)

        output = self._output(hidden_states, packing)
        if self.pooler is not None:
            output.pooler_output = self.pooler(packing.first_positions(hidden_states).unsqueeze(1))
        if recorded.states is not None:
            last = output.last_hidden_state
            output.hidden_states = tuple(
                None if state is None else last if state is hidden_states else packing.pad(state) for state in recorded.states
            )
        return output.to_tuple() if kwargs.get("return_dict", getattr(config, "return_dict", True)) is False else output

    def _output(self, hidden_states: Tensor, packing: Packing):
        if torch.compiler.is_compiling():
            return hf.BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=packing.pad(hidden_states))
        output = BertModelOutput()
        output.defer("last_hidden_state", Deferred(lambda: packing.pad(hidden_states)))
        output.packed, output.packing = hidden_states, packing
        return output

    def _packing(self, tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_length: int | None) -> Packing:
        shape = tuple(tokens.shape[:2])
        if cu_seqlens is None:
            return Packing.from_mask(mask, shape, tokens.device)
        cu_seqlens = cu_seqlens.to(torch.int32)
        return Packing(cu_seqlens, int(cu_seqlens.diff().max()) if max_length is None else int(max_length), shape)


def model_fallback_reasons(
    model: hf.BertModel,
    *,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    past_key_values: Any = None,
    output_attentions: bool | None = None,
) -> list[str]:
    """Why a call runs transformers' own forward pass, padding included; empty where it runs packed."""
    config = model.config
    reasons = []
    if config._attn_implementation == "eager":
        reasons.append("attn_implementation is 'eager' (the one that returns attention weights)")
    if output_attentions or (output_attentions is None and getattr(config, "output_attentions", False)):
        reasons.append("output_attentions asks for attention weights, which fused attention never stores")
    if config.is_decoder or encoder_hidden_states is not None or past_key_values is not None:
        reasons.append("the model runs as a decoder (causal mask, key-value cache or cross-attention)")
    if attention_mask is not None and attention_mask.dim() != 2:
        reasons.append(f"attention_mask has {attention_mask.dim()} dimensions; padding is known from (batch, length) ones")
    if torch.jit.is_tracing():
        reasons.append("torch.jit.trace would freeze the sequence lengths of its example")
    if attention_mask is not None and torch.compiler.is_compiling():
        reasons.append("torch.compile cannot know how many tokens a mask leaves; pass no mask, or packed inputs (cu_seq_lens_q)")
    foreign = {type(layer).__qualname__ for layer in model.encoder.layer if not isinstance(layer, BertLayer)}
    if foreign:
        reasons.append(f"encoder layers are of another class: {', '.join(sorted(foreign))}")
    return reasons


class _HiddenStates:
    """Keeps the packed rows after the embeddings and after each layer, all of them or those whose index was asked for."""

    def __init__(self, wanted: bool | int | list[int] | None, num_layers: int) -> None:
        self.states: list[Tensor | None] | None = None if wanted is None or wanted is False else []
        self._selected = None
        if self.states is not None and not isinstance(wanted, bool):
            indices = [wanted] if isinstance(wanted, int) else wanted
            self._selected = {i % (num_layers + 1) for i in indices if -num_layers - 1 <= i <= num_layers}

    def add(self, state: Tensor) -> None:
        if self.states is not None:
            keep = self._selected is None or len(self.states) in self._selected
            self.states.append(state if keep else None)
