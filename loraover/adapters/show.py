"""Text for the terminal about what the verbs on adapters have written or found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from loraover.adapters.numerics.matrix_certificate import matrix_facts
from loraover.adapters.verdict import POWER, Proof
from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover.reporting.svg import short
from loraover.reporting.table import Column, Table, percent

if TYPE_CHECKING:  # what imports PyTorch
    from loraover.adapters.combine.diff import DiffReport, ModuleDiff
    from loraover.adapters.combine.requests import DiffRequest
    from loraover.adapters.convert.request import ConvertRequest
    from loraover.adapters.convert.run import ConvertReport
    from loraover.adapters.uniform.certificate import LoraCertificate, ModuleCertificate
    from loraover.adapters.verdict import Deviation

OTHER_TEXTS = "Try --prompts with texts that it was trained for, or --dtype fp32."

SHOWN = 12
"""Number of modules in a table, those with the largest errors or differences."""


def show_verdict(proof: Proof, text: str, console: Console) -> None:
    """Print a text in the colour of a verdict."""
    print_line(console, text, terminal_color(proof.verdict))


def show_place(proof: Proof, output: Path, console: Console, *, reason: str = "") -> None:
    """Print where the output is, or the reason for which nothing was written."""
    text = f"wrote {output}" if proof.verdict != "failed" else f"nothing was written{reason and f': {reason}'}"
    print_line(console, text)


def deviations_table(
    rows: Sequence[tuple[str, Deviation]], title: str, head: str = "distance"
) -> Table[tuple[str, Deviation]]:
    """Return a table of distances of logits, with their names."""

    def figure(head: str, value: Callable[[Deviation], float]) -> Column[tuple[str, Deviation]]:
        return Column(head, lambda row: short(value(row[1]), ".2e"))

    return Table(
        [
            Column(head, lambda row: row[0], "word"),
            figure("max logit", lambda d: d.max_logit),
            figure("mean logit", lambda d: d.mean_logit),
            figure("max KL", lambda d: d.max_kl),
            figure("mean KL", lambda d: d.mean_kl),
            Column("same top token", lambda row: percent(row[1].top1_agreement, 2)),
        ],
        rows,
        title,
    )


def in_one_line(facts: Mapping[str, str]) -> str:
    """Join rows of a model card."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def undecided(subject: str, remedy: str, compared: str = "it") -> str:
    """Return why a comparison of logits is inconclusive, and what to try."""
    found = f"{subject} moves no logit by {POWER:g} times the allowed error"
    return f"{found}, so this check cannot distinguish {compared} from an adapter that does nothing. {remedy}"


def show_left_out(keys: Sequence[str], console: Console) -> None:
    """Print the keys of tensors that an export left out, if there are any."""
    if keys:
        print_line(console, f"left out, as copies of the base model's weights: {', '.join(keys)}", "yellow")


def show_lora(certificate: LoraCertificate, request: Any, console: Console) -> None:
    """Print the modules with the largest errors, the verdict, and where the adapter is."""
    worst = sorted(certificate.modules, key=lambda module: -module.relative_error_bound)[:SHOWN]
    table: Table[ModuleCertificate] = Table(
        [
            Column("module", lambda m: m.module, "name"),
            Column("shape", lambda m: f"{m.shape[0]} x {m.shape[1]}"),
            Column("rank", lambda m: str(m.rank)),
            Column("norm", lambda m: f"{m.norm:.3g}"),
            Column("left out", lambda m: f"{m.truncation_error / (m.norm or 1.0):.2%}" if m.truncation_error else "0"),
            Column("stored", lambda m: f"{m.storage_error / (m.norm or 1.0):.1e}"),
            Column("in all", lambda m: f"{m.relative_error_bound:.1e}"),
        ],
        worst,
        f"Largest errors, {len(worst)} of {len(certificate.modules)} modules",
        caption="Shares of each delta's Frobenius norm. Left out: by a smaller rank. Stored: by rounding A and B.",
    )
    console.print(table)
    for note in certificate.notes:
        print_line(console, note)
    cancelled = [module.module for module in certificate.modules if module.rank == 0]
    if cancelled:
        print_line(console, f"{len(cancelled)} modules have a delta of zero: {', '.join(cancelled[:3])}", "yellow")
    show_matrices(certificate, console)
    reason = "a matrix failed its check"
    if all(matrix.passed for matrix in certificate.matrices):
        reason = "the logits are further from the source's than rounding explains"
    show_place(certificate, request.output, console, reason=reason)


def show_matrices(certificate: Any, console: Console) -> None:
    """Print the verdict of a certificate that has a rank, a data type and matrices, and a summary of the matrices."""
    facts = in_one_line(matrix_facts(certificate.matrices))
    text = f"certificate {certificate.verdict}: rank {certificate.rank}, {certificate.dtype}, {facts}"
    show_verdict(certificate, text, console)


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


def show_diff(report: DiffReport, request: DiffRequest, console: Console) -> None:
    """Print the modules that differ most, the totals, and the logits if they were compared."""
    console.print(_differences_table(report))
    others, logits = report.other_tensors, report.logits
    if others:
        print_line(console, f"{len(others)} other parameters differ: {', '.join(others[:3])}")
    if logits is not None:
        effects = zip(("first to base", "second to base"), logits.effects, strict=True)
        title = f"Logits on {logits.prompt_source}, {logits.tokens} tokens"
        console.print(deviations_table([("first to second", logits.difference), *effects], title))
    print_line(
        console,
        f"norms of the adapters {report.norms[0]:.4g} and {report.norms[1]:.4g}, norm of their difference "
        f"{report.difference:.4g}: {report.relative_difference:.2%} of the larger",
    )


def _differences_table(report: DiffReport) -> Table[ModuleDiff]:
    def ends(angles: list[float]) -> str:
        return f"{angles[0]:.1f}, {angles[-1]:.1f}" if angles else "-"

    shown = sorted(report.modules, key=lambda module: -module.relative_difference)[:SHOWN]
    return Table(
        [
            Column("module", lambda m: m.module, "name"),
            Column("ranks", lambda m: f"{m.ranks[0]}, {m.ranks[1]}"),
            Column("norm 1", lambda m: f"{m.norms[0]:.3g}"),
            Column("norm 2", lambda m: f"{m.norms[1]:.3g}"),
            Column("diff.", lambda m: f"{m.relative_difference:.1%}"),
            Column("column\nangles", lambda m: ends(m.column_angles)),
            Column("row\nangles", lambda m: ends(m.row_angles)),
        ],
        shown,
        f"Largest differences, {len(shown)} of {len(report.modules)} modules",
        caption="Difference: of the larger norm. Angles: smallest and largest principal angle, in degrees.",
    )
