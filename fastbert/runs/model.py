"""What a run asks of a device and of a checkpoint before its first step."""

from __future__ import annotations

from typing import Any

import torch

from .errors import SettingsError


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU where torch can use one. Raises :class:`SettingsError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise SettingsError("--device meta cannot be used: its tensors hold no numbers; give cpu or cuda")
    return device


def check_sizes(name: str, loading: dict[str, Any], part: str = "") -> None:
    """Raises :class:`SettingsError` for a weight of a checkpoint, its name beginning with ``part``, of another size than
    config.json says. ``loading``: transformers' ``output_loading_info``, under ``ignore_mismatched_sizes``."""
    other = sorted(entry for entry in loading["mismatched_keys"] if entry[0].startswith(part))
    if other:
        key, has, expected = other[0]
        raise SettingsError(
            f"--model {name}: {key} is {tuple(has)} in the checkpoint and {tuple(expected)} by its config.json "
            f"({len(other)} weights are like that): the two are not of one model"
        )
