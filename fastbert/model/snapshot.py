"""Modules as they are now, to ask soon and often whether anybody has changed something about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops import native

# Dicts that every module has: what is in them, and those to which nothing may be added.
_HELD = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What torch keeps of a tensor and of its storage: how far it reads where it is asked for address and version.
_TENSOR_BYTES, _STORAGE_BYTES = 208, 96


class Snapshot:
    """What :meth:`unchanged` compares: of the ``modules``, submodules and their classes, parameters, buffers, hooks, ``forward``
    methods, put on a module or on its class, and the attributes that are named, by identity; of the ``tensors``, which are on the
    CPU and parameters or buffers of the modules, also what memory they have, their version counters (those made in inference mode
    have none), and a few words of each, because an update through ``.data`` leaves the counters alone; of matrices also how large
    they are, and whether contiguous. ``may_grow``: whether submodules, parameters and buffers may be added.

    The native extension compares all of it, and keeps nothing alive: a hook or an attribute that leads to the model would otherwise
    keep that alive through whoever holds the snapshot. The extension must be available.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        attributes: Mapping[nn.Module, Sequence[str]],
        tensors: Sequence[Tensor] = (),
        *,
        may_grow: bool = True,
    ) -> None:
        modules = list(modules)
        names = [["forward", *attributes.get(module, ())] for module in modules]
        kept = [tensor.detach() for tensor in tensors]  # while it is read: other threads may give a tensor other memory
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in kept]
        arrays = [(tensor.data_ptr(), _extent(tensor)) for tensor in kept]
        read = [(tensor._cdata, _TENSOR_BYTES) for tensor in tensors]
        read += [(tensor.untyped_storage()._cdata, _STORAGE_BYTES) for tensor in tensors]
        dicts, counted = (list(_HELD), list(_HOOKS)) if may_grow else ([], [*_HELD, *_HOOKS])
        self.handle = native.EXTENSION.Snapshot(
            modules, names, dicts, counted, list(tensors), storages, not any(map(Tensor.is_inference, tensors)), arrays, read,
        )  # fmt: skip

    def unchanged(self) -> bool:
        return all_unchanged([self.handle])


class AttributesSnapshot:
    """The same of any object's attributes: all that it has itself, and those of ``names`` that it may get."""

    def __init__(self, of: object, names: Iterable[str]) -> None:
        self.handle = native.EXTENSION.Snapshot([of], [[*vars(of), *names]], [], [], [], [], False, [], [])


def all_unchanged(handles: list[Any]) -> bool:
    """Of snapshots, by their handles."""
    return native.EXTENSION.all_unchanged(handles)


def attributes_of(dropout: nn.Dropout) -> tuple[str, ...]:
    """Those that say whether it drops: one of probability 0 does not, in either mode."""
    return ("p", "training") if dropout.p > 0 else ("p",)


def _extent(tensor: Tensor) -> int:
    """The bytes from a tensor's first element to its last: rows of it may be apart, or all one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
