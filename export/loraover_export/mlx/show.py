"""A report of an export for mlx-lm as text for the terminal."""

from __future__ import annotations

import json
import shlex

from rich.console import Console

from loraover.reporting.reporter import print_line
from loraover_export.mlx.report import MlxReport
from loraover_export.mlx.request import MlxRequest
from loraover_export.numerics.matrix_certificate import matrix_facts


def show_report(report: MlxReport, request: MlxRequest, console: Console) -> None:
    """Print the certificate, and how to run the adapter if it was written."""
    facts = ", ".join(f"{name} {value}" for name, value in matrix_facts(report.matrices).items())
    print_line(
        console,
        f"certificate {report.verdict}: rank {report.rank}, {report.dtype}, {facts}",
        "green" if report.passed else "red",
    )
    if report.left_out:
        print_line(console, f"left out, as copies of the base model's weights: {', '.join(report.left_out)}", "yellow")
    if not report.passed:
        print_line(console, "nothing was written")
        return
    if report.lost_settings:
        print_line(
            console,
            f"config.json of {report.base_model} has these settings only within rope_parameters, where mlx-lm 0.32 "
            f"does not look for all models; add them at its top level: {json.dumps(report.lost_settings)}",
            "yellow",
        )
    print_line(console, f"wrote {request.output}")
    words = ["mlx_lm.generate", "--model", report.base_model, "--adapter-path", str(request.output)]
    print_line(console, f"run it: {shlex.join([*words, '--prompt', 'Hello'])}")
