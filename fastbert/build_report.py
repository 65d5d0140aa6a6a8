"""What happened when this installation's native modules were built: read by ``fastbert doctor``, written by setup.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

REPORT_PATH = Path(__file__).with_name("_build_report.json")


@dataclass(frozen=True)
class ModuleBuild:
    """The build of one native module.

    name: ``_cpu`` or ``_cuda``; built: whether there is one; reason: why not, or None; compiler: its version line where it was
    asked; output: the last lines that a failing command printed; seconds: how long the build took.
    """

    name: str
    built: bool
    reason: str | None
    compiler: str | None
    output: str
    seconds: float


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
