"""One fold from command line to verdict: fold, certify, check outputs, publish, show."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from loraover.checkpoint.base_model import base_facts, naming, resolve_base
from loraover.checkpoint.checkpoint import Checkpoint, read_checkpoint
from loraover.checkpoint.peft_adapter import CONFIG_FILE
from loraover.common.atomic_output import check_free, publish_directory
from loraover.common.command_line import quiet_libraries
from loraover.common.errors import ConfigError, OutputError
from loraover.common.provenance import environment, hardware
from loraover.models.licence import known_licence
from loraover.models.load import ModelSource
from loraover.reporting.model_card import model_card
from loraover_export.fold.certificate import (
    CERTIFICATE_FILE,
    EXIT_CODES,
    POWER,
    CheckVerdict,
    FoldCertificate,
    OutputCertificate,
)
from loraover_export.fold.check_outputs import check_outputs
from loraover_export.fold.fold import write_config, write_folded
from loraover_export.numerics.matrix_certificate import MatrixCertificate, matrix_facts

WORST_SHOWN = 8


class _RejectedError(Exception):
    """Leaves the block that would publish."""


def run_fold(
    source: Path,
    output: Path,
    dtype: str,
    check_error: bool,
    base: str | None,
    prompts: Path | None,
    as_json: bool,
    force: bool = False,
) -> int:
    """Fold, certify and publish.

    Returns:
        The exit code: 0; 1 where a check failed and nothing was published; 3 where the adapter was published, and its
        effect on the outputs is too small for their check.

    Raises:
        LoraOverError: anything about the request, the files or the base model that makes the fold impossible.
    """
    quiet_libraries()
    console = Console(stderr=as_json)
    if (prompts is not None or base is not None) and not check_error:
        raise ConfigError("--base and --prompts belong to --check-error, which runs the model.")
    _check_output(output.absolute(), source, force)
    checkpoint = read_checkpoint(source)
    checkpoint.adapter.check_keeps_base()
    model = None
    if check_error:
        model = resolve_base([checkpoint.adapter], base, option="--base", say=lambda line: _say(console, line))
    command = _command(source, output, dtype, check_error, base, prompts)
    try:
        with publish_directory(output, outside=source, replace=force) as draft:
            certificate = _fold(checkpoint, draft, dtype, model, prompts, console)
            (draft / CERTIFICATE_FILE).write_text(certificate.model_dump_json(indent=1) + "\n")
            (draft / "README.md").write_text(_card(certificate, checkpoint, model, command), encoding="utf-8")
            if certificate.verdict == "failed":
                raise _RejectedError
    except _RejectedError:
        pass
    _show(certificate, console)
    if certificate.verdict == "failed":
        console.print("nothing was written: an adapter that fails its check is not left behind")
    else:
        console.print(f"wrote {escape(str(output))}", soft_wrap=True)
    if as_json:
        print(certificate.model_dump_json(indent=1))
    return EXIT_CODES[certificate.verdict]


def _check_output(target: Path, source: Path, force: bool) -> None:
    check_free(target, outside=source, replace=force)
    if target.exists() and any(target.iterdir()) and not (target / CERTIFICATE_FILE).is_file():
        raise OutputError(
            f"{target} holds no folded adapter, and --force replaces folded adapters only; choose another output."
        )


def _command(source: Path, output: Path, dtype: str, check_error: bool, base: str | None, prompts: Path | None) -> str:
    """The command line, for the model card; without what was done about an adapter that lay at the output."""
    words = ["loraover-export", "fold", str(source), "-o", str(output), "--dtype", dtype]
    words += ["--check-error"] if check_error else []
    words += [] if base is None else ["--base", base]
    return shlex.join([*words, *([] if prompts is None else ["--prompts", str(prompts)])])


def _say(console: Console, line: str) -> None:
    console.print(escape(line), soft_wrap=True)


def _fold(
    checkpoint: Checkpoint,
    draft: Path,
    dtype: str,
    model: ModelSource | None,
    prompts: Path | None,
    console: Console,
) -> FoldCertificate:
    """Write the folded adapter and judge it; with a model, by its outputs too."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("folding", total=len(checkpoint.adapter.shapes))
        matrices = write_folded(checkpoint, draft, dtype, lambda: progress.advance(task))
    outputs, base_model = None, checkpoint.meta.base_model
    if model is not None:
        if model.moved is not None:
            write_config(naming(json.loads((draft / CONFIG_FILE).read_bytes()), model), draft)
            base_model = model.name
        outputs = check_outputs(checkpoint, draft, dtype, model, prompts, lambda line: _say(console, line))
    return FoldCertificate(
        verdict=_verdict(matrices, outputs),
        base_model=base_model,
        dtype=dtype,
        decomposition=checkpoint.meta.config.decomposition,
        step=checkpoint.meta.step,
        seed=checkpoint.meta.config.seed,
        matrices=matrices,
        outputs=outputs,
        output_bound=None if outputs is None else outputs.bound,
        versions=environment(),
        hardware=hardware(),
    )


def _verdict(matrices: list[MatrixCertificate], outputs: OutputCertificate | None) -> CheckVerdict:
    if not all(matrix.passed for matrix in matrices):
        return "failed"
    return "passed" if outputs is None else outputs.verdict


def _card(certificate: FoldCertificate, checkpoint: Checkpoint, model: ModelSource | None, command: str) -> str:
    facts = {
        "decomposition in training": certificate.decomposition,
        "optimizer steps": str(certificate.step),
        "stored as": certificate.dtype,
        **matrix_facts(certificate.matrices),
    }
    outputs, base = certificate.outputs, certificate.base_model
    revision = model.revision if model is not None and base == model.name else checkpoint.adapter.config.revision
    facts |= base_facts(base, model)
    if outputs is not None:
        facts["largest logit error"] = f"{outputs.error.max_logit:.2e}, allowed {outputs.bound:.2e}"
    licence = None if base is None else known_licence(base, revision)
    return model_card("Folded LoRA adapter", base, facts, command, licence=licence)


def _show(certificate: FoldCertificate, console: Console) -> None:
    worst = sorted(certificate.matrices, key=lambda m: -m.worst_to_bound)[:WORST_SHOWN]
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"Worst {len(worst)} of {len(certificate.matrices)} matrices, stored as {certificate.dtype}",
        caption="worst: largest element error / its bound",
    )
    table.add_column("matrix", no_wrap=True, overflow="ellipsis")
    for column in ("shape", "rel. error", "bound", "worst"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for m in worst:
        table.add_row(
            escape(m.name),
            f"{m.shape[0]} x {m.shape[1]}",
            f"{m.relative_error:.2e}",
            f"{m.relative_bound:.2e}",
            f"{m.worst_to_bound:.3f}",
        )
    console.print(table)
    flushed = sum(m.flushed_to_zero for m in certificate.matrices)
    subnormal = sum(m.subnormal for m in certificate.matrices)
    if flushed or subnormal:
        console.print(
            f"{certificate.dtype} range: {flushed} elements became zero, {subnormal} are subnormal with fewer bits"
        )
    if certificate.outputs is not None:
        _show_outputs(certificate, console)
    color = {"passed": "green", "failed": "red"}.get(certificate.verdict, "yellow")
    console.print(f"fold {certificate.verdict}", style=color)
    if certificate.verdict == "inconclusive":
        console.print(
            f"The matrices are within their bounds, but the adapter moves no logit by {POWER:g} times what is allowed, "
            "so this check could not tell it from an adapter that does nothing. Try --prompts with texts that it was "
            "trained for, or --dtype fp32.",
            soft_wrap=True,
        )


def _show_outputs(certificate: FoldCertificate, console: Console) -> None:
    outputs = certificate.outputs
    assert outputs is not None
    table = Table(
        box=SIMPLE, title=f"Folded against unfolded: {escape(outputs.prompt_source)}, {outputs.tokens} tokens"
    )
    for column in ("", "max logit", "mean logit", "max KL", "mean KL", "top-1 agreement"):
        table.add_column(column, justify="left" if not column else "right")
    for label, d in (("error", outputs.error), ("noise floor", outputs.noise)):
        table.add_row(
            label,
            f"{d.max_logit:.2e}",
            f"{d.mean_logit:.2e}",
            f"{d.max_kl:.2e}",
            f"{d.mean_kl:.2e}",
            f"{d.top1_agreement:.2%}",
        )
    console.print(table)
    console.print(
        f"max logit error {outputs.error.max_logit:.2e}, allowed {outputs.bound:.2e}; "
        f"the adapter itself moves logits by up to {outputs.adapter_effect:.3g}",
        soft_wrap=True,
    )
