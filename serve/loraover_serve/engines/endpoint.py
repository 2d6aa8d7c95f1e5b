"""Servers that speak OpenAI's protocol: after each token of a prompt, one new token with its logprobs is asked for.

A server that takes chats alone is asked for its greedy answer to each message, and is compared up to the first token
that is not PyTorch's. Logprobs of a prompt (`prompt_logprobs`) are never used: they can miss what an adapter adds to
the output head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from typing import Any, final

from loraover.client.at_once import at_once
from loraover.client.dialects import Dialect, Prompt, alone_with_text
from loraover.client.endpoint import Endpoint
from loraover.client.speaker import Speaker, find_models
from loraover.common.errors import ConfigError, EngineError, LoraOverError, UnscoredError
from loraover.common.request import as_written
from loraover.models.load import ModelSource, load_tokenizer
from loraover_serve.engines import EngineRequest
from loraover_serve.engines.base import Engine, Setting
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.limits import ADAPTER, BASE, OTHER
from loraover_serve.judge.models import Answers, Models, Rows

PROBE = "Hello"


class OpenAiEngine(Engine):
    """A running server.

    Args:
        names: Name of each arm's model on the server, and of another adapter if there is one.
        base: The base model; None if nothing is asked that needs its tokenizer.
    """

    def __init__(self, names: Mapping[str, str], base: ModelSource | None) -> None:
        self.names, self._base = dict(names), base

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the base model."""
        assert self._base is not None
        return load_tokenizer(self._base)

    @abstractmethod
    def speak(self) -> Speaker:
        """Find the dialect in which the server answers.

        Raises:
            EngineError: A server that answers in none of them, or without logprobs.
        """

    @cached_property
    def speaker(self) -> Speaker:
        """The server, with the dialect in which it answers."""
        return self.speak()

    def logprobs(self, arm: str, models: Models) -> Rows:
        asker = self._asker(models)
        return asker.rounds(arm, asker.places)[0].rows

    def answers(self, models: Models, *, without_mixed: bool = False) -> Answers:
        try:
            return self._asker(models).answers(without_mixed=without_mixed)
        except UnscoredError as error:
            if any(response.is_scored for response in self.speaker.responses):
                name = self.speaker.responses[-1].model
                message = f"{name}: the logprobs are not those of the base model's tokens"
                raise EngineError(self.speaker.endpoint.hidden(message)) from error
            raise

    def _asker(self, models: Models) -> Asker:
        url, form = self.speaker.endpoint.url, self.speaker.dialect.form
        if form == "chat" and not any(question.message for question in models.questions):
            raise ConfigError(
                f"{url} answers chats only, but the base model's tokenizer has no chat template, so the same question "
                f"cannot be put to PyTorch; use the tokenizer of the server's model ({as_written('model')}), or start "
                "the server "
                "so that it answers /v1/completions."
            )
        return Asker(models, self.speaker, self.names)

    def generate(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        def ask(prompt: Sequence[int]) -> tuple[int, ...]:
            form = prompt if self.speaker.dialect.form == "ids" else text_of(self.tokenizer, prompt)
            return () if form is None else self.speaker.answer(self.names[arm], form, tokens, scored=tokens).ids

        return at_once(ask, prompts)


@final
class EndpointEngine(OpenAiEngine):
    """A server that somebody else has started, with the adapter loaded.

    Args:
        speaker: The server, with the dialect in which it answers.
        names: See `OpenAiEngine`.
    """

    def __init__(self, speaker: Speaker, names: Mapping[str, str], base: ModelSource) -> None:
        super().__init__(names, base)
        self._speaker = speaker

    def speak(self) -> Speaker:
        return self._speaker

    @classmethod
    def lacking(cls, request: EngineRequest) -> str | None:
        return None

    def version(self) -> str | None:
        return None  # of the packages here

    def program(self, name: str) -> tuple[str, str] | None:
        return self.speaker.endpoint.engine()

    @classmethod
    def check(cls, setting: Setting) -> None:
        _opened(setting).close()

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[EndpointEngine]:
        with _spoken_to(setting) as (speaker, names):
            yield cls(speaker, names, setting.base)


def takes_chats_only(setting: Setting) -> bool:
    """Whether the server at the endpoint answers chats alone; False as well if it cannot be asked."""
    try:
        with _spoken_to(setting) as (speaker, _):
            return speaker.dialect.form == "chat"
    except LoraOverError:  # it will be told when the engine is asked
        return False


def as_chats(tokenizer: Any, prompts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    """Tokens of chats whose messages are these prompts, and the messages.

    Without a chat template the prompts stay as they are, and there are no messages.
    """
    if tokenizer.chat_template is None:
        return list(prompts), ()
    messages = tuple(str(tokenizer.decode(list(prompt), skip_special_tokens=True)) for prompt in prompts)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": each}], tokenize=False, add_generation_prompt=True)
        for each in messages
    ]
    return [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts], messages


def _opened(setting: Setting) -> Endpoint:
    """The server at the endpoint.

    Raises:
        ConfigError: An address or a key that cannot be used.
    """
    assert setting.server is not None
    return Endpoint(setting.server.url, setting.server.key_variable, timeout_s=setting.request.timeout_s)


@contextmanager
def _spoken_to(setting: Setting) -> Iterator[tuple[Speaker, dict[str, str]]]:
    """The server, and the name of each arm's model there."""
    server, endpoint = setting.server, _opened(setting)
    assert server is not None
    try:
        found = find_models(
            endpoint,
            lambda base: speak_as(endpoint, base, load_tokenizer(setting.base)),
            adapter=server.adapter,
            model=setting.base.name,
            base=server.base,
            named=setting.request.named,
        )
        other = found.find_other()
        yield found.speaker, {BASE: found.base, ADAPTER: found.adapter} | ({} if other is None else {OTHER: other})
    finally:
        endpoint.close()


def speak_as(endpoint: Endpoint, base: str, tokenizer: Any) -> Speaker:
    """Speak to a server, whose base model has this name, with the tokens of a tokenizer."""

    def probe(dialect: Dialect) -> Prompt:
        return list(tokenizer(PROBE).input_ids) if dialect.form == "ids" else PROBE

    return Speaker(endpoint, base, probe, partial(ids_by_text, tokenizer))


@lru_cache(maxsize=1)
def ids_by_text(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens whose text no other token has, in any of the spellings that servers use."""
    pieces = ((index, str(tokenizer.convert_ids_to_tokens(index))) for index in range(len(tokenizer)))
    return alone_with_text(
        (text, index)
        for index, piece in pieces
        for text in {tokenizer.decode([index]), piece, piece.replace("▁", " ")}  # as sentencepiece has it
    )


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str | None:
    """The text that a tokenizer turns into these tokens; None if there is none."""
    for skips in (True, False):  # special tokens, such as that at the beginning, which servers add
        text = str(tokenizer.decode(list(tokens), skip_special_tokens=skips))
        if text and tokenizer(text).input_ids == list(tokens):
            return text
    return None
