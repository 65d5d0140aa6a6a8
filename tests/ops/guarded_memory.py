"""Tensors that no kernel can read or write beyond: the pages before and behind their memory are protected.

torch's own allocator rounds up what it gives, and gives what was used before: a read of a few elements too many goes unseen there.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

PAGE, _NO_ACCESS = mmap.PAGESIZE, 0


class GuardedMemory(TorchDispatchMode):
    """Within it every new tensor on the CPU lies at one edge of its pages; what nobody has written yet is bytes of ``fill``.

    at_end: at the edge behind it, otherwise at the one before it. An access beyond an edge ends the process.
    """

    def __init__(self, *, at_end: bool, fill: int) -> None:
        super().__init__()
        self._at_end, self._fill = at_end, fill

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        known = set()
        tree_map_only(Tensor, lambda x: known.add(x.untyped_storage().data_ptr()), (args, kwargs))
        result = operator(*args, **(kwargs or {}))
        is_written = "empty" not in operator.name()

        def guarded(x: Tensor) -> Tensor:
            return x if x.untyped_storage().data_ptr() in known else self.moved(x, is_written)

        return tree_map_only(Tensor, guarded, result)

    def given(self, x: Tensor | None) -> Tensor | None:
        """An argument that may be left out, :meth:`moved`."""
        return None if x is None else self.moved(x)

    def moved(self, x: Tensor, is_written: bool = True) -> Tensor:
        """``x`` in memory of its own, with its strides."""
        if x.numel() == 0 or x.device.type != "cpu":
            return x
        elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        copy = torch.frombuffer(self._memory(elements * x.element_size()), dtype=x.dtype).as_strided(x.shape, x.stride())
        return copy.copy_(x) if is_written else copy

    def _memory(self, num_bytes: int) -> memoryview:
        inner = -(-num_bytes // PAGE) * PAGE
        pages = mmap.mmap(-1, inner + 2 * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        start = PAGE + (inner - num_bytes if self._at_end else 0)
        pages[PAGE : PAGE + inner] = bytes([self._fill]) * inner
        for edge in (address, address + PAGE + inner):
            if _libc.mprotect(ctypes.c_void_p(edge), PAGE, _NO_ACCESS) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        return memoryview(pages)[start : start + num_bytes]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
