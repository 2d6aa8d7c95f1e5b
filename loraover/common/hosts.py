"""Hosts of addresses. This module imports the standard library alone, and is packed into the checker of references."""

from __future__ import annotations

from ipaddress import ip_address


def is_near(host: str) -> bool:
    """Whether a host is this machine, so that secrets may be sent to it without encryption and no proxy is used."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False
