"""Functions of verbs, whose arguments are the fields of a request."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from loraover.common.request import Request, declarations

P = ParamSpec("P")
Result = TypeVar("Result")
AnyRequest = TypeVar("AnyRequest", bound=Request)


def verb(request: Callable[P, Any]) -> Callable[[Callable[[Any], Result]], Callable[P, Result]]:
    """Give a function of a request the request's fields as its arguments; `perform` calls it with a request.

    The function's docstring gets an `Args:` section, before `Returns:` or `Raises:`.
    """
    assert isinstance(request, type)
    kind: type[Request] = request

    def with_fields(work: Callable[[Any], Result]) -> Callable[P, Result]:
        @functools.wraps(work)
        def call(*places: P.args, **keywords: P.kwargs) -> Result:
            return work(with_sources_here(request(*places, **keywords)))

        call.__doc__ = _with_args(inspect.getdoc(work) or "", kind)
        call.__signature__ = _signature(work, kind)  # type: ignore[attr-defined]
        return call

    return with_fields


def _signature(work: Callable[..., Any], request: type[Request]) -> inspect.Signature:
    """Signature with the fields as parameters, in the words that a reader of `help()` knows."""
    shown = {"AnyPaths": "Sequence[str | Path]", "AnyNames": "Sequence[str]", "AnyPath": "str | Path"}
    shown |= {"AnyName": shown["AnyPath"], "AnyNumbers": "Sequence[float]", "AnyIntegers": "Sequence[int]"}
    made, others = inspect.signature(request).parameters, []
    for name in declarations(request):
        first, *more = made[name].annotation.split(" | ")
        others.append(made[name].replace(annotation=" | ".join([shown.get(first, first), *more])))
    return inspect.Signature([*others, made["report"]], return_annotation=inspect.signature(work).return_annotation)


def perform(function: Callable[..., Result], request: Request) -> Result:
    """Call a verb's function with a request that has been made already."""
    work: Callable[[Request], Result] = typing.cast(Any, function).__wrapped__
    return work(with_sources_here(request))


def with_sources_here(request: AnyRequest) -> AnyRequest:
    """Return a request whose adapters are folders of this machine, after fetching those that are elsewhere."""
    folders: dict[str, Any] = {}
    addresses: dict[str, Any] = {}
    for name, declared in declarations(type(request)).items():
        value = getattr(request, name)
        if not declared.spec.is_source or value is None or name in request.addresses:
            continue
        from loraover.sources.fetch import fetch_adapter  # only now: `--help` shall not wait for it

        found = [fetch_adapter(one, request.report.line) for one in (value if declared.is_several else (value,))]
        is_several = declared.is_several
        folders[name] = tuple(one.folder for one in found) if is_several else found[0].folder
        addresses[name] = tuple(one.address for one in found) if is_several else found[0].address
    return replace(request, **folders, addresses={**request.addresses, **addresses})


def _with_args(text: str, request: type[Request]) -> str:
    lines = [f"    {name}: {declared.help}" for name, declared in declarations(request).items()]
    section = "\n".join(["Args:", *lines, "    report: Receiver of progress.", ""])
    places = [place for head in ("\nReturns:", "\nRaises:", "\nExample:") if (place := text.find(head)) >= 0]
    place = min(places, default=len(text))
    return f"{text[:place].rstrip()}\n\n{section}{text[place:]}"
