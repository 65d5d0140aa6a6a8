"""What the runs of all commands share, from the checks before their first step to the files that they leave: settings and errors,
the output folder, one process that writes, torchrun's processes, device and memory. It knows nothing of what is run."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]  # a run tells what it does line by line
