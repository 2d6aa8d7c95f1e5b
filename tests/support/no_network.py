"""No network: whatever a test tries to reach fails, and is a failure of the test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def without_network() -> Iterator[list[Any]]:
    """Addresses that the main thread tries to reach in the block; every attempt fails."""
    addresses: list[Any] = []

    def refuse(*address: Any, **_: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            addresses.append(address)
        raise OSError("the network is out of bounds")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", lambda self, address: refuse(address))
        yield addresses


@pytest.fixture(scope="module")
def reached() -> Iterator[list[Any]]:
    with without_network() as addresses:
        yield addresses


@pytest.fixture
def no_network(reached: list[Any]) -> Iterator[None]:
    yield
    found, reached[:] = list(reached), []
    assert found == []
