"""Work in a new process, whose time and memory are those of this work alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar
from unittest.mock import patch

from loraover.common.command_line import quiet_libraries

Found = TypeVar("Found")


def in_child(
    function: Callable[..., Found],
    *arguments: object,
    preloaded: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Found:
    """Return what a function returns in a new process, which begins with more environment variables."""
    context = get_context("forkserver" if preloaded else "spawn")
    if preloaded:
        context.set_forkserver_preload(list(preloaded))
    with (
        patch.dict(os.environ, environment or {}),
        ProcessPoolExecutor(1, mp_context=context, initializer=quiet_libraries) as pool,
    ):
        return pool.submit(function, *arguments).result()
