"""The encoder's forward pass with padding taken out once before the first layer and put back once after the last.

:class:`PackedEncoder` is a mixin in front of transformers' model class: it runs what it can on packed rows, and transformers' own
forward for the rest, which :func:`model_fallback_reasons` names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.registration import has_no_data
from . import request
from .cache_name import CACHE, takes_their_cache
from .embeddings import embed
from .fallback import CAUSAL, hidden_states_wanted, model_fallback_reasons, selected_states
from .in_half import convert_for
from .inputs import check_inputs, warn_of_first_position
from .layer import active_dropout_p, take_half
from .outputs import PooledEncoderOutput
from .packed_ends import pool
from .packed_layer import is_trained, run_stack
from .packing import Packing
from .plain import is_watched
from .row_selection import RowSelection, SelectedRows, all_rows_reasons, few_are_worth_it, reads_first_rows
from .swap import is_of_fast_class, use_fast_classes


class PackedEncoder:
    """Mixin for transformers' BertModel and its relatives: the same arguments, outputs, state dict and configuration.

    Differences: padding positions of ``last_hidden_state`` and ``hidden_states`` are 0. Given ``cu_seq_lens_q`` (and
    ``max_length_q``), or ``position_ids`` that start again within the one row of the batch, the inputs (1, total) hold several
    sequences one after the other: they do not see each other, their positions start anew unless ``position_ids`` says
    otherwise, and ``pooler_output`` is (num_sequences, hidden).
    """

    # The class of embeddings that can run fused, the position of a sequence's first token, and the class of the outputs.
    embeddings_class: type
    first_position = 0
    output_class = PooledEncoderOutput

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        use_fast_classes(self.encoder)

    @takes_their_cache
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
        inputs = {
            "input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        # From a head of ours: the labels (batch, length) whose rows it reads, and those rows (cap,) where it knows them, or that it
        # reads the pooler's output alone.
        read = kwargs.pop("read_labels", None), kwargs.pop("read_rows", None), kwargs.pop("read_first", False)
        nothing_else = kwargs in _NOTHING_ELSE and position_ids is None and inputs_embeds is None and read[0] is None
        if nothing_else and input_ids is not None and encoder_hidden_states is None and past_key_values is None:
            answered = request.answer(self, input_ids, attention_mask, token_type_ids, read[2])
            if answered is not None:
                return self._answer(*answered)
        packing = self.packed_row(attention_mask, kwargs, past_key_values, **inputs)
        reasons = model_fallback_reasons(
            self,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=past_key_values,
            output_attentions=kwargs.get("output_attentions"),
            output_hidden_states=kwargs.get("output_hidden_states"),
            is_causal=kwargs.get("is_causal"),
        )
        if not reasons:
            return self._packed_forward(packing, attention_mask, read, kwargs, **inputs)
        decoder = {
            "encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask,
            CACHE: past_key_values, "use_cache": use_cache,
        }  # fmt: skip
        if packing is None:
            return super().forward(attention_mask=attention_mask, **inputs, **decoder, **kwargs)
        if encoder_hidden_states is not None or past_key_values is not None:
            raise ValueError("packed inputs (cu_seq_lens_q) cannot be combined with cross-attention or a key-value cache")
        if CAUSAL in reasons:  # whose mask of padding would end that
            raise ValueError("packed inputs (cu_seq_lens_q) cannot be combined with is_causal")
        return self._row_through_their_forward(packing, kwargs, **inputs)

    def packed_row(self, attention_mask, kwargs, past_key_values=None, **inputs) -> Packing | None:
        """The sequences of a packed row, None where the inputs are a batch with a sequence per row.

        Takes the arguments of a call of this model. Raises ValueError where they do not fit: see :func:`check_inputs`.
        """
        check_inputs(self, attention_mask=attention_mask, past_key_values=past_key_values, kwargs=kwargs, **inputs)
        tokens = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
        position_ids, shape = inputs["position_ids"], tuple(tokens.shape[:2])
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is not None:
            cu_seqlens, longest = cu_seqlens.to(torch.int32), kwargs.get("max_length_q")
            if longest is None:  # compiled code takes a bound: it cannot know the number
                longest = shape[1] if torch.compiler.is_compiling() else int(cu_seqlens.diff().max())
            packing = Packing(cu_seqlens, int(longest), shape)
        elif position_ids is None or attention_mask is not None or torch.jit.is_tracing() or has_no_data():
            return None
        else:
            packing = Packing.from_positions(position_ids, shape)
        if packing is not None and position_ids is not None:
            warn_of_first_position(self, position_ids)
        return packing

    def _packed_forward(self, packing, attention_mask, read, kwargs, *, input_ids, token_type_ids, position_ids, inputs_embeds):
        tokens = inputs_embeds if input_ids is None else input_ids
        if packing is None:
            packing = Packing.from_mask(attention_mask, tuple(tokens.shape[:2]), tokens.device)
        hidden_states = embed(self, packing, input_ids, token_type_ids, position_ids, inputs_embeds)

        config = self.config
        recorded = _HiddenStates(hidden_states_wanted(config, kwargs), config)
        hidden_states = recorded.add(hidden_states, packing)
        selection = self._selection(read, packing, hidden_states.shape[0], recorded.states is not None)
        layers = list(self.encoder.layer)
        of_layers = _packings(packing, layers)
        if torch.compiler.is_compiling() and _drops(self.encoder):  # a checkpointed layer may not draw what later ones use
            packing.seed_for(1.0)
        worth_it = selection is not None and selection.is_worth_it(is_trained(layers[-1], hidden_states))
        last_layer = layers.pop() if worth_it else None
        convert_for(layers, hidden_states, packing)
        rows = run_stack(layers, hidden_states, packing) if recorded.states is None else None
        if rows is not None:
            hidden_states = rows
        else:
            for layer, packing_of_layer in zip(layers, of_layers, strict=False):
                hidden_states = recorded.add(layer.on_packed_rows(hidden_states, packing_of_layer), packing)
            if last_layer is None:
                take_half(hidden_states)  # which no layer will

        output = self._output(hidden_states, packing, selection, last_layer, of_layers[-1])
        if getattr(self, "pooler", None) is not None:
            pooled = self._pooled(hidden_states if last_layer is None else None, packing, output)
            if pooled is not None:
                output["pooler_output"] = pooled
        if rows is not None and last_layer is None:
            request.keep(self)
        if recorded.states is not None:
            if recorded.states[-1] is not None:
                output.last_hidden_state = recorded.states[-1]
            output.hidden_states = tuple(recorded.states)
        return output.to_tuple() if kwargs.get("return_dict", getattr(config, "return_dict", True)) is False else output

    def _selection(self, read, packing: Packing, total: int, keeps_states: bool) -> RowSelection | None:
        """The rows that somebody reads, of ``total``, where they are known and may be fewer than all."""
        labels, labelled_rows, first_only = read
        has_pooler = getattr(self, "pooler", None) is not None
        if torch.compiler.is_compiling() or (labels is None and not (first_only and has_pooler)) or total == 0:
            return None
        trains = self.training or torch.is_grad_enabled()
        if labels is None and not few_are_worth_it(packing.num_sequences, total, trains):  # first: it takes next to no time
            return None
        if all_rows_reasons(self, keeps_states):
            return None
        return RowSelection(packing, total, labels, first=has_pooler, labelled_rows=labelled_rows)

    def _pooled(self, rows: Tensor | None, packing: Packing, output: PooledEncoderOutput) -> Tensor | None:
        """What the pooler makes of ``rows`` (total, hidden), or of those that ``output`` has where only some are computed."""
        if rows is not None and not reads_first_rows(self):
            return self.pooler(packing.to_sequences(rows))
        first = output.first_rows() if rows is None else packing.first_positions(rows)
        pooled = pool(self.pooler, first)
        return self.pooler(first.unsqueeze(1)) if pooled is None else pooled

    def _answer(self, packing: Packing, rows: Tensor, pooled: Tensor | None):
        output = self._output(rows, packing, None, None, packing)
        if pooled is not None:
            output["pooler_output"] = pooled
        return output

    def default_positions(self, packing: Packing, input_ids: Tensor | None) -> Tensor:
        """(1, length) or (batch, length): the positions of tokens whose caller names none."""
        return packing.default_positions

    def _output(
        self,
        hidden_states: Tensor,
        packing: Packing,
        selection: RowSelection | None,
        last_layer: nn.Module | None,
        packing_of_last: Packing,
    ):
        """The output made of ``hidden_states`` (total, hidden), which are final, or the input of ``last_layer``."""
        if torch.compiler.is_compiling():
            theirs = self.output_class.__bases__[1]
            return theirs(last_hidden_state=packing.pad(hidden_states))
        output = self.output_class.empty()
        if last_layer is None:
            output.set_rows(hidden_states, packing, selection)
        else:
            selected = SelectedRows(selection, lambda read: last_layer(hidden_states, packing_of_last, read=read))
            output.set_selected_rows(selected, last_layer)
        return output

    def _row_through_their_forward(self, packing, kwargs, **inputs):
        """A packed row through transformers' forward, which knows padding only: one sequence per row, and back."""
        positions = inputs["position_ids"]
        inputs["position_ids"] = self.default_positions(packing, inputs["input_ids"]) if positions is None else positions
        rows = {name: None if x is None else packing.to_sequences(x.flatten(0, 1)) for name, x in inputs.items()}
        others = {k: v for k, v in kwargs.items() if k not in _PACKED_ARGUMENTS}
        return_dict = others.pop("return_dict", getattr(self.config, "return_dict", True))
        output = super().forward(attention_mask=packing.padding_mask, **rows, use_cache=False, **others, return_dict=True)
        output.last_hidden_state = packing.pad(packing.from_sequences(output.last_hidden_state))
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                None if state is None else packing.pad(packing.from_sequences(state)) for state in output.hidden_states
            )
        return output if return_dict is not False else output.to_tuple()


def sequences_in_row(encoder: nn.Module, attention_mask, kwargs: dict[str, Any], past_key_values=None, **inputs) -> Packing | None:
    """:meth:`PackedEncoder.packed_row` for the head of any encoder, whose ``kwargs`` then name what was found."""
    if not isinstance(encoder, PackedEncoder):
        return None
    packing = encoder.packed_row(attention_mask, kwargs, past_key_values, **inputs)
    if packing is not None:
        kwargs |= {"cu_seq_lens_q": packing.cu_seqlens, "max_length_q": packing.max_seqlen}
    return packing


def not_told_reasons(encoder: nn.Module) -> list[str]:
    """Why a head cannot tell its encoder which rows it reads; empty where it can."""
    if not (is_of_fast_class(encoder) and isinstance(encoder, PackedEncoder)):
        return [f"the encoder is {type(encoder).__module__}.{type(encoder).__qualname__}"]
    return ["the encoder has hooks, or another forward than its class"] if is_watched(encoder) else []


def _packings(packing: Packing, layers: list[nn.Module]) -> list[Packing]:
    """What each of the layers is called with: ``packing``, unless their indices are not the numbers of their calls."""
    attentions = (getattr(getattr(layer, "attention", None), "self", None) for layer in layers)
    if all(getattr(attention, "layer_idx", None) == index for index, attention in enumerate(attentions)):
        return [packing] * len(layers) or [packing]
    return [packing.for_layer(index) for index in range(len(layers))]


def _drops(encoder: nn.Module) -> bool:
    """Whether any dropout inside is active."""
    return any(isinstance(module, nn.Dropout) and active_dropout_p(module) > 0 for module in encoder.modules())


# Arguments beside the inputs that ask for nothing.
_NOTHING_ELSE: tuple[dict[str, Any], ...] = ({}, {"return_dict": True})
_PACKED_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class _HiddenStates:
    """Keeps, with padding, the rows after the embeddings and after each layer, all of them or those whose index was asked for."""

    def __init__(self, wanted: bool | int | list[int] | None, config: Any) -> None:
        self.states: list[Tensor | None] | None = [] if wanted else None  # 0 asks for none in transformers, too
        self._selected = selected_states(wanted, config)

    def add(self, rows: Tensor, packing: Packing) -> Tensor:
        """The rows (total, hidden) to go on with: where what is kept may be asked for its gradient, they are made of that."""
        if self.states is None:
            return rows
        keep = self._selected is None or len(self.states) in self._selected
        padded = packing.pad(rows) if keep else None
        self.states.append(padded)
        return packing.unpad(padded) if keep and padded.requires_grad else rows
