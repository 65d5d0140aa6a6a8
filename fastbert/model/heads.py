"""The task heads: transformers' classes with a packed encoder inside.

Nothing else is needed where transformers' ``forward`` reads ``last_hidden_state`` or ``pooler_output``. The language-model heads,
which do less than transformers' ones, are in :mod:`fastbert.model.lm_heads`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.bert import modeling_bert as hf
from transformers.utils.generic import can_return_tuple

from .bert import PackedHead
from .swap import replaces


@replaces(hf.BertForNextSentencePrediction)
class BertForNextSentencePrediction(PackedHead, hf.BertForNextSentencePrediction):
    """transformers' class; see :class:`fastbert.BertModel` for what differs inside."""


@replaces(hf.BertForSequenceClassification)
class BertForSequenceClassification(PackedHead, hf.BertForSequenceClassification):
    """transformers' class; see :class:`fastbert.BertModel` for what differs inside."""


@replaces(hf.BertForMultipleChoice)
class BertForMultipleChoice(PackedHead, hf.BertForMultipleChoice):
    """transformers' class; see :class:`fastbert.BertModel` for what differs inside."""


@replaces(hf.BertForTokenClassification)
class BertForTokenClassification(PackedHead, hf.BertForTokenClassification):
    """transformers' class; see :class:`fastbert.BertModel` for what differs inside."""


@replaces(hf.BertForQuestionAnswering)
class BertForQuestionAnswering(PackedHead, hf.BertForQuestionAnswering):
    """transformers' class; see :class:`fastbert.BertModel` for what differs inside.

    Padding is no candidate for an answer: its logits are the dtype's smallest number. transformers lets them take part in the
    softmax of the loss with whatever the encoder makes of padding, which fastbert does not compute.
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
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.qa_outputs(outputs.last_hidden_state)
        if attention_mask is not None and attention_mask.dim() == 2:
            logits = logits.masked_fill((attention_mask == 0).unsqueeze(-1), torch.finfo(logits.dtype).min)
        start_logits, end_logits = (part.squeeze(-1).contiguous() for part in logits.split(1, dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_span_loss(start_logits, start_positions) + _span_loss(end_logits, end_positions)) / 2
        return hf.QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy of (batch, length) logits; a position outside of the sequence (a truncated answer) counts for nothing."""
    outside = logits.shape[1]
    return F.cross_entropy(logits, positions.view(-1).clamp(0, outside), ignore_index=outside)
