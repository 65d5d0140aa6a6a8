"""Parameters of queries, keys and values side by side in memory: one matrix for the GEMM, three for the state dict."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_flatten_lock = threading.Lock()


def are_adjacent(*groups: list[Tensor | None], kind: type = nn.Parameter) -> bool:
    """Whether the three tensors of each group lie one after the other in one storage, moving them there where that is safe.

    kind: the class of what may be moved, nn.Parameter or, of buffers, Tensor: in a parameter's place somebody else has put that.

    The idea of nn.RNN.flatten_parameters: one GEMM needs one matrix, the state dict three. ``.to()`` and optimizers that swap
    storages undo it, so it is checked at each forward pass: six pointer comparisons.
    """
    for group in groups:
        if any(p is None for p in group):
            return False
        if not follow_each_other(group):
            with _flatten_lock:
                if not follow_each_other(group) and not _flatten(group, kind):
                    return False
    return True


def follow_each_other(group: list[Tensor]) -> bool:
    size = group[0].numel() * group[0].element_size()
    start = group[0].data_ptr()
    return (
        group[1].data_ptr() == start + size
        and group[2].data_ptr() == start + 2 * size
        and group[0].untyped_storage().data_ptr() == group[2].untyped_storage().data_ptr()
        and group[0].dtype == group[1].dtype == group[2].dtype
    )


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
    if not ours_to_move:
        return False
    # Parameters whose memory was made in inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.cat([p.detach() for p in group])
        for parameter, part in zip(group, buffer.chunk(3), strict=True):
            parameter.data = part
    return True


def _owns_its_memory(parameter: nn.Parameter) -> bool:
    """Whether nobody else would miss this memory: not a part of more, no other tensor on it (FSDP's, which it gathers into)."""
    storage = parameter.untyped_storage()
    whole = storage.nbytes() == parameter.numel() * parameter.element_size()
    return whole and torch._C._storage_Use_Count(storage._cdata) <= 2  # the parameter's and the one at hand


def joined(first: Tensor) -> Tensor:
    """The three tensors that lie one after the other from this one on, as one."""
    return first.as_strided((3 * first.shape[0], *first.shape[1:]), first.stride())


def rejoined(weights: Sequence[Tensor]) -> Tensor:
    """The same of saved ones: one tensor that was converted, or three, which somebody may have moved apart since."""
    if len(weights) == 1:
        return weights[0]
    return joined(weights[0]) if follow_each_other(weights) else torch.cat(list(weights))
