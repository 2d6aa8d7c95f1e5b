"""The pre-flight of `loraover export vllm`, on adapters that are served without an export."""

from __future__ import annotations

from collections.abc import Mapping

from loraover.checkpoint.peft_adapter import AdapterDir, read_on_base
from loraover.checkpoint.read_facts import read_served
from loraover.common.errors import ConfigError, printable
from loraover.common.reporter import Reporter
from loraover.models.load import ModelSource
from loraover_export.formats.vllm.candidate import Candidate
from loraover_export.formats.vllm.preflight import Violation, preflight
from loraover_export.formats.vllm.releases import Platform, architectures_of


def check_adapters(
    adapters: Mapping[str, AdapterDir], source: ModelSource, address: str, version: str | None, report: Reporter
) -> None:
    """Apply vLLM's rules to every adapter, and report its warnings.

    Args:
        adapters: Adapters by the names that requests use.
        source: The model to be served.
        address: Name that requests for the base model use.
        version: vLLM's version with its label, such as "0.32.0+cpu"; None if it is not known.
        report: Receiver of the warnings.

    Raises:
        CheckpointError: LoRA of experts that does not fit the model.
        ConfigError: An adapter that vLLM refuses or would serve wrongly without a message.
    """
    known = architectures_of(version)
    if version is None:
        report.line(f"the command vllm prints no version; the rules of {known.version} are applied")
    served, platform = read_served(source, known.lora), _platform(version)
    found: dict[Violation, list[str]] = {}
    for name, adapter in adapters.items():
        placed = read_on_base(adapter, served.experts) if served.architecture in known.lora else adapter
        checked = preflight(Candidate(placed, served, known, name, address, None, platform=platform))
        for finding in checked.findings:
            found.setdefault(finding, []).append(name)
    for finding, names in found.items():
        if finding.level == "warning":
            report.line(printable(f"warning: {_described(finding, names)}"))
    errors = [_described(finding, names) for finding, names in found.items() if finding.level == "error"]
    if errors:
        raise ConfigError(f"vLLM was not started: {'; '.join(errors)}")


def _described(finding: Violation, names: list[str]) -> str:
    return f"{', '.join(names)}: {finding.rule}: {finding.found}; remedy: {finding.remedy}"


def _platform(version: str | None) -> Platform | None:
    """The kind of device that a build of vLLM is for, by the label of its version; PyPI's build, for CUDA, has none."""
    label = None if version is None else version.partition("+")[2]
    if label is None or not (label == "" or label.startswith(("cpu", "cu"))):
        return None
    return "cpu" if label.startswith("cpu") else "cuda"
