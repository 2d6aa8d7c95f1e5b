"""Arguments of `loraover inspect` and `loraover doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.common.request import AnyPath, Request, argument, option


@dataclass(frozen=True)
class InspectRequest(Request):
    """Arguments of the command `loraover inspect`."""

    verb = "loraover inspect"

    path: AnyPath = argument("Folder to describe.")
    plot: AnyPath | None = option(
        "New .svg file for a map of the matrices with cores, and for their scores over time.", default=None
    )
    html: AnyPath | None = option("New .html file for the description, with these figures.", default=None)


@dataclass(frozen=True)
class DoctorRequest(Request):
    """Arguments of `check_installation`."""

    verb = "loraover doctor"

    offline: bool = option(
        "Skip the question whether the Hugging Face hub can be reached, which takes up to three seconds.", default=False
    )
