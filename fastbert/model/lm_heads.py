"""The language-model heads on labelled rows only; :mod:`fastbert.model.lm_head` does the work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.bert import modeling_bert as hf
from transformers.utils.generic import can_return_tuple

from .bert import PackedHead
from .encoder import sequences_in_row
from .inputs import check_labels
from .lm_head import IGNORE_INDEX, LanguageModelHead
from .outputs import BertForPreTrainingOutput, BertLMHeadOutput, MaskedLMOutput
from .swap import replaces


def _bert_head(cls: hf.BertOnlyMLMHead | hf.BertPreTrainingHeads) -> LanguageModelHead:
    predictions = cls.predictions
    transform = predictions.transform
    only_mlm = type(cls) is not hf.BertPreTrainingHeads
    containers = ((predictions, hf.BertLMPredictionHead), (transform, hf.BertPredictionHeadTransform))
    return LanguageModelHead(
        whole=cls if only_mlm else predictions,
        containers=((cls, hf.BertOnlyMLMHead), *containers) if only_mlm else containers,
        dense=transform.dense,
        activation=transform.transform_act_fn,
        norm=transform.LayerNorm,
        decoder=predictions.decoder,
    )


def _check_labels(labels: Tensor | None, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    if labels is not None:
        check_labels(labels, tuple((inputs_embeds if input_ids is None else input_ids).shape[:2]))


class MaskedLM:
    """Mixin in front of transformers' masked-LM class: the head runs on labelled rows only, ``logits`` come when they are read."""

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
        _check_labels(labels, input_ids, inputs_embeds)
        outputs = self.base_model(
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
        head = self.language_model_head()
        output = MaskedLMOutput() if not torch.compiler.is_compiling() else hf.MaskedLMOutput()
        if labels is not None:
            output.loss, output.mlm_correct, output.mlm_count = head.loss(outputs, labels)
        head.set_logits(output, "logits", outputs, deferred=labels is not None)
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        return output


@replaces(hf.BertForMaskedLM)
class BertForMaskedLM(PackedHead, MaskedLM, hf.BertForMaskedLM):
    """transformers' class; see :class:`MaskedLM` for what differs."""

    def language_model_head(self) -> LanguageModelHead:
        return _bert_head(self.cls)


@replaces(hf.BertForPreTraining)
class BertForPreTraining(PackedHead, hf.BertForPreTraining):
    """transformers' class: the masked-LM head runs on labelled rows only, ``prediction_logits`` are computed when read.

    Packed inputs (``cu_seq_lens_q``) take ``next_sentence_label`` (num_sequences,).
    """

    def language_model_head(self) -> LanguageModelHead:
        return _bert_head(self.cls)

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
        _check_labels(labels, input_ids, inputs_embeds)
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
        head = self.language_model_head()
        output = BertForPreTrainingOutput() if not torch.compiler.is_compiling() else hf.BertForPreTrainingOutput()
        if labels is not None and next_sentence_label is not None:
            check_labels(next_sentence_label.view(-1), (seq_relationship_logits.shape[0],), "next_sentence_label")
            mlm, output.mlm_correct, output.mlm_count = head.loss(outputs, labels)
            next_sentence = F.cross_entropy(seq_relationship_logits.float().view(-1, 2), next_sentence_label.view(-1))
            output.loss = mlm + next_sentence
            output.mlm_loss, output.next_sentence_loss = mlm.detach(), next_sentence.detach()
        head.set_logits(output, "prediction_logits", outputs, deferred=output.loss is not None)
        output.seq_relationship_logits = seq_relationship_logits
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        return output


@replaces(hf.BertLMHeadModel)
class BertLMHeadModel(PackedHead, hf.BertLMHeadModel):
    """transformers' class: the loss (each label is the next token) comes from labelled rows only.

    As a decoder (``is_decoder=True``) the encoder runs transformers' own forward pass.
    """

    # The loss is divided by Trainer's num_items_in_batch, as transformers' own does.
    accepts_loss_kwargs = True

    def language_model_head(self) -> LanguageModelHead:
        return _bert_head(self.cls)

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
        _check_labels(labels, input_ids, inputs_embeds)
        arguments = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        if labels is not None:
            packing = sequences_in_row(
                self.bert, attention_mask, kwargs, past_key_values, input_ids=input_ids, token_type_ids=token_type_ids,
                position_ids=position_ids, inputs_embeds=inputs_embeds,
            )  # fmt: skip
            if packing is not None:  # the first token of a sequence does not follow the last one of its neighbour
                starts = packing.cu_seqlens[:-1].long()
                labels = F.pad(labels, (0, 1)).index_fill(1, starts, kwargs.get("ignore_index", IGNORE_INDEX))[:, :-1]
        custom_loss = {"shift_labels", "ignore_index"} & kwargs.keys() or self.loss_type not in ("ForCausalLM", None)
        if labels is None or custom_loss:
            return super().forward(
                input_ids, **arguments, labels=labels, past_key_values=past_key_values, use_cache=use_cache,
                logits_to_keep=logits_to_keep, **kwargs,
            )  # fmt: skip
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.bert(input_ids, **arguments, past_key_values=past_key_values, use_cache=False, return_dict=True, **kwargs)
        head = self.language_model_head()
        next_tokens = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        output = BertLMHeadOutput() if not torch.compiler.is_compiling() else hf.CausalLMOutputWithCrossAttentions()
        if num_items is None:
            output.loss = head.loss(outputs, next_tokens)[0]
        else:
            output.loss = head.loss(outputs, next_tokens, reduction="sum")[0] / num_items
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            head.set_logits(output, "logits", outputs, deferred=True)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = self.cls(outputs.last_hidden_state[:, kept, :])
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        output.cross_attentions = outputs.cross_attentions
        return output
