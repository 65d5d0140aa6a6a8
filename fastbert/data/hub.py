"""The Hugging Face hub where its host cannot be reached at all."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants


@contextmanager
def no_waiting_for_the_hub(name: str) -> Iterator[None]:
    """Loads ``name``, a path or a name on the hub, from the cache alone where the hub's host has no address, as without a network.

    The hub's library asks six times and waits for half a minute, for every file, before it looks there or gives up.
    """
    if Path(name).exists() or constants.HF_HUB_OFFLINE or _host_has_an_address():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _host_has_an_address() -> bool:
    """True behind a proxy, too, which looks names up itself."""
    if "https" in (proxies := urllib.request.getproxies()) or "all" in proxies:
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True
