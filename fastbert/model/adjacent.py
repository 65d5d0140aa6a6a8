"""Parameters of queries, keys and values side by side in memory: one matrix for the GEMM, three for the state dict.

Each of the three has a storage of its own, which is a part of the buffer that they lie in: tools that write checkpoints
(accelerate, safetensors, huggingface_hub) take tensors of one storage for the same weight and write one of them alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..fork_safe import lock
from ..ops.registration import under_autocast

_flatten_lock = lock()
_buffers: dict[int, StorageWeakRef] = {}  # by the address where they begin


def are_adjacent(*groups: list[Tensor | None], kind: type = nn.Parameter) -> bool:
    """Whether the three tensors of each group lie one after the other in one buffer, moving them there where that is safe.

    kind: the class of what may be moved, nn.Parameter or, of buffers, Tensor: in a parameter's place somebody else has put that.

    The idea of nn.RNN.flatten_parameters: one GEMM needs one matrix, the state dict three. ``.to()`` and optimizers that swap
    storages undo it, so it is checked at each forward pass: a few pointer comparisons.
    """
    for group in groups:
        if any(p is None for p in group):
            return False
        if not follow_each_other(group):
            with _flatten_lock:
                if not follow_each_other(group) and not _flatten(group, kind):
                    return False
    return True


def follow_each_other(group: Sequence[Tensor]) -> bool:
    return _buffer_of(group) is not None


def _buffer_of(group: Sequence[Tensor]) -> torch.UntypedStorage | None:
    """The buffer that three tensors of one dtype fill, one after the other."""
    start, size = group[0].data_ptr(), group[0].numel() * group[0].element_size()
    reference = _buffers.get(start)
    if reference is None or group[1].data_ptr() != start + size or group[2].data_ptr() != start + 2 * size:
        return None
    if not group[0].dtype == group[1].dtype == group[2].dtype:
        return None
    buffer = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)  # None where it is gone, with all its parts
    return buffer if buffer is not None and buffer.nbytes() == 3 * size else None


def _flatten(group: list[Tensor], kind: type) -> bool:
    """Moves three parameters (or buffers) of one shape into one buffer; False where their memory belongs to someone else."""
    first = group[0]
    ours_to_move = len({p.data_ptr() for p in group}) == 3 and all(
        type(p) is kind
        and p.shape == first.shape
        and p.dtype == first.dtype
        and p.device == first.device
        and p.is_contiguous()
        and not p.is_inference()
        and p.device.type != "meta"
        and not (p.device.type == "cpu" and p.is_shared())  # of a GPU's tensors torch always says so
        and _owns_its_memory(p)
        for p in group
    )
    # Moves that are recorded would come with each replay, out of memory that has long been freed.
    is_recorded = first.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not ours_to_move or is_recorded:
        return False
    # Parameters whose memory was made in inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        buffer = cat_of_any([p.detach() for p in group]).untyped_storage()
        if first.device.type == "cuda":
            # Once a layer: other streams may write the memory that is freed here, and read the new one, from now on.
            torch.cuda.current_stream(first.device).synchronize()
        size = buffer.nbytes() // 3
        for index, parameter in enumerate(group):
            part = buffer[index * size : (index + 1) * size]  # a storage that keeps the buffer alive
            parameter.data = first.new_empty(0).set_(part, 0, first.shape)
    for address, reference in list(_buffers.items()):
        if reference.expired():
            _buffers.pop(address, None)
    _buffers[buffer.data_ptr()] = StorageWeakRef(buffer)
    return True


def _owns_its_memory(parameter: nn.Parameter) -> bool:
    """Whether nobody else would miss this memory: not a part of more, no other tensor on it (FSDP's, which it gathers into)."""
    storage = parameter.untyped_storage()
    whole = storage.nbytes() == parameter.numel() * parameter.element_size()
    return whole and torch._C._storage_Use_Count(storage._cdata) <= 2  # the parameter's and the one at hand


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Three tensors (n, ...) as one (3 * n, ...): what they lie in, or a copy where somebody has moved them apart. One that is
    joined already is itself."""
    if len(tensors) == 1:
        return tensors[0]
    buffer = _buffer_of(tensors)
    if buffer is None:
        return cat_of_any(tensors)
    first = tensors[0]
    with torch._C._DisableTorchDispatch():  # memory that is there already: nothing for who records what is computed
        return first.new_empty(0).set_(buffer, 0, (3 * first.shape[0], *first.shape[1:]))


def cat_of_any(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat``, which under autocast refuses half precision that is not autocast's."""
    changed = under_autocast(tensors[0])
    with torch.autocast(tensors[0].device.type, enabled=False) if changed else contextlib.nullcontext():
        return torch.cat(list(tensors))
