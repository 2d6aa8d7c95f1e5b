"""Tiny base models, and no network."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.tiny_hub import save_llama, save_t5, write_recipe


@pytest.fixture(scope="module")
def reached() -> Iterator[list[Any]]:
    """Addresses that the main thread tried to reach; every attempt fails, as without a network."""
    addresses: list[Any] = []

    def refuse(*address: Any, **_: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            addresses.append(address)
        raise OSError("the network is out of bounds")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", lambda self, address: refuse(address))
        yield addresses


@pytest.fixture
def no_network(reached: list[Any]) -> Iterator[None]:
    yield
    found, reached[:] = list(reached), []
    assert found == []


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": save_llama(folder / "llama"),
        "chat": save_llama(folder / "chat", chat=True),
        "t5": save_t5(folder / "t5"),
    }


@pytest.fixture
def recipe(bases: dict[str, Path], tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", bases["llama"])
