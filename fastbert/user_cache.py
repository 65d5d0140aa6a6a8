"""Where fastbert keeps what it has found out and would otherwise find out again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fastbert``, ``~/.cache/fastbert`` by default; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG base directory specification: a relative path is to be ignored.
    folder = Path(base) if base and os.path.isabs(base) else Path("~/.cache").expanduser()
    return folder / "fastbert"
