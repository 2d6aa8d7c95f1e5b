"""Devices for tests: those of this machine, a skip with its reason for those that are not there, and a chosen one."""

from __future__ import annotations

import os

import pytest

from loraover.models.device import DEVICES, choose_device, found_devices

FOUND = found_devices()
ALL_DEVICES = [
    pytest.param(kind, marks=pytest.mark.skipif(not FOUND[kind], reason=f"PyTorch finds no {kind} on this machine"))
    for kind in DEVICES
    if kind != "auto"
]

DEVICE = choose_device(os.environ.get("LORAOVER_DEVICE") or "cpu")
"""Device of the tests of exactness, which compare with oracles on the CPU; LORAOVER_DEVICE names another."""
