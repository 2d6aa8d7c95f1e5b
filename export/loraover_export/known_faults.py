"""Known faults of engines and of programs around them with adapters: one table for check, verify, doctor and docs.

Source: `known_faults.json`, kept by hand; `python docs/write_faults.py` writes docs/faults.md from it. An entry counts
as reproduced only if a test of this repository shows it.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Literal

from packaging.version import InvalidVersion, Version

from loraover.common.errors import ConfigError
from loraover.common.strict_json import StrictModel

Platform = Literal["cpu", "cuda"]


class Versions(StrictModel):
    """A range of releases.

    Args:
        since: First release of the range; None leaves the range open.
        before: First release after the range; None leaves the range open.
    """

    since: str | None = None
    before: str | None = None

    def __contains__(self, version: str) -> bool:
        found = release(version)
        return (self.since is None or found >= Version(self.since)) and (
            self.before is None or found < Version(self.before)
        )


def release(version: str) -> Version:
    """Return the release that a version belongs to: 0.33.0 for "0.33.0rc1+cpu".

    Raises:
        ConfigError: Not a version.
    """
    try:
        return Version(Version(version).base_version)
    except InvalidVersion as error:
        raise ConfigError(f"{version!r} is not a version of vLLM; expected one such as 0.32.0.") from error


class NoOp(StrictModel):
    """A module whose matrices vLLM loads and applies nowhere.

    Args:
        module: Last part of the module's path.
        classes: Model classes, by vLLM's names.
        reason: Cause, in words.
    """

    module: str
    classes: tuple[str, ...]
    reason: str


class KnownFault(StrictModel):
    """A fault that engines or programs around them have with adapters.

    Args:
        name: The fault in a few words, unique in the table.
        engine: The engine or program, by a name in `KnownFaults.names`.
        platform: Kind of device that has the fault; None if that does not matter.
        versions: Releases that have the fault: `before` is the first one that is known to be without it.
        seen: Release in which it was run or read; None if the thread names none.
        threads: Issues and pull requests that discuss it, as "owner/name#number".
        symptom: What the user sees, as a clause without a full stop.
        words: Words that users search for, the same for all faults that look alike to them.
        cure: What the user does about it, as a clause in the imperative.
        shown_by: Test of this repository that shows the fault; None if it was read, and not run.
        command: Command that finds the fault; None if there is none.
        shown_as: Verdict or fault that the command reports; None if it has no name of its own there.
        picture: File in `docs/figures` that shows what a check reports; None if there is none.
        no_op: Modules that have no effect, for the pre-flight; None for other faults.
    """

    name: str
    engine: str
    platform: Platform | None = None
    versions: Versions = Versions()
    seen: str | None = None
    threads: tuple[str, ...]
    symptom: str
    words: tuple[str, ...]
    cure: str
    shown_by: str | None = None
    command: str | None = None
    shown_as: str | None = None
    picture: str | None = None
    no_op: NoOp | None = None

    def affects(self, version: str | None) -> bool:
        """Whether a release has the fault; of an unknown one, whether every release that is known has it."""
        if self.versions == Versions():
            return True
        try:
            return version is not None and version in self.versions
        except ConfigError:  # a build that has no version
            return False


class KnownFaults(StrictModel):
    """Contents of `known_faults.json`.

    Args:
        names: Usual names of the engines and programs, by the names in the table; engines have those of `--engine`.
    """

    names: dict[str, str]
    faults: tuple[KnownFault, ...]

    @property
    def no_ops(self) -> list[tuple[KnownFault, NoOp]]:
        """Faults of modules that have no effect."""
        return [(fault, fault.no_op) for fault in self.faults if fault.no_op is not None]


@cache
def known_faults() -> KnownFaults:
    """Read the table that comes with this package."""
    return KnownFaults.model_validate_json(files(__package__).joinpath("known_faults.json").read_bytes())


def faults_of(engine: str, version: str | None) -> tuple[KnownFault, ...]:
    """Return the known faults of a release of an engine.

    Args:
        engine: Name that `--engine` takes.
        version: Release such as "0.32.0+cpu", whose label names the device; None if it is not known.
    """
    label = "" if version is None else version.partition("+")[2]
    is_cpu = label.startswith("cpu")
    return tuple(
        fault
        for fault in known_faults().faults
        if fault.engine == engine
        and fault.affects(version)
        and (fault.platform is None or version is None or (fault.platform == "cpu") == is_cpu)
    )
