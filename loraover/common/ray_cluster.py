"""A Ray cluster to which work is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loraover.common.errors import ConfigError
from loraover.common.extras import install
from loraover.common.request import as_written


@contextmanager
def ray_cluster(address: str) -> Iterator[Any]:
    """Connect to a Ray cluster for a block, and yield the module `ray`.

    Args:
        address: Address of the cluster, or "local" for one on this machine.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray as imported
    except ImportError as error:
        raise ConfigError(f"{as_written('ray')} needs Ray: {install('ray')}.") from error
    ray: Any = imported
    where = None if address == "local" else address
    try:
        ray.init(address=where, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"{as_written('ray', address)}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
