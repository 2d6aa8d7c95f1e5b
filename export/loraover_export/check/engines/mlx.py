"""mlx-lm, which has an adapter format of its own.

Source: mlx_lm/tuner/utils.py and mlx_lm/tuner/lora.py of ml-explore/mlx-lm at d78bf58e217c; run with 0.32.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from loraover_export.check.engines.base import OTHER_BASE, Engine, command, more_than_ab, react, refused
from loraover_export.check.report import Finding
from loraover_export.check.subject import Subject

MLX_FORM = {
    "task": refused("mlx-lm runs causal language models only"),
    "tied embedding": refused("mlx-lm would adapt the head as well"),
    "tied head": refused("mlx-lm's model has no separate head to adapt"),
    "quantised base": OTHER_BASE,
}


@final
class Mlx(Engine):
    """mlx-lm."""

    reader = "mlx-lm 0.32.2"

    def as_it_is(self, subject: Subject) -> Iterator[Finding]:
        yield Finding(
            feature="format",
            level="refused",
            found="PEFT's form; mlx-lm stops with an AttributeError, since it expects num_layers and lora_parameters "
            "in adapter_config.json, and transposed matrices in adapters.safetensors",
        )

    def exported(self, subject: Subject) -> Iterator[Finding]:
        yield from more_than_ab(subject)
        yield from react(subject, MLX_FORM) if subject.lora is not None else ()

    def export(self, subject: Subject) -> str:
        return command(subject, "mlx", ending="-mlx")
