"""The fold of a checkpoint on disk: read, fold, certify, check outputs, publish."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from loraover.adapters.logits.verdict import CheckVerdict
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, matrix_facts
from loraover.checkpoint.adapter_config import write_config
from loraover.checkpoint.base_model import base_facts, naming
from loraover.checkpoint.carried_files import record_beside
from loraover.checkpoint.checkpoint import HASHED_LATER, Checkpoint, open_checkpoint
from loraover.checkpoint.files import CONFIG_FILE
from loraover.common.atomic_output import AbandonedError
from loraover.common.provenance import environment, hardware, today
from loraover.models.load import ModelSource
from loraover.sources.push import push_checked
from loraover.sources.verb import verb
from loraover_export.fold.certificate import FoldCertificate, OutputCertificate
from loraover_export.fold.check_outputs import check_outputs
from loraover_export.fold.fold import write_folded
from loraover_export.fold.report import HTML_FILE, to_page
from loraover_export.fold.trained_base import compare_bases
from loraover_export.publishing import FOLDED, base_of
from loraover_export.requests import FoldRequest


@verb(FoldRequest)
def fold_checkpoint(request: FoldRequest) -> FoldCertificate:
    """Contract a checkpoint's cores into a plain PEFT adapter on disk, and certify every matrix.

    Returns:
        The certificate, which the output holds too, beside `fold.html` with figures. If its verdict is "failed",
        nothing was written. If it is "inconclusive", the adapter was written, but it changes logits too little for
        `check_error` to distinguish it from an adapter that does nothing.

    Raises:
        ConfigError: Arguments that cannot be used, a base model that cannot be loaded, or memory that does not
            suffice for `check_error`; the message says what would fit.
        CheckpointError: A checkpoint that cannot be trusted, or that belongs to another base model.
        FoldError: An element beyond the range of `dtype`.
        DataError: A file of prompts that cannot be used.
        ExportError: An adapter that no reference can be recorded of, which is written all the same.
        OutputError: An output that cannot be written, or that exists and may not be replaced; or the hub refuses what
            was written.
    """
    FOLDED.check_output(request, request.checkpoint)
    source = open_checkpoint(request.checkpoint)
    source.check_keeps_base()
    base = base_of(request, source) if request.check_error else None
    with FOLDED.draft(request, request.checkpoint) as draft:
        certificate = _fold(request, source, base, draft.folder)
        if certificate.verdict == "failed":
            raise AbandonedError
        to_page(certificate, request.command()).write(draft.folder / HTML_FILE)
        certificate = draft.seal(certificate, request.checkpoint)
        name = certificate.base_model
        revision = base.revision if base is not None and name == base.name else source.config.revision
        draft.describe(name, revision, _facts(certificate, base))
        draft.keep_reference(request.checkpoint)
    if request.record and certificate.verdict != "failed":
        names = ("model", "device", "compute_dtype", "max_memory_gib", "report")
        record_beside(request.output, **{name: getattr(request, name) for name in names})
    if request.push_to_hub is not None:
        push_checked(request, certificate.verdict)
    return certificate


def _fold(request: FoldRequest, checkpoint: Checkpoint, base: ModelSource | None, draft: Path) -> FoldCertificate:
    """Write the folded adapter and judge it; with a base model, by its outputs too."""
    with request.report.task("folding tensors", len(checkpoint.shapes)) as done:
        sums = [partial(checkpoint.check_sum, name) for name in HASHED_LATER]
        matrices = write_folded(checkpoint, draft, request.dtype, done, sums)
    outputs, base_model = None, checkpoint.meta.base_model
    if base is not None:
        if base.moved is not None:
            write_config(naming(json.loads((draft / CONFIG_FILE).read_bytes()), base), draft)
            base_model = base.name
        outputs = check_outputs(request, checkpoint, draft, base)
    trained_base = None
    if base is not None and request.trained_on is not None:
        trained_base = compare_bases(request, draft, base, request.trained_on)
    return FoldCertificate(
        trained_base=trained_base,
        verdict=_verdict(matrices, outputs),
        base_model=base_model,
        dtype=request.dtype,
        decomposition=checkpoint.meta.config.decomposition,
        step=checkpoint.meta.step,
        seed=checkpoint.meta.config.seed,
        matrices=matrices,
        outputs=outputs,
        output_bound=None if outputs is None else outputs.bound,
        versions=environment(),
        hardware=hardware(),
        date=today(),
    )


def _verdict(matrices: list[MatrixCertificate], outputs: OutputCertificate | None) -> CheckVerdict:
    if not all(matrix.passed for matrix in matrices):
        return "failed"
    return "passed" if outputs is None else outputs.verdict


def _facts(certificate: FoldCertificate, base: ModelSource | None) -> dict[str, str]:
    facts = {
        "decomposition in training": certificate.decomposition,
        "optimizer steps": str(certificate.step),
        "stored as": certificate.dtype,
        **matrix_facts(certificate.matrices),
        **base_facts(certificate.base_model, base),
    }
    outputs = certificate.outputs
    if outputs is not None:
        if certificate.trained_base is not None:
            facts["trained on"] = str(certificate.trained_base)
        facts["largest logit error"] = f"{outputs.error.max_logit:.2e}, allowed {outputs.bound:.2e}"
    return facts
