"""Devices for tests: those of this machine, and a skip with its reason for those that are not there."""

from __future__ import annotations

import pytest

from loraover.models.device import DEVICES, found_devices

FOUND = found_devices()
ALL_DEVICES = [
    pytest.param(kind, marks=pytest.mark.skipif(not FOUND[kind], reason=f"PyTorch finds no {kind} on this machine"))
    for kind in DEVICES
    if kind != "auto"
]
