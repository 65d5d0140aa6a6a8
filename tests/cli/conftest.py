"""Commands run in the process of the tests, on one thread."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def always_one_thread(one_thread: None, rough_pictures: None) -> None:
    """For all tests of this folder."""
