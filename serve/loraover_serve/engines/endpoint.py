"""Servers that speak OpenAI's protocol: after each token of a prompt, one new token with its logprobs is asked for.

A server that takes chats alone is asked for its greedy answer to each message, and is compared up to the first token
that is not PyTorch's. Logprobs of a prompt (`prompt_logprobs`) are never used: they can miss what an adapter adds to
the output head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, final

import numpy as np

from loraover.client.at_once import COMPANION_TOKENS, at_once, in_company
from loraover.client.dialects import Dialect, Prompt
from loraover.client.endpoint import Endpoint
from loraover.client.speaker import Generated, Response, Speaker, find_models
from loraover.common.errors import ConfigError, EngineError, LoraOverError
from loraover.models.load import ModelSource, load_tokenizer
from loraover_serve.engines.answers import ADAPTER, BASE, OTHER, GreedyAnswer, Question, Row
from loraover_serve.engines.base import Engine, Setting
from loraover_serve.engines.request import EngineRequest
from loraover_serve.engines.texts import ids_by_text, text_of
from loraover_serve.judge.evidence import ReadChat

PROBE = "Hello"


class OpenAiEngine(Engine):
    """A running server.

    Args:
        names: Name of each arm's model on the server, and of another adapter if there is one.
        base: The base model; None if nothing is asked that needs its tokenizer.
        messages: Message of each question's chat, for a server that takes chats alone.
    """

    def __init__(self, names: Mapping[str, str], base: ModelSource | None, messages: Sequence[str] = ()) -> None:
        self.names, self._base, self._messages = dict(names), base, messages
        self._chats: list[ReadChat] = []

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

    @property
    def responses(self) -> Sequence[Response]:
        return self.speaker.responses

    @property
    def chats(self) -> Sequence[ReadChat] | None:
        return self._chats if self.is_chat else None

    @property
    def is_chat(self) -> bool:
        """Whether the server takes chats alone."""
        return self.speaker.dialect.form == "chat"

    def logprobs(self, arm: str, questions: Sequence[Question]) -> list[Row]:
        found = at_once(lambda place: self._rows(arm, questions, *place), self._places(questions))
        return [row for rows in found for row in rows]

    def mixed(self, questions: Sequence[Question]) -> dict[str, list[Row]] | None:
        beside = {BASE: (BASE, ADAPTER), ADAPTER: (ADAPTER, BASE), OTHER: (ADAPTER, OTHER)}
        found = {}
        for name, (arm, companion) in beside.items():
            if companion in self.names:
                with in_company(self._companion(companion, questions)):
                    found[name] = self.logprobs(arm, questions)
        return found

    def _companion(self, arm: str, questions: Sequence[Question]) -> Callable[[], object]:
        """Asks an arm for one short answer."""
        longest = max(len(question.tokens) for question in questions)  # of which the server certainly takes as many
        prompt, tokens = self._places(questions)[0][2], max(min(COMPANION_TOKENS, longest - 1), 1)
        first = prompt if isinstance(prompt, str) else prompt[:1]
        return lambda: self.speaker.answer(self.names[arm], first, tokens)

    def generate(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        found = at_once(lambda index: self._generate(arm, index, prompts[index], tokens), range(len(prompts)))
        return [() if answer is None else answer.ids for answer in found]

    def generated(self, questions: Sequence[Question], tokens: int) -> list[GreedyAnswer]:
        def ask(index: int) -> GreedyAnswer:
            question = questions[index]
            answer = self._generate(ADAPTER, index, question.prompt, tokens)
            if answer is None:
                return GreedyAnswer((), 0)
            rows = _shared_rows(index, len(question.prompt) - 1, question, answer)
            length = max(len(answer.ids), len(answer.tops))
            return GreedyAnswer(answer.ids, length, tuple(rows[: len(question.answered)]))

        return at_once(ask, range(len(questions)))

    def _generate(self, arm: str, index: int, prompt: Sequence[int], tokens: int) -> Generated | None:
        form = self._prompt(index, prompt)
        return None if form is None else self.speaker.answer(self.names[arm], form, tokens, scored=tokens)

    def _places(self, questions: Sequence[Question]) -> list[tuple[int, int, Prompt]]:
        """Questions and positions after which the server can be asked, and what it has to be asked."""
        places = [
            (index, position, self._prompt(index, question.tokens[: position + 1]))
            for index, question in enumerate(questions)
            for position in question.answered[: 1 if self.is_chat else None]
        ]
        found = [(index, position, prompt) for index, position, prompt in places if prompt is not None]
        if not found:
            raise EngineError(
                f"{self.speaker.endpoint.url} takes no token ids, and no text has exactly the tokens of a prompt; give "
                "other prompts, or start the server so that it takes token ids."
            )
        return found

    def _prompt(self, index: int, tokens: Sequence[int]) -> Prompt | None:
        """The tokens of a question in the form that the server takes; None if no text has exactly these."""
        if self.is_chat:
            return self._messages[index]
        return tokens if self.speaker.dialect.form == "ids" else text_of(self.tokenizer, tokens)

    def _rows(self, arm: str, questions: Sequence[Question], index: int, position: int, prompt: Prompt) -> list[Row]:
        """Rows from a position on, as long as the tokens of the answer are those of the question."""
        question = questions[index]
        asked = len(question.answered) if self.is_chat else 1
        answer = self.speaker.answer(self.names[arm], prompt, asked, scored=asked)
        self._chats += ReadChat.of(answer.prompt, question.prompt) if self.is_chat else []
        if not answer.tops:
            raise self.speaker.without_logprobs(self.names[arm])
        if not all(answer.tops):
            message = f"{self.names[arm]}: the logprobs are not those of the base model's tokens"
            raise EngineError(self.speaker.endpoint.hidden(message))
        return _shared_rows(index, position, question, answer)


def _shared_rows(index: int, position: int, question: Question, answer: Generated) -> list[Row]:
    """Rows of an answer from a position on, as long as its tokens are those of the question."""
    found = answer.along(question.continuation[position + 1 - len(question.prompt) :])
    return [
        Row(index, position + step, np.array([*top.values()], dtype=np.float32), np.array([*top], dtype=np.int64))
        for step, top in enumerate(found)
    ]


@final
class EndpointEngine(OpenAiEngine):
    """A server that somebody else has started, with the adapter loaded.

    Args:
        speaker: The server, with the dialect in which it answers.
        names: See `OpenAiEngine`.
        base: The base model.
        messages: See `OpenAiEngine`.
    """

    def __init__(
        self, speaker: Speaker, names: Mapping[str, str], base: ModelSource, messages: Sequence[str] = ()
    ) -> None:
        super().__init__(names, base, messages)
        self._speaker, self.is_one_model = speaker, names[BASE] == names[ADAPTER]

    def speak(self) -> Speaker:
        return self._speaker

    @classmethod
    def lacking(cls, request: EngineRequest) -> str | None:
        return None

    def version(self) -> str | None:
        return None

    @classmethod
    def check(cls, setting: Setting) -> None:
        _opened(setting).close()

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[EndpointEngine]:
        with _spoken_to(setting) as (speaker, names):
            messages = setting.server.messages if setting.server is not None else ()
            if speaker.dialect.form == "chat" and not messages:
                raise ConfigError(
                    f"{speaker.endpoint.url} answers chats only, and the base model's tokenizer has no chat template, "
                    "so PyTorch cannot be asked the same; use the tokenizer of the server's model "
                    f"({setting.request.named('model')}), or start the server so that it answers /v1/completions."
                )
            yield cls(speaker, names, setting.base, messages)


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
    """Speak to a server with the tokens of a tokenizer.

    Args:
        endpoint: The server.
        base: Name of the base model there.
        tokenizer: Tokenizer of the base model.

    Raises:
        EngineError: See `Speaker`.
    """

    def probe(dialect: Dialect) -> Prompt:
        return list(tokenizer(PROBE).input_ids) if dialect.form == "ids" else PROBE

    return Speaker(endpoint, base, probe, partial(ids_by_text, tokenizer))
