"""A conversion as text for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from loraover.common.command_line import printable
from loraover_export.convert.report import ConvertReport
from loraover_export.uniform.show import show_lora


def show_report(report: ConvertReport, output: Path, console: Console) -> None:
    """Print the ranks, the certificate, the effect on logits, and where the adapter is."""
    done = "the best approximation of rank" if report.truncated else "exact, of rank"
    lines = [
        f"{report.method}: {done} {report.certificate.rank}",
        f"exact rank {report.exact_rank}: {report.engines}",
    ]
    outputs = report.outputs
    if outputs is not None:
        lines.append(
            f"logits on {outputs.prompt_source}, {outputs.tokens} tokens, {outputs.compute_dtype} on {outputs.device}: "
            f"largest difference from the source {outputs.error.max_logit:.2e}, largest KL "
            f"{outputs.error.max_kl:.2e} nats, the same most likely token at {outputs.error.top1_agreement:.2%}; the "
            f"source moves logits by up to {outputs.adapter_effect:.3g}"
        )
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    show_lora(report.certificate, output, console)
