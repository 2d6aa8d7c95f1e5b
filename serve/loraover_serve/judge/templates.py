"""Chats as a server reads them, compared with the tokens of the chat template that the adapter was trained with.

Questions are sent as token ids, which no chat template touches: a server with another template, or with a system prompt
of its own, answers them as trained, and gives its chat users other prompts. So a server is asked for the tokens of a
few recorded conversations: by a chat of one new token (vLLM's `prompt_token_ids`), by /tokenize with messages (vLLM),
by /apply-template and /tokenize (llama-server), or else for their number alone (`usage`).

Numbers show less than tokens do, because gateways may count with a different tokenizer. If all chats with a system
prompt, or all without one, differ by the same number of tokens, and the others are right, the template is another one.
Other differences of numbers are inconclusive.

Tools show less than messages do, because engines rewrite them before they render them; vLLM adds fields that nobody
sent. So a conversation with tools that is read differently is reported, but it is not a fault if the others are read as
recorded. It is one if the server reads the chat without its tools as the same tokens, so that it leaves them out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from loraover.client.dialects import cached_tokens
from loraover.common.errors import EngineError, printable

if TYPE_CHECKING:
    from loraover.client.endpoint import Endpoint

DATE_SLACK = 4
"""Tokens by which a date may exceed one and a half times the length of the recorded date, or fall below half of it."""

MOST_CONVERSATIONS, MOST_TOKENS = 16, 4096
"""Largest number of conversations in a file, and of tokens in each."""

ID_BITS = 64  # a longer number is no token
BEFORE, AFTER, SHOWN = 3, 8, 60  # tokens that are shown around a difference, and the characters of their text

Tokens = Sequence[int]


class Conversation(NamedTuple):
    """A conversation, in the chat template that the adapter was trained with.

    Args:
        messages: Messages, each with `role` and `content`.
        tokens: Ids of its tokens, up to the place where the answer begins.
        tools: Tools that the model may call, as OpenAI's protocol has them.
        date: Index of the first token of a date that the template prints, and of the first token after it; None without
            a date.
    """

    messages: Sequence[Mapping[str, str]]
    tokens: Tokens
    tools: Sequence[Any] = ()
    date: tuple[int, int] | None = None

    @property
    def words(self) -> str:
        """Roles of the messages, in words."""
        roles = ", ".join(message["role"] for message in self.messages)
        return f"{roles} with tools" if self.tools else roles

    def differs_at(self, read: Tokens) -> tuple[int, int] | None:
        """Index of the first token that differs, in the tokens that were read and in the recorded ones.

        A date may differ, if it has about as many tokens.

        Returns:
            The two indices; None if no token differs.
        """
        first, after = self.date or (0, 0)
        begun = shared(read, self.tokens[:first])
        if begun < first:
            return begun, begun
        rest, width = self.tokens[after:], after - first
        dates = sorted(
            range(max(0, width - self._slack), width + self._slack + 1), key=lambda tokens: abs(tokens - width)
        )
        alike = {tokens: shared(read[first + tokens :], rest) for tokens in dates}
        if any(len(rest) == alike[tokens] == len(read) - first - tokens for tokens in dates):
            return None
        longest = max(dates, key=alike.__getitem__)
        return first + longest + alike[longest], after + alike[longest]

    def is_as_long(self, number: int) -> bool:
        """Whether the conversation can have this number of tokens, with a date of another length."""
        return abs(number - len(self.tokens)) <= self._slack

    @property
    def _slack(self) -> int:
        return 0 if self.date is None else DATE_SLACK + (self.date[1] - self.date[0]) // 2


def shared(one: Tokens, other: Tokens) -> int:
    """Number of the first tokens that are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


class Conversations(NamedTuple):
    """Conversations of a reference.

    Args:
        found: The conversations; none where there is no chat template.
        pieces: Texts of their tokens, by the ids.
    """

    found: Sequence[Conversation] = ()
    pieces: Mapping[int, str] = {}

    @classmethod
    def of(cls, content: Any, vocabulary: int) -> Conversations:
        """Read the section of a file.

        Args:
            content: The section; None if the file has none, as older ones.
            vocabulary: Number of tokens of the base model.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: Another content.
        """
        if content is None:
            return cls()
        found = [
            Conversation(each["messages"], each["tokens"], each["tools"] or (), each["date"])
            for each in content["conversations"]
        ]
        if len(found) > MOST_CONVERSATIONS:
            raise ValueError(f"more than {MOST_CONVERSATIONS} conversations")
        for each in found:
            texts = [one[key] for one in each.messages for key in ("role", "content")]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError("a conversation has no messages, or one without a role or a content")
            if not (0 < len(each.tokens) <= MOST_TOKENS and are_ids(each.tokens, vocabulary)):
                raise ValueError("a conversation has no token, too many, or ids outside the vocabulary")
            first, after = (0, 0) if each.date is None else each.date
            if not (are_ids([first, after], len(each.tokens) + 1) and first <= after) or not isinstance(
                each.tools, list | tuple
            ):
                raise ValueError("a conversation has a date outside its tokens, or tools that are not a list")
        return cls(found, {int(index): str(text) for index, text in content["pieces"].items()})


def are_ids(found: Any, below: int = 2**ID_BITS) -> bool:
    """Whether this is a list of token ids."""
    return isinstance(found, list) and all(type(each) is int and 0 <= each < below for each in found)


class TemplateReading(NamedTuple):
    """Finding on a server's chat template.

    Args:
        words: What was found, in words.
        is_other: Whether the template differs; if it does not, the words may say what was not compared.
        is_unclear: Whether the template may differ.
        unseen: Things that were not found out, in words.
    """

    words: str
    is_other: bool = False
    is_unclear: bool = False
    unseen: Sequence[str] = ()


class _Told(NamedTuple):
    """Tokens of a conversation as a server gives them, or their number; or the reason why it gives neither.

    Args:
        tokens: Ids of the tokens; None if the server does not give them.
        number: Number of the tokens; None if it is not given, or the tokens are.
        cached: Number of tokens from a cache, which some servers leave out of the number.
        refusal: Reason why there is neither; empty if there is one.
        is_silent: Whether the server has not answered at all, so that no other form is tried.
        calls_nothing: Whether the request said that no tool may be called, at which some servers leave all tools out.
    """

    tokens: list[int] | None = None
    number: int | None = None
    cached: int = 0
    refusal: str = ""
    is_silent: bool = False
    calls_nothing: bool = False

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of tokens that the server may mean."""
        return () if self.number is None else (self.number, self.number + self.cached)

    @property
    def is_counted(self) -> bool:
        """Whether only the number of the tokens is known."""
        return self.tokens is None


class _Compared(NamedTuple):
    """A conversation, and its tokens or their number from a server."""

    asked: Conversation
    told: _Told

    @property
    def has_system(self) -> bool:
        """Whether it begins with a system prompt."""
        return self.asked.messages[0]["role"] == "system"

    @property
    def is_same(self) -> bool:
        """Whether the server may read it as recorded."""
        if self.told.tokens is not None:
            return self.asked.differs_at(self.told.tokens) is None
        return any(map(self.asked.is_as_long, self.told.numbers))

    @property
    def off(self) -> int:
        """Number of tokens by which the server's count exceeds the recorded number."""
        assert self.told.number is not None
        return self.told.number - len(self.asked.tokens)

    def words(self, endpoint: Endpoint, pieces: Mapping[int, str]) -> str:
        """Difference from the recorded tokens, in words."""
        if self.told.tokens is None:
            return (
                f"the server reads {self.told.number} tokens of a chat ({self.asked.words}), and the adapter's "
                f"template gives {len(self.asked.tokens)}"
            )
        places = self.asked.differs_at(self.told.tokens)
        assert places is not None
        mine, right = (
            tokens[max(0, place - BEFORE) : place + AFTER]
            for place, tokens in zip(places, (self.told.tokens, self.asked.tokens), strict=True)
        )
        return (
            f"prompt differs at token {places[0]} of a chat ({self.asked.words}): the server reads "
            f"{_quoted(_text(endpoint, mine, pieces), endpoint)}, and the adapter's template gives "
            f"{_quoted(''.join(pieces.get(each, f'<{each}>') for each in right), endpoint)}"
        )


def most_requests(conversations: Conversations) -> int:
    """Largest number of requests by `read_template`: two a conversation, and one a further form or text."""
    return 2 * len(conversations.found) + 4 if conversations.found else 0


def read_template(endpoint: Endpoint, model: str, conversations: Conversations) -> TemplateReading | None:
    """Compare a server's chat template with the recorded one; None if none is recorded.

    Args:
        model: Name of the adapter there.
        conversations: The recorded conversations.
    """
    if not conversations.found:
        return None
    told = _tell(endpoint, model, conversations.found)
    known = [_Compared(*pair) for pair in zip(conversations.found, told, strict=True) if not pair[1].refusal]
    if not known:
        why = told[0].refusal
        return TemplateReading(f"the chat template was not compared: {why}", unseen=[f"the chat template: {why}"])
    others = [each for each in known if not each.is_same]
    without_tools = [each for each in others if _leaves_tools_out(each, known)]
    faults = [each for each in others if not each.asked.tools] or without_tools
    if faults:
        words = _likely(faults[0], known) + faults[0].words(endpoint, conversations.pieces)
        often = f"this is so in {len(others)} of {len(known)} chats"
        if not faults[0].told.is_counted or without_tools == faults or _is_system_prompt(known):
            return TemplateReading(f"{words} ({often})", is_other=True)
        offs = {each.off for each in known}
        gateway = "adds to each number" if len(offs) == 1 else "counts with another tokenizer"
        return TemplateReading(
            f"the chat template may be another one, or a gateway {gateway}: {words} ({often}, and the server returns "
            "no tokens, only their number)",
            is_unclear=True,
        )
    is_counted = all(each.told.is_counted for each in known)
    words = f"{len(known) - len(others)} chats have " + (
        "as many tokens as in the recorded template; the server does not return the tokens"
        if is_counted
        else "the tokens of the recorded template"
    )
    words += ", but for the date that it prints" if any(each.asked.date for each in known) else ""
    unseen = ["the tokens of chats: the server returns only their number"] if is_counted else []
    if others:
        difference = others[0].words(endpoint, conversations.pieces)
        words += f"; tools are rendered differently or left out, as some engines do: {difference}"
        unseen.append(
            f"whether chats with tools are right: some engines render them differently, and here the {difference}"
        )
    refusal = next((one.refusal for one in told if one.refusal), None)
    if refusal is not None:
        words += f"; {len(told) - len(known)} of the chats were not compared: {refusal}"
        unseen.append(f"{len(told) - len(known)} of the chats: {refusal}")
    return TemplateReading(words, unseen=unseen)


def _leaves_tools_out(each: _Compared, known: Sequence[_Compared]) -> bool:
    """Whether the server reads a conversation with tools as it reads the same one without them."""
    if not each.asked.tools or each.told.calls_nothing:
        return False
    return _is_read_as(each, known, each.asked.messages)


def _is_read_as(each: _Compared, known: Sequence[_Compared], messages: Sequence[Any]) -> bool:
    """Whether the server gives a conversation the tokens of one with these messages and without tools."""
    told = (each.told.tokens, each.told.number)
    plain = (one for one in known if not one.asked.tools and one.asked.messages == messages)
    return any(told == (one.told.tokens, one.told.number) for one in plain)


def _is_system_prompt(known: Sequence[_Compared]) -> bool:
    """Whether numbers differ only in chats with a system prompt, or only in those without, and by one number in all."""
    plain = [each for each in known if not each.asked.tools]
    others = [each for each in plain if not each.is_same]
    has_system = {each.has_system for each in others}
    return (
        len(has_system) == 1
        and len({each.off for each in others}) == 1
        and all(each.is_same for each in plain if each.has_system not in has_system)
        and {each.has_system for each in plain} == {True, False}
        and len(others) == sum(each.has_system in has_system for each in plain)
    )


def _likely(each: _Compared, known: Sequence[_Compared]) -> str:
    """The likely mistake of a template, in words that precede the difference; empty if none is known."""
    right, read = list(each.asked.tokens), each.told.tokens or []
    more = read[len(right) :]
    if each.has_system and _is_read_as(each, known, each.asked.messages[1:]):
        return "the system prompt is left out: "
    if _leaves_tools_out(each, known):
        return "the tools are left out: "
    if read == [*right[:1], *right]:
        return "the first token occurs twice: "
    if more and read == right + more and right[-len(more) :] == more:
        return "the end of a prompt, such as the beginning of the answer, occurs twice: "
    return ""


def _quoted(text: str, endpoint: Endpoint) -> str:
    """A short text for a message, without semicolons, which separate the clauses of a reason."""
    shown = printable(json.dumps(endpoint.hidden(text)[:SHOWN], ensure_ascii=False)).replace(";", ",")
    return shown if len(text) <= SHOWN else f"{shown} ..."


def _text(endpoint: Endpoint, tokens: Tokens, pieces: Mapping[int, str]) -> str:
    """Text of tokens: by the recorded texts, else by the server, else the ids of those that are not known."""
    if any(each not in pieces for each in tokens):
        with suppress(EngineError, LookupError, TypeError, AttributeError):
            answer = endpoint.request("/detokenize", {"tokens": [*tokens]})
            text = answer.get("prompt", answer.get("content"))  # of vLLM, and of llama-server
            if isinstance(text, str) and text:
                return text
    return "".join(pieces.get(each, f"<{each}>") for each in tokens)


def _tell(endpoint: Endpoint, model: str, conversations: Sequence[Conversation]) -> list[_Told]:
    """Tokens of each conversation by the first kind of request that returns any; otherwise their number."""
    forms: tuple[Callable[[Conversation], _Told], ...] = (
        lambda each: _by_chat(endpoint, model, each, {"return_token_ids": True}),
        lambda each: _by_tokenize(endpoint, model, each),
        lambda each: _by_apply(endpoint, each),
        lambda each: _by_chat(endpoint, model, each, {}),  # for a server that refuses fields which it does not know
    )
    found: list[tuple[_Told, Callable[[Conversation], _Told]]] = []
    for ask in forms:
        if ask is forms[-1] and any(told.number for told, _ in found):
            break
        found.append((ask(conversations[0]), ask))
        if found[-1][0].tokens is not None or found[-1][0].is_silent:
            break
    found.sort(key=lambda pair: (pair[0].tokens is None, pair[0].number is None))
    best, ask = found[0]
    if best.refusal:
        return [best] * len(conversations)
    counted = next((told for told, _ in found if told.number is not None), None)
    if best.tokens is not None and counted is not None and len(best.tokens) not in counted.numbers:
        refusal = (
            f"the server counts {counted.number} tokens of a chat, but another route returns {len(best.tokens)}, so "
            "the tokens of its chats are not known"
        )
        return [_Told(refusal=refusal)] * len(conversations)
    told = [best]
    for each in conversations[1:]:
        told.append(told[-1] if told[-1].is_silent else ask(each))
    return told


def _by_chat(endpoint: Endpoint, model: str, asked: Conversation, more: Mapping[str, Any]) -> _Told:
    """Ask for an answer of one token. If the server refuses the tools, ask again, and say that none may be called."""
    body = {"model": model, **_body(asked), "max_tokens": 1, **endpoint.GREEDY, **more}
    answer = _answer(endpoint, "/v1/chat/completions", body)
    if isinstance(answer, _Told) and asked.tools and not answer.is_silent:
        found = _by_chat(endpoint, model, asked._replace(tools=()), {**more, **_body(asked), "tool_choice": "none"})
        return found._replace(calls_nothing=True)
    if isinstance(answer, _Told):
        return answer
    ids, usage = answer.get("prompt_token_ids"), answer.get("usage")
    if ids and are_ids(ids):
        return _Told(ids)
    number = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if type(number) is int and 0 < number < 2**ID_BITS:
        return _Told(number=number, cached=cached_tokens(usage, "prompt_tokens_details", "cached_tokens") or 0)
    return _Told(refusal="the server returns neither the tokens of a chat nor their number")


def _by_tokenize(endpoint: Endpoint, model: str, asked: Conversation) -> _Told:
    answer = _answer(endpoint, "/tokenize", {"model": model, **_body(asked), "add_generation_prompt": True})
    return answer if isinstance(answer, _Told) else _listed(answer)


def _by_apply(endpoint: Endpoint, asked: Conversation) -> _Told:
    rendered = _answer(endpoint, "/apply-template", _body(asked))
    if isinstance(rendered, _Told):
        return rendered
    if not isinstance(prompt := rendered.get("prompt"), str):
        return _Told(refusal="the answer to /apply-template cannot be read")
    # As llama-server's chats, with the token that begins a text where the model has one.
    answer = _answer(endpoint, "/tokenize", {"content": prompt, "add_special": True, "parse_special": True})
    return answer if isinstance(answer, _Told) else _listed(answer)


def _body(asked: Conversation) -> dict[str, Any]:
    return {"messages": list(asked.messages)} | ({"tools": list(asked.tools)} if asked.tools else {})


def _listed(answer: Mapping[str, Any]) -> _Told:
    ids = answer.get("tokens")
    return _Told(ids) if ids and are_ids(ids) else _Told(refusal="the answer to /tokenize cannot be read")


def _answer(endpoint: Endpoint, path: str, body: dict[str, Any]) -> dict[str, Any] | _Told:
    """The answer to a request, or why there is none."""
    from loraover.client.endpoint import UnansweredError  # loads http.client, for which --help must not wait

    try:
        answer = endpoint.request(path, body)
    except EngineError as error:
        return _Told(refusal=str(error), is_silent=isinstance(error, UnansweredError))
    return answer if isinstance(answer, dict) else _Told(refusal=f"the answer to {path} cannot be read")
