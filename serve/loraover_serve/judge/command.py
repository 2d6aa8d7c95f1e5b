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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any

from loraover.client.dialects import DIALECTS
from loraover.client.endpoint import Endpoint
from loraover.common.errors import ConfigError, LoraOverError, UnscoredError
from loraover_serve.judge.asker import QUICK, Asker
from loraover_serve.judge.bases import on_served_weights
from loraover_serve.judge.caches import ask_warm, beside
from loraover_serve.judge.case import flag
from loraover_serve.judge.churn import ChurnRequest, ask_in_churn
from loraover_serve.judge.evidence import Evidence
from loraover_serve.judge.limits import EXIT_CODES, NUMBER_FORMATS, REPEATS
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.rules import judge
from loraover_serve.judge.user_command import UserCommand
from loraover_serve.judge.vectors.asking import VectorAsker
from loraover_serve.judge.vectors.reference import VectorReference, read_any_reference
from loraover_serve.judge.vectors.verdict import judge_vectors
from loraover_serve.judge.warm_probe import long_questions


def check(
    asker: Asker,
    served_format: str = "bf16",
    option: Callable[[str], str] = flag,
    *,
    repeats: int = REPEATS,
    is_quick: bool = False,
    without_mixed: bool = False,
    without_template: bool = False,
    long: Reference | None = None,
    reload: UserCommand | None = None,
    churn: ChurnRequest | None = None,
) -> dict[str, Any]:
    """Ask a server everything, and judge its answers.

    Args:
        asker: The server, with the reference.
        served_format: Coarsest number format in which the server may hold the base model.
        option: Name of an option as its user writes it.
        repeats: Number of times that each question is asked of the adapter.
        is_quick: Whether to ask only for a few answers of the adapter.
        without_mixed: Whether no requests for both models are sent together.
        without_template: Whether no chats are sent that show the server's chat template.
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
    more = {"without_mixed": without_mixed, "without_template": without_template}
    answers = asker.quick_answers() if is_quick else asker.answers(repeats, **more)
    found = judge(Evidence(asker.models, answers), served_format, option, is_quick=is_quick)
    found = found if caches is None else beside(found, "caches", caches)
    if churn is not None:
        found = beside(found, "churn", ask_in_churn(asker, churn, with_base=not without_mixed))
    return found | {"seconds": time.monotonic() - start}


def unanswered(error: LoraOverError) -> dict[str, Any]:
    """Result of a check that ended early: "inconclusive" for a server without logprobs, else "failed".

    Args:
        error: The error that ended it.
    """
    verdict = "inconclusive" if isinstance(error, UnscoredError) else "failed"
    return {"verdict": verdict, "reason": str(error), "fault": None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a server from a command line, and return the exit code."""
    parser = argparse.ArgumentParser(description="Check that a server answers as an adapter was trained.")
    parser.add_argument("reference", type=Path, help="file that loraover record wrote")
    parser.add_argument("url", help="address of the server, such as http://localhost:8000")
    parser.add_argument("--served-name", help="name of the adapter there (default: that of its folder)")
    parser.add_argument("--base-name", help="name of the base model there (default: as listed)")
    parser.add_argument(
        "--served-format", default="bf16", choices=NUMBER_FORMATS, help="coarsest format of the base model's weights"
    )
    parser.add_argument("--protocol", choices=sorted({one.protocol for one in DIALECTS}), help="default: tried in turn")
    parser.add_argument("--key-variable", help="environment variable with the server's key")
    parser.add_argument("--header", action="append", default=[], metavar="NAME=VARIABLE", help="header from a variable")
    parser.add_argument("--ca-file", help="certificates that sign the server's (PEM)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for an answer (default: 120)")
    parser.add_argument("--check-timeout", type=_seconds, default=math.inf, help="seconds for everything (no limit)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"times that each question is asked ({REPEATS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} requests: is the adapter applied at all?")
    parser.add_argument("--caches", action="store_true", help="also ask long questions without and with the cache")
    parser.add_argument("--reload", metavar="COMMAND", help="shell command that loads the adapter; implies --caches")
    parser.add_argument(
        "--churn", type=_seconds, metavar="SECONDS", help="finally, ask all models while adapters change"
    )
    parser.add_argument("--run", metavar="COMMAND", help="shell command that changes adapters during --churn")
    parser.add_argument("--without-mixed", action="store_true", help="send no requests for both models at once")
    parser.add_argument("--without-template", action="store_true", help="do not compare the server's chat template")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    asked = parser.parse_args(arguments)
    if asked.run is not None and asked.churn is None:
        parser.error("--run needs --churn, which is missing")
    try:
        endpoint = Endpoint(
            asked.url,
            asked.key_variable,
            timeout_s=asked.timeout,
            more=asked.header,
            ca_file=asked.ca_file,
            ends=time.monotonic() + asked.check_timeout,
        )
        reference = read_any_reference(asked.reference)
        if isinstance(reference, VectorReference):
            return _shown(_check_vectors(asked, reference, endpoint), asked.json)
        asker = Asker.of(reference, endpoint, asked.served_name, asked.base_name, asked.protocol)
        if not asked.quick:
            asker = on_served_weights(asker)
            assert isinstance(asker.models, Reference)
            reference = asker.models
        needs = "caches" if asked.reload is None else "reload"
        long = long_questions(reference, field=needs) if asked.caches or asked.reload is not None else None
        run = None if asked.run is None else UserCommand(asked.run, flag("run"), endpoint.hidden)
        churn = None if asked.churn is None else ChurnRequest(reference.caches or reference, asked.churn, run)
        found = check(
            asker,
            asked.served_format,
            repeats=max(1, asked.repeats),
            is_quick=asked.quick,
            without_mixed=asked.without_mixed,
            without_template=asked.without_template,
            long=long,
            churn=churn,
            reload=None if asked.reload is None else UserCommand(asked.reload, flag("reload"), endpoint.hidden),
        )
    except LoraOverError as error:
        found = unanswered(error)
    return _shown(found, asked.json)


def _check_vectors(asked: argparse.Namespace, reference: VectorReference, endpoint: Endpoint) -> dict[str, Any]:
    check_of_vectors({name: bool(getattr(asked, name)) for name in (*OF_TEXT, "churn")})
    asker = VectorAsker.of(reference, endpoint, asked.served_name, asked.base_name)
    return check_vectors(
        asker,
        asked.served_format,
        repeats=max(1, asked.repeats),
        is_quick=asked.quick,
        without_mixed=asked.without_mixed,
    )


OF_TEXT = ("caches", "reload", "protocol", "without_template")
"""Fields of a check that there are only for generated text, beside that of changes of adapters."""


def check_of_vectors(wanted: Mapping[str, bool], option: Callable[[str], str] = flag) -> None:
    """Refuse what there is only for generated text, before a server is asked for vectors.

    Args:
        wanted: Whether the user gives an option, by the name of its field.
        option: Name of an option as its user writes it.

    Raises:
        ConfigError: Such an option is given.
    """
    for name, is_wanted in wanted.items():
        if is_wanted:
            raise ConfigError(f"{option(name)} is for generated text, and this reference has vectors; leave it out.")


def check_vectors(
    asker: VectorAsker,
    served_format: str = "bf16",
    option: Callable[[str], str] = flag,
    *,
    repeats: int = REPEATS,
    is_quick: bool = False,
    without_mixed: bool = False,
) -> dict[str, Any]:
    """Ask a server for vectors, classes or scores, and judge its answers.

    Args:
        asker: The server, with the reference.
        served_format: Coarsest number format in which the server may hold the base model.
        option: Name of an option as its user writes it.
        repeats: Number of times that each text is asked of the adapter.
        is_quick: Whether to ask only for a few answers of the adapter.
        without_mixed: Whether no requests for both models are sent together.

    Returns:
        The fields of an engine's result in verify.json, but for the engine.

    Raises:
        EngineError: A server that refuses, or whose answers cannot be read.
    """
    start = time.monotonic()
    answers = asker.quick_answers() if is_quick else asker.answers(repeats, without_mixed=without_mixed)
    found = judge_vectors(asker.reference, answers, served_format, option, is_quick=is_quick)
    return found | {"seconds": time.monotonic() - start}


def _shown(found: dict[str, Any], as_json: bool) -> int:
    """Print a result, and return the exit code."""
    print(json.dumps(found, indent=1, default=asdict) if as_json else f"{found['verdict']}: {found['reason']}")
    return EXIT_CODES[found["verdict"]]


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
