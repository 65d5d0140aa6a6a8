"""Ctrl-C and SIGTERM during training: the first asks for a stop at the end of the step, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether the user has asked for a stop. Outside :meth:`deferred` a signal raises KeyboardInterrupt where it strikes."""

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first signal is only noted in ``requested``; a second one raises KeyboardInterrupt."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self.requested or not self._deferring:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Directs SIGINT and SIGTERM to a :class:`StopRequest` and puts the former handlers back at the end.

    Only the main thread may set handlers; in another thread the request is never raised and signals stay as they were.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
