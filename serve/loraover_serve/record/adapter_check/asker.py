"""The questions of a reference, asked of a server in the dialect in which it answers."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from loraover.client.dialects import DIALECTS, token_id, up_to_unknown
from loraover_serve.judge.limits import ADAPTER, BASE, OTHER
from loraover_serve.record.adapter_check.evidence import Greedy, Round
from loraover_serve.record.adapter_check.reference import CheckError, Reference, Row, Rows
from loraover_serve.record.adapter_check.server import Server, UnfitError

AT_ONCE = 4  # requests in flight
OF_SERVER = ("id", "system_fingerprint")  # fields of an answer that tell who gave it
COMPANIONS, COMPANION_TOKENS = 2, 16  # answers of the other arm that are generated meanwhile, to mix batches


class Asker:
    """Asks a server the questions of a reference.

    Args:
        reference: The reference.
        server: The server.
        names: Name of each arm's model there.
        dialect: Protocol that the server speaks; None finds out.
    """

    def __init__(
        self, reference: Reference, server: Server, names: Mapping[str, str], protocol: str | None = None
    ) -> None:
        self.reference, self.server, self.names = reference, server, names
        refusals: list[CheckError] = []
        for self.dialect in (one for one in DIALECTS if protocol in (None, one.protocol)):
            asked = [prompt for place in range(len(reference.places)) if (prompt := self.prompt(place)) is not None]
            if not asked:
                continue
            try:
                if any(row for _, row in self.answer(BASE, asked[0], 1)[0]):
                    return
                refusals.insert(0, CheckError(f"{server.url} gives no logprobs: nothing can be compared."))
            except CheckError as error:
                if not refusals and not isinstance(error, UnfitError):
                    raise
                refusals.append(error)
        raise refusals[0] if refusals else CheckError("no dialect takes the questions of this reference.")

    def prompt(self, place: int) -> Any:
        """A place's tokens in the form that the server takes; None if there is no such form."""
        question, step = self.reference.places[place]
        mine = self.reference.questions[question]
        if self.dialect.form == "chat":
            return mine["message"] if step == 0 else None
        return self.reference.read(place) if self.dialect.form == "ids" else mine["texts"][step]

    def answer(self, arm: str, prompt: Any, tokens: int) -> tuple[list[tuple[int | None, Row]], dict[str, str]]:
        """Tokens of the greedy answer, as far as they are known, each with the logprobs there; and what it says."""
        by_text = self.reference.by_text
        asked = self.dialect.request(self.names[arm], prompt, tokens, is_base=arm == BASE)
        answer, told = self.server.ask(*asked)
        try:
            rows = [
                ({token_id(entry, by_text): float(value) for entry, value in tops}, token_id(chosen, by_text))
                for chosen, tops in zip(*self.dialect.read(answer), strict=False)
            ]
            if any(not math.isfinite(value) for row, _ in rows for value in row.values()):
                raise ValueError("a logprob is not a finite number")
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckError(f"{self.server.url}: the answer cannot be read ({error}): {answer!r:.300}") from None
        for name in OF_SERVER:
            if isinstance(answer, dict) and answer.get(name):
                told[name] = str(answer[name])
        return [(i, {t: v for t, v in row.items() if t is not None}) for row, i in rows], told

    def rounds(self, arm: str, places: Sequence[int], repeats: int = 1) -> list[Round]:
        """An arm's logprobs at places, each asked for several times, all of it in random order.

        Those of chats are kept as long as the tokens are PyTorch's.
        """

        def ask(asked: tuple[int, int]) -> tuple[int, dict[int, Row], dict[str, str]]:
            turn, place = asked
            question, step = self.reference.places[place]
            expected = self.reference.questions[question]["answer"]
            tokens = len(expected) if self.dialect.form == "chat" else 1
            found, told = self.answer(arm, self.prompt(place), tokens)
            return turn, self.shared(place, expected[step:], found), told

        asked = [(turn, place) for turn in range(repeats) for place in places]
        found: list[tuple[dict[int, Row], dict[int, dict[str, str]]]] = [({}, {}) for _ in range(repeats)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for turn, rows, told in pool.map(ask, random.sample(asked, len(asked))):
                found[turn][0].update(rows)
                found[turn][1].update(dict.fromkeys(rows, told))
        return [Round(dict(sorted(rows.items())), told) for rows, told in found]

    @staticmethod
    def shared(place: int, expected: Sequence[int], found: Sequence[tuple[int | None, Row]]) -> dict[int, Row]:
        """Rows of an answer from a place on, as long as its tokens are the expected ones."""
        rows: dict[int, Row] = {}
        for step, (token, row) in enumerate(found[: len(expected)]):
            rows[place + step] = row
            if token != expected[step]:
                break
        return {at: row for at, row in rows.items() if row}

    @cached_property
    def places(self) -> list[int]:
        """Places that the server can be asked for."""
        found = [place for place in range(len(self.reference.places)) if self.prompt(place) is not None]
        if not found:
            raise CheckError(f"{self.server.url} takes no token ids, and no text has exactly the tokens of a question.")
        return found

    def greedy(self) -> list[Greedy]:
        """The adapter's greedy answer to each question."""

        def ask(question: int) -> Greedy:
            place, expected = self.reference.first(question), self.reference.questions[question]["answer"]
            found, _ = self.answer(ADAPTER, self.prompt(place), len(expected))
            tokens = [token for token, _ in found]
            follows = [expected[k] if token is None else token for k, token in enumerate(tokens[: len(expected)])]
            rows = self.shared(place, expected, [*zip(follows, (row for _, row in found), strict=False)])
            return Greedy(question, up_to_unknown(tokens), len(found), rows)

        first = [question for question, step in map(self.reference.places.__getitem__, self.places) if step == 0]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, first))

    def mixed(self, places: Sequence[int]) -> dict[str, Rows]:
        """Rows of each arm while the other one generates, and of the adapter beside another one."""
        found: dict[str, Rows] = {}
        for name, arm, companion in ((BASE, BASE, ADAPTER), (ADAPTER, ADAPTER, BASE), (OTHER, ADAPTER, OTHER)):
            if companion not in self.names:
                continue
            enough, prompt = threading.Event(), self.prompt(places[0])

            def generate(
                begun: threading.Event,
                arm: str = companion,
                prompt: Any = prompt,
                enough: threading.Event = enough,
            ) -> None:
                try:
                    while not enough.is_set():
                        self.answer(arm, prompt, COMPANION_TOKENS)
                        begun.set()
                finally:
                    begun.set()

            with ThreadPoolExecutor(COMPANIONS) as pool:
                begun = [threading.Event() for _ in range(COMPANIONS)]
                running = [pool.submit(generate, each) for each in begun]
                try:
                    for each in begun:
                        each.wait()
                    found[name] = self.rounds(arm, places)[0].rows
                finally:
                    enough.set()
            for one in running:
                one.result()
        return found


def served_names(server: Server, reference: Reference, adapter: str | None, base: str | None) -> dict[str, str]:
    """Names of both arms on a server, and of another adapter that it lists."""
    try:
        listed = {str(each["id"]): each.get("parent") for each in server.ask("/v1/models")[0]["data"]}
    except (UnfitError, LookupError, TypeError, AttributeError):
        listed = {}
    mine, model = adapter or reference.content["adapter"], reference.content["base_model"]
    alike = [name for name in listed if name == model or model.endswith(f"/{name}") or name.endswith(f"/{model}")]
    others = [name for name, parent in listed.items() if parent is None and name != mine]
    found = next((names[0] for names in (alike, others) if len(names) == 1), model)
    if [*listed] == [mine]:  # as llama-server does with --lora: one model for both
        found = mine
    names = {BASE: base or found, ADAPTER: mine}
    if listed and not {*names.values()} <= {*listed}:
        raise CheckError(f"the server has {', '.join(listed)}, and not {', '.join(names.values())}; name both models.")
    beside = [name for name, parent in listed.items() if parent is not None and name not in names.values()]
    return names | ({OTHER: beside[0]} if beside else {})
