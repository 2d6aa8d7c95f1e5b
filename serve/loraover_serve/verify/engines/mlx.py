"""mlx-lm in an environment of its own, on an adapter that is exported for the comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np

from loraover.common.errors import ExportError
from loraover_export.mlx.run import export_mlx
from loraover_serve.engines.elsewhere import MLX, Runner, local_folder
from loraover_serve.verify.answers import ADAPTER, BASE
from loraover_serve.verify.engines.base import LogitEngine, Setting, VerifyEngine


@final
class Mlx(LogitEngine):
    """mlx-lm, which loads the base model in float32 and adapts it for the second arm.

    Args:
        runner: the running engine.
        scratch: folder for logits.
    """

    def __init__(self, runner: Runner, scratch: Path) -> None:
        self._runner, self._file = runner, scratch / "logits.npy"
        self.version = MLX.version()

    @classmethod
    def install(cls, vllm: str) -> str | None:
        return MLX.install()

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[VerifyEngine]:
        folder = setting.scratch / ADAPTER
        exported = export_mlx(setting.adapter, folder, model=setting.base.location)
        if not exported.passed:
            raise ExportError("mlx: a matrix of the exported adapter is not within its error bound.")
        if exported.lost_settings:
            names = ", ".join(exported.lost_settings)
            setting.request.report.line(
                f"mlx-lm does not find {names} in the model's config.json, and is given it here"
            )
        arguments = {
            "model": local_folder(setting.base),
            "settings": exported.lost_settings,
            "adapters": {BASE: None, ADAPTER: str(folder)},
        }
        with MLX.run(arguments, setting.scratch / "mlx.log", setting.request.start_timeout_s) as runner:
            yield cls(runner, setting.scratch)

    def logits(self, arm: str, tokens: Sequence[int]) -> Any:
        self._runner.ask("logits", arm=arm, tokens=list(tokens), file=str(self._file))
        return np.load(self._file, allow_pickle=False)

    def greedy(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        return [tuple(self._runner.ask("greedy", arm=arm, prompt=list(prompt), tokens=tokens)) for prompt in prompts]
