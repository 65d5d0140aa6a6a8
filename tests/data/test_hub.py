"""Loading by name without a network: at once from the cache, or an error."""

from __future__ import annotations

import socket
import time

import pytest
from huggingface_hub import constants

from fastbert.data.errors import TokenizerError
from fastbert.data.hub import no_waiting_for_the_hub
from fastbert.data.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def asked(monkeypatch) -> list[str]:
    """The hosts whose addresses were asked for: there are none."""
    hosts: list[str] = []

    def getaddrinfo(host, *others, **options):
        hosts.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return hosts


def test_a_name_is_given_up_at_once_where_the_hub_has_no_address():
    begin = time.monotonic()
    with pytest.raises(TokenizerError, match="no-such-model-anywhere: no such folder, and loading it from the .* hub failed"):
        load_tokenizer("no-such-model-anywhere")
    assert time.monotonic() - begin < 10  # the first wait between two attempts of the hub's library is 1 s, all are 23 s
    assert not constants.HF_HUB_OFFLINE


def test_the_hub_is_asked_where_it_may_be_reached(monkeypatch, asked, tmp_path):
    with no_waiting_for_the_hub("name"):
        assert constants.HF_HUB_OFFLINE
    assert asked == ["huggingface.co"]
    with no_waiting_for_the_hub(str(tmp_path)):  # a folder needs no hub
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    with no_waiting_for_the_hub("name"):
        assert not constants.HF_HUB_OFFLINE
    assert asked == ["huggingface.co"]
    monkeypatch.delenv("https_proxy")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *others, **options: [])
    with no_waiting_for_the_hub("name"):
        assert not constants.HF_HUB_OFFLINE
