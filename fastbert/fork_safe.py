"""Locks that a forked process finds open."""

from __future__ import annotations

import os
import threading


def lock() -> threading.Lock:
    """A lock that is nobody's in a forked process, whichever thread held it in the process that was forked.

    That thread is not in the new process (a worker of a DataLoader, of a server that loads the model first), and would never open
    it there. What the lock guards must be usable as such a thread has left it in the middle.
    """
    made = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=made._at_fork_reinit)  # what the standard library's modules do with theirs
    return made
