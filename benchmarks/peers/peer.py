"""What a benchmark has to know about who takes part in it, before and after it runs."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

BENCH_EXTRA = "pip install 'fastbert[bench]'"
FLOATS = ("float32", "bfloat16")


class NotAvailable(Exception):
    """Why a contender cannot take part."""


@dataclass(frozen=True)
class Package:
    """module: what is imported; install: the command that brings it."""

    module: str
    install: str = BENCH_EXTRA

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    def require(self, what_for: str) -> None:
        """Raises :class:`NotAvailable` where it is not installed."""
        if not self.installed:
            raise NotAvailable(f"{self.module}, {what_for}, is not installed ({self.install})")

    @property
    def version(self) -> str | None:
        """Of the distributions that bring the module, with their names: the same module may come from several."""
        names = dict.fromkeys(_distributions().get(self.module, ()))
        if names:
            return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        version = getattr(sys.modules.get(self.module), "__version__", None)  # found on the path, not installed
        return version and f"{self.module} {version}"


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


@dataclass(frozen=True)
class Peer:
    """Who takes part.

    make: the contender, or :class:`NotAvailable` (of what, the registry says: ``PEERS`` here and in ``steps``); dtypes: what it
    computes in, by device; how: one line on how it is run; packages: what it needs; extras: what it needs for some dtypes;
    on_request: dtypes in which it takes part only where it is named, by device; in_torch: its memory is torch's.
    """

    title: str
    make: Callable[..., Any]
    dtypes: Mapping[str, tuple[str, ...]]
    how: str = ""
    packages: tuple[Package, ...] = ()
    extras: tuple[Package, ...] = ()
    on_request: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    in_torch: bool = True

    def why_not_on(self, device: str) -> str | None:
        """Why it cannot take part in any dtype; None where it can."""
        if device not in self.dtypes:
            return f"not on {device}, only on {' and '.join(self.dtypes)}"
        return self.why_not_installed()

    def why_not_in(self, dtype: str, device: str, named: bool) -> str | None:
        """Why it does not take part in ``dtype``, on a device that it has; ``named``: the user asked for it by its name."""
        if dtype not in self.dtypes[device]:
            return f"not in {dtype} on {device}"
        if dtype in self.on_request.get(device, ()) and not named:
            return f"in {dtype} on {device} only where --peers names it: it takes minutes to compile"
        return None

    def why_not_installed(self) -> str | None:
        missing = [package for package in self.packages if not package.installed]
        if not missing:
            return None
        names = " and ".join(package.module for package in missing)
        commands = " && ".join(dict.fromkeys(package.install for package in missing))
        return f"{names} {'is' if len(missing) == 1 else 'are'} not installed ({commands})"

    def described(self) -> dict[str, str | None]:
        """What a document says of it: ``title``, ``version`` of all its packages that are installed, ``how`` it is run."""
        versions = [package.version for package in (*self.packages, *self.extras)]
        return {"title": self.title, "version": ", ".join(filter(None, versions)) or None, "how": self.how}
