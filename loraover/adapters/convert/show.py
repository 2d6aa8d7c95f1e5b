"""A conversion as text for the terminal."""

from __future__ import annotations

from rich.console import Console

from loraover.adapters.convert.report import ConvertReport
from loraover.adapters.convert.request import ConvertRequest
from loraover.adapters.logits.show import OTHER_TEXTS, undecided
from loraover.adapters.uniform.show import show_lora
from loraover.reporting.reporter import print_line


def show_report(report: ConvertReport, request: ConvertRequest, console: Console) -> None:
    """Print the ranks, the certificate, the effect on logits, and where the adapter is."""
    done = "the best approximation of rank" if report.truncated else "exact, of rank"
    lines = [
        f"{report.method}: {done} {report.certificate.rank}",
        f"exact rank {report.exact_rank}: {report.engines}",
    ]
    outputs = report.outputs
    if outputs is not None:
        allowed = "" if outputs.bound is None else f", allowed {outputs.bound:.2e}"
        lines.append(
            f"logits on {outputs.prompt_source}, {outputs.tokens} tokens, {outputs.compute_dtype} on {outputs.device}: "
            f"largest difference from the source {outputs.error.max_logit:.2e}{allowed}, largest KL "
            f"{outputs.error.max_kl:.2e} nats, the same most likely token at {outputs.error.top1_agreement:.2%}; the "
            f"source moves logits by up to {outputs.adapter_effect:.3g}"
        )
    if outputs is not None and outputs.verdict == "inconclusive":
        lines.append(undecided("The source", OTHER_TEXTS, "the LoRA"))
    for line in lines:
        print_line(console, line)
    show_lora(report.certificate, request, console)
