"""The export of an adapter for vLLM: read, pre-flight, write, certify, publish."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from loraover.adapters.convert.plain import PlainLora, plain_lora
from loraover.adapters.numerics.matrix_certificate import matrix_facts
from loraover.adapters.uniform.certificate import CONVERSION_FILE
from loraover.adapters.uniform.folder import (
    name_modules,
    split_experts,
    split_paths,
    stack_fields,
    uniform_config,
    write_uniform,
)
from loraover.checkpoint.base_model import base_facts
from loraover.checkpoint.model_facts import ServedModel, read_served
from loraover.checkpoint.peft_adapter import AdapterDir, read_on_base
from loraover.checkpoint.source import read_source
from loraover.models.load import ModelSource
from loraover.sources.push import push_checked
from loraover.sources.verb import verb
from loraover_export.formats.vllm.architectures import Architectures, architectures_of, projections_of
from loraover_export.formats.vllm.candidate import Candidate
from loraover_export.formats.vllm.launch import launch_commands
from loraover_export.formats.vllm.preflight import PREFLIGHT_FILE, Preflight, preflight
from loraover_export.formats.vllm.report import VllmCertificate, VllmReport
from loraover_export.publishing import VLLM, base_of, certified
from loraover_export.requests import VllmRequest


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
        return _export(request, plain)


def _export(request: VllmRequest, plain: PlainLora) -> VllmReport:
    replaces = request.output.exists()
    adapter = read_source(plain.path)
    served, known = _served(request, adapter)
    if served.architecture in known.lora:  # of others, nothing but the configuration is read
        adapter = read_on_base(adapter, served.experts)
    name, address = request.adapter_name, _address(served.source)
    candidate = Candidate(adapter, served, known, name, address, request.dtype, replaces)
    found = preflight(candidate)
    report = VllmReport(preflight=found, conversion=plain.certificate)
    if not found.passed:
        return report
    report = _publish(request, candidate, report)
    if not report.passed:
        return report
    return report.model_copy(update=launch_commands(candidate, request.output.resolve()))


def _served(request: VllmRequest, adapter: AdapterDir) -> tuple[ServedModel, Architectures]:
    source = base_of(request, adapter)
    known = architectures_of(request.vllm_version)
    return read_served(source, known.lora), known


def _address(source: ModelSource) -> str:
    """Return the model's name for `vllm serve`: the full path of a folder, else the hub name."""
    return str(Path(source.location).resolve()) if Path(source.location).is_dir() else source.name


def _publish(request: VllmRequest, candidate: Candidate, report: VllmReport) -> VllmReport:
    """Write the adapter with its report, certificates and card; where the certificate fails, publish nothing."""
    found, conversion = report.preflight, report.conversion
    with VLLM.draft(request, request.source) as draft:
        certificate = _write(request, candidate, draft.folder)
        certificate = draft.seal(certificate, request.source)
        if conversion is not None:
            conversion = conversion.keep(draft.folder / CONVERSION_FILE)
        found = found.keep(draft.folder / PREFLIGHT_FILE)
        base, source = certificate.base_model, candidate.served.source
        revision = source.revision if base == source.name else candidate.adapter.config.revision
        draft.describe(base, revision, _facts(certificate, found) | base_facts(base, source))
        draft.keep_reference(request.source)
    if request.push_to_hub is not None:
        push_checked(request, certificate.verdict)
    return report.model_copy(update={"preflight": found, "conversion": conversion, "certificate": certificate})


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


def _facts(certificate: VllmCertificate, found: Preflight) -> dict[str, str]:
    warnings = [finding.rule for finding in found.findings]
    return {
        "rank": str(certificate.rank),
        "stored as": certificate.dtype,
        **matrix_facts(certificate.matrices),
        "pre-flight": f"passed vLLM {found.vllm_version}'s rules on {found.served_model}",
        **({"warnings": ", ".join(warnings)} if warnings else {}),
    }
