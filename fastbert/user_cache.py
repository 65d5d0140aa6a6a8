"""Where fastbert keeps what it has found out and would otherwise find out again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fastbert``, ``~/.cache/fastbert`` by default, a temporary folder without a home; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG base directory specification: a relative path is to be ignored.
    if base and os.path.isabs(base):
        return Path(base) / "fastbert"
    try:
        return Path("~/.cache").expanduser() / "fastbert"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"fastbert-{os.getuid()}"
