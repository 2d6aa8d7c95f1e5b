"""The command `loraover compare`."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.common.request import AnyPaths, Request, argument
from loraover.reporting.request_command import request_command


@dataclass(frozen=True)
class CompareRequest(Request):
    """Show finished runs side by side: method, data, parameters, losses.

    Each RUN is a folder of `loraover train`.
    """

    verb = "loraover compare"
    examples = ("loraover compare runs/demo-1 runs/demo-2",)

    runs: AnyPaths = argument("Folders of finished runs.", metavar="RUN...")


def _compare(request: CompareRequest, as_json: bool) -> None:
    import json

    from loraover.training.run_result import read_run

    results = {str(run): read_run(run) for run in request.runs}
    if as_json:
        print(json.dumps({run: result.model_dump(mode="json") for run, result in results.items()}, indent=1))
        return
    from rich.console import Console

    from loraover.training.show import show_runs

    show_runs(results, Console())


compare = request_command(CompareRequest, _compare)
