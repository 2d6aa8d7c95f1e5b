"""Versions of engines that are installed, here or in another environment; `loraover doctor` shows them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from loraover.common.errors import EngineError
from loraover.common.provenance import environment, hardware, processor
from loraover_export.known_faults import faults_of
from loraover_serve.engines import ENGINES, EngineRequest, engine_class


@dataclass(frozen=True)
class InstalledEngine:
    """Inference engine.

    Args:
        name: The engine's usual name.
        version: Installed version, or the path of a command whose version is not recorded; None if it is missing.
        takes: Files that the engine loads.
        install: Instructions to install the engine.
        faults: Names of the known faults of the installed version.
    """

    name: str
    version: str | None
    takes: str
    install: str
    faults: tuple[str, ...] = ()


def find_engines() -> list[InstalledEngine]:
    """The engines that this project can run, with the versions that are installed."""
    found = {name: engine_class(name) for name in ENGINES}
    engines = []
    for name, entry in ENGINES.items():
        version = found[name].installed()
        faults = () if version is None else tuple(fault.name for fault in faults_of(name, version))
        engines.append(InstalledEngine(entry.title, version, entry.takes, found[name].hint, faults))
    return engines


def check_installed(request: EngineRequest) -> None:
    """Check that all engines of a request can be started here.

    Raises:
        EngineError: Some are not installed; the message says how to install each.
    """
    lacking = {name: engine_class(name).lacking(request) for name in request.asked}
    faults = [
        f"{request.named('engines', name)} is not installed here; install it: {how}"
        for name, how in lacking.items()
        if how
    ]
    if faults:
        raise EngineError("; ".join(faults) + ".")


def versions(engines: Iterable[str]) -> dict[str, str]:
    """Versions of the packages in this environment; a vLLM server reports its version itself.

    Args:
        engines: Names of the engines that were asked.
    """
    reported = [package for name in engines for package in engine_class(name).reported.items()]
    found = {name: installed_version(names) for name, names in reported}
    return environment("numpy", "scipy") | {name: version for name, version in found.items() if version}


def machine() -> str:
    """Processor, memory, system and threads, in one line."""
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return f"{processor()}, {memory:.0f} GiB of memory, {hardware()}"


def installed_version(names: Sequence[str], folders: Sequence[Path] | None = None) -> str | None:
    """Version of the first of some distributions that is installed, here or in some folders; None if none is."""
    path = sys.path if folders is None else list(map(str, folders))
    return next((found.version for name in names for found in distributions(name=name, path=path)), None)


def version_beside(command: str, names: Sequence[str]) -> str | None:
    """Version of the first of some distributions in the environment of a command, such as `python`; None: none."""
    root = Path(shutil.which(command) or command).absolute().parent.parent
    folders = [*root.glob("lib*/python3*/site-packages"), *root.glob("lib/python3*/dist-packages")]
    return installed_version(names, folders)
