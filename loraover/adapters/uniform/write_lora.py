"""A plain LoRA made from other adapters: written in the uniform form with its certificate, or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from loraover.adapters.numerics.delta import Delta
from loraover.adapters.numerics.low_rank import factor_noise, product_norm, sum_norm
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, certify, matrix_facts
from loraover.adapters.numerics.rounding import round_tensor, save_and_compare
from loraover.adapters.uniform.certificate import (
    CERTIFICATE_FILE,
    LoraCertificate,
    ModuleCertificate,
    SourceRecord,
    module_facts,
    record_source,
)
from loraover.adapters.uniform.folder import plain_config, stack_fields
from loraover.checkpoint.adapter_config import write_config
from loraover.checkpoint.base_model import base_facts
from loraover.checkpoint.expert_stacks import ExpertStack, expert_paths
from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.peft_adapter import pack_stacks, site_key
from loraover.common.arrays import as_array, as_tensor
from loraover.common.atomic_output import AbandonedError, check_replaceable, publish_directory
from loraover.common.errors import ExportError
from loraover.common.provenance import environment, hardware_used
from loraover.common.reporter import SILENT, Reporter
from loraover.common.threads import workers
from loraover.models.model_file import known_licence
from loraover.reporting.model_card import model_card


@dataclass(frozen=True)
class Approximation:
    """Factors that are to be written, and their distance from the module's exact delta_W.

    Args:
        delta: The factors, with the scaling in B; its rank may be 0.
        norm: Frobenius norm of the exact delta_W.
        truncation_error: Frobenius norm of what was left out on purpose; 0 if nothing was.
        arithmetic_bound: Bound of the error of the arithmetic, as a Frobenius norm.
    """

    delta: Delta
    norm: float
    truncation_error: float = 0.0
    arithmetic_bound: float = 0.0

    @staticmethod
    def exact(delta: Delta) -> Approximation:
        """Return a delta that is written exactly: the only error is that of its own factors."""
        noise = factor_noise(delta.b, delta.a)
        return Approximation(delta, product_norm(delta.b.value, delta.a.value), arithmetic_bound=noise)


Work = Callable[[], Approximation]
"""Computation of one module's factors, which a thread runs."""

Check = Callable[[Path, LoraCertificate], LoraCertificate]
"""Check of a written adapter: from its folder and its certificate to the certificate that is published."""


@dataclass(frozen=True)
class LoraOutput:
    """Destination of a plain LoRA, and what its files say about it.

    Args:
        output: New folder.
        command: Command line that makes it.
        title: Heading of the model card.
        asked: What was asked for, by the names of the command's options.
        sources: Folders of the adapters that are read.
        base_model: Folder or hub name of the base model; None if it is not known.
        revision: Commit of the base model on the hub; None for folders.
        task_type: PEFT's name of the task; None if the adapter names none.
        dtype: Data type to store the adapter in: fp32, bf16 or fp16.
        force: Replace an adapter of this kind that is already at `output`.
        others: Tensors that are written as they are, by their keys in the file.
        modules_to_save: Modules that these tensors belong to.
        stacks: Parameters of experts that are adapted; each of their experts is a module.
        notes: What else a reader should know, in words.
        if_zero: Message of the error if every delta is zero.
        targets: Fields of PEFT's configuration that choose the adapted modules; None names each by its path.
    """

    output: Path
    command: str
    title: str
    asked: Mapping[str, str]
    sources: Sequence[Path]
    base_model: str | None
    revision: str | None = None
    task_type: str | None = None
    dtype: str = "fp32"
    force: bool = False
    others: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    stacks: Sequence[ExpertStack] = ()
    notes: Sequence[str] = ()
    if_zero: str = "every delta_W is zero, so the adapter would do nothing; train it first."
    targets: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raise OutputError unless a new folder can be written, or replace one of this kind if `force` is true."""
        check_replaceable(self.output, "certified adapter", CERTIFICATE_FILE, inputs=self.sources, replace=self.force)


class _Stored(NamedTuple):
    """Module in the storage type, before it is padded."""

    a: Tensor
    b: Tensor
    module: ModuleCertificate
    matrices: list[MatrixCertificate]


def write_lora(
    work: Iterable[Work],
    total: int,
    target: LoraOutput,
    report: Reporter = SILENT,
    check: Check = lambda draft, certificate: certificate,
) -> LoraCertificate:
    """Compute modules on threads, round each matrix once, and publish them as a plain PEFT LoRA with a certificate.

    The adapter has one rank, to which smaller ones are padded with zeros, and scaling 1, so that every engine reads it
    in the same way. The file is read back, and must equal the certified matrices bit for bit. In memory are the rounded
    matrices, and the factors in float64 of a few modules, since `work` is read a few modules ahead of the threads.
    `check` sees an adapter whose matrices passed, before it is published.

    Returns:
        The certificate, which the output holds too. If its verdict is "failed", nothing was written.
    """
    target.check()
    with publish_directory(target.output, replace=target.force) as draft:
        with workers() as threads, report.task("writing modules", total) as done:
            hashes = [threads.start(record_source, folder, threads.ending) for folder in target.sources]
            stored: list[_Stored] = []
            for module in threads.map(lambda make: _store(make(), target.dtype), work):
                stored.append(module)
                done(len(stored))
            certificate = _certificate(target, stored, [record.result() for record in hashes])
        if not certificate.passed:
            raise AbandonedError
        _save(target, stored, certificate, draft)
        certificate = check(draft, certificate)
        certificate = certificate.keep(draft / CERTIFICATE_FILE)
        (draft / "README.md").write_text(_card(target, certificate), encoding="utf-8")
    return certificate


def _store(approximation: Approximation, dtype: str) -> _Stored:
    """Round the factors to the storage type, and measure what that did to each matrix and to their product."""
    delta = approximation.delta
    names = {kind: f"{delta.module}.lora_{'embedding_' * delta.embedding}{kind}" for kind in "AB"}
    exacts = {"A": delta.a.arrays(), "B": delta.b.arrays()}
    rounded = {kind: round_tensor(names[kind], exact.value, dtype) for kind, exact in exacts.items()}
    a, b = map(as_tensor, rounded.values())
    exact_a, exact_b = delta.a.value.double(), delta.b.value.double()
    change_b, change_a = b.double() - exact_b, a.double() - exact_a
    module = ModuleCertificate(
        module=delta.module,
        embedding=delta.embedding,
        shape=(len(b), a.shape[1]),
        rank=delta.rank,
        norm=approximation.norm,
        truncation_error=approximation.truncation_error,
        arithmetic_bound=approximation.arithmetic_bound,
        storage_error=sum_norm([(change_b, exact_a), (b.double(), change_a)]),
    )
    matrices = [certify(names[kind], rounded[kind], exacts[kind]) for kind in exacts] if delta.rank else []
    return _Stored(a, b, module, matrices)


def _certificate(target: LoraOutput, stored: Sequence[_Stored], sources: list[SourceRecord]) -> LoraCertificate:
    twice = next((name for name, count in Counter(part.module.module for part in stored).items() if count > 1), None)
    if twice is not None:
        raise ExportError(
            f"{', '.join(map(str, target.sources))}: two deltas belong to {twice}, and an adapter has one for each "
            "module; the file names the module in two ways, so save the adapter again."
        )
    if not any(part.module.rank and part.module.norm for part in stored):
        raise ExportError(f"{', '.join(map(str, target.sources))}: {target.if_zero}")
    matrices = [matrix for module in stored for matrix in module.matrices]
    return LoraCertificate(
        verdict="passed" if all(matrix.passed for matrix in matrices) else "failed",
        asked=dict(target.asked),
        sources=sources,
        base_model=target.base_model,
        dtype=target.dtype,
        rank=max(part.module.rank for part in stored),
        modules=[module.module for module in stored],
        matrices=matrices,
        notes=list(target.notes),
        versions=environment(),
        hardware=hardware_used(),
    )


def _save(target: LoraOutput, stored: Sequence[_Stored], certificate: LoraCertificate, draft: Path) -> None:
    """Write tensors and configuration."""
    tensors = dict(target.others)
    for matrix in stored:
        missing = certificate.rank - matrix.module.rank
        prefix = f"{matrix.module.module}.lora_{'embedding_' * matrix.module.embedding}"
        tensors[site_key(f"{prefix}A")] = pad(matrix.a, (0, 0, 0, missing)).contiguous()
        tensors[site_key(f"{prefix}B")] = pad(matrix.b, (0, missing)).contiguous()
    arrays = {key: as_array(tensor) for key, tensor in tensors.items()}
    save_and_compare(pack_stacks(target.stacks, arrays), draft / TENSORS_FILE)
    experts = expert_paths(target.stacks)
    config = plain_config(
        certificate.rank,
        [part.module.module for part in stored if part.module.module not in experts],
        base_model=target.base_model,
        revision=target.revision,
        task_type=target.task_type,
        modules_to_save=target.modules_to_save,
    )
    write_config(config | dict(target.targets or {}) | stack_fields(target.stacks), draft)


def _card(target: LoraOutput, certificate: LoraCertificate) -> str:
    outputs, compared = certificate.outputs, {}
    if outputs is not None:
        allowed = "" if outputs.bound is None else f", allowed {outputs.bound:.2e}"
        compared = {"largest logit error": f"{outputs.error.max_logit:.2e}{allowed}"}
    facts = {
        **{f"source {k}": source.path for k, source in enumerate(certificate.sources, 1)},
        **target.asked,
        "rank": str(certificate.rank),
        "stored as": certificate.dtype,
        **module_facts(certificate.modules),
        **matrix_facts(certificate.matrices),
        **compared,
        **base_facts(target.base_model, None),
        **{f"note {k}": note for k, note in enumerate(certificate.notes, 1)},
    }
    licence = None if target.base_model is None else known_licence(target.base_model, target.revision)
    return model_card(target.title, target.base_model, facts, target.command, licence=licence)
