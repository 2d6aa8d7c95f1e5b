"""The export of an adapter for vLLM: read, pre-flight, write, certify, publish, and the commands that serve it."""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console

from loraover.adapters.convert.plain import PlainLora, plain_lora
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, matrix_facts
from loraover.adapters.show import in_one_line, show_matrices, show_verdict
from loraover.adapters.uniform.certificate import CONVERSION_FILE, LoraCertificate, module_facts
from loraover.adapters.uniform.folder import (
    name_modules,
    split_experts,
    split_paths,
    stack_fields,
    uniform_config,
    write_uniform,
)
from loraover.adapters.uniform.request_fields import max_lora_rank
from loraover.adapters.verdict import Certificate
from loraover.checkpoint.base_model import base_facts
from loraover.checkpoint.model_facts import read_served
from loraover.checkpoint.peft_adapter import read_on_base
from loraover.checkpoint.source import read_source
from loraover.common.strict_json import StrictModel
from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover.sources.hub import push_checked
from loraover.sources.verb import verb
from loraover_export.formats.vllm.candidate import Candidate
from loraover_export.formats.vllm.releases import architectures_of, projections_of
from loraover_export.formats.vllm.rules import PREFLIGHT_FILE, Preflight, preflight
from loraover_export.publishing import VLLM, base_of, certified
from loraover_export.requests import VllmRequest


class VllmCertificate(Certificate):
    """Errors of the matrices of a written adapter, and the contents of `vllm_certificate.json`."""

    verdict: Literal["passed", "failed"]
    base_model: str | None = Field(description="Base model that the written adapter names")
    dtype: str = Field(description="Data type that the adapter is stored in: fp32, bf16 or fp16")
    rank: int = Field(description="Rank of every module; smaller ranks are padded with zeros")
    scaling: dict[str, float] = Field(description="Factor that B was multiplied by, by module")
    matrices: list[MatrixCertificate] = Field(description="One certificate for each A and each scaling * B")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")


class VllmReport(StrictModel):
    """Pre-flight, certificate and launch commands of one export for vLLM."""

    preflight: Preflight = Field(description="Check of the adapter against vLLM's rules")
    conversion: LoraCertificate | None = Field(
        default=None, description="Certificate of the conversion into a plain LoRA; None if there was none"
    )
    certificate: VllmCertificate | None = Field(
        default=None, description="Errors of the written matrices; None if the pre-flight failed"
    )
    serve: str | None = Field(
        default=None, description="Command that starts vLLM with the adapter; None if nothing was written"
    )
    load: str | None = Field(
        default=None, description="Command that adds the adapter to a running server; None if nothing was written"
    )

    @property
    def passed(self) -> bool:
        """Whether pre-flight and certificate passed, so that the adapter was written."""
        return self.certificate is not None and self.certificate.passed

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0: written, 1: a matrix failed its check, 2: the pre-flight found an error."""
        return 0 if self.passed else 1 if self.preflight.passed else 2


LOAD_URL = "http://localhost:8000/v1/load_lora_adapter"


def lora_module(name: str, path: Path) -> str:
    """Return a value of --lora-modules: name=path, or JSON where a character in them would be misread."""
    text = f"{name}={path}"
    if "," in text or "=" in name or name.startswith(("-", "{")):
        return json.dumps({"name": name, "path": str(path)})
    return text


def launch_commands(candidate: Candidate, path: Path) -> dict[str, str]:
    """Return two commands, quoted for a POSIX shell: `serve` starts vLLM, `load` adds to a running server."""
    revision, rank = candidate.served.source.revision, max_lora_rank(candidate.adapter.rank)
    pinned = [] if revision is None else ["--revision", revision]
    serve = ["vllm", "serve", candidate.address, *pinned, "--enable-lora", "--max-lora-rank", str(rank)]
    body = json.dumps({"lora_name": candidate.name, "lora_path": str(path)})
    load = ["curl", LOAD_URL, "-H", "Content-Type: application/json", "-d", body]
    return {
        "serve": shlex.join([*serve, "--lora-modules", lora_module(candidate.name, path)]),
        "load": shlex.join(load),
    }


@verb(VllmRequest)
def export_vllm(request: VllmRequest) -> VllmReport:
    """Check an adapter against vLLM's rules, and write it in a form that vLLM, SGLang and PEFT read identically.

    Returns:
        The pre-flight, the certificate of what was written, and the commands that serve it. Where `passed` is false,
        nothing was written: the pre-flight found an error, and there is no certificate, or a matrix failed its check.

    Raises:
        ConfigError: Arguments that cannot be used, or a served model that cannot be read.
        CheckpointError: An adapter that cannot be trusted.
        ExportError: Adapted modules that no list of target modules can name.
        FoldError: An element beyond the range of `dtype`.
        OutputError: An output that cannot be written, or that exists and may not be replaced; or the hub refuses what
            was written.
    """
    VLLM.check_output(request, request.source)
    with ExitStack() as converted:
        plain = PlainLora(request.source, None)
        if request.convert:
            made = plain_lora(request.source, model=request.model, dtype=request.dtype, report=request.report)
            plain = converted.enter_context(made)
        adapter, conversion = read_source(plain.path), plain.certificate
        base, known = base_of(request, adapter), architectures_of(request.vllm_version)
        served = read_served(base, known.lora)
        if served.architecture in known.lora:  # of others, nothing but the configuration is read
            adapter = read_on_base(adapter, served.experts)
        place, replaces = Path(base.location), request.output.exists()
        address = str(place.resolve()) if place.is_dir() else base.name
        candidate = Candidate(adapter, served, known, request.adapter_name, address, request.dtype, replaces)
        found = preflight(candidate)
        if not found.passed:
            return VllmReport(preflight=found, conversion=conversion)
        with VLLM.draft(request, request.source) as draft:
            certificate = _write(request, candidate, draft.folder)
            certificate = draft.seal(certificate, request.source)
            if conversion is not None:
                conversion = conversion.keep(draft.folder / CONVERSION_FILE)
            found = found.keep(draft.folder / PREFLIGHT_FILE)
            warnings = ", ".join(finding.rule for finding in found.findings)
            facts = {
                "rank": str(certificate.rank),
                "stored as": certificate.dtype,
                **matrix_facts(certificate.matrices),
                "pre-flight": f"passed vLLM {found.vllm_version}'s rules on {found.served_model}",
                **({"warnings": warnings} if warnings else {}),
            }
            name = certificate.base_model
            revision = base.revision if name == base.name else adapter.config.revision
            draft.describe(name, revision, facts | base_facts(name, base))
            draft.keep_reference(request.source)
    if request.push_to_hub is not None:
        push_checked(request, certificate.verdict)
    commands = launch_commands(candidate, request.output.resolve()) if certificate.passed else {}
    return VllmReport(preflight=found, conversion=conversion, certificate=certificate, **commands)


def _write(request: VllmRequest, candidate: Candidate, draft: Path) -> VllmCertificate:
    adapter, served = candidate.adapter, candidate.served
    others = served.modules.keys() - candidate.modules.keys()
    adapted, pack = candidate.modules.keys() - adapter.experts, None
    if adapter.stacks and candidate.architecture and not candidate.architecture.stacked_experts:
        projections = projections_of(served.architecture)
        adapted, pack = adapted | split_paths(adapter.stacks, projections), split_experts(adapter, projections)
    config = uniform_config(adapter, served.source, name_modules(adapted, others))
    if pack is None:
        config |= stack_fields(adapter.stacks)
    with request.report.task("writing matrices", len(adapter.matrices)) as done:
        matrices = write_uniform(adapter, draft, request.dtype, config, done, pack)
    certificate = certified(adapter, request.dtype, matrices)
    return VllmCertificate(**certificate, base_model=config["base_model_name_or_path"])


def show_report(report: VllmReport, request: VllmRequest, console: Console) -> None:
    """Print the pre-flight, the certificate, and how to serve the adapter if it was written."""
    if report.conversion is not None:
        facts = in_one_line(module_facts(report.conversion.modules))
        print_line(console, f"converted into a plain LoRA of rank {report.conversion.rank}: {facts}", "green")
    found = report.preflight
    print_line(
        console, f"pre-flight: {found.modules} modules of {found.architecture}, rules of vLLM {found.vllm_version}"
    )
    for finding in found.findings:
        print_line(console, f"{finding.level}: {finding.rule}: {finding.found}", terminal_color(finding.level))
        print_line(console, f"  remedy: {finding.remedy}")
    errors, warnings = (sum(one.level == level for one in found.findings) for level in ("error", "warning"))
    summary = f"pre-flight {found.verdict}: {errors} errors, {warnings} warnings, {len(found.rules)} rules"
    show_verdict(found, summary, console)
    if report.certificate is not None:
        show_matrices(report.certificate, console)
    if not report.passed:
        console.print("nothing was written")
        return
    print_line(console, f"wrote {request.output}")
    print_line(console, f"\nserve it:\n{report.serve}")
    print_line(console, "\nor load it into a running server, started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1:")
    print_line(console, str(report.load))
