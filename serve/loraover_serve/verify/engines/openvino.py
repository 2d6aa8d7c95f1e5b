"""OpenVINO GenAI in an environment of its own, with the adapter in the form that `loraover export vllm` writes.

It gives no logits. The scores of 20 beams of one token are the logprobs of the 20 likeliest next tokens.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final

import numpy as np

from loraover.checkpoint.peft_adapter import TENSORS_FILE
from loraover.common.errors import EngineError
from loraover_serve.engines.elsewhere import OPENVINO, Runner, end_process, local_folder, start_process, tail
from loraover_serve.verify.answers import ADAPTER, BASE, Question, Row
from loraover_serve.verify.engines.base import Setting, VerifyEngine
from loraover_serve.verify.engines.vllm import export_uniform

TOP = 20  # logprobs of each token, as servers give them
CONVERT = "from optimum.commands.optimum_cli import main; main()"
OPTIONS = ("--task", "text-generation-with-past", "--weight-format", "fp32", "--disable-convert-tokenizer")


@final
class OpenVino(VerifyEngine):
    """OpenVINO GenAI, in a pipeline without the adapter and then in one with it.

    Args:
        runner: the running engine.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.version = OPENVINO.version()

    @classmethod
    def install(cls, vllm: str) -> str | None:
        return OPENVINO.install()

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[VerifyEngine]:
        file = export_uniform(setting) / TENSORS_FILE
        arguments = {"model": str(_convert(setting)), "adapters": {BASE: None, ADAPTER: str(file)}}
        with OPENVINO.run(arguments, setting.scratch / "openvino.log", setting.request.start_timeout_s) as runner:
            yield cls(runner)

    def rows(self, arm: str, questions: Sequence[Question]) -> list[Row]:
        return [
            self._row(arm, index, question, position)
            for index, question in enumerate(questions)
            for position in question.answered
        ]

    def _row(self, arm: str, index: int, question: Question, position: int) -> Row:
        found = self._runner.ask("top", arm=arm, tokens=list(question.tokens[: position + 1]), number=TOP)
        ids, logprobs = zip(*found, strict=True)
        return Row(index, position, np.array(logprobs, dtype=np.float32), np.array(ids, dtype=np.int64))

    def greedy(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        return [tuple(self._runner.ask("greedy", arm=arm, prompt=list(prompt), tokens=tokens)) for prompt in prompts]


def _convert(setting: Setting) -> Path:
    """Export the base model with optimum-intel in float32, and return its folder."""
    output, log = setting.scratch / "model", setting.scratch / "optimum.log"
    setting.request.report.line(f"exporting {setting.base.name} with optimum-intel")
    words = [str(OPENVINO.python()), "-I", "-c", CONVERT, "export", "openvino", "--model", local_folder(setting.base)]
    with log.open("wb") as errors:
        process = start_process("openvino", [*words, *OPTIONS, str(output)], errors)
    try:
        process.communicate(timeout=setting.request.start_timeout_s)
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"openvino: optimum-intel takes more than {setting.request.start_timeout_s:g} s; raise "
            f"{setting.request.named('start_timeout_s')}."
        ) from None
    finally:
        end_process(process, 0)
    if process.returncode != 0:
        raise EngineError(f"openvino: optimum-intel cannot export {setting.base.name}: {tail(log)}")
    return output
