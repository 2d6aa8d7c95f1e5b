"""vLLM, by the rules of its pre-flight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import final

from loraover.adapters.uniform.request_fields import DEFAULT_MAX_LORA_RANK, MAX_LORA_RANKS, max_lora_rank
from loraover.checkpoint.source import read_source
from loraover.checkpoint.tensor_file import FLOATS, open_tensors
from loraover.common.errors import ExportError
from loraover.models.device import DTYPES
from loraover_export.check.engines.base import (
    ADAPTER,
    CORES,
    NOT_NUMBERS,
    EngineRules,
    Target,
    Written,
    command,
    more_than_ab,
    note,
    react,
    refused,
    silent,
)
from loraover_export.check.features import missing_modules
from loraover_export.check.report import EngineFinding, Level
from loraover_export.check.subject import Subject
from loraover_export.formats.vllm.candidate import Candidate
from loraover_export.formats.vllm.releases import known_architectures
from loraover_export.formats.vllm.rules import RULES
from loraover_export.publishing import VLLM

NO_LORA = {
    "method": refused("vLLM knows no such tensors"),
    "DoRA": refused("vLLM refuses it by name"),
    "no fields": refused("vLLM needs them"),
    "aLoRA": refused("vLLM refuses it by name"),
    "biases": refused("vLLM refuses them by name"),
    "LoRA bias": refused("vLLM refuses it by name"),
    "initialisation": refused("vLLM refuses it by name"),
    "lost initialisation": silent("vLLM pairs A and B with the unchanged base weights"),
    "other initialisation": refused("vLLM refuses it by name"),
    "modules_to_save": refused("vLLM knows no such tensors"),
    "trained vocabulary": refused("vLLM knows no such tensors"),
    "norms": refused("vLLM knows no such tensors"),
    "trained tokens": refused("vLLM knows no such tensors"),
    "variant": silent("vLLM may not read this field"),
    "rank": silent("vLLM scales by the configuration's rank"),
    "key prefix": note("vLLM accepts these keys too, as names of modules in its model class"),
    "doubled prefix": note("vLLM removes the prefix, however often it occurs"),
    "missing modules": silent("vLLM ignores matrices below an unknown prefix and answers as the base model"),
    "absent layers": note("vLLM ignores them, which is right for a base model without these layers"),
    "unnamed modules": silent("vLLM does not read these fields, and applies all matrices"),
    "other shapes": silent("vLLM would fill only part of a larger module"),
    "numbers": NOT_NUMBERS,
}
"""Reactions to adapters that neither the exports nor the rules of the pre-flight can read."""

HEAD_LEAKS = note("on a CPU, vLLM before 0.33 applies it to requests for the base model as well")

DTYPE = "bf16"
"""Storage type that `loraover export vllm` writes by default."""


class UniformRules(EngineRules):
    """An engine for which the uniform form is written, as `loraover export vllm` does it."""

    def write(self, source: Path, folder: Path, target: Target) -> Written:
        """Write the uniform form after the pre-flight of vLLM's rules."""
        from loraover_export.formats.vllm.run import export_vllm

        report = export_vllm(
            source,
            folder / ADAPTER,
            model=target.model,
            convert=False,
            dtype=target.dtype,
            vllm_version=target.engine_version,
        )
        errors = [found for found in report.preflight.findings if found.level == "error"]
        if errors:
            found = " ".join(f"{error.rule}: {error.found}; {error.remedy}." for error in errors)
            raise ExportError(f"{source}: {found}")
        certificate = report.certificate
        assert certificate is not None
        adapter = read_source(source)
        with open_tensors(adapter.tensors_path) as file:
            types = {FLOATS.get(file.dtype(key)) for key in file.keys}
        taken = (
            {*certificate.scaling.values()} == {1.0}
            and (adapter.is_run_by_peft and not adapter.others)
            and types == {DTYPES[target.dtype]}
            and all(module.rank == adapter.rank for module in adapter.modules.values())
        )
        return Written(ADAPTER, f"{ADAPTER}/{VLLM.certificate}", certificate.rank, certificate.matrices, taken)


@final
class VllmRules(UniformRules):
    """vLLM, which reads PEFT's form itself."""

    largest_rank = MAX_LORA_RANKS[-1]
    rank_option = "--max-lora-rank"

    def __init__(self) -> None:
        self.version = known_architectures().version
        self.reader = f"vLLM {self.version}"

    def as_it_is(self, subject: Subject) -> Iterator[EngineFinding]:
        if subject.lora is None:
            yield from react(subject, NO_LORA)
            return
        yield from apply_rules(subject, dtype=None)
        yield from react(subject, {"cores": CORES, "adapted head": HEAD_LEAKS, "numbers": NOT_NUMBERS})
        yield from _rank(subject)

    def exported(self, subject: Subject) -> Iterator[EngineFinding]:
        if subject.lora is None:
            yield from more_than_ab(subject)
            return
        yield from apply_rules(subject, dtype=DTYPE)
        yield from _rank(subject)

    def export(self, subject: Subject) -> str:
        return command(subject, "vllm", ending="-vllm")


def apply_rules(subject: Subject, *, dtype: str | None) -> Iterator[EngineFinding]:
    """Apply the pre-flight's rules to the adapter as written in a data type; None: the folder is served unchanged."""
    assert subject.lora is not None
    name, address = f"{subject.path.name}-vllm", subject.served.source.name
    candidate = Candidate(subject.lora, subject.served, known_architectures(), name, address, dtype)
    for rule, check in RULES.items():
        for problem in check(candidate):
            # What the export finds keeps it from writing, whatever vLLM would do with it.
            level: Level = "wrong silently" if problem.is_silent and dtype is None else "refused"
            if problem.is_warning or rule == "patterns":  # these releases read patterns as PEFT does
                level = "note"
            yield EngineFinding(feature=rule, level=level, found=problem.found)


def uniform_form(subject: Subject) -> Iterator[EngineFinding]:
    """Yield what keeps `loraover export vllm` from writing the uniform form, which other engines read as well."""
    if subject.lora is None:
        yield from more_than_ab(subject)
        return
    found = [finding for finding in apply_rules(subject, dtype=DTYPE) if finding.level != "note"]
    yield from found
    described = known_architectures().lora.get(subject.served.architecture)
    is_split = subject.lora.stacks and described is not None and not described.stacked_experts
    if not found and (is_split or missing_modules(subject) is not None):
        text = "the export writes a pair for each projection of each expert, which only vLLM and SGLang read"
        yield EngineFinding(feature="experts", level="wrong silently", found=text)


def _rank(subject: Subject) -> Iterator[EngineFinding]:
    """Yield a note on a rank that vLLM refuses unless it is started with an option."""
    needed = max_lora_rank(max(subject.ranks))
    if needed is not None and needed > DEFAULT_MAX_LORA_RANK:
        found = f"vLLM refuses rank {max(subject.ranks)} unless it is started with --max-lora-rank {needed}"
        yield EngineFinding(feature="rank", level="note", found=found)
