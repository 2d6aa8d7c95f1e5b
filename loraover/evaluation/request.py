"""What an evaluation is asked for, checked before anything is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraover.client.endpoint import Endpoint
from loraover.common.dtypes import short_dtype
from loraover.common.errors import ConfigError
from loraover.evaluation import TASKS
from loraover.evaluation.base import Options
from loraover.evaluation.judge import Judge


@dataclass(frozen=True)
class EvaluationRequest:
    """The arguments of `evaluate`, see there.

    Raises:
        ConfigError: an unknown task or data type, a number below 1, or options that do not go together.
    """

    model: str
    task: str
    adapters: tuple[Path, ...] = ()
    data: str | None = None
    limit: int | None = None
    endpoint: str | None = None
    endpoint_models: tuple[str, ...] = ()
    endpoint_key_variable: str | None = None
    batch_size: int = 8
    dtype: str = "fp32"
    max_new_tokens: int | None = None
    apply_chat_template: bool | None = None
    allow_code_execution: bool = False
    judge_url: str | None = None
    judge_model: str | None = None
    judge_key_variable: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"--task {self.task!r}: expected one of {', '.join(TASKS)}.")
        for name in ("limit", "batch_size", "max_new_tokens"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{_option(name)} is {number}, expected 1 or more.")
        object.__setattr__(self, "dtype", short_dtype(self.dtype))
        if (self.judge_url is None) != (self.judge_model is None):
            raise ConfigError("--judge-url and --judge-model go together.")
        if self.endpoint is not None and (not self.endpoint_models or self.adapters):
            raise ConfigError("--endpoint needs --endpoint-model for each model it serves, and takes no --adapter.")
        if self.endpoint is not None and self.dtype != "fp32":
            raise ConfigError("--dtype is for models in memory; the server of --endpoint chooses its own.")
        if self.endpoint is None and self.endpoint_models:
            raise ConfigError("--endpoint-model names models of an --endpoint; add its address.")
        if self.endpoint is None and self.endpoint_key_variable is not None:
            raise ConfigError("--endpoint-key-variable is for an --endpoint; add its address.")
        if self.judge_url is None and self.judge_key_variable is not None:
            raise ConfigError("--judge-key-variable is for a judge; add --judge-url and --judge-model.")

    def options(self) -> Options:
        """What tasks read.

        Raises:
            ConfigError: the judge's address or key cannot be used.
        """
        judge = None
        if self.judge_url is not None and self.judge_model is not None:
            judge = Judge(Endpoint(self.judge_url, self.judge_key_variable), self.judge_model)
        return Options(
            data=self.data,
            limit=self.limit,
            max_new_tokens=self.max_new_tokens,
            apply_chat_template=self.apply_chat_template,
            allow_code_execution=self.allow_code_execution,
            judge=judge,
        )

    def server(self) -> Endpoint | None:
        """The server that answers; None for models in memory.

        Raises:
            ConfigError: its address or key cannot be used.
        """
        return None if self.endpoint is None else Endpoint(self.endpoint, self.endpoint_key_variable)

    def command(self, output: Path | None) -> str:
        """Command line of this evaluation."""
        words = ["loraover", "eval", self.model, "--task", self.task]
        words += _repeated("--adapter", self.adapters) + _repeated("--endpoint-model", self.endpoint_models)
        for name in ("data", "limit", "endpoint", "endpoint_key_variable", "batch_size", "dtype", "max_new_tokens"):
            words += _given(name, getattr(self, name))
        for name in ("judge_url", "judge_model", "judge_key_variable"):
            words += _given(name, getattr(self, name))
        if self.apply_chat_template is not None:
            words.append(f"--{'' if self.apply_chat_template else 'no-'}apply-chat-template")
        words += ["--allow-code-execution"] * self.allow_code_execution
        return shlex.join([*words, *(() if output is None else ("-o", str(output)))])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _given(name: str, value: object) -> list[str]:
    return [] if value is None else [_option(name), str(value)]


def _repeated(option: str, values: Sequence[object]) -> list[str]:
    return [word for value in values for word in (option, str(value))]
