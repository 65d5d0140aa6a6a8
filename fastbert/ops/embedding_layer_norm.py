"""``embedding_layer_norm``: the model's input, dropout(LayerNorm(word + token type + position embedding)), in one pass.

The sum of the three embeddings is neither stored nor saved: the forward writes the result alone, and the backward gathers the
three rows again, which saves hidden values a token and reads tables that are small or were read in the same order before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import implementation_for
from .registration import check_dropout, check_ids, check_shape, contiguous_grad, register


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    padding_idx: int = -1,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    backend: str = "auto",
) -> Tensor:
    """dropout(LayerNorm(z) * weight + ln_bias), z = word[input_ids] + token_type[token_type_ids] + position[position_ids].

    The input of BERT (Devlin et al., 2019, figure 2), as transformers' BertEmbeddings computes it. input_ids, token_type_ids,
    position_ids: (rows,) int64 or int32; word, position, token_type: the tables, (number of ids, hidden) each; weight, ln_bias:
    (hidden,). All are computed in word's dtype (float32, bfloat16, float16 or float64; others are converted), sums and
    statistics in float32. padding_idx: the row of word whose gradient stays 0, -1 for none. dropout_p, seed (int64, one
    element), stream: see ``reference.dropout_keep``.

    Returns (rows, hidden) in word's dtype. Raises ValueError for shapes and dtypes that do not fit and, on a CPU, for ids
    outside their table; on a GPU such an id fails a device-side assertion, as in torch. Raises RuntimeError where an
    explicitly named backend cannot do it.
    """
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (rows,)")
    for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        check_shape(name, ids, tuple(input_ids.shape), "one per row, as many as input_ids")
    for name, ids in (("input_ids", input_ids), ("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} has dtype {ids.dtype}, expected torch.int64 or torch.int32")
    for name, table in (("word", word), ("position", position), ("token_type", token_type)):
        if table.dim() != 2 or table.shape[1] != word.shape[-1]:
            raise ValueError(f"{name} has shape {tuple(table.shape)}, expected (number of ids, hidden), hidden as in word")
    for name, parameter in (("weight", weight), ("ln_bias", ln_bias)):
        check_shape(name, parameter, (word.shape[1],), "(hidden,)")
    if not -1 <= padding_idx < word.shape[0]:
        raise ValueError(f"padding_idx is {padding_idx}, expected a row of word, 0 to {word.shape[0] - 1}, or -1 for none")
    check_dropout(dropout_p, seed)
    seed = seed if dropout_p > 0.0 else None
    input_ids, token_type_ids, position_ids = (ids.long().contiguous() for ids in (input_ids, token_type_ids, position_ids))
    position, token_type, weight, ln_bias = (t.to(word.dtype).contiguous() for t in (position, token_type, weight, ln_bias))
    return torch.ops.fastbert.embedding_layer_norm(
        input_ids, token_type_ids, position_ids, word.contiguous(), position, token_type, weight, ln_bias, padding_idx, eps,
        dropout_p, seed, stream, backend,
    )[0]  # fmt: skip


def _forward(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    padding_idx: int,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if word.device.type == "cpu":  # Looking at ids on a GPU would wait for it: the kernels there assert.
        check_ids("input_ids", input_ids, word.shape[0], "the number of word's rows")
        check_ids("token_type_ids", token_type_ids, token_type.shape[0], "the number of token_type's rows")
        check_ids("position_ids", position_ids, position.shape[0], "the number of position's rows")
    module = implementation_for("embedding_layer_norm", backend, word, "forward", rows=len(input_ids), hidden=word.shape[1])
    return module.embedding_layer_norm_forward(
        input_ids, token_type_ids, position_ids, word, position, token_type, weight, ln_bias, eps, dropout_p, seed, stream
    )


def _fake(input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, word: Tensor, *_: object):
    rows = input_ids.shape[0]
    statistics = word.new_empty(rows, dtype=torch.float64 if word.dtype == torch.float64 else torch.float32)
    return word.new_empty(rows, word.shape[1]), statistics, torch.empty_like(statistics)


def _setup_context(ctx, inputs, output) -> None:
    *ids_and_tables, weight, _, ctx.padding_idx, _, ctx.dropout_p, seed, ctx.stream, ctx.backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*ids_and_tables, weight, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dy: Tensor | None, *_unused: Tensor | None):
    if dy is None:
        return (None,) * 14
    *tensors, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[3:8])
    grads = torch.ops.fastbert.embedding_layer_norm_backward(
        contiguous_grad(dy), *tensors, ctx.padding_idx, needs, ctx.dropout_p, seed, ctx.stream, ctx.backend
    )
    wanted = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return None, None, None, *wanted, *(None,) * 6


def _backward(
    dy: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int,
    needs: list[bool],
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dword, dposition, dtoken_type, dweight, dln_bias; those that ``needs`` does not ask for come back empty.

    The two vectors cost nothing beside the pass that makes them: a backend computes them in any case.
    """
    module = implementation_for("embedding_layer_norm", backend, word, "backward", rows=len(input_ids), hidden=word.shape[1])
    grads = module.embedding_layer_norm_backward(
        dy, input_ids, token_type_ids, position_ids, word, position, token_type, weight, mean, rstd, padding_idx,
        tuple(needs[:3]), dropout_p, seed, stream,
    )  # fmt: skip
    return tuple(grad if needed else word.new_empty(0) for grad, needed in zip(grads, needs, strict=True))


def _fake_backward(
    dy, input_ids, token_type_ids, position_ids, word, position, token_type, weight, mean, rstd, padding_idx, needs, *_
):
    parameters = (word, position, token_type, weight, weight)
    return tuple(torch.empty_like(p) if needed else word.new_empty(0) for p, needed in zip(parameters, needs, strict=True))


_IDS_AND_TABLES = (
    "Tensor input_ids, Tensor token_type_ids, Tensor position_ids, Tensor word, Tensor position, Tensor token_type, Tensor weight"
)
_DROPOUT = "float dropout_p, Tensor? seed, int stream, str backend"
register(
    "embedding_layer_norm",
    f"({_IDS_AND_TABLES}, Tensor ln_bias, int padding_idx, float eps, {_DROPOUT}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _autograd_backward,
)
register(
    "embedding_layer_norm_backward",
    f"(Tensor dy, {_IDS_AND_TABLES}, Tensor mean, Tensor rstd, int padding_idx, bool[] needs, {_DROPOUT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
