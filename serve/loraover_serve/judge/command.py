"""Check whether a server answers as its adapter was trained, with the standard library alone.

    python adapter_check.pyz adapter_reference.json.gz http://localhost:8000 --served-name shop

`loraover record` writes the reference; docs/formats.md describes it, and docs/verify.md the rules of the verdict.
Exit code 0: as trained; 1: differs; 3: inconclusive; 2: unusable reference, address or server.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any

from loraover.client.dialects import DIALECTS
from loraover.client.endpoint import Endpoint
from loraover.common.errors import ConfigError, LoraOverError, UnscoredError
from loraover_serve.judge.asker import QUICK, Asker, on_served_weights
from loraover_serve.judge.caches import ask_warm, beside
from loraover_serve.judge.case import flag
from loraover_serve.judge.churn import ChurnRequest, ask_in_churn
from loraover_serve.judge.evidence import Evidence
from loraover_serve.judge.limits import EXIT_CODES, NUMBER_FORMATS, REPEATS
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.remedies import to_do
from loraover_serve.judge.results import listed
from loraover_serve.judge.rules import judge
from loraover_serve.judge.user_command import UserCommand
from loraover_serve.judge.vectors.asking import VectorAsker
from loraover_serve.judge.vectors.reference import VectorReference, read_any_reference
from loraover_serve.judge.vectors.verdict import judge_vectors
from loraover_serve.judge.warm_probe import long_questions


@dataclass(frozen=True)
class CheckOptions:
    """Options of a check of a server, which its user gives by name on a command line.

    Args:
        served_format: Coarsest number format in which the server may hold the base model.
        base_name: Name of the base model there; None asks the server.
        protocol: Protocol that the server speaks; None tries all.
        repeats: Number of times that each question is asked of the adapter.
        quick: Whether to ask only for a few answers of the adapter.
        without_mixed: Whether no requests for both models are sent together.
        without_template: Whether no chats are sent that show the server's chat template.
        caches: Whether long questions are asked first, without and with the server's cache.
        reload: Shell command that loads the adapter anew, after the server has read them; None if there is none.
        churn_s: Seconds for which questions are asked last, while adapters come and go; None asks none.
        run: Shell command that changes adapters meanwhile; None if there is none.
        option: Name of an option as its user writes it.
    """

    served_format: str = "bf16"
    base_name: str | None = None
    protocol: str | None = None
    repeats: int = REPEATS
    quick: bool = False
    without_mixed: bool = False
    without_template: bool = False
    caches: bool = False
    reload: str | None = None
    churn_s: float | None = None
    run: str | None = None
    option: Callable[[str], str] = flag

    @classmethod
    def of(cls, given: object, **more: Any) -> CheckOptions:
        """Options that are attributes of an object by the same names, but for those in `more`."""
        return cls(**{each.name: getattr(given, each.name) for each in fields(cls) if each.name not in more}, **more)


DEFAULT = CheckOptions()


def check_reference(
    reference: Reference | VectorReference, endpoint: Endpoint, name: str | None, options: CheckOptions
) -> dict[str, Any]:
    """Ask a server everything about the adapter of a reference, and judge its answers.

    Args:
        name: Name of the adapter there; None means that of the reference.

    Returns:
        The fields of an engine's result in verify.json, but for the engine.

    Raises:
        ConfigError: An option that does not fit the reference, or models that the server does not list.
        EngineError: A server that refuses, or whose answers cannot be read, or a command that failed.
    """
    if isinstance(reference, VectorReference):
        for field in OF_TEXT:
            if getattr(options, field):
                raise ConfigError(
                    f"{options.option(field)} is for generated text, and this reference has vectors; leave it out."
                )
        return check_vectors(VectorAsker.of(reference, endpoint, name, options.base_name, options.option), options)

    def command(field: str) -> UserCommand | None:
        words = getattr(options, field)
        return None if words is None else UserCommand(words, options.option(field), endpoint.hidden)

    asker = find_asker(reference, endpoint, name, options)
    assert isinstance(asker.models, Reference)
    reference, reload, long, churn = asker.models, command("reload"), None, None
    if options.caches or reload is not None:
        long = long_questions(reference, options.option, "caches" if reload is None else "reload")
    if options.churn_s is not None:
        churn = ChurnRequest(reference.caches or reference, options.churn_s, command("run"))
    return check(asker, options, long=long, reload=reload, churn=churn)


OF_TEXT = ("caches", "reload", "protocol", "without_template", "churn_s")
"""Options of a check that there are only for generated text."""


def find_asker(reference: Reference, endpoint: Endpoint, name: str | None, options: CheckOptions) -> Asker:
    """Speak to a server about an adapter, with the reference on the weights that it has; a quick check finds none."""
    asker = Asker.of(reference, endpoint, name, options.base_name, options.protocol, options.option)
    return asker if options.quick else on_served_weights(asker)


def check(
    asker: Asker,
    options: CheckOptions = DEFAULT,
    *,
    long: Reference | None = None,
    reload: UserCommand | None = None,
    churn: ChurnRequest | None = None,
) -> dict[str, Any]:
    """Ask a server for the logprobs of next tokens, and judge its answers.

    Args:
        asker: The server, with the reference.
        long: Long questions, which are asked first, without and with the server's cache; None asks none.
        reload: Command that loads the adapter anew, after the server has read them; None if there is none.
        churn: Questions that are asked last, while adapters come and go; None asks none.

    Returns:
        The fields of an engine's result in verify.json, but for the engine.

    Raises:
        EngineError: A server that refuses, or whose answers cannot be read, or a command that failed.
    """
    start, caches = time.monotonic(), None
    if long is not None:
        caches = ask_warm(Asker(long, asker.speaker, asker.names, asker.find_other), reload)
    more = {"without_mixed": options.without_mixed, "without_template": options.without_template}
    answers = asker.quick_answers() if options.quick else asker.answers(options.repeats, **more)
    evidence = Evidence(asker.models, answers)
    found = judge(evidence, options.served_format, options.option, is_quick=options.quick)
    found = found if caches is None else beside(found, "caches", caches)
    if churn is not None:
        found = beside(found, "churn", ask_in_churn(asker, churn, with_base=not options.without_mixed))
    return found | {"seconds": time.monotonic() - start}


def check_vectors(asker: VectorAsker, options: CheckOptions = DEFAULT) -> dict[str, Any]:
    """Ask a server for vectors, classes or scores, and judge its answers; see `check`."""
    start = time.monotonic()
    more = {"without_mixed": options.without_mixed}
    answers = asker.quick_answers() if options.quick else asker.answers(options.repeats, **more)
    found = judge_vectors(asker.reference, answers, options.served_format, options.option, is_quick=options.quick)
    return found | {"seconds": time.monotonic() - start}


def unanswered(error: LoraOverError) -> dict[str, Any]:
    """Result of a check that ended early: "inconclusive" for a server without logprobs, else "failed".

    Args:
        error: The error that ended it.
    """
    verdict = "inconclusive" if isinstance(error, UnscoredError) else "failed"
    return {"verdict": verdict, "reason": str(error), "fault": None, "not_checked": []}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a server from a command line, and return the exit code."""
    given = read_command_line(arguments)
    try:
        endpoint = Endpoint(
            given.url,
            given.key_variable,
            timeout_s=given.timeout,
            more=given.header,
            ca_file=given.ca_file,
            ends=time.monotonic() + given.check_timeout,
        )
        options = CheckOptions.of(given, repeats=max(1, given.repeats), option=flag)
        found = check_reference(read_any_reference(given.reference), endpoint, given.served_name, options)
    except LoraOverError as error:
        found = unanswered(error)
    lines = [f"{found['verdict']}: {found['reason']}", *to_do(found["fault"]), *listed(found["not_checked"])]
    print(json.dumps(found, indent=1, default=asdict) if given.json else "\n".join(lines))
    return EXIT_CODES[found["verdict"]]


def read_command_line(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command by name; unusable ones end it with exit code 2."""
    parser = argparse.ArgumentParser(description="Check that a server answers as an adapter was trained.")
    parser.add_argument(
        "reference", type=Path, help="file that loraover record wrote; of several bases in it, the server's is found"
    )
    parser.add_argument("url", help="address of the server, such as http://localhost:8000")
    parser.add_argument("--served-name", help="name of the adapter there (default: that of its folder)")
    parser.add_argument("--base-name", help="name of the base model there (default: as listed)")
    parser.add_argument(
        "--served-format", default="bf16", choices=NUMBER_FORMATS, help="coarsest format of the base model's weights"
    )
    parser.add_argument("--protocol", choices=sorted({one.protocol for one in DIALECTS}), help="default: detected")
    parser.add_argument("--key-variable", help="environment variable with the server's key")
    parser.add_argument(
        "--header", action="append", default=[], metavar="NAME=VARIABLE", help="header and where its value is"
    )
    parser.add_argument("--ca-file", help="certificates that sign the server's (PEM)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for an answer (default: 120)")
    parser.add_argument("--check-timeout", type=_seconds, default=math.inf, help="seconds for all requests (no limit)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"times that each question is asked ({REPEATS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} requests: is the adapter applied at all?")
    parser.add_argument("--caches", action="store_true", help="also ask long questions without and with the cache")
    parser.add_argument("--reload", metavar="COMMAND", help="shell command that loads the adapter; implies --caches")
    parser.add_argument(
        "--churn",
        dest="churn_s",
        type=_seconds,
        metavar="SECONDS",
        help="time to ask all models while adapters change",
    )
    parser.add_argument("--run", metavar="COMMAND", help="shell command that changes adapters during --churn")
    parser.add_argument("--without-mixed", action="store_true", help="send no requests for both models at once")
    parser.add_argument("--without-template", action="store_true", help="do not compare the server's chat template")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args(arguments)
    if given.run is not None and given.churn_s is None:
        parser.error("--run needs --churn, which is missing")
    return given


def _seconds(text: str) -> float:
    if not 1 <= (value := float(text)) <= TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 1 to {TIMEOUT_MAX:g}")
    return value


def run() -> None:
    """Check a server, and end with the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may be ASCII, unlike names of models
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
