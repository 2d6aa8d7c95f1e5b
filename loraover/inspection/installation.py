"""Abilities of this installation: devices, libraries, optional extras, the hub, the sandbox and engines."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, metadata, requires, version

from packaging.requirements import Requirement
from pydantic import BaseModel, ConfigDict, Field

from loraover.common.errors import ConfigError
from loraover.common.extras import install, missing_package
from loraover.common.later import has_torch, torch
from loraover.common.version import __version__
from loraover.inspection.request import DoctorRequest
from loraover.models.device import total_memory
from loraover.sources.verb import verb

ENGINE_GROUP = "loraover.doctor"
"""Entry points in this group are functions that return the engines of a package."""

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "trl", "accelerate", "datasets", "huggingface-hub")
HUB_TIMEOUT_S = 3.0
FOR_DEVELOPERS = ("dev",)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Device(_Part):
    """A device that PyTorch can compute on."""

    kind: str = Field(description="Cpu, cuda or mps.")
    name: str = Field(description="Name of the hardware.")
    memory_bytes: int | None = Field(description="Memory in bytes; None: unknown.")

    def describe(self) -> str:
        """Return a line for people."""
        memory = "" if self.memory_bytes is None else f", {self.memory_bytes / 2**30:.1f} GiB"
        return f"{self.kind}: {self.name}{memory}"


class Extra(_Part):
    """An optional set of packages."""

    name: str = Field(description="Name of the extra.")
    missing: list[str] = Field(description="Packages that are missing or too old.")
    install: str = Field(description="Command that installs them.")


class ListedEngine(_Part):
    """An inference engine that adapters can be served with."""

    name: str = Field(description="Name of the engine.")
    version: str | None = Field(description="Installed version; None: not installed.")
    takes: str = Field(description="What the engine loads.")
    install: str = Field(description="How it is installed.")


class Installation(_Part):
    """Contents of `loraover doctor --json`."""

    loraover: str = Field(description="Version of this package.")
    python: str = Field(description="Version of Python.")
    devices: list[Device] = Field(description="Processor, and the devices that PyTorch can compute on.")
    libraries: dict[str, str | None] = Field(description="Version of each library; None: not installed.")
    extras: list[Extra] = Field(description="Optional sets of packages.")
    hub: str = Field(description="Whether the Hugging Face hub can be reached.")
    sandbox: str = Field(description="Whether HumanEval's sandbox works, or what it needs.")
    engines: list[ListedEngine] = Field(description="Inference engines.")
    faults: list[str] = Field(description="Packages whose engines could not be asked for, and why.")

    @property
    def exit_code(self) -> int:
        """Exit code of the command, which is 0."""
        return 0


@verb(DoctorRequest)
def check_installation(request: DoctorRequest) -> Installation:
    """Describe this installation."""
    engines, faults = find_engines(entry_points(group=ENGINE_GROUP))
    return Installation(
        loraover=__version__,
        python=f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        devices=_devices(),
        libraries={name: _version(name) for name in LIBRARIES},
        extras=missing_extras(metadata("loraover").get_all("Provides-Extra") or [], requires("loraover") or []),
        hub="not asked (offline)" if request.offline else _hub(),
        sandbox=_sandbox(),
        engines=engines,
        faults=faults,
    )


def find_engines(points: Iterable[EntryPoint]) -> tuple[list[ListedEngine], list[str]]:
    """Ask each package for its engines.

    Args:
        points: Entry points to functions that return objects with name, version, takes and install.

    Returns:
        The engines, and for each package that could not be asked the reason.
    """
    engines: list[ListedEngine] = []
    faults = []
    for point in points:
        try:
            engines += [ListedEngine.model_validate(found, from_attributes=True) for found in point.load()()]
        except Exception as error:  # another package's code: whatever is wrong with it is what the user asked for
            faults.append(missing_package(error) or f"{point.value} failed: {type(error).__name__}: {error}")
    return engines, faults


def missing_extras(extras: Iterable[str], requirements: Iterable[str]) -> list[Extra]:
    """List the optional extras of a package with what is missing from each.

    Args:
        extras: Names of the extras.
        requirements: The package's requirements, as its metadata has them.
    """
    conditional = [found for found in map(Requirement, requirements) if found.marker is not None]
    return [
        Extra(
            name=name,
            missing=[found.name for found in _packages(name, conditional) if not _is_installed(found)],
            install=install(name),
        )
        for name in extras
        if name not in FOR_DEVELOPERS
    ]


def _packages(extra: str, requirements: Sequence[Requirement]) -> Iterator[Requirement]:
    """Yield the packages of an extra, and those of the extras that it names."""
    for found in requirements:
        if not _belongs(found, extra):
            continue
        if found.name == "loraover":
            for other in sorted(found.extras):
                yield from _packages(other, requirements)
        else:
            yield found


def _belongs(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement comes with an extra, and not without it."""
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _is_installed(requirement: Requirement) -> bool:
    found = _version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[Device]:
    name = f"{platform.machine()}, {os.cpu_count()} cores"
    found = [Device(kind="cpu", name=name, memory_bytes=total_memory("cpu"))]
    if not has_torch():
        return found
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(Device(kind="cuda", name=properties.name, memory_bytes=properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(Device(kind="mps", name="Apple GPU", memory_bytes=torch.mps.recommended_max_memory()))
    return found


def _hub() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "not asked (HF_HUB_OFFLINE is set)"
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(_ask(constants.ENDPOINT)), daemon=True)
    thread.start()  # a thread, since looking up a name has no time limit
    thread.join(HUB_TIMEOUT_S)
    return answers[0] if answers else f"{constants.ENDPOINT} does not answer within {HUB_TIMEOUT_S:g} s"


def _ask(address: str) -> str:
    import httpx2

    try:
        httpx2.head(address, timeout=HUB_TIMEOUT_S)
    except (httpx2.HTTPError, httpx2.InvalidURL, ImportError, ValueError, OSError) as error:
        return f"{address} cannot be reached: {error}"
    return f"{address} can be reached"


def _sandbox() -> str:
    from loraover.evaluation.sandbox import check_sandbox

    try:
        check_sandbox()
    except ConfigError as error:
        return str(error)
    return "ready"
