"""The language-model heads on labelled rows only; :mod:`fastbert.model.lm_head` does the work."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert import modeling_bert as hf
from transformers.utils.generic import can_return_tuple

from ..ops.registration import at_least_float32
from .bert import PackedHead
from .cache_name import CACHE, takes_their_cache
from .encoder import not_told_reasons, sequences_in_row
from .inputs import check_labels
from .lm_head import IGNORE_INDEX, LanguageModelHead
from .outputs import BertForPreTrainingOutput, BertLMHeadOutput, MaskedLMOutput
from .plain import is_plain
from .swap import replaces


def _bert_head(cls: nn.Module, expected: type) -> LanguageModelHead:
    """Of a head that is not ``expected``, transformers' class for it, the parts may be missing."""
    predictions = getattr(cls, "predictions", None)
    transform = getattr(predictions, "transform", None)
    only_mlm = expected is hf.BertOnlyMLMHead
    return LanguageModelHead(
        whole=cls if only_mlm else predictions,
        containers=((cls, expected), (predictions, hf.BertLMPredictionHead), (transform, hf.BertPredictionHeadTransform)),
        dense=getattr(transform, "dense", None),
        activation=getattr(transform, "transform_act_fn", None),
        norm=getattr(transform, "LayerNorm", None),
        decoder=getattr(predictions, "decoder", None),
    )


def _shape_of_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, ...]:
    return tuple((inputs_embeds if input_ids is None else input_ids).shape[:2])


def _beside_tokens(labels: Tensor | None, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
    """Labels (batch, length), or as many in a row, as (batch, length). Raises ValueError for others."""
    if labels is None:
        return None
    shape = _shape_of_tokens(input_ids, inputs_embeds)
    if labels.dim() == 1 and labels.numel() == math.prod(shape):
        return labels.view(shape)
    check_labels(labels, shape)
    return labels


def _take_labelled_rows(kwargs: dict[str, Any], labels: Tensor | None) -> Tensor | None:
    """Argument ``labelled_rows``, out of ``kwargs``. Raises ValueError where it is not what it says; on a GPU nothing is read."""
    rows = kwargs.pop("labelled_rows", None)
    if rows is None:
        return None
    if labels is None or kwargs.get("cu_seq_lens_q") is None:
        raise ValueError("labelled_rows is for packed inputs (cu_seq_lens_q) with labels: it says which rows have one")
    if rows.dim() != 1 or rows.dtype != torch.int64 or rows.device != labels.device:
        raise ValueError(
            f"labelled_rows is {rows.dtype} {tuple(rows.shape)} on {rows.device}, expected int64 (cap,) on {labels.device} like "
            "the labels"
        )
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        is_labelled = labels.flatten() != IGNORE_INDEX
        named, count = is_labelled[rows], is_labelled.sum()
        rising = (rows.diff() > 0) | ~named[1:]
        if not (rising & (named[:-1] | ~named[1:])).all() or named.sum() != count:
            raise ValueError(
                f"labelled_rows does not name the {int(count)} rows with a label, each once and in rising order, and behind them "
                "rows without one"
            )
    return rows


def _loss(
    head: LanguageModelHead, outputs: Any, labels: Tensor, num_items: Tensor | int | None, labelled_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:meth:`LanguageModelHead.loss`, its mean over ``num_items`` labelled tokens where they are more than this batch has."""
    if num_items is None:
        return head.loss(outputs, labels, labelled_rows=labelled_rows)
    loss, *telemetry = head.loss(outputs, labels, "sum", labelled_rows)
    return loss / num_items, *telemetry


class LabelledRowsOnly:
    """Mixin: a call with labels reads the encoder's labelled rows and each sequence's first, and tells the encoder which those are.

    So its last layer computes no others (:mod:`fastbert.model.row_selection`) until somebody reads the logits of all tokens.

    A call with packed inputs and labels may say which rows have one: ``labelled_rows`` (cap,) int64, all of them in rising order,
    then any rows without a label. Loss and gradients are the same, but nothing about the call depends on how many there are: where
    ``max_length_q`` is given and attention has a kernel no GPU is waited for, and a CUDA graph can be recorded of it. (RoBERTa's
    classes look at ``position_ids``, and wait, where they are given.)
    """

    def all_rows_reasons(self) -> list[str]:
        """Why the last layer computes all rows in a call with labels; empty where it computes those that are read."""
        return self.language_model_head().container_reasons() or not_told_reasons(self.base_model)

    def _rows_read(self, labels: Tensor | None, labelled_rows: Tensor | None) -> dict[str, Tensor | None]:
        """Arguments of the encoder's call. Compiled code cannot know how many tokens have labels."""
        if labels is None or torch.compiler.is_compiling() or self.all_rows_reasons():
            return {}
        return {"read_labels": labels, "read_rows": labelled_rows}


class MaskedLM(LabelledRowsOnly):
    """Mixin in front of transformers' masked-LM class: the head runs on labelled rows only, ``logits`` come when they are read.

    Given Trainer's ``num_items_in_batch``, the labelled tokens of all batches whose gradients accumulate, the loss is its sum over
    that number: so many small batches give what one large batch gives, however their labels are spread.
    """

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
        **kwargs,
    ):
        labels = _beside_tokens(labels, input_ids, inputs_embeds)
        num_items = kwargs.pop("num_items_in_batch", None)
        labelled_rows = _take_labelled_rows(kwargs, labels)
        outputs = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=True,
            **self._rows_read(labels, labelled_rows),
            **kwargs,
        )
        head = self.language_model_head()
        output = MaskedLMOutput() if not torch.compiler.is_compiling() else hf.MaskedLMOutput()
        if labels is not None:
            output.loss, output.mlm_correct, output.mlm_count = _loss(head, outputs, labels, num_items, labelled_rows)
        head.set_logits(output, "logits", outputs, deferred=labels is not None)
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        return output


@replaces(hf.BertForMaskedLM)
class BertForMaskedLM(MaskedLM, PackedHead, hf.BertForMaskedLM):
    """transformers' class; see :class:`MaskedLM` for what differs."""

    def language_model_head(self) -> LanguageModelHead:
        return _bert_head(self.cls, hf.BertOnlyMLMHead)


@replaces(hf.BertForPreTraining)
class BertForPreTraining(LabelledRowsOnly, PackedHead, hf.BertForPreTraining):
    """transformers' class: the masked-LM head runs on labelled rows only, ``prediction_logits`` are computed when read.

    Packed inputs (``cu_seq_lens_q``) take ``next_sentence_label`` (num_sequences,).
    """

    def language_model_head(self) -> LanguageModelHead:
        return _bert_head(self.cls, hf.BertPreTrainingHeads)

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
        labels = _beside_tokens(labels, input_ids, inputs_embeds)
        labelled_rows = _take_labelled_rows(kwargs, labels)
        inputs = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        if type(self.cls) is not hf.BertPreTrainingHeads or not is_plain(self.cls):
            # Whoever is asked for both logits at once gets all hidden states.
            return super().forward(
                input_ids, attention_mask, **inputs, labels=labels, next_sentence_label=next_sentence_label, **kwargs
            )
        rows_read = self._rows_read(None if next_sentence_label is None else labels, labelled_rows)
        outputs = self.bert(input_ids, attention_mask=attention_mask, **inputs, return_dict=True, **rows_read, **kwargs)
        seq_relationship_logits = self.cls.seq_relationship(outputs.pooler_output)
        head = self.language_model_head()
        output = BertForPreTrainingOutput() if not torch.compiler.is_compiling() else hf.BertForPreTrainingOutput()
        if labels is not None and next_sentence_label is not None:
            check_labels(next_sentence_label.view(-1), (seq_relationship_logits.shape[0],), "next_sentence_label")
            mlm, output.mlm_correct, output.mlm_count = head.loss(outputs, labels, labelled_rows=labelled_rows)
            next_sentence = F.cross_entropy(at_least_float32(seq_relationship_logits).view(-1, 2), next_sentence_label.view(-1))
            output.loss = mlm + next_sentence
            output.mlm_loss, output.next_sentence_loss = mlm.detach(), next_sentence.detach()
        head.set_logits(output, "prediction_logits", outputs, deferred=output.loss is not None)
        output.seq_relationship_logits = seq_relationship_logits
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        return output


@replaces(hf.BertLMHeadModel)
class BertLMHeadModel(PackedHead, hf.BertLMHeadModel, hf.GenerationMixin):
    """transformers' class: the loss (each label is the next token) comes from labelled rows only.

    As a decoder (``is_decoder=True``) the encoder runs transformers' own forward pass.
    """

    # The loss is divided by Trainer's num_items_in_batch, as transformers' own does.
    accepts_loss_kwargs = True

    def language_model_head(self) -> LanguageModelHead:
        return _bert_head(self.cls, hf.BertOnlyMLMHead)

    @can_return_tuple
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
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ):
        arguments = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        if labels is not None:
            check_labels(labels, _shape_of_tokens(input_ids, inputs_embeds))
            packing = sequences_in_row(
                self.bert, attention_mask, kwargs, past_key_values, input_ids=input_ids, token_type_ids=token_type_ids,
                position_ids=position_ids, inputs_embeds=inputs_embeds,
            )  # fmt: skip
            if packing is not None:  # the first token of a sequence does not follow the last one of its neighbour
                starts = packing.cu_seqlens[:-1].long()
                labels = F.pad(labels, (0, 1)).index_fill(1, starts, kwargs.get("ignore_index", IGNORE_INDEX))[:, :-1]
        custom_loss = {"shift_labels", "ignore_index"} & kwargs.keys() or self.loss_type not in ("ForCausalLM", None)
        cache = {CACHE: past_key_values}
        if labels is None or custom_loss:
            return super().forward(
                input_ids, **arguments, labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep, **cache, **kwargs,
            )  # fmt: skip
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.bert(input_ids, **arguments, **cache, use_cache=False, return_dict=True, **kwargs)
        head = self.language_model_head()
        next_tokens = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        output = BertLMHeadOutput() if not torch.compiler.is_compiling() else hf.CausalLMOutputWithCrossAttentions()
        output.loss = _loss(head, outputs, next_tokens, num_items)[0]
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            head.set_logits(output, "logits", outputs, deferred=True)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = self.cls(outputs.last_hidden_state[:, kept, :])
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        output.cross_attentions = outputs.cross_attentions
        return output
