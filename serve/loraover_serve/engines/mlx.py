"""mlx-lm in a separate environment, on an adapter that is exported for the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import numpy as np

from loraover.adapters.base_weights import folder_of
from loraover.common.errors import ExportError
from loraover_export.formats.mlx import export_mlx
from loraover_serve.engines.base import LogitEngine, Setting
from loraover_serve.engines.elsewhere import ElsewhereEngine
from loraover_serve.judge.limits import ADAPTER, BASE


@final
class MlxEngine(ElsewhereEngine, LogitEngine):
    """mlx-lm, which loads the base model in float32 and adapts it for the second arm."""

    name = "mlx"
    distributions = ("mlx-lm",)
    variable = "LORAOVER_MLX"
    hint = "pip install mlx-lm, and without a Mac mlx-cpu, in a separate environment"

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[MlxEngine]:
        folder, request = setting.scratch / ADAPTER, setting.request
        exported = export_mlx(setting.adapter, folder, model=setting.base.location)
        if not exported.passed:
            raise ExportError("mlx: a matrix of the exported adapter is not within its error bound.")
        if exported.lost_settings:
            names = ", ".join(exported.lost_settings)
            request.report.line(
                f"mlx-lm does not find {names} in the model's config.json, so the value is passed to it"
            )
        arguments = {
            "model": str(folder_of(setting.base).resolve()),
            "settings": exported.lost_settings,
            "adapters": {BASE: None, ADAPTER: str(folder)},
        }
        with cls.run(arguments, setting.log, request.start_timeout_s) as runner:
            yield cls(runner, setting.scratch)

    def logits(self, arm: str, sequences: Iterable[Sequence[int]]) -> Iterator[Any]:
        file = self._scratch / "logits.npy"
        for tokens in sequences:
            self._runner.ask("logits", arm=arm, tokens=list(tokens), file=str(file))
            yield np.load(file, allow_pickle=False)
