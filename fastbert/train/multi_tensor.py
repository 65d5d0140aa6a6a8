"""AdamW and LAMB in kernels of our own, which clip the gradients while they read them: see ``optimizer`` for what that is good for.

Not run on a GPU yet: the tests run the kernels on a model of a GPU's threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from fastbert.ops.cuda.extension import DEVICE_TYPE, extension, unavailable_reason
from fastbert.ops.cuda.multi_tensor import TensorTable, is_recorded, optimizer_group, table_words

from .lamb import LAMB


def not_supported_reason(device: torch.device) -> str | None:
    """Why parameters on ``device`` cannot be trained by these kernels, or None where they can."""
    if reason := unavailable_reason():
        return reason
    return None if device.type == DEVICE_TYPE else f"its kernels run on {DEVICE_TYPE}, the parameters are on {device}"


class MultiTensorOptimizer(Optimizer):
    """What both have in common. Parameters are float32, contiguous and on one device.

    As torch's fused AdamW it leaves weights and state as they are, without waiting for the device, in a step for which its
    attribute ``found_inf`` (float32, 0-d, on the device) is not 0. A learning rate that is a tensor on the device is read there.
    """

    found_inf: Tensor | None = None
    _clip: Tensor | None = None
    _table: TensorTable | None = None

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` of all gradients for the next step alone: in memory they stay as they are.

        Returns their norm (0-d, float32, not waited for).
        """
        gradients = self._gradients()
        norm, self._clip = self._table_of(gradients).gradient_norm(max_norm)
        return norm

    @torch.no_grad()
    def step(self) -> None:
        gradients = self._gradients()
        table = self._table_of(gradients)
        groups = [self._group(group) for group in self.param_groups]
        self._launch(table, [group for group, _ in groups], self._clip, self.found_inf)
        self._clip = None
        if table.recorded:
            self._table = None  # other steps have no business in a graph's memory

    def _launch(self, table: TensorTable, groups: list[Any], clip: Tensor | None, found_inf: Tensor | None) -> None:
        raise NotImplementedError

    def _trained(self) -> Iterator[tuple[int, Tensor]]:
        """The parameters that have a gradient, each with the number of its group."""
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield number, parameter

    def _gradients(self) -> list[Tensor]:
        """Autograd makes them contiguous, as the parameters are; a copy lives as long as the list."""
        return [parameter.grad.contiguous() for _, parameter in self._trained()]

    def _table_of(self, gradients: list[Tensor]) -> TensorTable:
        """That of the last step, unless a tensor has come, gone or moved."""
        tensors = [(parameter, *self._state_tensors(parameter), number) for number, parameter in self._trained()]
        words, chunks = table_words(tensors)
        table, device = self._table, _device(self)
        if table is None or table.words != words or table.recorded != is_recorded(device):
            for parameter, average, square, step, _ in tensors:
                _check(device, parameter, average, square, step)
            self._table = table = TensorTable(words, chunks, device)
        table.point_to(gradients)
        return table

    def _state_tensors(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """exp_avg, exp_avg_sq and step, on the parameter's device, wherever they were loaded from."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] = state["step"].to(parameter.device, torch.float32)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]

    def _group(self, group: dict[str, Any]) -> tuple[Any, float | Tensor]:
        """For the kernels, and what must live until they are queued."""
        if group.get("amsgrad") or group.get("maximize"):
            raise ValueError("the optimizers of CUDA C++ have neither amsgrad nor maximize")
        rate = group["lr"]
        if isinstance(rate, Tensor):
            rate = rate.float() if rate.device == _device(self) else float(rate)
        trust_ratio = group.get("trust_ratio", False)
        return optimizer_group(rate, group["betas"], group["eps"], group["weight_decay"], trust_ratio), rate


class MultiTensorAdamW(MultiTensorOptimizer, AdamW):
    """torch's AdamW, whose state and options it has."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        # fused: so that torch's AdamW, where it goes on from here, keeps the steps on the device. Unlike torch's kernel ours do
        # not divide by a GradScaler's scale, which therefore does it before.
        self._step_supports_amp_scaling = False
        _check_groups(self)

    def _launch(self, table: TensorTable, groups: list[Any], clip: Tensor | None, found_inf: Tensor | None) -> None:
        table.adamw(groups, clip, found_inf)


class MultiTensorLAMB(MultiTensorOptimizer, LAMB):
    """:class:`LAMB`, whose state and options it has."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        _check_groups(self)

    def _launch(self, table: TensorTable, groups: list[Any], clip: Tensor | None, found_inf: Tensor | None) -> None:
        table.lamb(groups, clip, found_inf)


def _device(optimizer: Optimizer) -> torch.device:
    return next(parameter.device for group in optimizer.param_groups for parameter in group["params"])


def _check_groups(optimizer: Optimizer) -> None:
    """Raises ``RuntimeError`` where there are no kernels for the parameters, ``ValueError`` for those that they do not take."""
    device = _device(optimizer)
    if reason := not_supported_reason(device):
        raise RuntimeError(f"there is no optimizer of CUDA C++: {reason}")
    if len(optimizer.param_groups) > extension.MAX_OPTIMIZER_GROUPS:
        raise ValueError(f"at most {extension.MAX_OPTIMIZER_GROUPS} groups of parameters, not {len(optimizer.param_groups)}")
    for group in optimizer.param_groups:
        _check(device, *group["params"])


def _check(device: torch.device, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device != device or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise ValueError(
                f"tensors must be float32, contiguous and on {device}: one is {tensor.dtype}, {layout}, on {tensor.device}"
            )
