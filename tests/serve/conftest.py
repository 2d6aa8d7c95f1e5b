"""One vLLM server for all tests that need one: starting it takes most of a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving import Served, serving


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served adapters")) as running:
        yield running
