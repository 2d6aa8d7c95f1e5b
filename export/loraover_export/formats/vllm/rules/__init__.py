"""The rules of the pre-flight by name, and its report: what vLLM would refuse, or serve wrongly without a message.

Source: vllm/lora/{peft_helper,lora_model,model_manager}.py and vllm/lora/layers of vLLM 0.32 and 0.33, and PEFT 0.21.
Where the two releases differ, a rule compares `Versions`. Faults of vLLM are in the table of `known_faults.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import Field

from loraover.adapters.uniform.request_fields import MAX_LORA_RANKS, max_lora_rank
from loraover.adapters.verdict import Certificate
from loraover.common.request import as_written
from loraover.common.strict_json import StrictModel
from loraover.models.model_file import embeds_texts
from loraover_export.formats.vllm.candidate import Candidate, Problem
from loraover_export.formats.vllm.releases import READ
from loraover_export.formats.vllm.rules.config import (
    bias,
    initialisation,
    other_parameters,
    patterns,
    required,
    variant,
)
from loraover_export.formats.vllm.rules.model import (
    architecture,
    base_model,
    experts,
    modules,
    no_ops,
    shapes,
    target_modules,
    targets,
    towers,
    vocabulary,
)
from loraover_export.formats.vllm.rules.tensors import tensors
from loraover_export.known_faults import known_faults

WITHOUT_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""Types of models that vLLM does not compute in float16: `_FLOAT16_NOT_SUPPORTED_MODELS` in vllm/config/model.py."""


def name(candidate: Candidate) -> Iterator[Problem]:
    """An adapter name that equals the served model's."""
    if candidate.name == candidate.address:
        yield Problem(
            f"the adapter is named {candidate.name!r} like the served model; requests would reach the base model",
            f"choose another name with {as_written('name')}",
        )


def rank(candidate: Candidate) -> Iterator[Problem]:
    """A rank that vLLM has no kernels for."""
    if max_lora_rank(candidate.adapter.rank) is None:
        yield Problem(
            f"rank {candidate.adapter.rank} is above the largest --max-lora-rank, {MAX_LORA_RANKS[-1]}",
            "train with a smaller rank, or merge the adapter into the base model",
        )


def storage_type(candidate: Candidate) -> Iterator[Problem]:
    """A storage type that vLLM would round again."""
    if candidate.dtype is None:
        return
    dtype, cast = candidate.served.dtype, _served_type(candidate)
    if cast not in (None, candidate.dtype):
        yield Problem(
            f"stored as {candidate.dtype}, but a model of type {dtype} is served in {cast}: A and B are rounded twice",
            f"use {as_written('dtype', cast)}, or give the server another --dtype",
            is_warning=True,
        )


def _served_type(candidate: Candidate) -> str | None:
    """Return the type that vLLM computes in and casts adapters to, unless --dtype asks for another; None if unknown.

    A model in float32 is cast to float16 where it pools, to bfloat16 where it generates.

    Source: `_resolve_auto_dtype` in vllm/config/model.py of vLLM 0.32, for devices that compute in both types.
    """
    served, described = candidate.served, candidate.architecture
    is_pooling = (described is not None and described.pooling) or embeds_texts(served.source)
    if served.dtype == "float16" or (served.dtype == "float32" and is_pooling):
        return "bf16" if served.model_type in WITHOUT_FLOAT16 else "fp16"
    return "bf16" if served.dtype in ("bfloat16", "float32") else None


def replacement(candidate: Candidate) -> Iterator[Problem]:
    """An adapter that replaces one that a server may have loaded."""
    if candidate.replaces:
        yield Problem(
            "a server that has loaded the folder's old adapter keeps using it, and a reload in place would keep "
            "cached blocks of the old adapter's outputs",
            "write to a new folder, or restart such a server",
            is_warning=True,
        )


def engine(candidate: Candidate) -> Iterator[Problem]:
    """Known faults of the release, and releases whose sources the rules were not read from."""
    version = candidate.architectures.version
    if version not in READ:
        yield Problem(
            f"the rules were read from vLLM {READ.since} up to, but not including, {READ.before}; {version} may differ",
            "compare the answers with PyTorch's: loraover verify --engine vllm",
            is_warning=True,
        )
    for fault in known_faults().faults:
        is_vllms = fault.engine == "vllm" and fault.platform is not None
        if is_vllms and fault.platform == candidate.platform and version in fault.versions:
            found = f"vLLM {version}: {fault.symptom} ({', '.join(fault.threads)})"
            yield Problem(found, fault.cure, is_warning=True)


RULES: dict[str, Callable[[Candidate], Iterator[Problem]]] = {
    "architecture": architecture,
    "base model": base_model,
    "modules": modules,
    "shapes": shapes,
    "targets": targets,
    "towers": towers,
    "target modules": target_modules,
    "experts": experts,
    "silent no-ops": no_ops,
    "vocabulary": vocabulary,
    "rank": rank,
    "required fields": required,
    "variant": variant,
    "initialisation": initialisation,
    "patterns": patterns,
    "bias": bias,
    "other parameters": other_parameters,
    "tensors": tensors,
    "name": name,
    "storage type": storage_type,
    "replacement": replacement,
    "engine": engine,
}

PREFLIGHT_FILE = "preflight.json"


class Violation(StrictModel):
    """Violated rule."""

    rule: str = Field(description="Name of the rule")
    level: Literal["error", "warning"] = Field(description="An error keeps the adapter from being written")
    found: str = Field(description="The violation, in words")
    remedy: str = Field(description="Next step for the user")


class Preflight(Certificate):
    """Result of checking an adapter against vLLM's rules, and the contents of `preflight.json`."""

    verdict: Literal["passed", "failed"] = Field(description="Passed: no rule found an error; warnings are allowed")
    vllm_version: str = Field(description="Release of vLLM whose rules were applied")
    served_model: str = Field(description="Folder or hub name of the model to be served")
    architecture: str = Field(description="Model class that the served model's configuration names")
    modules: int = Field(description="Number of adapted modules")
    rank: int = Field(description="Largest rank of a module")
    max_lora_rank: int | None = Field(description="Value for vLLM's --max-lora-rank; None if the rank is too large")
    rules: dict[str, Literal["passed", "warning", "error"]] = Field(description="Outcome of each rule, by its name")
    findings: list[Violation] = Field(description="Violated rules")


def preflight(candidate: Candidate) -> Preflight:
    """Apply every rule of `RULES` to an adapter."""
    findings = [
        Violation(
            rule=rule, level="warning" if problem.is_warning else "error", found=problem.found, remedy=problem.remedy
        )
        for rule, check in RULES.items()
        for problem in check(candidate)
    ]
    rules = dict.fromkeys(RULES, "passed") | {finding.rule: finding.level for finding in findings}
    rules |= {finding.rule: "error" for finding in findings if finding.level == "error"}
    return Preflight(
        verdict="failed" if "error" in rules.values() else "passed",
        vllm_version=candidate.architectures.version,
        served_model=candidate.served.source.name,
        architecture=candidate.served.architecture,
        modules=len(candidate.modules),
        rank=candidate.adapter.rank,
        max_lora_rank=max_lora_rank(candidate.adapter.rank),
        rules=rules,
        findings=findings,
    )
