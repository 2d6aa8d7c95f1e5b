"""One export for vLLM from command line to launch line: read, pre-flight, write, certify, publish, show."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from loraover.checkpoint.base_model import base_facts, resolve_base
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.exact_tensors import adapter_of, read_source
from loraover.checkpoint.peft_adapter import CONFIG_FILE, AdapterDir
from loraover.common.atomic_output import check_free, publish_directory
from loraover.common.command_line import printable, quiet_libraries
from loraover.common.errors import ConfigError, OutputError
from loraover.common.provenance import environment, hardware
from loraover.models.licence import known_licence
from loraover.models.load import ModelSource
from loraover.reporting.model_card import model_card
from loraover_export.numerics.matrix_certificate import matrix_facts
from loraover_export.vllm.architectures import architectures_of
from loraover_export.vllm.candidate import Candidate
from loraover_export.vllm.certificate import CERTIFICATE_FILE, VllmCertificate
from loraover_export.vllm.launch import launch_commands
from loraover_export.vllm.preflight import PREFLIGHT_FILE, Preflight, preflight
from loraover_export.vllm.served import read_served
from loraover_export.vllm.show import show_certificate, show_launch, show_preflight
from loraover_export.vllm.uniform import name_modules, uniform_config, write_uniform


@dataclass(frozen=True)
class VllmRequest:
    """What the command was asked for.

    Args:
        source: LoRA-Over checkpoint, folded adapter or any PEFT LoRA.
        model: to be served, folder or hub name; None means the adapter's base model.
        dtype: to store the adapter in: fp32, bf16 or fp16.
        name: that requests will use; None means the output folder's.
        force: replace an adapter that lies at the output.
        vllm_version: release of vLLM whose rules apply; None means the one that `architectures.json` lists.
    """

    source: Path
    output: Path
    model: str | None
    dtype: str
    name: str | None
    force: bool
    vllm_version: str | None = None

    def command(self) -> str:
        """The command line, for the model card; without --force, which is about what lay at the output."""
        words = ["loraover-export", "vllm", str(self.source), "-o", str(self.output), "--dtype", self.dtype]
        words += [] if self.model is None else ["--model", self.model]
        words += [] if self.vllm_version is None else ["--vllm-version", self.vllm_version]
        return shlex.join([*words, *([] if self.name is None else ["--name", self.name])])


class _RejectedError(Exception):
    """Leaves the block that would publish."""

    def __init__(self, certificate: VllmCertificate) -> None:
        super().__init__()
        self.certificate = certificate


def run_vllm(request: VllmRequest, as_json: bool) -> int:
    """Check the adapter against vLLM's rules, write it, and print how to serve it.

    Returns:
        The exit code: 0, 1 where a matrix failed its certificate, or 2 where the pre-flight found an error; in both
        cases nothing was written.

    Raises:
        LoraOverError: anything about the request, the files or the served model that makes the export impossible.
    """
    quiet_libraries()
    console = Console(stderr=as_json)
    replaces = _check_output(request)
    source = read_source(request.source)
    candidate = _candidate(request, adapter_of(source), replaces, console)
    report = preflight(candidate)
    show_preflight(report, console)
    result: dict[str, object] = {"preflight": report.model_dump()}
    code = 2
    if report.passed:
        certificate = _publish(request, source, candidate, report, console)
        show_certificate(certificate, console)
        result["certificate"] = certificate.model_dump()
        code = 0 if certificate.passed else 1
    if code == 0:
        commands = launch_commands(candidate, request.output.resolve())
        show_launch(request.output, commands, console)
        result |= commands
    else:
        console.print("nothing was written")
    if as_json:
        print(json.dumps(result, indent=1))
    return code


def _check_output(request: VllmRequest) -> bool:
    """Whether an adapter is to be replaced."""
    target = request.output.absolute()
    check_free(target, outside=request.source, replace=request.force)
    if target.exists() and any(target.iterdir()) and not (target / CONFIG_FILE).is_file():
        raise OutputError(f"{target} holds no adapter, and --force replaces adapters only; choose another output.")
    return target.exists()


def _candidate(request: VllmRequest, adapter: AdapterDir, replaces: bool, console: Console) -> Candidate:
    name = request.output.absolute().name if request.name is None else request.name
    if not name.strip() or not name.isprintable():
        raise ConfigError(f"--name: {name!r} is no name that a request could carry.")

    def say(line: str) -> None:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    source = resolve_base([adapter], request.model, option="--model", say=say)
    known = architectures_of(request.vllm_version)
    served = read_served(source, known.lora)
    return Candidate(adapter, served, known, name, _address(source), request.dtype, replaces)


def _address(source: ModelSource) -> str:
    """What vLLM is to be started with: a folder by its full path, else the hub name."""
    return str(Path(source.location).resolve()) if Path(source.location).is_dir() else source.name


def _publish(
    request: VllmRequest, source: Checkpoint | AdapterDir, candidate: Candidate, report: Preflight, console: Console
) -> VllmCertificate:
    """Write the adapter with its report, certificate and card; a failed certificate publishes nothing."""
    try:
        with publish_directory(request.output, outside=request.source, replace=request.force) as draft:
            certificate = _write(request, source, candidate, draft, console)
            if not certificate.passed:
                raise _RejectedError(certificate)
            (draft / CERTIFICATE_FILE).write_text(certificate.model_dump_json(indent=1) + "\n")
            (draft / PREFLIGHT_FILE).write_text(report.model_dump_json(indent=1) + "\n")
            (draft / "README.md").write_text(_card(request, candidate, certificate, report), encoding="utf-8")
    except _RejectedError as rejected:
        return rejected.certificate
    return certificate


def _write(
    request: VllmRequest, source: Checkpoint | AdapterDir, candidate: Candidate, draft: Path, console: Console
) -> VllmCertificate:
    adapter, served = candidate.adapter, candidate.served
    others = served.modules.keys() - candidate.modules.keys()
    config = uniform_config(adapter, served.source, name_modules(candidate.modules, others))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=len(adapter.sites))
        matrices = write_uniform(source, draft, request.dtype, config, lambda: progress.advance(task))
    return VllmCertificate(
        verdict="passed" if all(matrix.passed for matrix in matrices) else "failed",
        base_model=config["base_model_name_or_path"],
        dtype=request.dtype,
        rank=candidate.rank,
        scaling={path: adapter.config.scaling(path) for path in candidate.modules},
        matrices=matrices,
        versions=environment(),
        hardware=hardware(),
    )


def _card(request: VllmRequest, candidate: Candidate, certificate: VllmCertificate, report: Preflight) -> str:
    warnings = [finding.rule for finding in report.findings]
    facts = {
        "rank": str(certificate.rank),
        "stored as": certificate.dtype,
        **matrix_facts(certificate.matrices),
        "pre-flight": f"passed vLLM {report.vllm_version}'s rules on {report.served_model}",
        **({"warnings": ", ".join(warnings)} if warnings else {}),
    }
    base, source = certificate.base_model, candidate.served.source
    facts |= base_facts(base, source)
    revision = source.revision if base == source.name else candidate.adapter.config.revision
    licence = None if base is None else known_licence(base, revision)
    return model_card("LoRA adapter for vLLM", base, facts, request.command(), licence=licence)
