"""Servers that speak OpenAI's protocol: after each token of a prompt, one new token with its logprobs is asked for.

A server that takes chats alone is asked for its greedy answer to each message, and is compared up to the first token
that is not PyTorch's. Logprobs of a prompt (`prompt_logprobs`) are never used: they can miss what an adapter adds to
the output head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import takewhile
from threading import Event
from typing import Any, TypeVar, final

from loraover.client.dialects import Prompt
from loraover.client.endpoint import Endpoint, is_same_model
from loraover.client.speaker import Generated, Speaker
from loraover.common.errors import ConfigError, EngineError, LoraOverError
from loraover.models.load import load_tokenizer
from loraover_serve.engines.answers import ADAPTER, BASE, OTHER, GreedyAnswer, Question, Row
from loraover_serve.engines.base import Engine, RunningServer, Setting
from loraover_serve.engines.request import EngineRequest

AT_ONCE = 4  # requests in flight
COMPANIONS, COMPANION_TOKENS = 2, 16  # answers of the other arm that are generated meanwhile, to mix batches
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class OpenAiEngine(Engine):
    """A running server.

    Args:
        names: Name of each arm's model on the server, and of another adapter if there is one.
        messages: Message of each question's chat, for a server that takes chats alone.
    """

    def __init__(self, names: Mapping[str, str], messages: Sequence[str] = ()) -> None:
        self.names, self._messages = dict(names), messages

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
    def is_chat(self) -> bool:
        """Whether the server takes chats alone."""
        return self.speaker.dialect.form == "chat"

    def logprobs(self, arm: str, questions: Sequence[Question]) -> list[Row]:
        found = _at_once(lambda place: self._rows(arm, questions, *place), self._places(questions))
        return [row for rows in found for row in rows]

    def mixed(self, questions: Sequence[Question]) -> dict[str, list[Row]] | None:
        beside = {BASE: (BASE, ADAPTER), ADAPTER: (ADAPTER, BASE), OTHER: (ADAPTER, OTHER)}
        found = {}
        for name, (arm, companion) in beside.items():
            if companion in self.names:
                with self._company(companion, questions):
                    found[name] = self.logprobs(arm, questions)
        return found

    @contextmanager
    def _company(self, arm: str, questions: Sequence[Question]) -> Iterator[None]:
        """Keep an arm generating, in one short answer after the other, so that others share its batches.

        The block begins when each companion has had an answer: the first one of an arm can take a server long. Answers
        are short, since a server sends nothing before an answer is complete, and may be given up as silent meanwhile.
        """
        longest = max(len(question.tokens) for question in questions)  # of which the server certainly takes as many
        prompt, tokens = self._places(questions)[0][2], max(min(COMPANION_TOKENS, longest - 1), 1)
        if not isinstance(prompt, str):
            prompt = prompt[:1]
        enough, begun = Event(), [Event() for _ in range(COMPANIONS)]

        def generate(mine: Event) -> None:
            try:
                while not enough.is_set():
                    self.speaker.answer(self.names[arm], prompt, tokens)
                    mine.set()
            finally:
                mine.set()

        pool = ThreadPoolExecutor(COMPANIONS)
        try:
            running = [pool.submit(generate, mine) for mine in begun]
            for mine in begun:
                mine.wait()
            yield
            enough.set()
            for each in running:
                each.result()
        finally:
            enough.set()
            pool.shutdown(wait=False)

    def generate(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        found = _at_once(lambda index: self._generate(arm, index, prompts[index], tokens), range(len(prompts)))
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

        return _at_once(ask, range(len(questions)))

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
        return tokens if self.speaker.dialect.form == "ids" else self.speaker.text_of(tokens)

    def _rows(self, arm: str, questions: Sequence[Question], index: int, position: int, prompt: Prompt) -> list[Row]:
        """Rows from a position on, as long as the tokens of the answer are those of the question."""
        question = questions[index]
        asked = len(question.answered) if self.is_chat else 1
        answer = self.speaker.answer(self.names[arm], prompt, asked, scored=asked)
        if not answer.tops:
            raise self.speaker.without_logprobs(self.names[arm])
        return _shared_rows(index, position, question, answer)


def _shared_rows(index: int, position: int, question: Question, answer: Generated) -> list[Row]:
    """Rows of an answer from a position on, as long as its tokens are those of the question."""
    following = zip(answer.ids, question.tokens[position + 1 :], strict=False)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], following)))
    return [Row(index, position + step, values, ids) for step, (ids, values) in enumerate(answer.tops[: same + 1])]


@final
class EndpointEngine(OpenAiEngine):
    """A server that somebody else has started, with the adapter loaded.

    Args:
        speaker: The server, with the dialect in which it answers.
        names: See `OpenAiEngine`.
        messages: See `OpenAiEngine`.
    """

    def __init__(self, speaker: Speaker, names: Mapping[str, str], messages: Sequence[str]) -> None:
        super().__init__(names, messages)
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
            yield cls(speaker, names, messages)


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
    named, server = setting.request.named, setting.server
    assert server is not None
    endpoint = _opened(setting)
    try:
        listed = endpoint.models()
        names = {BASE: _base_name(setting, server, listed), ADAPTER: server.adapter}
        absent = [name for name in names.values() if listed and name not in listed]
        served = endpoint.hidden(f"{endpoint.api} serves {', '.join(listed)}, and not {', '.join(absent)}")
        unlisted = ConfigError(
            f"{served}; name the adapter with {named('served_name')} and its base model with {named('base_name')}."
        )
        if names[BASE] in absent:
            raise unlisted
        speaker = Speaker(endpoint, load_tokenizer(setting.base), names[BASE])
        if absent and not speaker.has(names[ADAPTER]):  # some servers load an adapter when it is first asked for
            raise unlisted
        yield speaker, names | _other_adapter(speaker, names, listed)
    finally:
        endpoint.close()


def _base_name(setting: Setting, server: RunningServer, listed: Mapping[str, str | None]) -> str:
    """Name of the base model on the server: as it was given or is listed, or else the only other name there.

    A server that lists the adapter's name alone, as llama-server does with --lora, has one model for both.
    """
    name = server.base or setting.base.name
    alike = [each for each in listed if is_same_model(each, name)]
    others = [each for each, parent in listed.items() if parent is None and not is_same_model(each, server.adapter)]
    if name in listed or server.base is not None:
        return name
    if list(listed) == [server.adapter]:
        return server.adapter
    return next((found[0] for found in (alike, others) if len(found) == 1), name)


def _other_adapter(speaker: Speaker, names: Mapping[str, str], listed: Mapping[str, str | None]) -> dict[str, str]:
    """Name of an adapter that the server has beside the one in question: one that answers, if the list has any."""
    told = [name for name, parent in listed.items() if parent is not None] or list(listed)
    others = [name for name in told if not any(is_same_model(name, known) for known in names.values())]
    with suppress(EngineError):
        return {OTHER: others[0]} if others and speaker.has(others[0]) else {}
    return {}


def _at_once(ask: Callable[[Asked], Answered], items: Sequence[Asked]) -> list[Answered]:
    """Ask several questions at a time, and none of those that wait after a failure."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(ask, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
