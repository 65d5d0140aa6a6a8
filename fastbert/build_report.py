"""The native modules of this installation, and what happened when they were built: read by ``fastbert doctor``, written by
setup.py."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPORT_PATH = Path(__file__).with_name("_build_report.json")


@dataclass(frozen=True)
class ModuleBuild:
    """The build of one native module.

    name: ``_cpu`` or ``_cuda``; built: whether there is one; reason: why not, or None; compiler: its version line where it was
    asked; output: the last lines that a failing command printed; seconds: how long the build took. Of ``_cuda``: requested_archs,
    what FASTBERT_CUDA_ARCHS was, None where nvcc decided; kernels, what ptxas says of each for each architecture (``source``,
    ``kernel``, ``symbol``, ``architecture``, ``registers`` per thread and the bytes of its ``stack_bytes``, ``spill_store_bytes``,
    ``spill_load_bytes`` and, static and per block, ``shared_bytes``); warnings, the lines in which nvcc and ptxas complain.
    """

    name: str
    built: bool
    reason: str | None
    compiler: str | None
    output: str
    seconds: float
    requested_archs: str | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def architectures(self) -> list[str]:
        """Those that there are kernels for: "sm_90a"."""
        return list(dict.fromkeys(kernel["architecture"] for kernel in self.kernels))

    @property
    def spilling(self) -> list[dict[str, Any]]:
        """The kernels that keep something in memory for want of registers, or have a stack there."""
        return [k for k in self.kernels if k["stack_bytes"] or k["spill_store_bytes"] or k["spill_load_bytes"]]


@dataclass(frozen=True)
class BuildReport:
    """python and platform: those of the build; modules: by name."""

    python: str
    platform: str
    modules: dict[str, ModuleBuild]


def read_build_report(path: Path = REPORT_PATH) -> BuildReport | None:
    """The report beside the package, or None where the package was never built (run from a bare checkout).

    Raises ValueError, naming the file, where it is no report.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text)
        modules = {name: ModuleBuild(name=name, **entry) for name, entry in content["modules"].items()}
        return BuildReport(content["python"], content["platform"], modules)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a build report of fastbert: {error}; reinstall to write it anew") from error


def why_not_built(module: str) -> str | None:
    """The reason why ``_cpu`` or ``_cuda`` was not built, or None where it was."""
    report = read_build_report()
    if report is None or module not in report.modules:
        return f"fastbert.{module} was never built: install the package (pip install -e .)"
    return report.modules[module].reason


def built_architectures() -> list[str]:
    """What ``_cuda`` has kernels for; none where no report says so."""
    try:
        report = read_build_report()
    except ValueError:
        return []
    return report.modules["_cuda"].architectures if report is not None and "_cuda" in report.modules else []


def import_built(module: str, names: tuple[str, ...]) -> tuple[Any, str | None]:
    """``_cpu`` or ``_cuda`` and None, or None and the reason why there is none that has ``names``, all that callers need.

    Where a checkout was updated and not installed again the module is still that of the older sources.
    """
    try:
        built = importlib.import_module(f"fastbert.{module}")
    except ImportError as error:
        return None, why_not_built(module) or f"fastbert.{module} was built but does not load: {error}"
    missing = [name for name in names if not hasattr(built, name)]
    if missing:
        was_built = f"fastbert.{module} was built from other sources, without {', '.join(missing)}"
        return None, f"{was_built}: install the package again (pip install -e .)"
    return built, None
