"""OpenVINO GenAI in a separate environment, with the adapter in the form that `loraover export vllm` writes.

It gives no logits. The scores of 20 beams of one token are the logprobs of the 20 likeliest next tokens.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

from loraover.adapters.base_weights import folder_of
from loraover.checkpoint.files import TENSORS_FILE
from loraover.common.errors import EngineError
from loraover_serve.engines.base import Setting
from loraover_serve.engines.elsewhere import ElsewhereEngine, end_process, start_process, tail
from loraover_serve.engines.vllm import export_uniform
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Models, Row, Rows

TOP = 20  # logprobs of each token, as servers give them
CONVERT = "from optimum.commands.optimum_cli import main; main()"
OPTIONS = ("--task", "text-generation-with-past", "--weight-format", "fp32", "--disable-convert-tokenizer")


@final
class OpenVinoEngine(ElsewhereEngine):
    """OpenVINO GenAI, in a pipeline without the adapter and then in one with it."""

    name = "openvino"
    distributions = ("openvino-genai",)
    variable = "LORAOVER_OPENVINO"
    hint = "pip install openvino-genai 'optimum-intel[openvino]', in a separate environment"

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[OpenVinoEngine]:
        file = export_uniform(setting) / TENSORS_FILE
        arguments = {"model": str(cls.convert(setting)), "adapters": {BASE: None, ADAPTER: str(file)}}
        with cls.run(arguments, setting.log, setting.request.start_timeout_s) as runner:
            yield cls(runner, setting.scratch)

    @classmethod
    def convert(cls, setting: Setting) -> Path:
        """Export the base model with optimum-intel in float32, and return its folder."""
        output, log = setting.scratch / "model", setting.log.with_name("optimum.log")
        request, python, model = setting.request, str(cls.python()), str(folder_of(setting.base).resolve())
        request.report.line(f"exporting {setting.base.name} with optimum-intel")
        words = [python, "-I", "-c", CONVERT, "export", "openvino", "--model", model, *OPTIONS, str(output)]
        with log.open("wb") as errors:
            process = start_process("openvino", words, errors)
        try:
            process.communicate(timeout=request.start_timeout_s)
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"openvino: optimum-intel takes more than {request.start_timeout_s:g} s; raise "
                f"{request.named('start_timeout_s')}."
            ) from None
        finally:
            end_process(process, 0)
        if process.returncode != 0:
            raise EngineError(f"openvino: optimum-intel cannot export {setting.base.name}: {tail(log)}")
        return output

    def logprobs(self, arm: str, models: Models) -> Rows:
        found: dict[int, Row] = {}
        for place, (_, step) in enumerate(models.places):
            if step >= 0:
                top = self._runner.ask("top", arm=arm, tokens=models.read(place), number=TOP)
                found[place] = {int(index): float(logprob) for index, logprob in top}
        return found
