"""The two ends of an encoder in calls without gradients and dropout on a CPU: its embeddings and its pooler, a native call each.

Both work as :mod:`fastbert.model.packed_layer` does, for as long as nobody has changed the module: :class:`Snapshot` tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.encoder_layer import LinearWeights
from ..ops.native.inference import EmbeddingTables, PackedDense, are_readable_ids
from ..ops.registration import dispatch_mode_is_on, under_autocast
from .layer import active_dropout_p
from .packing import Packing
from .plain import has_attributes_for_parameters, is_plain, is_plain_linear
from .snapshot import Snapshot, attributes_of

TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
# What nn.Embedding does beside reading rows: see ``embedding_notes``, which has to find nothing first.
_OPTIONS = ("max_norm", "scale_grad_by_freq", "sparse", "padding_idx")


@dataclass(frozen=True, eq=False)
class _Entry:
    """A module as it was when its native form was made."""

    module_type: type
    snapshot: Snapshot
    instruction_set: str
    native_form: Any

    def is_current(self, module: nn.Module) -> bool:
        return self.module_type is type(module) and self.instruction_set == native.instruction_set() and self.snapshot.unchanged()


_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def entry_of(module: nn.Module) -> _Entry | None:
    """The native form that a module was given, whether it is current or not, and its snapshot."""
    return _entries.get(module)


def _current(module: nn.Module) -> Any:
    """The native form of a module, where it has one that is current. One that is not is freed, with the old weights in it."""
    entry = _entries.get(module)
    if entry is not None and not entry.is_current(module):
        entry = None
        forget(module)
    return None if entry is None else entry.native_form


def forget(module: nn.Module) -> None:
    """Frees the native form of a module: training never holds weights twice, nor those that were replaced before it."""
    _entries.pop(module, None)


def takes(x: Tensor) -> bool:
    """Whether calls with the tensor x may end natively: they have no gradients."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # first: compiled code would guard on the rest
        return False
    return native.AVAILABLE and x.device.type == "cpu" and type(x) is Tensor and not dispatch_mode_is_on()


def tables_of(model: nn.Module) -> EmbeddingTables | None:
    """What embeds the tokens of calls that have no gradients, where it was made before and nobody has changed anything since.

    None also under autocast where the tables are not float32: torch decides about the LayerNorm's dtype there.
    """
    tables = _current(model.embeddings)
    if tables is not None and tables.dtype != torch.float32 and under_autocast(model.embeddings.LayerNorm.weight):
        return None
    return tables


def keep_tables(model: nn.Module) -> EmbeddingTables | None:
    """Makes what :func:`tables_of` returns, of embeddings without ``embedding_notes``; None where they drop or run otherwise."""
    embeddings, norm = model.embeddings, model.embeddings.LayerNorm
    tables = [getattr(embeddings, name) for name in TABLES]
    if any(map(has_attributes_for_parameters, (*tables, norm))):
        return None
    parameters = [*(table.weight for table in tables), norm.weight, norm.bias]
    memory = [parameter.detach() for parameter in parameters]
    dropout = embeddings.dropout
    if active_dropout_p(dropout) > 0 or not all(map(_is_readable, memory)) or len({tensor.dtype for tensor in memory}) > 1:
        return None
    *shapes, norm_shape, bias_shape = (tensor.shape for tensor in memory)
    if not (norm_shape == bias_shape == shapes[0][1:] and all(shape[1:] == norm_shape for shape in shapes)):
        return None
    attributes = {**dict.fromkeys(tables, _OPTIONS), norm: ("eps",), dropout: attributes_of(dropout)}
    snapshot = Snapshot(embeddings.modules(), attributes, parameters)  # first: a change from now on is seen, whoever makes it
    if not _is_memory_of(parameters, memory):
        return None
    form = EmbeddingTables(*memory, norm.eps)
    _entries[embeddings] = _Entry(type(embeddings), snapshot, native.instruction_set(), form)
    return form


def embed_at_once(
    tables: EmbeddingTables,
    model: nn.Module,
    packing: Packing,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor | None:
    """``embed`` in one call, with its arguments; None where they are not as that reads them, or an id is in no table."""
    if not are_readable_ids(input_ids, token_type_ids, position_ids):
        return None
    columns = model.first_position == 0 and packing.shape[0] == packing.num_sequences
    if position_ids is None and not columns:
        position_ids = model.default_positions(packing, input_ids)
    if any(x is not None and x.shape != input_ids.shape for x in (token_type_ids, position_ids)):
        return None
    return tables.embed(input_ids, token_type_ids, position_ids, packing.indices)


def pool(pooler: nn.Module, first: Tensor) -> Tensor | None:
    """What transformers' pooler makes of the first rows (num_sequences, hidden), in calls without gradients; None elsewhere."""
    if not takes(first):
        if not torch.compiler.is_compiling():
            forget(pooler)
        return None
    if under_autocast(first) or first.stride(1) != 1:
        return None
    dense = _current(pooler)
    if dense is None:
        dense = _keep_dense(pooler)
    if dense is None or first.dtype != dense.dtype or first.shape[1] != dense.in_features:
        return None
    return dense(first).tanh_()


def _keep_dense(pooler: nn.Module) -> PackedDense | None:
    linear, activation = pooler.dense, pooler.activation
    if not (is_plain_linear(linear) and type(activation) is nn.Tanh and is_plain(activation) and is_plain(pooler)):
        return None
    if has_attributes_for_parameters(linear):
        return None
    parameters = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    memory = [parameter.detach() for parameter in parameters]
    weight, bias = memory if len(memory) == 2 else (*memory, None)
    fits = weight.dim() == 2 and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype))
    whole_groups = weight.shape[-1] * weight.element_size() % 4 == 0
    if not (all(map(_is_readable, memory)) and fits and whole_groups):
        return None
    snapshot = Snapshot(pooler.modules(), {}, parameters)
    if not _is_memory_of(parameters, memory):
        return None
    with torch.no_grad():
        form = PackedDense(LinearWeights(weight, bias))
    _entries[pooler] = _Entry(type(pooler), snapshot, native.instruction_set(), form)
    return form


def _is_readable(tensor: Tensor) -> bool:
    """Whether the native code knows the dtype of a tensor and can read its memory as it lies."""
    return tensor.dtype in native.DTYPES and tensor.device.type == "cpu" and tensor.is_contiguous()


def _is_memory_of(parameters: list[Tensor], memory: list[Tensor]) -> bool:
    """Whether no other thread has cast or moved the parameters since their memory was at hand."""
    return all(parameter.data_ptr() == tensor.data_ptr() for parameter, tensor in zip(parameters, memory, strict=True))
