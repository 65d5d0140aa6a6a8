"""What a call without gradients on a CPU needs beside its layers, in one native call each: what its mask leaves, the embeddings of
its tokens, and a linear layer on packed weights. A short request would notice what the same costs as a dozen of torch's ops.

The native extension must be available.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .encoder_layer import PackedWeights
from .extension import DTYPES, EXTENSION

if TYPE_CHECKING:
    from ..encoder_layer import LinearWeights


def are_readable_ids(*tensors: Tensor | None) -> bool:
    """Whether the tensors that are given are int64 on the CPU, whose memory can be read as it lies."""
    for x in tensors:
        if x is not None and not (type(x) is Tensor and x.dtype == torch.int64 and x.device.type == "cpu" and x.is_contiguous()):
            return False
    return True


def read_mask(mask: Tensor) -> tuple[Tensor, int, Tensor]:
    """What a readable mask (batch, length), 0 on padding, leaves of a batch.

    Returns cu_seqlens (batch + 1,) int32, the longest length, and the flat positions (total,) int64 of the tokens.
    """
    batch, length = mask.shape
    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device="cpu")
    indices = torch.empty(batch * length, dtype=torch.int64, device="cpu")
    total, longest = EXTENSION.read_mask(mask.data_ptr(), batch, length, cu_seqlens.data_ptr(), indices.data_ptr())
    return cu_seqlens, longest, indices if total == batch * length else indices[:total]


class EmbeddingTables:
    """The tables (number of ids, hidden) and the LayerNorm (hidden,) of a model's embeddings, all of one dtype.

    The tables are read where they are at each call; so is a LayerNorm of float32, another one is copied.
    """

    def __init__(self, word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, ln_bias: Tensor, eps: float) -> None:
        self.dtype, self.hidden = word.dtype, word.shape[1]
        self._norm = weight.detach().float(), ln_bias.detach().float()
        self._tables = tables = (word, position, token_type)
        self._handle = EXTENSION.EmbeddingTables(
            *(table.data_ptr() for table in tables), *(table.shape[0] for table in tables),
            *(parameter.data_ptr() for parameter in self._norm), self.hidden, eps, DTYPES[word.dtype],
        )  # fmt: skip

    def embed(
        self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None, indices: Tensor | None
    ) -> Tensor | None:
        """LayerNorm(word + token type + position embedding) of tokens, as ``embedding_layer_norm`` has it, without dropout.

        input_ids, token_type_ids (None: all 0), position_ids (None: the columns): (batch, length) and readable; indices: (total,)
        the flat positions of the tokens in them, None for all. Returns (total, hidden), or None where an id is in no table.
        """
        rows = input_ids.numel() if indices is None else indices.numel()
        y = torch.empty(rows, self.hidden, dtype=self.dtype, device="cpu")
        pointers = (0 if x is None else x.data_ptr() for x in (input_ids, token_type_ids, position_ids, indices, y))
        known = EXTENSION.embed_tokens(self._handle, *pointers, rows, input_ids.shape[1], torch.get_num_threads())
        return y if known else None


class PackedDense:
    """x W^T + b on a packed copy of a weight of float32 or bfloat16, for x of its dtype."""

    def __init__(self, weights: LinearWeights) -> None:
        self.dtype = weights.weight.dtype
        self.out_features, self.in_features = weights.weight.shape
        self._packed = PackedWeights([weights])

    def __call__(self, x: Tensor, step: int = 1) -> Tensor:
        """Of every ``step``-th row of x (rows, in_features), which are contiguous but may be apart, from the first one on.

        Returns (ceil(rows / step), out_features).
        """
        rows = -(-x.shape[0] // step)
        y = torch.empty(rows, self.out_features, dtype=self.dtype, device="cpu")
        EXTENSION.packed_dense(
            self._packed.linears[0], x.data_ptr(), y.data_ptr(), rows, step * x.stride(0), DTYPES[self.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        return y
