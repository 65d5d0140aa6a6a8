"""``attn_implementation="fastbert"``: the fused attention under any transformers model, without its padding.

transformers asks a registered implementation for two functions: one that makes the mask of a forward pass and one that attends in
each layer. Ours run the op ``attention`` on the real tokens where attention is bidirectional self-attention over padded or packed
sequences, and transformers' sdpa for the rest; :func:`attention_fallback_reasons` says which, and the log says it once.

Padding alone is a boolean mask (batch, 1, 1, length), True on real tokens: it hides the same keys from all queries. sdpa takes that
form, too, so whatever else reads the mask, or sees a copy of it, stays right.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from ..ops import attention, backends
from ..ops.registration import transform_reasons
from .packing import Packing, begins_with_padding

NAME = "fastbert"
logger = logging.getLogger(__name__)


def register_attention() -> None:
    """Makes ``attn_implementation="fastbert"`` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_attention_mask)


def is_known_attention(name: str | None) -> bool:
    """Whether transformers' registry has no function of somebody else under this name: then it is attention as all know it."""
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    while isinstance(function, functools.partial):
        function = function.func
    return function is None or (getattr(function, "__module__", None) or "").startswith(("transformers.", "fastbert."))


# --- the mask, once per forward pass ---------------------------------------------------------------------------------------


def make_attention_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **arguments,
) -> Tensor | None:
    """What transformers' ``create_..._mask`` functions hand to the layers, with their arguments.

    Padding alone gives (batch, 1, 1, length) bool, no padding None; everything else (causal, sliding window, a mask function of
    the caller's) the mask that sdpa takes. Models that transformers does not let use sdpa (MPNet's attention is its own code) get
    the mask of ``"eager"``, which they add to their scores.
    """
    padding_only = (
        mask_function is bidirectional_mask_function
        and allow_is_bidirectional_skip
        and q_length == kv_length
        and q_offset == 0
        and kv_offset == 0
    )
    if padding_only and attention_mask is None:
        return None
    if config is not None and not _supports_sdpa(type(config)):
        _log_once(f"attn_implementation={NAME!r} cannot help the model of {type(config).__name__}: it does not support sdpa")
        make = eager_mask
    elif padding_only and attention_mask.shape == (batch_size, kv_length):
        return _padding_mask(attention_mask)
    else:
        make = sdpa_mask
    return make(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        config=config,
        **arguments,
    )


def _padding_mask(real: Tensor) -> Tensor | None:
    """(batch, length) bool, True on real tokens -> (batch, 1, 1, length), None where nothing is padding."""
    mask = real[:, None, None, :]
    if is_tracing(real):
        return mask
    shape = tuple(real.shape)
    packing = Packing.from_mask(real, shape, real.device)
    if packing.indices is None:
        return None
    if begins_with_padding(real):  # and may be pooled: the mask of sdpa, where padding looks at the tokens
        return mask.expand(-1, -1, shape[1], -1)
    _known[mask] = ((_version(mask), shape), packing)
    return mask


def _decided_once(function: Callable) -> Callable:
    """Cached by its arguments, and a constant for torch.compile, which would look inside a cache."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def decided(*args):
        return cached(*args)

    return torch.compiler.assume_constant_result(decided)


@_decided_once
def _supports_sdpa(config_class: type) -> bool:
    """Whether a model of this configuration does; transformers refuses ``"sdpa"`` where none does, but no registered name."""
    models, parents = [], [PreTrainedModel]
    while parents:
        children = parents.pop().__subclasses__()
        parents += children
        models += [child for child in children if child.config_class is config_class]
    return not models or any(model._supports_sdpa and model._can_set_attn_implementation() for model in models)


# --- attention, in each layer ----------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as transformers' layers call it: query, key, value (batch, num_heads, length, head_dim).

    Returns (batch, length, num_heads, head_dim), 0 on padding, and None in the place of the attention weights. Packed rows
    (``cu_seq_lens_q``, or ``position_ids`` that start again within the one row of a batch without a mask) give the result of
    separate sequences, whichever way they run. The dropout mask is drawn from torch's generator at each call.

    Raises ValueError where ``cu_seq_lens_q`` comes with more than one row or does not fit it, and for scores that are capped or
    have a sink (``softcap``, ``s_aux``), which neither the op nor sdpa computes.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} needs {name}, which {NAME!r} does not compute: use attn_implementation='eager'"
            )
    reasons = attention_fallback_reasons(module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)
    row = _packed_row(module, query, key, attention_mask, _is_causal(module, is_causal), kwargs)
    if reasons:
        for reason in reasons:
            _log_once(f"attn_implementation={NAME!r} runs {type(module).__name__} through sdpa: {reason}")
        if row is not None:
            attention_mask = _without_neighbours(row, query, key, attention_mask, _is_causal(module, is_causal), kwargs)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    packing = row or _packing(attention_mask, (query.shape[0], query.shape[2]), query.device)
    qkv = torch.stack([packing.unpad(x.transpose(1, 2)) for x in (query, key, value)], dim=1)
    out = attention(
        qkv,
        packing.cu_seqlens,
        packing.max_seqlen,
        softmax_scale=scaling,
        dropout_p=dropout,
        seed=torch.randint(2**62, (1,), device=query.device) if dropout > 0.0 else None,
    )
    return packing.pad(out), None


def attention_fallback_reasons(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    **kwargs,
) -> list[str]:
    """Why a call of :func:`attention_forward` with these arguments runs transformers' sdpa; empty where it runs the fused op.

    Reads no tensor's data.
    """
    reasons = [f"{name} is given" for name in ("position_bias", "cache") if kwargs.get(name) is not None]
    if _is_causal(module, is_causal):
        reasons.append("attention is causal")
    if kwargs.get("output_attentions"):
        reasons.append("output_attentions asks for attention weights, which fused attention never stores")
    if query.shape[2] != key.shape[2]:
        reasons.append("queries and keys differ in number (cross-attention, or keys from a cache)")
    elif not query.shape == key.shape == value.shape:
        reasons.append("query, key and value differ in shape (key-value heads shared by several query heads, or other head sizes)")
    if not query.dtype == key.dtype == value.dtype:
        reasons.append("query, key and value differ in dtype")
    if torch.jit.is_tracing():
        reasons.append("torch.jit.trace would freeze the sequence lengths of its example")
    reasons += transform_reasons()
    reasons += _kernel_reasons(query.device.type, query.dtype, query.shape[-1])
    packed = kwargs.get("cu_seq_lens_q") is not None
    if attention_mask is not None and not _is_causal(module, is_causal):
        if attention_mask.dtype != torch.bool or attention_mask.shape != (query.shape[0], 1, 1, key.shape[2]):
            reasons.append("the mask is not padding behind tokens alone, which is bool (batch, 1, 1, length)")
        elif packed:
            reasons.append("there is a mask besides cu_seq_lens_q")
        elif is_tracing(attention_mask):
            reasons.append(
                "compiled or captured code cannot know how many tokens a mask leaves; pass none, or packed inputs (cu_seq_lens_q)"
            )
    if not reasons and (packed or attention_mask is not None) and not _attends_to_itself(module):
        reasons.append("its keys may be of another sequence than its queries, and then a mask of keys says nothing about queries")
    return reasons


@_decided_once
def _kernel_reasons(device_type: str, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Where only plain torch could run the op, sequence by sequence, sdpa is the faster one."""
    if backends.select("attention", "auto", device_type, dtype, head_dim) != "reference":
        return ()
    order = [name for name in backends.AUTO_ORDER.get(device_type, ()) if name != "reference"]
    reasons = [backends.not_supported_reasons(name, "attention", device_type, dtype, head_dim) for name in order]
    named = [f"{name}: {', '.join(why)}" for name, why in zip(order, reasons, strict=True)]
    return (f"there is no kernel for these tensors ({'; '.join(named) or f'none runs on {device_type}'})",)


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """sdpa's rule: the argument, else the module's attribute, else yes."""
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def _attends_to_itself(module: nn.Module) -> bool:
    """Whether queries and keys are known to be of the same tokens.

    A mask of keys says nothing about queries in cross-attention, and one class may do both. ``is_decoder`` False means the
    encoder's; otherwise the module's forward must have no argument through which another sequence could come.
    """
    return getattr(module, "is_decoder", None) is False or _takes_one_sequence(type(module))


@_decided_once
def _takes_one_sequence(module_class: type) -> bool:
    return set(inspect.signature(module_class.forward).parameters) <= _ARGUMENTS_OF_SELF_ATTENTION


_ARGUMENTS_OF_SELF_ATTENTION = {
    "self", "hidden_states", "attention_mask", "position_embeddings", "position_ids", "past_key_values", "cache",
    "output_attentions", "cu_seqlens", "max_seqlen", "args", "kwargs",
}  # fmt: skip


# --- what is padding, and where packed sequences end -----------------------------------------------------------------------


def _packed_row(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> Packing | None:
    """The sequences of the queries where they are a packed row, else None."""
    batch, length = shape = (query.shape[0], query.shape[2])
    cu_seqlens, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(
                f"packed inputs (cu_seq_lens_q) hold all sequences in one row, but the batch size is {batch}; expected 1"
            )
        if longest is None and torch.compiler.is_compiling():
            longest = length  # the longest or more: the op takes a bound
        if longest is None:
            longest = _remembered(cu_seqlens, shape, lambda: int(cu_seqlens.diff().max()))
        return Packing(cu_seqlens.to(torch.int32), longest, shape)
    position_ids = kwargs.get("position_ids")
    # Causal masks of transformers know packed rows by their positions already.
    if position_ids is None or attention_mask is not None or causal or torch.jit.is_tracing():
        return None
    if key.shape[2] != length or not _attends_to_itself(module):
        return None
    if torch.compiler.is_compiling():
        return Packing.from_positions(position_ids, shape)
    return _remembered(position_ids, shape, lambda: Packing.from_positions(position_ids, shape))


def _packing(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Packing:
    if mask is None:
        return Packing.from_mask(None, shape, device)
    return _remembered(mask, shape, lambda: Packing.from_mask(mask[:, 0, 0], shape, device))


# What was read from a tensor's values, which waits for a GPU: once for the layers of a forward pass. Kept beside the tensors, as
# long as they live, with the version that they had and the shape of the queries; an attribute of theirs would be pickled with
# them. Nothing kept may refer to its tensor, which would then live for ever.
_known = WeakTensorKeyDictionary()


def _remembered(tensor: Tensor, shape: tuple[int, int], read: Callable[[], Any]) -> Any:
    version, known = _version(tensor), _known.get(tensor)
    if known is not None and known[0] == (version, shape):
        return known[1]
    value = read()
    if version is not None:
        _known[tensor] = ((version, shape), value)
    return value


def _version(tensor: Tensor) -> int | None:
    """Changes with every change in place; None where torch counts none. Then only masks that live for one pass are remembered."""
    return None if tensor.is_inference() else tensor._version


def _without_neighbours(
    row: Packing, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> Tensor:
    """(1, 1, queries, keys): ``mask`` (or, without one, the causal rule) and no attention between sequences of a packed row."""
    ends = kwargs.get("cu_seq_lens_k")
    ends = row.cu_seqlens if ends is None else ends
    expected = (query.shape[2], key.shape[2])
    if not torch.compiler.is_compiling() and (int(row.cu_seqlens[-1]), int(ends[-1])) != expected:
        raise ValueError(
            f"cu_seq_lens_q and cu_seq_lens_k end at {int(row.cu_seqlens[-1])} and {int(ends[-1])}, expected the number of queries "
            f"and of keys, {expected[0]} and {expected[1]}"
        )
    queries, keys = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
    same = _sequence_of(queries, row.cu_seqlens)[:, None] == _sequence_of(keys, ends)[None, :]
    if mask is None:
        return (same & (queries[:, None] >= keys[None, :]) if causal else same)[None, None]
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def _sequence_of(positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.searchsorted(cu_seqlens[1:].to(positions.dtype).contiguous(), positions, right=True)


@torch.compiler.assume_constant_result
def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning(message)


_logged: set[str] = set()
