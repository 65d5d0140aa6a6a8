"""The task heads: transformers' classes with a packed encoder inside.

Nothing else is needed where transformers' ``forward`` reads ``last_hidden_state`` or ``pooler_output``. The language-model heads,
which do less than transformers' ones, are in :mod:`fastbert.model.lm_heads`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.bert import modeling_bert as hf
from transformers.utils.generic import can_return_tuple

from .bert import PackedHead
from .encoder import not_told_reasons, sequences_in_row
from .inputs import check_labels
from .swap import replaces


class FirstRowsOnly:
    """Mixin in front of transformers' heads that read the pooler's output and nothing else: the encoder's last layer goes on with
    the first token of each sequence alone (:mod:`fastbert.model.row_selection`), 6% (bert-base) to 19% (4 layers) less work.
    """

    def all_rows_reasons(self) -> list[str]:
        """Why the last layer computes all rows; empty where it computes those that are read."""
        return not_told_reasons(self.base_model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ):
        if not torch.compiler.is_compiling() and not self.all_rows_reasons():
            kwargs["read_first"] = True
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, labels=labels, **kwargs,
        )  # fmt: skip


@replaces(hf.BertForNextSentencePrediction)
class BertForNextSentencePrediction(PackedHead, FirstRowsOnly, hf.BertForNextSentencePrediction):
    """transformers' class; see :class:`fastbert.BertModel` for what differs inside."""


@replaces(hf.BertForSequenceClassification)
class BertForSequenceClassification(PackedHead, FirstRowsOnly, hf.BertForSequenceClassification):
    """transformers' class; see :class:`fastbert.BertModel` for what differs inside."""


class MultipleChoice:
    """Mixin in front of transformers' multiple-choice class: packed inputs are an error.

    Nothing in a row (1, total) says how many of its sequences are the choices of one question.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ):
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "multiple choice takes no packed inputs (cu_seq_lens_q), which do not say how many choices a question has; "
                "pass input_ids (batch, num_choices, length) and their attention_mask"
            )
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, labels=labels, **kwargs,
        )  # fmt: skip


@replaces(hf.BertForMultipleChoice)
class BertForMultipleChoice(PackedHead, MultipleChoice, FirstRowsOnly, hf.BertForMultipleChoice):
    """transformers' class; see :class:`fastbert.BertModel` for what differs inside."""


class TokenClassification:
    """Mixin in front of transformers' token classification: the loss that Trainer asks for when gradients accumulate.

    Given ``num_items_in_batch``, the labelled tokens of all those batches, it is the sum over that number, which gives what one
    large batch gives. transformers ignores it, and lets Trainer believe that it does not.
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
        labels: Tensor | None = None,
        **kwargs,
    ):
        num_items = kwargs.pop("num_items_in_batch", None)
        output = super().forward(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, labels=labels if num_items is None else None, return_dict=True, **kwargs,
        )  # fmt: skip
        if labels is None or num_items is None:
            return output
        logits = output.logits
        loss = F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1), reduction="sum") / num_items
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions)


@replaces(hf.BertForTokenClassification)
class BertForTokenClassification(TokenClassification, PackedHead, hf.BertForTokenClassification):
    """transformers' class; see :class:`TokenClassification` for what differs, and :class:`fastbert.BertModel`."""


class QuestionAnswering:
    """Mixin in front of transformers' extractive question answering.

    Padding is no candidate for an answer: its logits are the dtype's smallest number, and a position on it counts for nothing, as
    one outside of the sequence does. transformers lets padding take part in the softmax of the loss with whatever the encoder makes
    of it, which fastbert does not compute. Packed inputs take start_positions and end_positions (num_sequences,) that count within
    each sequence, and give logits (1, total).
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs,
    ):
        inputs = {
            "token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        packing = sequences_in_row(self.base_model, attention_mask, kwargs, input_ids=input_ids, **inputs)
        outputs = self.base_model(input_ids, attention_mask=attention_mask, **inputs, return_dict=True, **kwargs)
        logits = self.qa_outputs(outputs.last_hidden_state)
        real = None
        if packing is not None:
            real = packing.padding_mask != 0
        elif attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask != 0
            logits = _no_answer_on_padding(logits, real)
        loss = None
        if start_positions is not None and end_positions is not None:
            sequences = logits if packing is None else _no_answer_on_padding(packing.to_sequences(logits[0]), real)
            start, end = sequences.unbind(-1)
            loss = (_span_loss(start, start_positions, real, "start") + _span_loss(end, end_positions, real, "end")) / 2
        start_logits, end_logits = (part.squeeze(-1).contiguous() for part in logits.split(1, dim=-1))
        return hf.QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@replaces(hf.BertForQuestionAnswering)
class BertForQuestionAnswering(PackedHead, QuestionAnswering, hf.BertForQuestionAnswering):
    """transformers' class; see :class:`QuestionAnswering` for what differs, and :class:`fastbert.BertModel`."""


def _no_answer_on_padding(logits: Tensor, real: Tensor) -> Tensor:
    """(batch, length, 2) logits; ``real`` (batch, length) is False on padding."""
    return logits.masked_fill(~real.unsqueeze(-1), torch.finfo(logits.dtype).min)


def _span_loss(logits: Tensor, positions: Tensor, real: Tensor | None, name: str) -> Tensor:
    """Cross-entropy of (batch, length) logits; a position outside of the sequence (a truncated answer) counts for nothing."""
    check_labels(positions.view(-1), (logits.shape[0],), f"{name}_positions")
    outside = logits.shape[1]
    positions = positions.view(-1).clamp(0, outside)
    if real is not None:
        inside = F.pad(real, (0, 1)).gather(1, positions.unsqueeze(1)).squeeze(1)
        positions = torch.where(inside, positions, outside)
    return F.cross_entropy(logits, positions, ignore_index=outside)
