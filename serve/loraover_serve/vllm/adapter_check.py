"""The pre-flight of `loraover-export vllm`, on adapters that are served as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.command_line import printable
from loraover.common.errors import ConfigError
from loraover.models.load import ModelSource
from loraover_export.vllm.architectures import architectures_of
from loraover_export.vllm.candidate import Candidate
from loraover_export.vllm.known_faults import Platform
from loraover_export.vllm.preflight import Finding, preflight
from loraover_export.vllm.served import read_served


def check_adapters(
    adapters: Mapping[str, AdapterDir],
    source: ModelSource,
    address: str,
    version: str | None,
    say: Callable[[str], None],
) -> None:
    """Apply vLLM's rules to every adapter, and show what they find.

    Args:
        adapters: adapters by the names that requests will use.
        source: the model to be served.
        address: the name that requests for the base model will use.
        version: vLLM's version with its label, such as "0.32.0+cpu"; None where it is not known.
        say: shows a line.

    Raises:
        ConfigError: an adapter that vLLM refuses or would serve wrongly without a message.
    """
    known = architectures_of(version)
    if version is None:
        say(f"the command vllm prints no version; the rules of {known.version} are applied")
    served, platform = read_served(source, known.lora), _platform(version)
    found: dict[Finding, list[str]] = {}
    for name, adapter in adapters.items():
        report = preflight(Candidate(adapter, served, known, name, address, None, platform=platform))
        for finding in report.findings:
            found.setdefault(finding, []).append(name)
    for finding, names in found.items():
        say(printable(f"{finding.level}: {', '.join(names)}: {finding.rule}: {finding.found}"))
        say(printable(f"  remedy: {finding.remedy}"))
    refused = [name for name in adapters if any(f.level == "error" and name in names for f, names in found.items())]
    if refused:
        raise ConfigError(f"{', '.join(refused)}: not served, for the errors above; nothing was started.")


def _platform(version: str | None) -> Platform | None:
    """What a build of vLLM computes on, by the label of its version; PyPI's own build has none and is for CUDA."""
    label = None if version is None else version.partition("+")[2]
    if label is None or not (label == "" or label.startswith(("cpu", "cu"))):
        return None
    return "cpu" if label.startswith("cpu") else "cuda"
