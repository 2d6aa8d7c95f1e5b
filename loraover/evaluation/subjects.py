"""The models that questions are put to: in memory, or behind an endpoint."""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraover.checkpoint.peft_adapter import CONFIG_FILE, TENSORS_FILE, AdapterConfig
from loraover.common.errors import CheckpointError, DataError
from loraover.common.strict_json import read_json
from loraover.evaluation.parallel import in_parallel
from loraover.models.load import ModelSource, is_encoder_decoder, load_model

if TYPE_CHECKING:
    from loraover.evaluation.endpoint import Endpoint
    from loraover.reporting.reporter import Reporter

Chat = list[dict[str, str]]


class Subject(ABC):
    """A model that answers."""

    tokenizer: Any

    @abstractmethod
    def complete(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], report: Reporter
    ) -> list[str]:
        """Greedy continuations, which may go on behind a text of `stop`."""

    @abstractmethod
    def chat(self, chats: Sequence[Chat], *, max_new_tokens: int, report: Reporter) -> list[str]:
        """Greedy answers in the model's chat format."""

    @abstractmethod
    def harness_model(self) -> Any:
        """The same model for lm-evaluation-harness; raises EngineError there when an engine fails."""


@dataclass(frozen=True)
class InMemory(Subject):
    """A PyTorch model, with or without an adapter."""

    model: Any
    tokenizer: Any
    batch_size: int

    def complete(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], report: Reporter
    ) -> list[str]:
        return self._answers(prompts, max_new_tokens, stop, report)

    def chat(self, chats: Sequence[Chat], *, max_new_tokens: int, report: Reporter) -> list[str]:
        return self._answers(chats, max_new_tokens, (), report)

    def harness_model(self) -> Any:
        from loraover.evaluation.harness_model import HarnessModel

        return _bars_on_terminals(
            HarnessModel(pretrained=self.model, tokenizer=self.tokenizer, batch_size=self.batch_size)
        )

    def _answers(self, prompts: Sequence[Any], max_new_tokens: int, stop: Sequence[str], report: Reporter) -> list[str]:
        from loraover.evaluation.generation import greedy_answers

        self._check_room(prompts)
        with report.task("answers", len(prompts)) as advance:
            return greedy_answers(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=self.batch_size,
                stop=stop,
                on_batch=advance,
            )

    def _check_room(self, prompts: Sequence[Any]) -> None:
        """Raise DataError of a prompt that leaves no room for an answer."""
        from loraover.evaluation.generation import prompt_text

        context = getattr(self.model.config, "max_position_embeddings", None)  # T5 has none
        for number, prompt in enumerate(prompts, 1):
            count = len(self.tokenizer(prompt_text(prompt, self.tokenizer)).input_ids)
            if context is not None and count >= context:
                raise DataError(
                    f"question {number}: its {count} tokens leave no room in the model's context of {context}; leave "
                    "it out of --data, or take a model with a longer context."
                )


@dataclass(frozen=True)
class Served(Subject):
    """A model or adapter behind an OpenAI-compatible endpoint.

    Args:
        tokenizer_location: of the base model, for the harness.
        batch_size: requests at the same time.
    """

    endpoint: Endpoint
    name: str
    tokenizer: Any
    tokenizer_location: str
    batch_size: int

    def complete(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], report: Reporter
    ) -> list[str]:
        def ask(prompt: str) -> str:
            return self.endpoint.complete(self.name, prompt, max_tokens=max_new_tokens, stop=stop)

        return in_parallel(ask, prompts, self.batch_size, "answers", report)

    def chat(self, chats: Sequence[Chat], *, max_new_tokens: int, report: Reporter) -> list[str]:
        def ask(chat: Chat) -> str:
            return self.endpoint.chat(self.name, chat, max_tokens=max_new_tokens)

        return in_parallel(ask, chats, self.batch_size, "answers", report)

    def harness_model(self) -> Any:
        from loraover.evaluation.harness_client import HarnessClient

        return _bars_on_terminals(
            HarnessClient(
                self.endpoint,
                model=self.name,
                tokenizer_backend="huggingface",
                tokenizer=self.tokenizer_location,
                num_concurrent=self.batch_size,
                max_length=sys.maxsize,  # else the harness cuts questions to 2048 tokens; the server knows its context
            )
        )


def _bars_on_terminals(model: Any) -> Any:
    """The harness's model with its progress bars on a terminal only; the harness has no setting for that."""
    if not sys.stderr.isatty():
        for name in ("generate_until", "loglikelihood"):
            setattr(model, name, partial(getattr(model, name), disable_tqdm=True))
    return model


def in_memory(source: ModelSource, tokenizer: Any, adapter: Path | None, *, dtype: str, batch_size: int) -> InMemory:
    """The base model as a subject, with an adapter as PEFT loads it.

    Raises:
        ConfigError: no such model.
        CheckpointError: the adapter is none, or is for another model.
    """
    import torch

    task = "SEQ_2_SEQ_LM" if is_encoder_decoder(source) else "CAUSAL_LM"
    model = load_model(source, dtype=dtype, task_type=task)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return InMemory(model, tokenizer, batch_size)


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter))
        loaded = wrapped.load_adapter(str(adapter), "default")  # again, since only this says what did not fit
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{adapter}: PEFT cannot put it on this model: {error}") from error
    for keys, fault in ((loaded.missing_keys, "lacks"), (loaded.unexpected_keys, "holds, without a place for it,")):
        if keys:
            raise CheckpointError(f"{adapter}: {fault} {keys[0]}; is it an adapter of this model?")
    return wrapped.eval()


def adapter_digest(adapter: Path) -> str:
    """SHA-256 of the adapter's configuration and tensors.

    Raises:
        CheckpointError: not an adapter directory with safetensors.
    """
    read_json(adapter / CONFIG_FILE, AdapterConfig)
    digest = hashlib.sha256()
    try:
        for name in (CONFIG_FILE, TENSORS_FILE):
            with (adapter / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise CheckpointError(f"{adapter / name}: cannot be read: {error.strerror}.") from error
    return digest.hexdigest()
