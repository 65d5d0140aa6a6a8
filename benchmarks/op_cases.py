"""The ops at the sizes that are measured, each beside what torch offers for the same work.

A case holds contenders: functions of the tensors that need gradients, in the layout that the contender wants (attention's
peers take query, key and value apart, some of them padded), and the way back to the layout of fastbert's op, in which all are
compared with the reference in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert.ops import add_layer_norm, attention, backends, embedding_layer_norm, gelu_layer_norm, linear_gelu, mlm_loss

from .lengths import MLPERF, embedded
from .workloads import VOCABULARY

EPS, STREAM, LABELLED = 1e-12, 5, 0.15
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Scale:
    """tokens: of every case. lengths: of the cases of equal sequences. mix: one cycle of real lengths."""

    tokens: int
    hidden: tuple[int, ...]
    head_dim: int
    vocabulary: int
    lengths: tuple[int, ...]
    mix: tuple[int, ...]


SCALES = {
    "full": Scale(65536, (768, 1024), 64, VOCABULARY, (128, 512), embedded()[MLPERF].quantiles(32)),
    "small": Scale(200, (64, 1024), 64, 320, (40,), (7, 33)),
    "toy": Scale(12, (64,), 64, 20, (), (3, 9)),
}


@dataclass
class Contender:
    """run(*leaves) -> output; restore(output, gradients of the leaves) -> the same in the layout of fastbert's op."""

    run: Callable[..., Tensor]
    leaves: Sequence[Tensor]
    dout: Tensor
    restore: Callable[[Tensor, Sequence[Tensor]], list[Tensor]] = lambda out, grads: [out, *grads]
    comparable: bool = True  # not where it draws a dropout mask of its own, or does only a part of the work


@dataclass
class Case:
    """ours(backend) is the op on that backend; ``compiled`` names the peer that torch.compile may try its luck with."""

    op: str
    name: str
    hidden: int
    dropout_p: float
    shape: dict[str, Any]
    ours: Callable[[str], Callable[..., Tensor]]
    leaves: Sequence[Tensor]
    dout: Tensor
    head_dim: int | None = None
    peers: dict[str, Callable[[], Contender]] = field(default_factory=dict)
    compiled: str = "torch eager"

    def contenders(self, device: str) -> Iterator[tuple[str, Callable[[], Contender] | str]]:
        """(name, contender or the reason why there is none), fastbert's first; the reference only where "auto" picks it."""
        dtype = self.leaves[0].dtype
        picked = backends.select(self.op, "auto", device, dtype, self.head_dim)
        for backend in backends.BACKENDS:
            reasons = backends.not_supported_reasons(backend, self.op, device, dtype, self.head_dim)
            if backend != "reference" or picked == "reference":
                make = lambda backend=backend: Contender(self.ours(backend), self.leaves, self.dout)  # noqa: E731
                yield f"fastbert {backend}", "; ".join(reasons) or make
        yield from self.peers.items()


def cases(op: str, scale: Scale, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Every case of ``op``, BERT-base's width first; inputs are the same in every run."""
    for hidden in scale.hidden:
        yield from _MAKERS[op](scale, hidden, device, dtype)


def _leaf(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def _seed(device: str) -> Tensor:
    return torch.tensor([0x1234567890ABCDE], dtype=torch.int64, device=device)


# --- attention -----------------------------------------------------------------------------------------------------------


def _attention(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    named = {f"S{n}": (n,) * (scale.tokens // n) for n in scale.lengths}
    named["real lengths"] = scale.mix * (scale.tokens // sum(scale.mix))
    heads = hidden // scale.head_dim
    for name, lengths in named.items():
        for dropout_p in (0.0, 0.1):
            total, longest = sum(lengths), max(lengths)
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
            qkv = _leaf(total, 3, heads, scale.head_dim, device=device, dtype=dtype)
            dout = torch.randn(total, heads, scale.head_dim, device=device).to(dtype)
            seed = _seed(device)

            def ours(backend, bounds=cu_seqlens, longest=longest, dropout_p=dropout_p, seed=seed):
                return lambda x: attention(x, bounds, longest, dropout_p=dropout_p, seed=seed, stream=STREAM, backend=backend)

            shape = {"lengths": lengths, "num_heads": heads, "head_dim": scale.head_dim, "dropout": dropout_p > 0}
            peers = _attention_peers(qkv.detach(), cu_seqlens, lengths, dout, dropout_p)
            yield Case("attention", name, hidden, dropout_p, shape, ours, [qkv], dout, scale.head_dim, peers)


def _attention_peers(
    qkv: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...], dout: Tensor, dropout_p: float
) -> dict[str, Callable[[], Contender]]:
    longest, batch = max(lengths), len(lengths)
    real = torch.arange(longest, device=qkv.device) < cu_seqlens.diff()[:, None]
    mask = None if min(lengths) == longest else real[:, None, None, :]

    def apart() -> list[Tensor]:
        return [t.contiguous().requires_grad_() for t in qkv.unbind(1)]

    def together(out: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
        return [out, torch.stack(tuple(grads), 1)]

    def padded(x: Tensor) -> Tensor:
        """(total, heads, head_dim) -> (batch, heads, longest, head_dim), in the memory order that a projection leaves."""
        rows = x.new_zeros(batch, longest, *x.shape[1:])
        rows[real] = x
        return rows.transpose(1, 2)

    def unpadded(out: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
        return together(out.transpose(1, 2)[real], [g.transpose(1, 2)[real] for g in grads])

    def on_padded(run: Callable[..., Tensor]) -> Callable[[], Contender]:
        def make() -> Contender:
            leaves = [padded(t).detach().requires_grad_() for t in qkv.unbind(1)]
            return Contender(run, leaves, padded(dout), unpadded, comparable=dropout_p == 0)

        return make

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout_p) @ v

    def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)

        return run

    def nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        jagged = [
            torch.nested.nested_tensor_from_jagged(t, cu_seqlens, min_seqlen=min(lengths), max_seqlen=longest).transpose(1, 2)
            for t in (q, k, v)
        ]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*jagged, dropout_p=dropout_p).transpose(1, 2).values()

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)

    peers = {"torch eager": on_padded(eager), **{name: on_padded(sdpa(backend)) for name, backend in SDPA.items()}}
    peers["sdpa flash, nested"] = lambda: Contender(nested, apart(), dout, together, comparable=dropout_p == 0)
    if dropout_p == 0.0:  # it has none
        peers["varlen_attn"] = lambda: Contender(varlen, apart(), dout, together)
    return peers


# --- row-wise ops ----------------------------------------------------------------------------------------------------------


def _add_layer_norm(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    for dropout_p in (0.0, 0.1):
        rows = [_leaf(scale.tokens, hidden, device=device, dtype=dtype) for _ in range(2)]
        bias, weight, ln_bias = (_leaf(hidden, device=device, dtype=dtype) for _ in range(3))
        leaves, seed = [rows[0], bias, rows[1], weight, ln_bias], _seed(device)
        dout = torch.randn(scale.tokens, hidden, device=device).to(dtype)

        def ours(backend, dropout_p=dropout_p, seed=seed):
            return lambda *t: add_layer_norm(*t, EPS, dropout_p=dropout_p, seed=seed, stream=STREAM, backend=backend)

        def eager(x, bias, residual, weight, ln_bias, dropout_p=dropout_p):
            return F.layer_norm(F.dropout(x + bias, dropout_p) + residual, weight.shape, weight, ln_bias, EPS)

        def peer(run=eager, leaves=leaves, dout=dout, dropout_p=dropout_p):
            return Contender(run, leaves, dout, comparable=dropout_p == 0)

        shape = {"rows": scale.tokens, "hidden": hidden, "dropout": dropout_p > 0}
        name, peers = f"{scale.tokens} rows", {"torch eager": peer}
        yield Case("add_layer_norm", name, hidden, dropout_p, shape, ours, leaves, dout, peers=peers)


def _embedding_layer_norm(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    positions = max(*scale.lengths, *scale.mix)
    tables = [_leaf(rows, hidden, device=device, dtype=dtype, scale=0.02) for rows in (scale.vocabulary, positions, 2)]
    leaves = [*tables, *(_leaf(hidden, device=device, dtype=dtype) for _ in range(2))]
    ids = [torch.randint(table.shape[0], (scale.tokens,), device=device) for table in tables]
    ids[1] = torch.arange(scale.tokens, device=device) % positions
    dout, seed = torch.randn(scale.tokens, hidden, device=device).to(dtype), _seed(device)
    for dropout_p in (0.0, 0.1):

        def ours(backend, dropout_p=dropout_p):
            words, at, types = ids
            options = {"dropout_p": dropout_p, "seed": seed, "stream": STREAM, "backend": backend}
            return lambda *t: embedding_layer_norm(words, types, at, *t, EPS, padding_idx=0, **options)

        def eager(word, position, token_type, weight, ln_bias, dropout_p=dropout_p):
            words, at, types = ids
            z = F.embedding(words, word, padding_idx=0) + F.embedding(types, token_type) + F.embedding(at, position)
            return F.dropout(F.layer_norm(z, weight.shape, weight, ln_bias, EPS), dropout_p)

        def peer(run=eager, dropout_p=dropout_p):
            return Contender(run, leaves, dout, comparable=dropout_p == 0)

        shape = {"rows": scale.tokens, "hidden": hidden, "vocabulary": scale.vocabulary, "dropout": dropout_p > 0}
        name, peers = f"{scale.tokens} rows", {"torch eager": peer}
        yield Case("embedding_layer_norm", name, hidden, dropout_p, shape, ours, leaves, dout, peers=peers)


def _gelu_layer_norm(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    leaves = [_leaf(*shape, device=device, dtype=dtype) for shape in ((scale.tokens, hidden), (hidden,), (hidden,), (hidden,))]
    dout = torch.randn(scale.tokens, hidden, device=device).to(dtype)

    def ours(backend):
        return lambda *t: gelu_layer_norm(*t, EPS, backend=backend)

    def eager(x, bias, weight, ln_bias):
        return F.layer_norm(F.gelu(x + bias), weight.shape, weight, ln_bias, EPS)

    shape = {"rows": scale.tokens, "hidden": hidden}
    peers = {"torch eager": lambda: Contender(eager, leaves, dout)}
    yield Case("gelu_layer_norm", f"{scale.tokens} rows", hidden, 0.0, shape, ours, leaves, dout, peers=peers)


# --- ops with a matmul -------------------------------------------------------------------------------------------------------


def _linear_gelu(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    x, wide = _leaf(scale.tokens, hidden, device=device, dtype=dtype), 4 * hidden
    weight, bias = (_leaf(*shape, device=device, dtype=dtype, scale=0.03) for shape in ((wide, hidden), (wide,)))
    leaves, dout = [x, weight, bias], torch.randn(scale.tokens, wide, device=device).to(dtype)

    def ours(backend):
        return lambda *t: linear_gelu(*t, backend=backend)

    peers = {
        "torch eager": lambda: Contender(lambda *t: F.gelu(F.linear(*t)), leaves, dout),
        # Not the same work: the matmul alone, which the goal is set beside.
        "plain linear": lambda: Contender(F.linear, leaves, dout, comparable=False),
    }
    shape = {"rows": scale.tokens, "in_features": hidden, "out_features": wide}
    yield Case("linear_gelu", f"{scale.tokens} rows", hidden, 0.0, shape, ours, leaves, dout, peers=peers)


def _mlm_loss(scale: Scale, hidden: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    rows = int(scale.tokens * LABELLED)
    x = _leaf(scale.tokens, hidden, device=device, dtype=dtype)
    weight, bias = (
        _leaf(*shape, device=device, dtype=dtype, scale=0.03) for shape in ((scale.vocabulary, hidden), (scale.vocabulary,))
    )
    labels, dout = torch.randint(scale.vocabulary, (rows,), device=device), torch.ones((), device=device)
    chosen = torch.randperm(scale.tokens, device=device)[:rows]
    all_labels = torch.full((scale.tokens,), -100, device=device).index_copy(0, chosen, labels)
    leaves = [x.detach()[chosen].requires_grad_(), weight, bias]

    def ours(backend):
        return lambda *t: mlm_loss(*t, labels, backend=backend)[0]

    def eager(targets):
        return lambda *t: F.cross_entropy(F.linear(*t).float(), targets)

    peers = {
        "torch eager": lambda: Contender(eager(labels), leaves, dout),
        "torch eager, all rows": lambda: Contender(
            eager(all_labels), [x, weight, bias], dout, lambda out, grads: [out, grads[0][chosen], *grads[1:]]
        ),
    }
    shape = {"rows": rows, "hidden": hidden, "vocabulary": scale.vocabulary}
    yield Case("mlm_loss", f"{rows} of {scale.tokens} rows", hidden, 0.0, shape, ours, leaves, dout, peers=peers)


_MAKERS = {
    "embedding_layer_norm": _embedding_layer_norm,
    "attention": _attention,
    "add_layer_norm": _add_layer_norm,
    "linear_gelu": _linear_gelu,
    "gelu_layer_norm": _gelu_layer_norm,
    "mlm_loss": _mlm_loss,
}
