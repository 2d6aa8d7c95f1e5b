"""The command `loraover doctor`."""

from __future__ import annotations

from loraover.inspection.request import DoctorRequest
from loraover.reporting.request_command import reporting, request_command

doctor = request_command(
    DoctorRequest,
    reporting("loraover.inspection.installation:check_installation", "loraover.inspection.show:show_installation"),
    json="Print what was found as JSON.",
    examples=["loraover doctor", "loraover doctor --offline --json"],
    help="""Show devices, versions and engines of this installation, what is missing, and how to get it.""",
)
