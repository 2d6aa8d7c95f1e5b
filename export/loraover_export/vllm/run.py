"""The export of an adapter for vLLM: read, pre-flight, write, certify, publish."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from loraover.adapters.convert.plain import PlainLora, plain_lora
from loraover.adapters.numerics.matrix_certificate import matrix_facts
from loraover.adapters.uniform.certificate import CONVERSION_FILE
from loraover.adapters.uniform.experts import split_experts, split_paths, stack_fields
from loraover.adapters.uniform.folder import name_modules, uniform_config, write_uniform
from loraover.adapters.uniform.served import ServedModel, read_served
from loraover.checkpoint.base_model import base_facts, resolve_base
from loraover.checkpoint.carried_reference import keep_reference
from loraover.checkpoint.chat_template import keep_chat_template
from loraover.checkpoint.peft_adapter import AdapterDir, read_on_base
from loraover.checkpoint.source import read_source
from loraover.common.atomic_output import check_replaceable, publish_directory
from loraover.common.provenance import environment, hardware
from loraover.models.licence import known_licence
from loraover.models.load import ModelSource
from loraover.reporting.model_card import model_card
from loraover.sources.push import push_checked
from loraover.sources.verb import verb
from loraover_export.vllm.architectures import Architectures, architectures_of, projections_of
from loraover_export.vllm.candidate import Candidate
from loraover_export.vllm.launch import launch_commands
from loraover_export.vllm.preflight import PREFLIGHT_FILE, Preflight, preflight
from loraover_export.vllm.report import CERTIFICATE_FILE, VllmCertificate, VllmReport
from loraover_export.vllm.request import VllmRequest


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
    check_replaceable(request.output, "vLLM adapter", CERTIFICATE_FILE, inputs=[request.source], replace=request.force)
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
    source = resolve_base([adapter], request.model, option=request.named("model"), say=request.report.line)
    known = architectures_of(request.vllm_version)
    return read_served(source, known.lora), known


def _address(source: ModelSource) -> str:
    """Return the model's name for `vllm serve`: the full path of a folder, else the hub name."""
    return str(Path(source.location).resolve()) if Path(source.location).is_dir() else source.name


def _publish(request: VllmRequest, candidate: Candidate, report: VllmReport) -> VllmReport:
    """Write the adapter with its report, certificates and card; where the certificate fails, publish nothing."""
    found, conversion = report.preflight, report.conversion
    with publish_directory(request.output, outside=request.source, replace=request.force) as draft:
        certificate = _write(request, candidate, draft)
        keep_chat_template(request.source, draft)
        certificate = certificate.keep(draft / CERTIFICATE_FILE)
        if conversion is not None:
            conversion = conversion.keep(draft / CONVERSION_FILE)
        found = found.keep(draft / PREFLIGHT_FILE)
        (draft / "README.md").write_text(_card(request, candidate, certificate, found), encoding="utf-8")
        keep_reference(request.source, draft, request.report.line)
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
    return VllmCertificate(
        verdict="passed" if all(matrix.passed for matrix in matrices) else "failed",
        base_model=config["base_model_name_or_path"],
        dtype=request.dtype,
        rank=candidate.adapter.rank,
        scaling={path: module.scaling for path, module in adapter.modules.items()},
        matrices=matrices,
        versions=environment(),
        hardware=hardware(),
    )


def _card(request: VllmRequest, candidate: Candidate, certificate: VllmCertificate, found: Preflight) -> str:
    warnings = [finding.rule for finding in found.findings]
    facts = {
        "rank": str(certificate.rank),
        "stored as": certificate.dtype,
        **matrix_facts(certificate.matrices),
        "pre-flight": f"passed vLLM {found.vllm_version}'s rules on {found.served_model}",
        **({"warnings": ", ".join(warnings)} if warnings else {}),
    }
    base, source = certificate.base_model, candidate.served.source
    facts |= base_facts(base, source)
    revision = source.revision if base == source.name else candidate.adapter.config.revision
    licence = None if base is None else known_licence(base, revision)
    return model_card("LoRA adapter for vLLM", base, facts, request.command(), licence=licence)
