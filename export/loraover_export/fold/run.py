"""The fold of a checkpoint on disk: read, contract its cores, certify, check outputs, publish."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Event

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, matrix_facts
from loraover.adapters.numerics.rounding import write_rounded
from loraover.checkpoint.adapter_config import write_config
from loraover.checkpoint.base_model import base_facts, naming
from loraover.checkpoint.carried_files import record_beside
from loraover.checkpoint.checkpoint import HASHED_LATER, Checkpoint, open_checkpoint
from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.atomic_output import AbandonedError
from loraover.common.provenance import environment, hardware_used, today
from loraover.common.threads import workers
from loraover.models.load import ModelSource
from loraover.sources.hub import push_checked
from loraover.sources.verb import verb
from loraover_export.fold.report import HTML_FILE, FoldCertificate, to_page
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
        with workers() as threads:
            digest = threads.start(sha256_of, draft.folder / TENSORS_FILE)
            to_page(certificate, request.command()).write(draft.folder / HTML_FILE)
            certificate = draft.seal(certificate, request.checkpoint, {TENSORS_FILE: digest.result()})
        name = certificate.base_model
        revision = base.revision if base is not None and name == base.name else source.config.revision
        facts = {
            "decomposition in training": certificate.decomposition,
            "optimizer steps": str(certificate.step),
            "stored as": certificate.dtype,
            **matrix_facts(certificate.matrices),
            **base_facts(name, base),
        }
        if certificate.outputs is not None:
            if certificate.trained_base is not None:
                facts["trained on"] = str(certificate.trained_base)
            error, bound = certificate.outputs.error.max_logit, certificate.outputs.bound
            facts["largest logit error"] = f"{error:.2e}, allowed {bound:.2e}"
        draft.describe(name, revision, facts)
        draft.keep_reference(request.checkpoint)
    if request.record and certificate.verdict != "failed":
        names = ("model", "device", "compute_dtype", "max_memory_gib", "report")
        record_beside(request.output, **{name: getattr(request, name) for name in names})
    if request.push_to_hub is not None:
        push_checked(request, certificate.verdict)
    return certificate


def _fold(request: FoldRequest, checkpoint: Checkpoint, base: ModelSource | None, draft: Path) -> FoldCertificate:
    """Write the folded adapter and certify it; with a base model, its outputs too."""
    with request.report.task("folding tensors", len(checkpoint.shapes)) as done:
        sums = [partial(checkpoint.check_sum, name) for name in HASHED_LATER]
        matrices = write_folded(checkpoint, draft, request.dtype, done, sums)
    outputs, trained_base, base_model = None, None, checkpoint.meta.base_model
    if base is not None:
        if base.moved is not None:
            write_config(naming(json.loads((draft / CONFIG_FILE).read_bytes()), base), draft)
            base_model = base.name
        from loraover_export.fold.check_outputs import check_outputs, compare_bases  # they need PyTorch

        outputs = check_outputs(request, checkpoint, draft, base)
        if request.trained_on is not None:
            trained_base = compare_bases(request, draft, base, request.trained_on)
    is_within = all(matrix.passed for matrix in matrices)
    return FoldCertificate(
        trained_base=trained_base,
        verdict="failed" if not is_within else "passed" if outputs is None else outputs.verdict,
        base_model=base_model,
        dtype=request.dtype,
        decomposition=checkpoint.meta.config.decomposition,
        step=checkpoint.meta.step,
        seed=checkpoint.meta.config.seed,
        matrices=matrices,
        outputs=outputs,
        output_bound=None if outputs is None else outputs.bound,
        versions=environment(),
        hardware=hardware_used(),
        date=today(),
    )


def write_folded(
    checkpoint: Checkpoint,
    directory: Path,
    dtype: str,
    on_tensor: Callable[[int], None] = lambda done: None,
    beside: Sequence[Callable[[Event], None]] = (),
) -> list[MatrixCertificate]:
    """Write the folded adapter, an ordinary PEFT folder, and certify each matrix.

    Each over-parameterised matrix is the float64 contraction of its cores, rounded once to `dtype`; every
    other floating-point tensor is rounded from its stored value, but that of a frozen base weight, which PEFT saves
    beside an adapted embedding and loads over the base model's, is written as it is stored. The bound is derived
    element by element: gamma_k(2^-53) |C_1| ... |C_K| for the contraction, plus u |M| for the rounding, or half a
    subnormal below the type's normal numbers. The file is read back, and must equal the certified tensors bit for bit.

    Returns:
        One certificate per A and B matrix, in file order.
    """
    keys = checkpoint.shapes
    certificates = write_rounded(checkpoint, keys, directory, dtype, on_tensor=on_tensor, beside=beside)
    config = json.loads((checkpoint.path / CONFIG_FILE).read_bytes())
    write_config(config | {"inference_mode": True}, directory)
    return certificates
