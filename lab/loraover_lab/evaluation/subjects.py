"""Models that answer questions: in memory, or behind an endpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover.checkpoint.target_modules import check_patterns
from loraover.checkpoint.tensor_file import open_tensors
from loraover.client.at_once import at_once
from loraover.common.errors import CheckpointError
from loraover.models.load import ModelSource, is_encoder_decoder, load_model

if TYPE_CHECKING:
    from loraover.client.endpoint import Endpoint
    from loraover.common.reporter import Reporter

Chat = list[dict[str, Any]]


class Answerer(ABC):
    """A model that answers."""

    tokenizer: Any

    @abstractmethod
    def answers(
        self, prompts: Sequence[str | Chat], *, max_new_tokens: int, report: Reporter, stop: Sequence[str] = ()
    ) -> list[str]:
        """Continue each text, or answer each conversation in the model's chat format, greedily.

        Args:
            prompts: Only texts, or only conversations.
            max_new_tokens: Largest number of tokens in an answer.
            stop: Texts after which the continuation of a text may end; it may also be longer.
        """

    @abstractmethod
    def harness_model(self) -> Any:
        """Return the model as lm-evaluation-harness takes it; it raises EngineError when its engine fails."""


@dataclass(frozen=True)
class InMemory(Answerer):
    """A PyTorch model, with or without an adapter."""

    model: Any
    tokenizer: Any
    batch_size: int

    def answers(
        self, prompts: Sequence[str | Chat], *, max_new_tokens: int, report: Reporter, stop: Sequence[str] = ()
    ) -> list[str]:
        from loraover.training.run.answers import greedy_answers

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

    def harness_model(self) -> Any:
        from loraover_lab.evaluation.harness_models import HarnessModel

        return HarnessModel(pretrained=self.model, tokenizer=self.tokenizer, batch_size=self.batch_size)


@dataclass(frozen=True)
class EndpointAnswerer(Answerer):
    """A model or adapter behind an OpenAI-compatible endpoint."""

    endpoint: Endpoint
    name: str
    tokenizer: Any
    batch_size: int

    def answers(
        self, prompts: Sequence[str | Chat], *, max_new_tokens: int, report: Reporter, stop: Sequence[str] = ()
    ) -> list[str]:
        def ask(prompt: str | Chat) -> str:
            if isinstance(prompt, str):
                return self.endpoint.ask(self.name, prompt, max_tokens=max_new_tokens, stop=stop)
            return self.endpoint.chat(self.name, prompt, max_tokens=max_new_tokens)

        with report.task("answers", len(prompts)) as advance:
            return at_once(ask, prompts, self.batch_size, advance)

    def harness_model(self) -> Any:
        from loraover_lab.evaluation.harness_models import HarnessClient

        return HarnessClient(self.endpoint, self.name, self.tokenizer, self.batch_size)


def in_memory(source: ModelSource, tokenizer: Any, adapter: Path | None, *, dtype: str, batch_size: int) -> InMemory:
    """Load the base model, with the PEFT adapter of a folder if there is one.

    Raises:
        ConfigError: No such model.
        CheckpointError: The folder holds no adapter, or one for another model, or one with NaN or infinity.
    """
    import torch

    task = "SEQ_2_SEQ_LM" if is_encoder_decoder(source) else "CAUSAL_LM"
    model = load_model(source, dtype=dtype, task_type=task)
    if adapter is not None:
        from peft import PeftModel
        from safetensors import SafetensorError

        with open_tensors(adapter / TENSORS_FILE) as tensors:
            for key in tensors.keys:
                tensors.read(key)  # which refuses NaN and infinity: any answer could come of them
        check_patterns(adapter / CONFIG_FILE, [path for path, _ in model.named_modules()])
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter))
            # Loaded again, since only this returns which tensors did not fit.
            loaded = wrapped.load_adapter(str(adapter), "default")
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise CheckpointError(f"{adapter}: PEFT cannot put it on this model: {error}") from error
        for keys, fault in ((loaded.missing_keys, "lacks"), (loaded.unexpected_keys, "holds, without a place for it,")):
            if keys:
                raise CheckpointError(f"{adapter}: {fault} {keys[0]}; is it an adapter of this model?")
        model = wrapped.eval()
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return InMemory(model, tokenizer, batch_size)
