"""The steps of AdamW and LAMB by CUDA C++ (csrc/cuda/multi_tensor.cu), on a table of all tensors in the device's memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .extension import current_stream, device_guard, extension, pointer


def is_recorded(device: torch.device) -> bool:
    """Whether a CUDA graph records what is given to ``device`` now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def optimizer_group(rate: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, trust_ratio: bool) -> Any:
    """What a group of parameters has in common. ``rate``: a number, or a float32 on the device, read when the kernels run."""
    rates = (rate.data_ptr(), 0.0) if isinstance(rate, Tensor) else (0, rate)
    return extension.OptimizerGroup(*rates, *betas, eps, weight_decay, trust_ratio)


def table_words(tensors: Iterable[tuple[Tensor, Tensor, Tensor, Tensor, int]]) -> tuple[list[int], int]:
    """What says where all tensors are, for ``TensorTable``, and how many chunks they have. ``tensors``: parameter, exp_avg,
    exp_avg_sq and step (float32, contiguous, on one device), and the number of their group.
    """
    words: list[int] = []
    chunks = 0
    for parameter, average, square, step, group in tensors:
        numel = parameter.numel()
        words += (parameter.data_ptr(), average.data_ptr(), square.data_ptr(), step.data_ptr(), numel, chunks, group)
        chunks += -(-numel // extension.OPTIMIZER_CHUNK)
    return words, chunks


class TensorTable:
    """Good for as long as the tensors of ``words`` stay where they are; the gradients may move from step to step.

    Kernels write it, on the current stream, with the addresses in their parameters: nobody waits, and a CUDA graph that records
    the making of a table makes it in every run, in memory of its own. ``recorded``: whether one does.
    """

    def __init__(self, words: list[int], chunks: int, device: torch.device) -> None:
        self.words = words
        self.recorded = is_recorded(device)
        self._num_tensors, self._num_chunks = len(words) // 7, chunks
        self._tensors = torch.empty(len(words), dtype=torch.int64, device=device)
        self._gradients = torch.empty(self._num_tensors, dtype=torch.int64, device=device)
        self._chunk_tensors = torch.empty(chunks, dtype=torch.int32, device=device)
        self._coefficients = torch.empty(self._num_tensors, extension.OPTIMIZER_COEFFICIENTS, device=device)
        self._partials = torch.empty(2, chunks, dtype=torch.float64, device=device)
        self._gradient_words: list[int] = []
        with device_guard(self._tensors):
            stream = current_stream(self._tensors)
            extension.write_words(self._tensors.data_ptr(), words, stream)
            extension.assign_chunks(self._tensors.data_ptr(), self._num_tensors, self._chunk_tensors.data_ptr(), stream)

    def point_to(self, gradients: Sequence[Tensor]) -> None:
        """``gradients``: one for each parameter, float32 and contiguous; they must live until the kernels are queued."""
        words = [gradient.data_ptr() for gradient in gradients]
        if words != self._gradient_words:
            with device_guard(self._gradients):
                extension.write_words(self._gradients.data_ptr(), words, current_stream(self._gradients))
            self._gradient_words = words

    def gradient_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Of all gradients together, and the factor that makes at most ``max_norm`` of it; both 0-d, float32."""
        norm, clip = torch.empty(2, dtype=torch.float32, device=self._tensors.device)
        with device_guard(norm):
            extension.gradient_norm(self._params(None, None), max_norm, norm.data_ptr(), clip.data_ptr(), current_stream(norm))
        return norm, clip

    def adamw(self, groups: list[Any], clip: Tensor | None, found_inf: Tensor | None) -> None:
        """A step on the gradients times ``clip``, none where ``found_inf`` is not 0 (both 0-d, float32). ``groups``: those of
        :func:`optimizer_group`, in the order of their numbers in the table.
        """
        with device_guard(self._tensors):
            extension.adamw(self._params(clip, found_inf), groups, current_stream(self._tensors))

    def lamb(self, groups: list[Any], clip: Tensor | None, found_inf: Tensor | None) -> None:
        """As :meth:`adamw`."""
        with device_guard(self._tensors):
            extension.lamb(self._params(clip, found_inf), groups, current_stream(self._tensors))

    def _params(self, clip: Tensor | None, found_inf: Tensor | None) -> Any:
        return extension.OptimizerParams(
            self._tensors.data_ptr(), self._gradients.data_ptr(), self._chunk_tensors.data_ptr(), self._coefficients.data_ptr(),
            self._partials.data_ptr(), pointer(clip), pointer(found_inf), self._num_tensors, self._num_chunks,
        )  # fmt: skip
