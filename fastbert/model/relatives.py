"""Relatives of BERT whose encoder layer is the same code: RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA.

They differ around the layers: RoBERTa's positions start after its padding token's id, ELECTRA may embed narrower than it encodes
and has no pooler. The classes come into play through :func:`fastbert.accelerate` and :func:`fastbert.register`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.camembert import modeling_camembert as camembert
from transformers.models.electra import modeling_electra as electra
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta

from .encoder import PackedEncoder
from .layer import FusedLayer, expected_parts
from .outputs import PlainEncoderOutput
from .packing import Packing
from .swap import replaces


class PositionsAfterPadding:
    """Mixin: positions count the tokens that are not the padding token, from its id + 1 on (fairseq's make_positions)."""

    @property
    def first_position(self) -> int:
        return self.embeddings.padding_idx + 1

    def default_positions(self, packing: Packing, input_ids: Tensor | None) -> Tensor:
        if input_ids is None:
            return packing.default_positions + self.first_position
        counted = input_ids != self.embeddings.padding_idx
        count = counted.cumsum(1)
        if packing.shape[0] != packing.num_sequences:
            ends = F.pad(count[0], (1, 0))  # how many were counted before each token
            lengths = packing.cu_seqlens.diff().long()
            count = count - ends[packing.cu_seqlens[:-1].long()].repeat_interleave(lengths, output_size=packing.shape[1])
        return torch.where(counted, count, 0) + self.embeddings.padding_idx


@replaces(roberta.RobertaLayer)
class RobertaLayer(FusedLayer, roberta.RobertaLayer):
    """transformers' RobertaLayer; see :class:`fastbert.model.layer.FusedLayer`."""

    expected_parts = expected_parts(roberta, "Roberta")


@replaces(roberta.RobertaModel)
class RobertaModel(PositionsAfterPadding, PackedEncoder, roberta.RobertaModel):
    """transformers' RobertaModel; see :class:`fastbert.model.encoder.PackedEncoder` for what differs."""

    embeddings_class = roberta.RobertaEmbeddings


@replaces(xlm_roberta.XLMRobertaLayer)
class XLMRobertaLayer(FusedLayer, xlm_roberta.XLMRobertaLayer):
    """transformers' XLMRobertaLayer; see :class:`fastbert.model.layer.FusedLayer`."""

    expected_parts = expected_parts(xlm_roberta, "XLMRoberta")


@replaces(xlm_roberta.XLMRobertaModel)
class XLMRobertaModel(PositionsAfterPadding, PackedEncoder, xlm_roberta.XLMRobertaModel):
    """transformers' XLMRobertaModel; see :class:`fastbert.model.encoder.PackedEncoder` for what differs."""

    embeddings_class = xlm_roberta.XLMRobertaEmbeddings


@replaces(camembert.CamembertLayer)
class CamembertLayer(FusedLayer, camembert.CamembertLayer):
    """transformers' CamembertLayer; see :class:`fastbert.model.layer.FusedLayer`."""

    expected_parts = expected_parts(camembert, "Camembert")


@replaces(camembert.CamembertModel)
class CamembertModel(PositionsAfterPadding, PackedEncoder, camembert.CamembertModel):
    """transformers' CamembertModel; see :class:`fastbert.model.encoder.PackedEncoder` for what differs."""

    embeddings_class = camembert.CamembertEmbeddings


@replaces(electra.ElectraLayer)
class ElectraLayer(FusedLayer, electra.ElectraLayer):
    """transformers' ElectraLayer; see :class:`fastbert.model.layer.FusedLayer`."""

    expected_parts = expected_parts(electra, "Electra")


@replaces(electra.ElectraModel)
class ElectraModel(PackedEncoder, electra.ElectraModel):
    """transformers' ElectraModel; see :class:`fastbert.model.encoder.PackedEncoder` for what differs."""

    embeddings_class = electra.ElectraEmbeddings
    output_class = PlainEncoderOutput
