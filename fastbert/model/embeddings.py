"""The embeddings of the real tokens: one fused op instead of three gathers, two additions, LayerNorm and dropout.

Embeddings that are not exactly what transformers builds (another class, hooks, a table that does more than hold rows) are called
as a module, so that what they add takes part; :func:`embedding_notes` says why. Calls without gradients on a CPU take the same
kernel straight from the caller's tensors (:mod:`.packed_ends`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import embedding_layer_norm
from ..ops.registration import under_autocast
from .inputs import check_token_ids
from .layer import STREAMS_PER_LAYER, active_dropout_p
from .packed_ends import TABLES, embed_at_once, forget, keep_tables, tables_of, takes
from .packing import Packing
from .plain import class_was_changed, is_watched


def embed(
    model: nn.Module,
    packing: Packing,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Tensor:
    """(total, hidden): the embeddings of the real tokens of a call of ``model``, with its arguments, each (batch, length, ...)."""
    natively = input_ids is not None and takes(input_ids)
    if not (natively or torch.compiler.is_compiling()):
        forget(model.embeddings)
    tables = tables_of(model) if natively else None
    if tables is None and (input_ids is None or embedding_notes(model)):
        rows = _their_embeddings(model, packing, input_ids, token_type_ids, position_ids, inputs_embeds)
    else:
        tables = tables or (keep_tables(model) if natively else None)
        rows = None
        if tables is not None:
            rows = embed_at_once(tables, model, packing, input_ids, token_type_ids, position_ids)
        if rows is None:  # ids outside the tables among others, which this names
            rows = _fused_embeddings(model, packing, input_ids, token_type_ids, position_ids)
    project = getattr(model, "embeddings_project", None)  # ELECTRA's embeddings may be narrower than its layers
    return rows if project is None else project(rows)


def _their_embeddings(model, packing, input_ids, token_type_ids, position_ids, inputs_embeds) -> Tensor:
    """The module itself in the caller's layout, with the arguments that transformers would give it."""
    if position_ids is None and packing.shape[0] != packing.num_sequences:
        position_ids = model.default_positions(packing, input_ids)
    parts = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
    real = {name: None if x is None else packing.unpad(x.expand(packing.shape)) for name, x in parts.items()}
    check_token_ids(model, **real, unpadded=packing.indices is not None)
    return packing.unpad(model.embeddings(**parts, inputs_embeds=inputs_embeds))


def _fused_embeddings(model, packing, input_ids, token_type_ids, position_ids) -> Tensor:
    if position_ids is None:
        position_ids = model.default_positions(packing, input_ids)
    position_ids = packing.unpad(position_ids.expand(packing.shape))
    input_ids = packing.unpad(input_ids)
    token_type_ids = None if token_type_ids is None else packing.unpad(token_type_ids.expand(packing.shape))
    check_token_ids(model, input_ids, token_type_ids, position_ids, unpadded=packing.indices is not None)
    module = model.embeddings
    dropout_p, norm = active_dropout_p(module.dropout), module.LayerNorm
    padding_idx = module.word_embeddings.padding_idx
    embedded = embedding_layer_norm(
        input_ids,
        torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        position_ids,
        module.word_embeddings.weight,
        _without_padding_gradient(module.position_embeddings),
        module.token_type_embeddings.weight,
        norm.weight,
        norm.bias,
        norm.eps,
        padding_idx=-1 if padding_idx is None else padding_idx,
        dropout_p=dropout_p,
        seed=packing.seed_for(dropout_p),
        # Behind those of the layers, of which there may be more than are configured.
        stream=len(model.encoder.layer) * STREAMS_PER_LAYER,
    )
    if _asks_for_gradients(module.word_embeddings) and torch.is_grad_enabled():
        embedded.requires_grad_()
    return embedded


def _without_padding_gradient(table: nn.Embedding) -> Tensor:
    """The rows of a table whose padding row (RoBERTa's positions have one) gets no gradient."""
    if table.padding_idx is None or not (table.weight.requires_grad and torch.is_grad_enabled()):
        return table.weight
    weight, row = table.weight.view_as(table.weight), table.padding_idx
    # torch.arange, because a number that is copied to a GPU is waited for.
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.arange(row, row + 1, device=gradient.device), 0))
    return weight


_EXPECTED_TYPES = {**dict.fromkeys(TABLES, nn.Embedding), "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}


def embedding_notes(model: nn.Module) -> list[str]:
    """Why the embeddings of token ids run as transformers' module; empty where they run fused."""
    embeddings = model.embeddings
    if type(embeddings) is not model.embeddings_class:
        reasons = [f"they are {type(embeddings).__module__}.{type(embeddings).__qualname__}"]
    else:
        reasons = ["they have hooks, or another forward than their class"] if is_watched(embeddings) else []
        reasons += ["the forward of their class was replaced"] if class_was_changed(embeddings) else []
        for name, expected in _EXPECTED_TYPES.items():
            part = getattr(embeddings, name, None)
            if type(part) is not expected:
                reasons.append(f"{name} is {type(part).__module__}.{type(part).__qualname__}")
            elif class_was_changed(part):
                reasons.append(f"the forward of {name}'s class was replaced")
            elif is_watched(part) and not _asks_for_gradients(part):
                reasons.append(f"{name} has hooks, or another forward than its class")
        reasons = reasons or _parameter_reasons(embeddings)
    return [f"called as transformers' module: {'; '.join(reasons)}"] if reasons else []


def _asks_for_gradients(table: nn.Module) -> bool:
    """Whether the one hook is that of transformers' gradient checkpointing, which lets the output of a frozen table require grad.

    :func:`embed` does that itself: torch's dropout in the module would draw other masks than the op does without checkpointing.
    """
    hooks = [
        *table._forward_hooks.values(),
        *table._forward_pre_hooks.values(),
        *table._backward_hooks.values(),
        *table._backward_pre_hooks.values(),
    ]
    return len(hooks) == 1 and getattr(hooks[0], "__qualname__", "") == _GRADIENT_HOOK


_GRADIENT_HOOK = "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads"


def _parameter_reasons(embeddings: nn.Module) -> list[str]:
    """What their options and parameters ask for that reading the tables' rows would not do."""
    reasons = []
    for name in TABLES:
        table = getattr(embeddings, name)
        if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
            reasons.append(f"{name} has max_norm, scale_grad_by_freq or sparse set")
        if name == "token_type_embeddings" and table.padding_idx is not None:
            reasons.append(f"{name} has a padding_idx")
    norm = embeddings.LayerNorm
    parameters = [*(getattr(embeddings, name).weight for name in TABLES), norm.weight, norm.bias]
    if any(type(parameter) not in (nn.Parameter, Tensor) for parameter in parameters):
        reasons.append("not all parameters are there and plain")
        return reasons
    dtype = parameters[0].dtype
    if any(parameter.dtype != dtype for parameter in parameters):
        reasons.append("their parameters differ in dtype")
    if dtype != torch.float32 and under_autocast(norm.weight):
        reasons.append("under autocast torch decides which dtype LayerNorm gives for tables that are not float32")
    return reasons
