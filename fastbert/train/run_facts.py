"""What a run's figures depend on beside its settings: versions and the device."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import fastbert

REPORTED_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES}
    return {"fastbert": fastbert.__version__, "python": platform.python_version(), **packages}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind of device and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
