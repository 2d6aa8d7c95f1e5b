"""A report of an export for mlx-lm as text for the terminal."""

from __future__ import annotations

import json
import shlex

from rich.console import Console

from loraover.adapters.logits.show import show_place
from loraover.adapters.uniform.show import show_matrices
from loraover.reporting.reporter import print_line
from loraover_export.mlx.report import MlxReport
from loraover_export.mlx.request import MlxRequest


def show_report(report: MlxReport, request: MlxRequest, console: Console) -> None:
    """Print the certificate, and how to run the adapter if it was written."""
    show_matrices(report, console)
    if report.left_out:
        print_line(console, f"left out, as copies of the base model's weights: {', '.join(report.left_out)}", "yellow")
    if report.passed and report.lost_settings:
        print_line(
            console,
            f"config.json of {report.base_model} has these settings only within rope_parameters, where mlx-lm 0.32 "
            f"does not look for all models; add them at its top level: {json.dumps(report.lost_settings)}",
            "yellow",
        )
    show_place(report, request.output, console)
    if report.passed:
        words = ["mlx_lm.generate", "--model", report.base_model, "--adapter-path", str(request.output)]
        print_line(console, f"run it: {shlex.join([*words, '--prompt', 'Hello'])}")
