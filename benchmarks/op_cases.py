"""The ops at the sizes that are measured, each beside what torch, flash-attn and Liger-Kernel offer for the same work.

A case holds contenders: functions of the tensors that need gradients, in the layout that the contender wants (attention's
peers take query, key and value apart, some of them padded), and the way back to the layout of fastbert's op, in which all are
compared with the reference in float32. Here are the row-wise ops; ``attention_cases`` and ``matmul_cases`` have the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from fastbert.ops import add_layer_norm, embedding_layer_norm, gelu_layer_norm
from fastbert.ops.add_layer_norm import add_layer_norm_mixed

from . import attention_cases, matmul_cases
from .op_contenders import EPS, NO_LIGER_GELU, SCALES, STREAM, Case, Contender, Offer, Scale, leaf, liger, seed_on

__all__ = ["OPS", "SCALES", "Case", "Contender", "Scale", "cases"]


def cases(op: str, scale: Scale, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Every case of ``op``, BERT-base's width first; inputs are the same in every run."""
    for hidden in scale.hidden:
        yield from _MAKERS[op](scale, hidden, device, dtype)


def _add_layer_norm(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    for dropout_p in (0.0, 0.1):
        rows = [leaf(scale.tokens, hidden, device=device, dtype=dtype) for _ in range(2)]
        bias, weight, ln_bias = (leaf(hidden, device=device, dtype=dtype) for _ in range(3))
        leaves, seed = [rows[0], bias, rows[1], weight, ln_bias], seed_on(device)
        dout = torch.randn(scale.tokens, hidden, device=device).to(dtype)

        def ours(backend, dropout_p=dropout_p, seed=seed):
            return lambda *t: add_layer_norm(*t, EPS, dropout_p=dropout_p, seed=seed, stream=STREAM, backend=backend)

        def with_norm(norm, dropout_p=dropout_p, leaves=leaves, dout=dout):
            def run(x, x_bias, residual, *parameters):
                return norm(F.dropout(x + x_bias, dropout_p) + residual, *parameters)

            return Contender(run, leaves, dout, comparable=dropout_p == 0)

        shape = {"rows": scale.tokens, "hidden": hidden, "dropout": dropout_p > 0}
        name, peers = f"{scale.tokens} rows", _norm_peers(with_norm, device)
        yield Case("add_layer_norm", name, hidden, dropout_p, shape, ours, leaves, dout, peers=peers)


def _add_layer_norm_mixed(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The gradient is of the result in half precision; in float32 nothing is mixed."""
    if dtype == torch.float32:
        return
    float32 = [
        leaf(*shape, device=device, dtype=torch.float32) for shape in ((hidden,), (scale.tokens, hidden), (hidden,), (hidden,))
    ]
    leaves = [leaf(scale.tokens, hidden, device=device, dtype=dtype), *float32]
    dout = torch.randn(scale.tokens, hidden, device=device).to(dtype)

    def ours(backend):
        return lambda *t: add_layer_norm_mixed(*t, EPS, backend=backend)[0]

    def with_norm(norm):
        def run(x, bias, residual, *parameters):
            return norm(x + bias + residual, *parameters).to(x.dtype)

        return Contender(run, leaves, dout)

    shape, peers = {"rows": scale.tokens, "hidden": hidden}, _norm_peers(with_norm, device)
    name = f"{scale.tokens} rows"
    yield Case("add_layer_norm_mixed", name, hidden, 0.0, shape, ours, leaves, dout, peers=peers, chooses=False)


def _embedding_layer_norm(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    positions = max(*scale.lengths, *scale.mix)
    tables = [leaf(rows, hidden, device=device, dtype=dtype, scale=0.02) for rows in (scale.vocabulary, positions, 2)]
    leaves = [*tables, *(leaf(hidden, device=device, dtype=dtype) for _ in range(2))]
    ids = [torch.randint(table.shape[0], (scale.tokens,), device=device) for table in tables]
    ids[1] = torch.arange(scale.tokens, device=device) % positions
    dout, seed = torch.randn(scale.tokens, hidden, device=device).to(dtype), seed_on(device)
    for dropout_p in (0.0, 0.1):

        def ours(backend, dropout_p=dropout_p):
            words, at, types = ids
            options = {"dropout_p": dropout_p, "seed": seed, "stream": STREAM, "backend": backend}
            return lambda *t: embedding_layer_norm(words, types, at, *t, EPS, padding_idx=0, **options)

        def with_norm(norm, dropout_p=dropout_p):
            def run(word, position, token_type, weight, ln_bias):
                words, at, types = ids
                z = F.embedding(words, word, padding_idx=0) + F.embedding(types, token_type) + F.embedding(at, position)
                return F.dropout(norm(z, weight, ln_bias), dropout_p)

            return Contender(run, leaves, dout, comparable=dropout_p == 0)

        shape = {"rows": scale.tokens, "hidden": hidden, "vocabulary": scale.vocabulary, "dropout": dropout_p > 0}
        name, peers = f"{scale.tokens} rows", _norm_peers(with_norm, device)
        yield Case("embedding_layer_norm", name, hidden, dropout_p, shape, ours, leaves, dout, peers=peers)


def _gelu_layer_norm(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    leaves = [leaf(*shape, device=device, dtype=dtype) for shape in ((scale.tokens, hidden), (hidden,), (hidden,), (hidden,))]
    dout = torch.randn(scale.tokens, hidden, device=device).to(dtype)

    def ours(backend):
        return lambda *t: gelu_layer_norm(*t, EPS, backend=backend)

    def with_norm(norm):
        return Contender(lambda x, bias, weight, ln_bias: norm(F.gelu(x + bias), weight, ln_bias), leaves, dout)

    shape = {"rows": scale.tokens, "hidden": hidden}
    peers = {**_norm_peers(with_norm, device), "Liger GELU": NO_LIGER_GELU}
    yield Case("gelu_layer_norm", f"{scale.tokens} rows", hidden, 0.0, shape, ours, leaves, dout, peers=peers)


def _norm_peers(with_norm: Callable[[Callable], Contender], device: str) -> dict[str, Offer]:
    """with_norm(norm): the op as torch spells it out, around norm(z, weight, bias)."""

    def of_torch(z, weight, bias):
        return F.layer_norm(z, weight.shape, weight, bias, EPS)

    def of_liger() -> Contender:
        from liger_kernel.transformers.functional import liger_layer_norm

        return with_norm(lambda z, weight, bias: liger_layer_norm(z, weight, bias, EPS))

    return {"torch eager": lambda: with_norm(of_torch), "Liger LayerNorm": liger(device, of_liger)}


_MAKERS = {
    "embedding_layer_norm": _embedding_layer_norm,
    "attention": attention_cases.cases,
    "add_layer_norm": _add_layer_norm,
    "add_layer_norm_mixed": _add_layer_norm_mixed,
    "linear": matmul_cases.linear_cases,
    "linear_gelu": matmul_cases.linear_gelu_cases,
    "feed_forward": matmul_cases.feed_forward_cases,
    "gelu_layer_norm": _gelu_layer_norm,
    "int8_linear": matmul_cases.int8_linear_cases,
    "mlm_loss": matmul_cases.mlm_loss_cases,
}
OPS = tuple(_MAKERS)
