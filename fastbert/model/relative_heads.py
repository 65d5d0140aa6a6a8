"""The task heads of BERT's relatives that do less work than transformers', or take packed inputs where transformers' could not.

Heads that are not here (causal language models, ...) stay transformers' and read the hidden states of an encoder that is fast.
"""

from __future__ import annotations

from torch import Tensor
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.camembert import modeling_camembert as camembert
from transformers.models.electra import modeling_electra as electra
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta
from transformers.utils.generic import can_return_tuple

from .encoder import sequences_in_row
from .heads import MultipleChoice, QuestionAnswering, TokenClassification
from .lm_head import LanguageModelHead
from .lm_heads import MaskedLM
from .outputs import EncoderOutput
from .plain import is_plain
from .swap import FastParts, replaces


class _MeanLoss:
    """Mixin: Trainer scales the loss for gradient accumulation itself; see :class:`fastbert.model.bert.CheckedLoading`."""

    accepts_loss_kwargs = False


class _FirstTokenClassification(_MeanLoss):
    """Mixin in front of transformers' sequence classification, whose classifier reads the first token of each sequence."""

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
        inputs = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        packing = sequences_in_row(self.base_model, attention_mask, kwargs, input_ids=input_ids, **inputs)
        outputs = self.base_model(input_ids, attention_mask=attention_mask, **inputs, return_dict=True, **kwargs)
        if isinstance(outputs, EncoderOutput):
            packing, rows = outputs.packing, outputs.packed
        elif packing is not None:
            rows = packing.unpad(outputs.last_hidden_state)
        if packing is None:
            features = outputs.last_hidden_state
        elif not is_plain(self.classifier) or not type(self.classifier).__module__.startswith("transformers."):
            features = packing.to_sequences(rows)  # another classifier than transformers' may look at all tokens, as a hook may
        else:
            features = packing.first_positions(rows).unsqueeze(1)
        logits = self.classifier(features)
        loss = None if labels is None else ForSequenceClassificationLoss(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class _RobertaMaskedLM(MaskedLM):
    """Mixin: where RoBERTa and what was made from it keep the parts of their head."""

    def language_model_head(self) -> LanguageModelHead:
        head = self.lm_head
        return LanguageModelHead(
            whole=head,
            containers=((head, self.lm_head_class),),
            dense=getattr(head, "dense", None),
            activation=None,
            norm=getattr(head, "layer_norm", None),
            decoder=getattr(head, "decoder", None),
        )


class _RobertaMultipleChoice(_MeanLoss, MultipleChoice):
    """Mixin: the order of arguments that multiple choice has in RoBERTa and what was made from it."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ):
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, labels=labels, **kwargs,
        )  # fmt: skip


@replaces(roberta.RobertaForMaskedLM)
class RobertaForMaskedLM(FastParts, _RobertaMaskedLM, roberta.RobertaForMaskedLM):
    """transformers' class; see :class:`fastbert.model.lm_heads.MaskedLM` for what differs."""

    lm_head_class = roberta.RobertaLMHead


@replaces(xlm_roberta.XLMRobertaForMaskedLM)
class XLMRobertaForMaskedLM(FastParts, _RobertaMaskedLM, xlm_roberta.XLMRobertaForMaskedLM):
    """transformers' class; see :class:`fastbert.model.lm_heads.MaskedLM` for what differs."""

    lm_head_class = xlm_roberta.XLMRobertaLMHead


@replaces(camembert.CamembertForMaskedLM)
class CamembertForMaskedLM(FastParts, _RobertaMaskedLM, camembert.CamembertForMaskedLM):
    """transformers' class; see :class:`fastbert.model.lm_heads.MaskedLM` for what differs."""

    lm_head_class = camembert.CamembertLMHead


@replaces(electra.ElectraForMaskedLM)
class ElectraForMaskedLM(FastParts, MaskedLM, electra.ElectraForMaskedLM):
    """transformers' class; see :class:`fastbert.model.lm_heads.MaskedLM` for what differs."""

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
        return super().forward(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, labels=labels, **kwargs,
        )  # fmt: skip

    def language_model_head(self) -> LanguageModelHead:
        predictions, decoder = self.generator_predictions, self.generator_lm_head
        return LanguageModelHead(
            whole=lambda hidden: decoder(predictions(hidden)),
            containers=((predictions, electra.ElectraGeneratorPredictions),),
            dense=getattr(predictions, "dense", None),
            activation=getattr(predictions, "activation", None),
            norm=getattr(predictions, "LayerNorm", None),
            decoder=decoder,
        )


@replaces(roberta.RobertaForSequenceClassification)
class RobertaForSequenceClassification(FastParts, _FirstTokenClassification, roberta.RobertaForSequenceClassification):
    """transformers' class; takes packed inputs, and no padding before the classifier."""


@replaces(roberta.RobertaForTokenClassification)
class RobertaForTokenClassification(FastParts, TokenClassification, roberta.RobertaForTokenClassification):
    """transformers' class; see :class:`fastbert.model.heads.TokenClassification` for what differs."""


@replaces(roberta.RobertaForQuestionAnswering)
class RobertaForQuestionAnswering(FastParts, _MeanLoss, QuestionAnswering, roberta.RobertaForQuestionAnswering):
    """transformers' class; see :class:`fastbert.model.heads.QuestionAnswering` for what differs."""


@replaces(roberta.RobertaForMultipleChoice)
class RobertaForMultipleChoice(FastParts, _RobertaMultipleChoice, roberta.RobertaForMultipleChoice):
    """transformers' class; packed inputs are an error."""


@replaces(xlm_roberta.XLMRobertaForSequenceClassification)
class XLMRobertaForSequenceClassification(FastParts, _FirstTokenClassification, xlm_roberta.XLMRobertaForSequenceClassification):
    """transformers' class; takes packed inputs, and no padding before the classifier."""


@replaces(xlm_roberta.XLMRobertaForTokenClassification)
class XLMRobertaForTokenClassification(FastParts, TokenClassification, xlm_roberta.XLMRobertaForTokenClassification):
    """transformers' class; see :class:`fastbert.model.heads.TokenClassification` for what differs."""


@replaces(xlm_roberta.XLMRobertaForQuestionAnswering)
class XLMRobertaForQuestionAnswering(FastParts, _MeanLoss, QuestionAnswering, xlm_roberta.XLMRobertaForQuestionAnswering):
    """transformers' class; see :class:`fastbert.model.heads.QuestionAnswering` for what differs."""


@replaces(xlm_roberta.XLMRobertaForMultipleChoice)
class XLMRobertaForMultipleChoice(FastParts, _RobertaMultipleChoice, xlm_roberta.XLMRobertaForMultipleChoice):
    """transformers' class; packed inputs are an error."""


@replaces(camembert.CamembertForSequenceClassification)
class CamembertForSequenceClassification(FastParts, _FirstTokenClassification, camembert.CamembertForSequenceClassification):
    """transformers' class; takes packed inputs, and no padding before the classifier."""


@replaces(camembert.CamembertForTokenClassification)
class CamembertForTokenClassification(FastParts, TokenClassification, camembert.CamembertForTokenClassification):
    """transformers' class; see :class:`fastbert.model.heads.TokenClassification` for what differs."""


@replaces(camembert.CamembertForQuestionAnswering)
class CamembertForQuestionAnswering(FastParts, _MeanLoss, QuestionAnswering, camembert.CamembertForQuestionAnswering):
    """transformers' class; see :class:`fastbert.model.heads.QuestionAnswering` for what differs."""


@replaces(camembert.CamembertForMultipleChoice)
class CamembertForMultipleChoice(FastParts, _RobertaMultipleChoice, camembert.CamembertForMultipleChoice):
    """transformers' class; packed inputs are an error."""


@replaces(electra.ElectraForSequenceClassification)
class ElectraForSequenceClassification(FastParts, _FirstTokenClassification, electra.ElectraForSequenceClassification):
    """transformers' class; takes packed inputs, and no padding before the classifier."""


@replaces(electra.ElectraForTokenClassification)
class ElectraForTokenClassification(FastParts, TokenClassification, electra.ElectraForTokenClassification):
    """transformers' class; see :class:`fastbert.model.heads.TokenClassification` for what differs."""


@replaces(electra.ElectraForQuestionAnswering)
class ElectraForQuestionAnswering(FastParts, _MeanLoss, QuestionAnswering, electra.ElectraForQuestionAnswering):
    """transformers' class; see :class:`fastbert.model.heads.QuestionAnswering` for what differs."""


@replaces(electra.ElectraForMultipleChoice)
class ElectraForMultipleChoice(FastParts, _MeanLoss, MultipleChoice, electra.ElectraForMultipleChoice):
    """transformers' class; packed inputs are an error."""


@replaces(electra.ElectraForPreTraining)
class ElectraForPreTraining(FastParts, _MeanLoss, electra.ElectraForPreTraining):
    """transformers' class, the discriminator."""
