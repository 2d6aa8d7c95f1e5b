"""Abilities of this installation: devices, libraries, optional extras, the hub, the sandbox and engines."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, metadata, requires, version

from packaging.requirements import Requirement
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from loraover.common.errors import ConfigError
from loraover.common.extras import install, missing_package
from loraover.common.later import has_torch, torch
from loraover.common.version import __version__
from loraover.inspection.request import DoctorRequest
from loraover.models.device import total_memory
from loraover.reporting.reporter import print_rows
from loraover.sources.verb import verb

GROUP = "loraover.doctor"
SANDBOX = "sandbox"
"""Name of the entry point that checks HumanEval's sandbox: its function raises ConfigError where the sandbox does not
work. The other entry points of the group are functions that return the engines of a package.
"""

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
    install: str = Field(description="Instructions to install the engine.")
    faults: tuple[str, ...] = Field(default=(), description="Known faults of that version; docs/faults.md has them.")


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
    faults: list[str] = Field(description="Packages that should name their engines but failed, with the reason.")

    @property
    def exit_code(self) -> int:
        """Exit code of the command, which is 0."""
        return 0


@verb(DoctorRequest)
def check_installation(request: DoctorRequest) -> Installation:
    """Describe this installation."""
    points = entry_points(group=GROUP)
    engines, faults = find_engines(point for point in points if point.name != SANDBOX)
    return Installation(
        loraover=__version__,
        python=f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        devices=_devices(),
        libraries={name: _version(name) for name in LIBRARIES},
        extras=missing_extras(metadata("loraover").get_all("Provides-Extra") or [], requires("loraover") or []),
        hub="not asked (offline)" if request.offline else _hub(),
        sandbox=_sandbox(next((point for point in points if point.name == SANDBOX), None)),
        engines=engines,
        faults=faults,
    )


def find_engines(points: Iterable[EntryPoint]) -> tuple[list[ListedEngine], list[str]]:
    """Return the engines of all packages, and for each package that could not be asked the reason."""
    engines: list[ListedEngine] = []
    faults = []
    for point in points:
        try:
            engines += [ListedEngine.model_validate(found, from_attributes=True) for found in point.load()()]
        except Exception as error:  # another package's code: whatever is wrong with it is what the user asked for
            faults.append(missing_package(error) or f"{point.value} failed: {type(error).__name__}: {error}")
    return engines, faults


def missing_extras(extras: Iterable[str], requirements: Iterable[str]) -> list[Extra]:
    """List the optional extras of a package, whose requirements its metadata has, with what is missing from each."""
    conditional = [found for found in map(Requirement, requirements) if found.marker is not None]
    found = []
    for name in extras:
        needed = [] if name in FOR_DEVELOPERS else [(one, _version(one.name)) for one in _packages(name, conditional)]
        missing = [
            one.name for one, there in needed if there is None or not one.specifier.contains(there, prereleases=True)
        ]
        if name not in FOR_DEVELOPERS:
            found.append(Extra(name=name, missing=missing, install=install(name)))
    return found


def _packages(extra: str, requirements: Sequence[Requirement]) -> Iterator[Requirement]:
    """Yield the packages of an extra, and those of the extras that it names."""
    for found in requirements:
        marker = found.marker
        if marker is None or not marker.evaluate({"extra": extra}) or marker.evaluate({"extra": ""}):
            continue
        if found.name == "loraover":
            for other in sorted(found.extras):
                yield from _packages(other, requirements)
        else:
            yield found


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

    address, answers = constants.ENDPOINT, []
    if constants.HF_HUB_OFFLINE:
        return "not asked (HF_HUB_OFFLINE is set)"

    def ask() -> None:
        import httpx2

        try:
            httpx2.head(address, timeout=HUB_TIMEOUT_S)
            answers.append(f"{address} can be reached")
        except (httpx2.HTTPError, httpx2.InvalidURL, ImportError, ValueError, OSError) as error:
            answers.append(f"{address} cannot be reached: {error}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()  # a thread, since looking up a name has no time limit
    thread.join(HUB_TIMEOUT_S)
    return answers[0] if answers else f"{address} does not answer within {HUB_TIMEOUT_S:g} s"


def _sandbox(point: EntryPoint | None) -> str:
    try:
        check = None if point is None else point.load()
    except ModuleNotFoundError:
        check = None
    if check is None:
        return f"not installed: {install('lab')}"
    try:
        check()
    except ConfigError as error:
        return str(error)
    return "ready"


def show_installation(found: Installation, request: DoctorRequest, console: Console) -> None:
    """Print what this installation has, what is missing, and how to get it."""
    rows: list[tuple[str, str]] = [("python", found.python)]
    rows += [("device", device.describe()) for device in found.devices]
    rows += [(f"  {name}", version or "missing") for name, version in found.libraries.items()]
    complete = [extra.name for extra in found.extras if not extra.missing]
    rows += [("extras complete", ", ".join(complete))] if complete else []
    for extra in found.extras:
        if extra.missing:
            rows.append((f"extra {extra.name}", f"missing {', '.join(extra.missing)}: {extra.install}"))
    rows += [("hub", found.hub), ("HumanEval sandbox", found.sandbox)]
    for engine in found.engines:
        state = f"not installed: {engine.install}" if engine.version is None else engine.version
        rows.append((engine.name, f"{state}; takes {engine.takes}" if engine.takes else state))
        if engine.faults:
            rows.append(("  known faults", f"{'; '.join(engine.faults)} (docs/faults.md)"))
    rows += [("engines", fault) for fault in found.faults]
    print_rows(console, rows, wraps=True)
