"""A fold's certificate as tables for the terminal."""

from __future__ import annotations

from rich.console import Console

from loraover.adapters.numerics.matrix_certificate import underflow_facts
from loraover.adapters.show import OTHER_TEXTS, show_place, show_verdict, undecided
from loraover.reporting.reporter import print_line
from loraover.reporting.terminal_table import terminal_table
from loraover_export.fold.certificate import FoldCertificate, OutputCertificate
from loraover_export.requests import FoldRequest

WORST_SHOWN = 8


def show_certificate(certificate: FoldCertificate, request: FoldRequest, console: Console) -> None:
    """Print the worst matrices, the check of the outputs, the verdict, and where the adapter is."""
    _show_matrices(certificate, console)
    if certificate.outputs is not None:
        _show_outputs(certificate.outputs, console)
    if certificate.trained_base is not None:
        print_line(console, str(certificate.trained_base))
    show_verdict(certificate, f"fold {certificate.verdict}", console)
    if certificate.verdict == "inconclusive":
        print_line(console, undecided("The matrices are within their bounds, but the adapter", OTHER_TEXTS))
    show_place(certificate, request.output, console, reason="an adapter that fails its check is not kept")


def _show_matrices(certificate: FoldCertificate, console: Console) -> None:
    worst = sorted(certificate.matrices, key=lambda m: (m.passed, -m.relative_error))[:WORST_SHOWN]
    rows = [
        (m.name, f"{m.shape[0]} x {m.shape[1]}", f"{m.relative_error:.2e}", f"{m.relative_bound:.2e}") for m in worst
    ]
    heads = ("matrix", "shape", "rel. error", "bound")
    title = f"Largest errors, of {len(certificate.matrices)} matrices, stored as {certificate.dtype}"
    is_within = all(m.passed for m in certificate.matrices)
    caption = "rounded to nearest, within the bound by construction" if is_within else None
    console.print(terminal_table(heads, rows, names=heads[:1], title=title, caption=caption))
    for fact in underflow_facts(certificate.matrices).values():
        console.print(f"{certificate.dtype} range: {fact}", soft_wrap=True)


def _show_outputs(outputs: OutputCertificate, console: Console) -> None:
    where = f"{outputs.compute_dtype} on {outputs.device}"
    heads = ("", "max logit", "mean logit", "max KL", "mean KL", "same top-1")
    rows = [
        (
            *(label, *(f"{value:.2e}" for value in (d.max_logit, d.mean_logit, d.max_kl, d.mean_kl))),
            f"{d.top1_agreement:.2%}",
        )
        for label, d in (("error", outputs.error), ("noise floor", outputs.noise))
    ]
    title = f"Folded against unfolded: {outputs.prompt_source}, {outputs.tokens} tokens, {where}"
    console.print(terminal_table(heads, rows, words=heads[:1], title=title))
    console.print(
        f"max logit error {outputs.error.max_logit:.2e}, allowed {outputs.bound:.2e}; "
        f"the adapter itself moves logits by up to {outputs.adapter_effect:.3g}",
        soft_wrap=True,
    )
    if outputs.compared_tokens < outputs.tokens:
        console.print(
            f"Cores were applied at {outputs.compared_tokens} of {outputs.tokens} tokens, the same in every layer: "
            "they are too large to be applied at all tokens.",
            soft_wrap=True,
        )
