"""mlx-lm, which has an adapter format of its own.

Source: mlx_lm/tuner/utils.py and mlx_lm/tuner/lora.py of ml-explore/mlx-lm at d78bf58e217c; run with 0.32.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import final

from loraover_export.check.engines.base import (
    ADAPTER,
    OTHER_BASE,
    EngineRules,
    Target,
    Written,
    command,
    react,
    refused_by,
)
from loraover_export.check.report import Finding
from loraover_export.check.subject import Subject
from loraover_export.mlx.target import read_target, refuse_or_leave_out

MLX_FORM = {"quantised base": OTHER_BASE}


@final
class MlxRules(EngineRules):
    """mlx-lm."""

    reader = "mlx-lm 0.32.2"
    extra = "torch"

    def as_it_is(self, subject: Subject) -> Iterator[Finding]:
        yield Finding(
            feature="format",
            level="refused",
            found="PEFT's form; mlx-lm stops with an AttributeError, since it expects num_layers and lora_parameters "
            "in adapter_config.json, and transposed matrices in adapters.safetensors",
        )

    def exported(self, subject: Subject) -> Iterator[Finding]:
        if subject.lora is not None:
            yield from react(subject, MLX_FORM)
        yield from refused_by(lambda adapter, base: refuse_or_leave_out(adapter, read_target(base)), subject)

    def export(self, subject: Subject) -> str:
        return command(subject, "mlx", ending="-mlx")

    def write(self, source: Path, folder: Path, target: Target) -> Written:
        from loraover_export.mlx.report import CERTIFICATE_FILE
        from loraover_export.mlx.run import export_mlx

        report = export_mlx(source, folder / ADAPTER, model=target.model, dtype=target.dtype)
        return Written(ADAPTER, f"{ADAPTER}/{CERTIFICATE_FILE}", report.rank, report.matrices)
