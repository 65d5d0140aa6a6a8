"""Which kernels a model launches: every op in each direction, on tensors that Triton cannot tell from real ones.

Triton compiles a kernel anew for every combination of argument types, constants (tile sizes, widths, number of heads, dropout on
or off, precision of float32 products) and specializations: a pointer divisible by 16 bytes, an integer divisible by 16 or
equal to 1, unless the kernel lists the integer in ``do_not_specialize``. A case is equal to real launches in all three:

- constants and types come from the op's own launcher, which gets the model's own widths, vocabulary, heads and dtype;
- torch gives tensors memory that is divisible by 16 bytes, on CPUs as on GPUs, and slices along rows keep it for BERT's widths;
- counts of rows and of sequences and sequence lengths, which differ from batch to batch, take values of each kind (1, divisible
  by 16, not divisible, few, many): a kernel that none of this changes comes out once, another one in all its forms.

Rows are few, because no kernel is compiled for their number: tensors stay small and nothing is computed. (On AMD a tensor above
2 GiB is one more specialization, which is not covered.)
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import backends

# tf32: float32 with torch.backends.cuda.matmul.fp32_precision = "tf32", on the matrix units.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
DIRECTIONS = ("forward", "backward")
ROW_COUNTS = (1, 61, 64)
SEQUENCE_COUNTS = (1, 4096)  # fewer heads than a GPU has multiprocessors, and more
EPS = 1e-12
STREAM = 1


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a BERT that its kernels are compiled for, under transformers' names (``activation``: hidden_act)."""

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    hidden_act: str = "gelu"


@dataclass(frozen=True)
class Case:
    """One op in one direction and dtype (a key of :data:`DTYPES`), with the arguments of its function below."""

    op: str
    direction: str
    dtype: str
    shape: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        shape = {name: value for name, value in self.shape.items() if name != "lengths"}
        if "lengths" in self.shape:
            shape["max_seqlen"] = max(self.shape["lengths"])
        return " ".join([self.op, self.direction, self.dtype, *(f"{name} {value}" for name, value in shape.items())])

    def run(self) -> None:
        """Calls the op's launcher, inside ``offline._compiling``, which ends each launch before a device is needed."""
        with _float32_products("tf32" if self.dtype == "tf32" else "ieee"):
            _LAUNCHES[self.op](self.direction == "backward", DTYPES[self.dtype], **self.shape)


def has_kernel(op: str) -> bool:
    """Whether there is a Triton kernel for ``op`` in this installation."""
    return importlib.util.find_spec(f"fastbert_kernels.{op}") is not None


def model_cases(model: ModelShape, dtypes: list[str], max_seq_length: int, *, inference: bool) -> list[Case]:
    """What a model launches in training (and evaluation) or in ``inference`` alone, with the ops that Triton serves on GPUs.

    max_seq_length: tokens of a sequence at most, or the model's positions where those are fewer.
    """
    cases = []
    for dtype in dtypes:
        for op, shape, dropout_p in _shapes(model, max_seq_length):
            if not has_kernel(op) or not _is_picked(op, dtype, shape.get("head_dim")):
                continue
            if dropout_p is None:
                options = [{}]
            else:
                options = [{"dropout_p": p} for p in dict.fromkeys((0.0,) if inference else (dropout_p, 0.0))]
            cases += [Case(op, "forward", dtype, {**shape, **option}) for option in options]
            if not inference:
                cases.append(Case(op, "backward", dtype, {**shape, **options[0]}))
    return cases


def _shapes(model: ModelShape, max_seq_length: int) -> Iterator[tuple[str, dict[str, Any], float | None]]:
    """(op, shape, dropout probability in training or None) of everything in the encoder and the masked-LM head."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    lengths = every_kind_of_length(min(max_seq_length, model.max_position_embeddings))
    tables = (model.vocab_size, model.max_position_embeddings, model.type_vocab_size)
    yield "embedding_layer_norm", {"hidden": hidden, "tables": tables}, model.hidden_dropout_prob
    yield "attention", {"num_heads": heads, "head_dim": hidden // heads, "lengths": lengths}, model.attention_probs_dropout_prob
    yield "add_layer_norm", {"hidden": hidden}, model.hidden_dropout_prob
    yield "add_layer_norm_mixed", {"hidden": hidden}, model.hidden_dropout_prob
    yield "mlm_loss", {"vocabulary": model.vocab_size}, None
    if model.hidden_act == "gelu":
        yield "linear_gelu", {"in_features": hidden, "out_features": model.intermediate_size}, None
        yield "gelu_layer_norm", {"hidden": hidden}, None


def _is_picked(op: str, dtype: str, head_dim: int | None) -> bool:
    if backends.not_supported_reasons("triton", op, "cuda", DTYPES[dtype], head_dim):
        return False
    return backends.select(op, "auto", "cuda", DTYPES[dtype], head_dim) == "triton"


def every_kind_of_length(max_seq_length: int) -> tuple[int, ...]:
    """1, and around every multiple of 16: whatever lengths a launcher distinguishes, one of each kind is among them."""
    around = (length for multiple in range(16, max_seq_length + 1, 16) for length in (multiple, multiple + 1))
    return tuple(sorted({1, *(length for length in around if length <= max_seq_length), max_seq_length}))


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


# --- the launches of each op ---------------------------------------------------------------------------------------------


def _embedding_layer_norm(backward: bool, dtype: torch.dtype, hidden: int, tables: tuple[int, int, int], dropout_p: float) -> None:
    from fastbert_kernels import embedding_layer_norm

    words, positions, types = (torch.zeros(size, hidden, dtype=dtype) for size in tables)
    for x, parameter, statistics in _rows_of(hidden, dtype):
        ids = torch.zeros(len(x), dtype=torch.int64)
        inputs = (ids, ids, ids, words, positions, types, parameter)
        if backward:
            for padding_idx in (0, -1):
                embedding_layer_norm.embedding_layer_norm_backward(
                    x, *inputs, statistics, statistics, padding_idx, (True, True, True), *_dropout(dropout_p)
                )
        else:
            embedding_layer_norm.embedding_layer_norm_forward(*inputs, parameter, EPS, *_dropout(dropout_p))


def _attention(
    backward: bool, dtype: torch.dtype, num_heads: int, head_dim: int, dropout_p: float, lengths: tuple[int, ...]
) -> None:
    from fastbert_kernels import attention

    dropout = _dropout(dropout_p)
    scale = head_dim**-0.5
    for rows, sequences in itertools.product(ROW_COUNTS, SEQUENCE_COUNTS):
        qkv, out = torch.zeros(rows, 3, num_heads, head_dim, dtype=dtype), torch.zeros(rows, num_heads, head_dim, dtype=dtype)
        lse, cu_seqlens = torch.zeros(num_heads, rows), torch.zeros(sequences + 1, dtype=torch.int32)
        for max_seqlen in lengths:
            if backward:
                attention.attention_backward(out, qkv, out, lse, cu_seqlens, max_seqlen, scale, *dropout)
            else:
                attention.attention_forward(qkv, cu_seqlens, max_seqlen, scale, *dropout)


def _add_layer_norm(backward: bool, dtype: torch.dtype, hidden: int, dropout_p: float) -> None:
    from fastbert_kernels import add_layer_norm

    for x, parameter, statistics in _rows_of(hidden, dtype):
        if backward:
            add_layer_norm.add_layer_norm_backward(x, x, statistics, statistics, parameter, True, *_dropout(dropout_p))
        else:
            add_layer_norm.add_layer_norm_forward(x, parameter, x, parameter, parameter, EPS, *_dropout(dropout_p))


def _add_layer_norm_mixed(backward: bool, dtype: torch.dtype, hidden: int, dropout_p: float) -> None:
    """Of results that no matmul reads there is no gradient in half precision. The last layer has the op in float32."""
    from fastbert_kernels import add_layer_norm_mixed

    dropout = _dropout(dropout_p)
    for x, _, statistics in _rows_of(hidden, dtype):
        residual, parameter = torch.zeros(x.shape), torch.ones(hidden)
        if backward:
            for dy in (x, None):
                add_layer_norm_mixed.add_layer_norm_mixed_backward(
                    dy, residual, x, statistics, statistics, parameter, True, *dropout
                )
        else:
            add_layer_norm_mixed.add_layer_norm_mixed_forward(x, parameter, residual, parameter, parameter, EPS, *dropout)
    _add_layer_norm(backward, torch.float32, hidden, dropout_p)


def _gelu_layer_norm(backward: bool, dtype: torch.dtype, hidden: int) -> None:
    from fastbert_kernels import gelu_layer_norm

    for x, parameter, statistics in _rows_of(hidden, dtype):
        if backward:
            gelu_layer_norm.gelu_layer_norm_backward(x, x, parameter, parameter, statistics, statistics)
        else:
            gelu_layer_norm.gelu_layer_norm_forward(x, parameter, parameter, parameter, EPS)


def _linear_gelu(backward: bool, dtype: torch.dtype, in_features: int, out_features: int, recompute: bool = False) -> None:
    """recompute: the pre-activation is not kept for the backward pass, which no model asks for."""
    from fastbert_kernels import linear_gelu

    weight, bias = torch.zeros(out_features, in_features, dtype=dtype), torch.zeros(out_features, dtype=dtype)
    for rows in ROW_COUNTS:
        x, u = torch.zeros(rows, in_features, dtype=dtype), torch.zeros(rows, out_features, dtype=dtype)
        if backward:
            linear_gelu.linear_gelu_backward(u, x, weight, bias, None if recompute else u)
            linear_gelu.bias_gelu_backward(u, u, bias, torch.float32)  # under autocast
        else:
            for keep_preactivation in (not recompute, False):
                linear_gelu.linear_gelu_forward(x, weight, bias, keep_preactivation)


def _mlm_loss(backward: bool, dtype: torch.dtype, vocabulary: int) -> None:
    """Blocks of a multiple of 64 classes, and the rest, in rows of such a length (``ops/mlm_loss.py``)."""
    from fastbert_kernels import mlm_loss

    bias = torch.zeros(vocabulary, dtype=dtype)
    for rows, classes in itertools.product(ROW_COUNTS, dict.fromkeys((vocabulary // 64 * 64 or vocabulary, vocabulary))):
        logits = torch.zeros(rows, -(-classes // 64) * 64, dtype=dtype)[:, :classes]
        labels, statistics, block_bias = torch.zeros(rows, dtype=torch.int64), torch.ones(rows), bias[:classes]
        if backward:
            mlm_loss.mlm_loss_backward(
                logits, block_bias, labels, 0, vocabulary, statistics, statistics, statistics, 0.0, block_bias
            )
        else:
            mlm_loss.mlm_loss_forward(logits, block_bias, labels, 0, statistics, statistics, statistics, None)


_LAUNCHES = {
    "embedding_layer_norm": _embedding_layer_norm,
    "attention": _attention,
    "add_layer_norm": _add_layer_norm,
    "add_layer_norm_mixed": _add_layer_norm_mixed,
    "linear_gelu": _linear_gelu,
    "gelu_layer_norm": _gelu_layer_norm,
    "mlm_loss": _mlm_loss,
}


def _rows_of(hidden: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states (rows, hidden), a parameter (hidden,) and a row statistic (rows,), for each number of rows."""
    for rows in ROW_COUNTS:
        yield torch.zeros(rows, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype), torch.ones(rows)


def _dropout(dropout_p: float) -> tuple[float, Tensor | None, int]:
    return dropout_p, torch.ones(1, dtype=torch.int64) if dropout_p else None, STREAM
