"""The command `loraover study`."""

from __future__ import annotations

from loraover.reporting.request_command import Reporting, request_command
from loraover.study.request import StudyRequest

REQUEST = "loraover.study.request:StudyRequest"
STUDY = Reporting(REQUEST, "loraover.study.runner:run_study", "loraover.study.show:show_study")
POWER = Reporting(REQUEST, "loraover.study.power:predict_power", "loraover.study.show:show_power")
PLAN = Reporting(REQUEST, "loraover.study.plan:plan_study", "loraover.study.show:show_study_plan")


def _study(request: StudyRequest, as_json: bool) -> int:
    asked = PLAN if request.plan else STUDY if request.power is None else POWER
    return asked.run(request, as_json)


study = request_command(StudyRequest, _study)
