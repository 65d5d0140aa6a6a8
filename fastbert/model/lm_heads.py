"""The language-model heads of BERT on labelled rows only.

A masked-LM step predicts 15% of the tokens; transformers computes, stores and differentiates logits for all of them. Here the
labelled rows are gathered first, and their loss comes from ``ops.mlm_loss``, which never holds whole logits. ``outputs.logits``
is computed when it is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert import modeling_bert as hf
from transformers.utils.generic import can_return_tuple

from ..ops import gelu_layer_norm, mlm_loss
from ..ops.linear import linear
from .bert import PackedHead
from .inputs import check_labels
from .layer import has_hooks, is_exact_gelu, is_plain_linear
from .outputs import BertForMaskedLMOutput, BertForPreTrainingOutput, BertLMHeadOutput, Deferred, EncoderOutput
from .packing import Packing
from .swap import replaces

IGNORE_INDEX = -100


def head_notes(predictions: hf.BertLMPredictionHead) -> list[str]:
    """What of a language-model head runs unfused, and why; empty for a fully fused one."""
    notes = []
    transform = predictions.transform
    if not _transform_is_plain(transform):
        notes.append("the transform runs as transformers' module: its parts are not those of BERT (erf-GELU), or have hooks")
    if not is_plain_linear(predictions.decoder):
        notes.append("logits of the labelled rows are stored whole: the decoder is not a plain nn.Linear without hooks")
    return notes


def _transform_is_plain(transform: nn.Module) -> bool:
    return (
        type(transform) is hf.BertPredictionHeadTransform
        and is_exact_gelu(transform.transform_act_fn)
        and is_plain_linear(transform.dense)
        and type(transform.LayerNorm) is nn.LayerNorm
        and not (has_hooks(transform) or has_hooks(transform.LayerNorm))
    )


def _transform(transform: nn.Module, rows: Tensor) -> Tensor:
    """BertPredictionHeadTransform on (rows, hidden)."""
    if not _transform_is_plain(transform):
        return transform(rows)
    norm = transform.LayerNorm
    x = linear(rows, transform.dense.weight, None)
    return gelu_layer_norm(x, transform.dense.bias, norm.weight, norm.bias, norm.eps)


def _rows_loss(
    predictions: nn.Module, rows: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Loss of (rows, hidden) against (rows,) labels, and which rows are right."""
    hidden = _transform(predictions.transform, rows)
    decoder = predictions.decoder
    if is_plain_linear(decoder):
        return mlm_loss(hidden, decoder.weight, decoder.bias, labels, ignore_index=ignore_index, reduction=reduction)
    logits = decoder(hidden)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction=reduction)
    return loss, (logits.argmax(-1) == labels) & (labels != ignore_index)


def _all_logits(predictions: nn.Module, outputs: Any) -> Tensor:
    """(batch, length, vocabulary): logits of every token, 0 on padding where the encoder ran packed."""
    if not isinstance(outputs, EncoderOutput):
        return predictions(outputs.last_hidden_state)
    return outputs.packing.pad(predictions.decoder(_transform(predictions.transform, outputs.packed)))


def _labelled_rows(outputs: Any, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """The encoder's rows (n, hidden) that carry a label, and those labels (n,)."""
    if isinstance(outputs, EncoderOutput):
        packing: Packing = outputs.packing
        rows, row_labels = outputs.packed, packing.unpad(labels)
    else:
        rows, row_labels = outputs.last_hidden_state.flatten(0, 1), labels.flatten()
    if torch.compiler.is_compiling():
        return rows, row_labels
    labelled = (row_labels != ignore_index).nonzero().squeeze(1)
    return rows.index_select(0, labelled), row_labels.index_select(0, labelled)


def _set_logits(output: Any, name: str, predictions: nn.Module, outputs: Any, labels: Tensor | None) -> None:
    """Logits at once where they are the result, when they are read where the loss is."""
    if labels is None or torch.compiler.is_compiling():
        setattr(output, name, _all_logits(predictions, outputs))
    else:
        parameters = tuple(predictions.parameters())
        output.defer(name, Deferred(lambda: _all_logits(predictions, outputs), parameters))


class _LMHead(PackedHead):
    """Mixin: the shape that labels must have."""

    @staticmethod
    def _check_labels(labels: Tensor | None, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        if labels is not None:
            check_labels(labels, tuple((inputs_embeds if input_ids is None else input_ids).shape[:2]))


@replaces(hf.BertForMaskedLM)
class BertForMaskedLM(_LMHead, hf.BertForMaskedLM):
    """transformers' class: the head runs on labelled rows only, ``logits`` are computed when they are read."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ):
        self._check_labels(labels, input_ids, inputs_embeds)
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=True,
            **kwargs,
        )
        predictions = self.cls.predictions
        output = BertForMaskedLMOutput() if not torch.compiler.is_compiling() else hf.MaskedLMOutput()
        if labels is not None:
            rows, row_labels = _labelled_rows(outputs, labels)
            output.loss, correct = _rows_loss(predictions, rows, row_labels)
            output.mlm_correct, output.mlm_count = correct.sum(), (row_labels != IGNORE_INDEX).sum()
        _set_logits(output, "logits", predictions, outputs, labels)
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        return output


@replaces(hf.BertForPreTraining)
class BertForPreTraining(_LMHead, hf.BertForPreTraining):
    """transformers' class: the masked-LM head runs on labelled rows only, ``prediction_logits`` are computed when read.

    Packed inputs (``cu_seq_lens_q``) take ``next_sentence_label`` (num_sequences,).
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **kwargs,
    ):
        self._check_labels(labels, input_ids, inputs_embeds)
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        seq_relationship_logits = self.cls.seq_relationship(outputs.pooler_output)
        predictions = self.cls.predictions
        output = BertForPreTrainingOutput() if not torch.compiler.is_compiling() else hf.BertForPreTrainingOutput()
        if labels is not None and next_sentence_label is not None:
            check_labels(next_sentence_label.view(-1), (seq_relationship_logits.shape[0],), "next_sentence_label")
            rows, row_labels = _labelled_rows(outputs, labels)
            mlm, correct = _rows_loss(predictions, rows, row_labels)
            next_sentence = F.cross_entropy(seq_relationship_logits.float().view(-1, 2), next_sentence_label.view(-1))
            output.loss = mlm + next_sentence
            output.mlm_loss, output.next_sentence_loss = mlm.detach(), next_sentence.detach()
            output.mlm_correct, output.mlm_count = correct.sum(), (row_labels != IGNORE_INDEX).sum()
        _set_logits(output, "prediction_logits", predictions, outputs, None if output.loss is None else labels)
        output.seq_relationship_logits = seq_relationship_logits
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        return output


@replaces(hf.BertLMHeadModel)
class BertLMHeadModel(_LMHead, hf.BertLMHeadModel):
    """transformers' class: the loss (each label is the next token) comes from labelled rows only.

    As a decoder (``is_decoder=True``) the encoder runs transformers' own forward pass.
    """

    # The loss is divided by Trainer's num_items_in_batch, as transformers' own does.
    accepts_loss_kwargs = True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ):
        self._check_labels(labels, input_ids, inputs_embeds)
        arguments = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        custom_loss = {"shift_labels", "ignore_index"} & kwargs.keys() or self.loss_type not in ("ForCausalLM", None)
        if labels is None or custom_loss:
            return super().forward(
                input_ids, **arguments, labels=labels, past_key_values=past_key_values, use_cache=use_cache,
                logits_to_keep=logits_to_keep, **kwargs,
            )  # fmt: skip
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.bert(input_ids, **arguments, past_key_values=past_key_values, use_cache=False, return_dict=True, **kwargs)
        predictions = self.cls.predictions
        next_tokens = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        rows, row_labels = _labelled_rows(outputs, next_tokens)
        output = BertLMHeadOutput() if not torch.compiler.is_compiling() else hf.CausalLMOutputWithCrossAttentions()
        if num_items is None:
            output.loss = _rows_loss(predictions, rows, row_labels)[0]
        else:
            output.loss = _rows_loss(predictions, rows, row_labels, reduction="sum")[0] / num_items
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            _set_logits(output, "logits", predictions, outputs, labels)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = self.cls(outputs.last_hidden_state[:, kept, :])
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        output.cross_attentions = outputs.cross_attentions
        return output
