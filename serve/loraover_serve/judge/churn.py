"""Answers of a server while its adapters come and go, each attributed to the model that gave it.

First, each model answers all questions alone. Then random questions of random models are asked, several at a
time, while the user's command loads and unloads adapters. `owners` finds which model gave each answer.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from threading import Event, Thread
from typing import Literal, NamedTuple

from loraover.client.at_once import AT_ONCE
from loraover.client.endpoint import (
    AbsentError,
    Endpoint,
    NotJsonError,
    UnansweredError,
    UnfitRequestError,
    is_same_model,
)
from loraover.client.speaker import Response
from loraover.common.errors import EngineError
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.estimates import share_found, share_in_percent
from loraover_serve.judge.limits import ADAPTER, BASE, FEW_AS_BASE, OTHER
from loraover_serve.judge.models import Models
from loraover_serve.judge.names import SERVER_ENDED
from loraover_serve.judge.owners import Attributed, ChurnCase, Said
from loraover_serve.judge.results import Churn
from loraover_serve.judge.user_command import UserCommand
from loraover_serve.judge.warm_probe import Asked, WarmProbe

MOST_OTHERS = 8
"""Largest number of further adapters on the server that are asked."""

ABSENT_PAUSE_S, LIFE_S = 0.02, 15.0  # after a refusal of a model that is just not loaded; for a sign of life
FAILURE_PAUSE_S, POLL_S = 0.5, 0.5  # after a request that failed; between two looks at what the server lists


class ChurnRequest(NamedTuple):
    """Questions to ask while adapters come and go.

    Args:
        questions: The questions. Long ones, if there are any, also show stale caches.
        seconds: Seconds for which they are asked.
        command: Command that runs meanwhile; None if there is none.
    """

    questions: Models
    seconds: float
    command: UserCommand | None = None


class Meanwhile(NamedTuple):
    """Answers and events while adapters came and went.

    Args:
        said: The answers.
        absent: Number of requests of each model that were refused since it was not loaded.
        failures: Other requests that were not answered, in words.
        ended: Reason why the server counts as ended; None if it answers.
        command: Failure of the command in words; empty if it has none.
        is_silent: Whether the server neither answers nor refuses connections at the end.
        is_moved: Whether the list of the server's models, or of their folders, changed.
        command_s: Seconds after which the command ended; None if it ran on.
    """

    said: Sequence[Said]
    absent: Mapping[str, int]
    failures: Sequence[str] = ()
    ended: str | None = None
    command: str = ""
    is_silent: bool = False
    is_moved: bool = False
    command_s: float | None = None


def ask_in_churn(asker: Asker, asked: ChurnRequest, *, with_base: bool = True) -> Churn:
    """Ask a server's models while its adapters come and go, and attribute each answer; a refusal is inconclusive.

    Args:
        asker: The server.
        asked: The questions.
        with_base: Whether the base model is asked beside the adapters.
    """
    words = None if asked.command is None else asked.command.shown
    begun = Churn("inconclusive", "", None, asked.seconds, words, AT_ONCE)
    asker = Asker(asked.questions, asker.speaker, asker.names, asker.find_other)
    try:
        if asker.is_one_model:
            raise EngineError("the server has one model under both names")
        listed = [name for name, parent in asker.speaker.endpoint.models().items() if parent is not None]
        known = [asker.names[ADAPTER], asker.names[BASE]]
        others = [name for name in listed if not any(is_same_model(name, mine) for mine in known)][:MOST_OTHERS]
        asker.names |= {f"{OTHER} {name}": name for name in others if asker.speaker.has(name)}
        probe = WarmProbe(asker)
        cold, noise = {arm: probe.cold(arm) for arm in asker.names}, probe.on_own(BASE)
        names = {arm: name for arm, name in asker.names.items() if with_base or arm != BASE}
        meanwhile = _asked(probe, names, asked)
    except EngineError as error:
        return replace(begun, reason=f"answers while adapters come and go were not checked: {error}")
    return judge_churn(begun, asker.models, names, cold, noise, meanwhile)


def _asked(probe: WarmProbe, names: Mapping[str, str], asked: ChurnRequest) -> Meanwhile:
    """Ask random models random questions, several at a time, while the command runs."""
    endpoint, arms, start, enough = probe.endpoint, [*names], time.monotonic(), Event()
    said, absent, failures, ended = list[Said](), Counter[str](), list[str](), list[str]()

    def ask_on() -> None:
        draw = random.Random()
        while not enough.is_set() and (begun := time.monotonic()) < start + asked.seconds:
            arm, place = draw.choice(arms), draw.choice(probe.places)
            try:
                found = probe.answer(arm, place)
                response = Response(names[arm], place, found.told, any(found.tops))
                said.append(Said(arm, place, probe.along(place, found), time.monotonic() - begun, response))
            except (AbsentError, UnfitRequestError):
                absent[arm] += 1
                time.sleep(ABSENT_PAUSE_S)
            except EngineError as error:
                failures.append(str(error))
                enough.wait(FAILURE_PAUSE_S)
                if _life(endpoint) == "ended":
                    ended.append(f"it answers nothing {begun - start:.0f} s after the start: {error}")
                    enough.set()

    lists, over = {_listed(endpoint)}, None
    with ExitStack() as until:
        failure: Callable[[], str | None] = str
        if asked.command is not None:
            failure = until.enter_context(asked.command.beside())
        threads = [Thread(target=ask_on, daemon=True) for _ in range(AT_ONCE)]
        try:
            for each in threads:
                each.start()
            while any(each.is_alive() for each in threads):
                threads[0].join(POLL_S) if threads[0].is_alive() else time.sleep(ABSENT_PAUSE_S)
                lists.add(_listed(endpoint))
                if asked.command is not None and over is None and failure() is not None:
                    over = time.monotonic() - start
        finally:
            enough.set()
        told = failure() or ""
    life = _life(endpoint)
    if not ended and life == "ended":
        ended.append("it accepts no connection any more at the end")
    is_moved = len(lists - {None}) > 1
    return Meanwhile(said, absent, failures, ended[0] if ended else None, told, life == "silent", is_moved, over)


def _life(endpoint: Endpoint) -> Literal["there", "silent", "ended"]:
    """State of a server: "there" if it answers with any status, "ended" if it refuses connections, else "silent"."""
    try:
        endpoint.request("/v1/models", timeout_s=LIFE_S)
    except NotJsonError:
        return "there"
    except UnansweredError as error:
        if error.is_refused:
            return "ended"
        return "there" if error.is_status or endpoint.is_over else "silent"
    except EngineError:
        return "there"
    return "there"


def _listed(endpoint: Endpoint) -> frozenset[tuple[str, str]] | None:
    """Names and folders of the models that a server lists; None if it lists none."""
    with suppress(EngineError, LookupError, TypeError, AttributeError):
        listed = endpoint.request("/v1/models", timeout_s=LIFE_S)["data"]
        return frozenset((str(each["id"]), str(each.get("root"))) for each in listed)
    return None


def judge_churn(
    begun: Churn,
    models: Models,
    names: Mapping[str, str],
    cold: Mapping[str, Asked],
    noise: Asked,
    meanwhile: Meanwhile,
) -> Churn:
    """Judge answers in churn.

    Args:
        begun: What was asked for.
        models: The questions, and what is known of their answers.
        names: Name on the server of each model that was asked in churn.
        cold: Answers of each model by itself.
        noise: The base model's answers in a cache that nothing else was put into.
        meanwhile: The answers in churn.
    """
    case = ChurnCase(models, names, cold, noise, meanwhile.said)
    found = [case.attributed(arm, meanwhile.absent.get(arm, 0)) for arm in names]
    shown = replace(begun, noise=case.noise, failed=len(meanwhile.failures), models=[each.shown for each in found])
    is_moved = meanwhile.is_moved or any(meanwhile.absent.values()) or case.has_loaded(found)
    shown = replace(shown, not_checked=[*_unseen_in_churn(case, found, meanwhile, begun.seconds, is_moved=is_moved)])
    if meanwhile.ended is not None:
        reason = f"{SERVER_ENDED}: {meanwhile.ended}"
        return replace(shown, verdict="differs", reason=reason, fault=SERVER_ENDED)
    worst = max(found, key=lambda each: each.questions)
    if worst.questions >= FEW_AS_BASE:
        return replace(shown, verdict="differs", reason=_wrong_in_churn(worst), fault=worst.fault)
    why = _undecided_in_churn(begun, case, found, meanwhile, is_moved=is_moved)
    if why is not None:
        return replace(shown, reason=f"answers while adapters come and go: {why}")
    answers, asked = sum(each.shown.answers for each in found), " and ".join(each.shown.model for each in found)
    when = "while adapters came and went, " if is_moved else ""
    return replace(shown, verdict="as trained", reason=f"{when}all {answers} answers of {asked} were right")


def _wrong_in_churn(worst: Attributed) -> str:
    """The wrong answers of a model, in a sentence."""
    shown = worst.shown
    owners = ", ".join(f"{number} {words}" for words, number in worst.wrong.items())
    return (
        f"{worst.fault}: while adapters came and went, {shown.wrong} of {shown.answers} answers of {shown.model} were "
        f"wrong ({owners})"
    )


def _undecided_in_churn(
    begun: Churn, case: ChurnCase, found: Sequence[Attributed], meanwhile: Meanwhile, *, is_moved: bool
) -> str | None:
    """Reason why the answers do not prove the server right; None if they do."""
    said, failed = len(meanwhile.said), len(meanwhile.failures)
    asked, cached = said + sum(meanwhile.absent.values()) + failed, sum(case.is_cached)
    if any(each.questions for each in found):
        return f"wrong answers to fewer than {FEW_AS_BASE} questions may be chance: run the check for longer"
    if meanwhile.command:
        return meanwhile.command
    if cached and cached / said >= share_found(said):
        return f"{cached} of {said} answers come from a response cache: bypass it"
    if failed and failed / asked >= share_found(asked):
        return f"{failed} of {asked} requests failed, so too few answers could be judged"
    if meanwhile.is_silent:
        return "at the end, the server accepts connections but answers no request"
    if begun.command is not None and not is_moved:
        return (
            "no answer showed that the command loaded an adapter: make it load other versions or folders, whose "
            "answers differ"
        )
    if any(each.unseen or not each.shown.answers for each in found):
        return (
            "some wrong answers could have been missed: run the check for longer, or check a server with a finer "
            "number format"
        )
    return None


def _unseen_in_churn(
    case: ChurnCase, found: Sequence[Attributed], meanwhile: Meanwhile, seconds: float, *, is_moved: bool
) -> Iterator[str]:
    """Yield what the answers do not show, in words."""
    for each in found:
        least = max((share for share in each.shown.visible.values() if share < 1), default=None)
        if least is not None:
            yield f"wrong answers of {each.shown.model}, if they are less than {share_in_percent(least)} of its answers"
        if not each.shown.answers:
            yield f"answers of {each.shown.model}: none came"
        elif each.unseen:
            yield f"answers of {each.shown.model} that are {', or '.join(each.unseen)}: too few would show it"
    if any(case.is_cached):
        yield f"answers that come from a cache of responses ({sum(case.is_cached)})"
    if meanwhile.failures:
        yield f"failed requests ({len(meanwhile.failures)}), such as: {meanwhile.failures[0]}"
    if meanwhile.command_s is not None:
        yield f"the time after the command: the command ended after {meanwhile.command_s:.4g} of {seconds:.4g} s"
    if not is_moved:
        yield "changes of adapters: no answer showed that an adapter was loaded"
