"""The arguments of a verification, checked before anything starts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraover.common.errors import ConfigError
from loraover.models.device import choose_device
from loraover_serve.verify.engines import ENDPOINT, ENGINES, engine_class
from loraover_serve.vllm.serve import SET_BY_SERVE, option_faults

SET_BY_VERIFY = dict.fromkeys(SET_BY_SERVE, "verify sets it")
"""Options of `vllm serve` that a verification sets itself."""


@dataclass(frozen=True)
class VerifyRequest:
    """The arguments of `verify_adapter`, which documents them.

    Raises:
        ConfigError: arguments that cannot be used; the message names all of them.
    """

    adapter: Path
    engines: tuple[str, ...]
    endpoint: str | None
    served_name: str | None
    base_name: str | None
    endpoint_key_variable: str | None
    model: str | None
    prompts: Path | None
    new_tokens: int
    device: str
    vllm: str
    timeout_s: float
    start_timeout_s: float
    output: Path | None
    base_gguf: Path | None = None
    graph: Path | None = None
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = [*self._engine_faults(), *self._endpoint_faults()]
        if self.new_tokens < 1:
            faults.append(f"--new-tokens is {self.new_tokens}, expected 1 at least.")
        for option, seconds in (("timeout", self.timeout_s), ("start-timeout", self.start_timeout_s)):
            if not seconds >= 1:
                faults.append(f"--{option} is {seconds}, expected 1 second at least.")
        if faults:
            raise ConfigError(" ".join(faults))
        choose_device(self.device)

    def _engine_faults(self) -> Iterator[str]:
        unknown = [engine for engine in self.engines if engine not in ENGINES]
        if unknown:
            yield f"--engine is {', '.join(unknown)}, expected some of {', '.join(ENGINES)}."
            return
        if len(set(self.engines)) < len(self.engines):
            yield f"--engine names one twice: {', '.join(self.engines)}; name each once."
        if self.options:
            takers = [engine for engine in self.engines if engine_class(engine).takes_options]
            if len(takers) != 1:
                yield "the words after -- are for an engine that has a command line; add --engine vllm."
            yield from option_faults(self.options, SET_BY_VERIFY)
        if self.base_gguf is not None and "llamacpp" not in self.engines:
            yield "--base-gguf is for llama.cpp; add --engine llamacpp."
        if self.graph is not None and "onnx" not in self.asked:
            yield "--graph is for ONNX Runtime; add --engine onnx."

    def _endpoint_faults(self) -> Iterator[str]:
        if (self.endpoint is None) != (self.served_name is None):
            yield "--endpoint and --served-name go together: the server's address, and the adapter's name on it."
        for option, given in (("base-name", self.base_name), ("endpoint-key-variable", self.endpoint_key_variable)):
            if given is not None and self.endpoint is None:
                yield f"--{option} is for a server at --endpoint."

    @property
    def asked(self) -> tuple[str, ...]:
        """The engines with the server at --endpoint; ONNX Runtime if neither is given."""
        given = (*self.engines, *(() if self.endpoint is None else (ENDPOINT,)))
        return given or ("onnx",)

    def command(self) -> str:
        """The command line, for the report; it names the variable with the key, and not the key."""
        words = ["loraover", "serve", "verify", str(self.adapter)]
        words += [word for engine in self.asked if engine in ENGINES for word in ("--engine", engine)]
        values = {
            "--endpoint": self.endpoint,
            "--served-name": self.served_name,
            "--base-name": self.base_name,
            "--endpoint-key-variable": self.endpoint_key_variable,
            "--model": self.model,
            "--prompts": self.prompts,
            "--base-gguf": self.base_gguf,
            "--graph": self.graph,
            "--output": self.output,
        }
        words += [word for option, value in values.items() if value is not None for word in (option, str(value))]
        words += ["--new-tokens", str(self.new_tokens), "--device", self.device]
        if "vllm" in self.engines:
            words += ["--vllm", self.vllm]
        words += ["--start-timeout", str(self.start_timeout_s), "--timeout", str(self.timeout_s)]
        words += ["--", *self.options] if self.options else []
        return shlex.join(words)
