"""Ranges of vLLM's releases."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from loraover.common.errors import ConfigError
from loraover.common.strict_json import StrictModel


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


READ = Versions(since="0.32.0", before="0.34.0")
"""Releases whose sources the rules were read from."""


def release(version: str) -> Version:
    """Return the release that a version belongs to: 0.33.0 for "0.33.0rc1+cpu".

    Raises:
        ConfigError: Not a version.
    """
    try:
        return Version(Version(version).base_version)
    except InvalidVersion as error:
        raise ConfigError(f"{version!r} is not a version of vLLM; expected one such as 0.32.0.") from error
