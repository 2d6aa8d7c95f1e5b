"""Hosts of addresses. This module imports the standard library alone, and is packed into the checker of references."""

from __future__ import annotations

from ipaddress import ip_address


def is_near(host: str) -> bool:
    """Whether a host is this machine, to which secrets may go in the clear and no proxy leads."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False
