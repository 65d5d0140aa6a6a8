"""From hidden states to embeddings: one row per sequence, out of the packed rows of its tokens.

"mean" and "max" go over all real tokens, [CLS] and [SEP] among them, as in sentence-transformers (Reimers and Gurevych, 2019);
"cls" is the last layer's [CLS]. "last-4" concatenates the last four layers, the features that BERT's paper gives a tagger that
leaves the model as it is (Devlin et al., 2019, table 7): per token there, and per sequence here their mean over the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LAST_LAYERS = 4


def num_layers(pooling: str | None) -> int:
    """How many of the last layers ``pooling`` reads; None is no pooling: the last layer, token by token."""
    return LAST_LAYERS if pooling == "last-4" else 1


def token_rows(layers: Sequence[Tensor]) -> Tensor:
    """``layers``, each (total, hidden), from the lower to the higher, side by side in float32: (total, len(layers) * hidden)."""
    return layers[0].float() if len(layers) == 1 else torch.cat([layer.float() for layer in layers], dim=1)


def sequence_rows(rows: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """(n, width) float32: what ``pooling`` makes of the tokens of each sequence.

    rows: (total, width), those of :func:`token_rows`; cu_seqlens: (n + 1,) int64 from 0 to total. No sequence may be empty.
    """
    if pooling == "cls":
        return rows.index_select(0, cu_seqlens[:-1])
    # A bag of rows is what a packed sequence is; torch.segment_reduce takes several times as long, index_add more than that.
    numbers = torch.arange(len(rows), device=rows.device)
    return F.embedding_bag(numbers, rows, cu_seqlens[:-1], mode="max" if pooling == "max" else "mean")
