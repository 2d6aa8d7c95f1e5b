"""Commands whose arguments and options come from the fields of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from itertools import zip_longest
from pathlib import Path
from pkgutil import resolve_name as imported
from typing import Any

import click

from loraover.common.command_line import Command, quiet_libraries
from loraover.common.errors import ConfigError, UnwrittenReportError
from loraover.common.extras import missing_package
from loraover.common.request import Declared, Request, Spec, declarations, written_as_flags
from loraover.sources.verb import perform

Body = Callable[[Any, bool], int | None]
"""Function of a command, called with its request and `--json`; it returns the exit code, or None for 0."""


def request_command(request: type[Request], body: Body) -> click.Command:
    """Make the command of a verb; its name is the last word of the request's `verb`, its help the class's docstring."""

    @click.pass_context
    def callback(context: click.Context, /, as_json: bool = False, **values: Any) -> int | None:
        given = {name: value for name, value in values.items() if value != ()}
        try:
            with written_as_flags():
                return body(request(**given, **({rest: context.obj} if rest else {})), as_json)
        except ModuleNotFoundError as error:
            if missing := missing_package(error, request.extra):
                raise ConfigError(missing) from error
            raise

    fields = declarations(request)
    rest = next((name for name, declared in fields.items() if declared.spec.is_rest), None)
    params = [_parameter(one) for name, one in fields.items() if name != rest and not one.spec.is_hidden]
    if request.json_help is not None:
        params.append(click.Option(["--json", "as_json"], is_flag=True, help=request.json_help))
    name = request.verb.split()[-1]
    more: dict[str, Any] = {"params": params, "callback": callback, "help": request.__doc__}
    more["examples"] = request.examples
    alone = {one.flag: one.spec for one in fields.values() if one.spec.alone is not None}
    if rest is not None:
        return _SplitAtDashes(name, rest=fields[rest].spec.metavar, **more)
    return _WithLoneFlags(name, alone=alone, **more) if alone else Command(name, **more)


class _WithLoneFlags(Command):
    """A command some of whose options may stand without their value, also before an argument."""

    def __init__(self, *args: Any, alone: Mapping[str, Spec], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alone = alone

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        for i, (word, after) in enumerate(zip_longest(args, args[1:], fillvalue="")):
            spec = self.alone.get(word)
            if spec is not None and after not in spec.choices:
                words[i] = f"{word}={spec.alone}"
        return super().parse_args(ctx, words)


class _SplitAtDashes(Command):
    """A command that keeps the words after "--" for another program, in the context's `obj`."""

    def __init__(self, *args: Any, rest: str | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rest = rest or "WORDS"

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), f"[-- {self.rest}]"]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ctx.obj = tuple(args[end + 1 :])
        return super().parse_args(ctx, args[:end])


@dataclass(frozen=True)
class Reporting:
    """The usual command: do the work with progress, show the report, print it as JSON, and return its exit code.

    What it names is imported when the command runs, and the request when its help is shown.

    Args:
        request: Place of the request's class, as "module:name".
        function: Place of the verb's function.
        show: Place of a function that prints the report, given the report, the request and a console.
        leaves_out: Fields of the report that the JSON does not have.
    """

    request: str
    function: str
    show: str
    leaves_out: Sequence[str] = ()

    def __call__(self) -> click.Command:
        """Make the command."""
        return request_command(imported(self.request), self.run)

    def run(self, request: Any, as_json: bool) -> int:
        """Do the work, show the report, and return the exit code."""
        from dataclasses import replace

        from loraover.reporting.reporter import ConsoleReporter

        if request.loads_models:
            quiet_libraries()
        progress = ConsoleReporter(stderr=as_json)

        def present(report: Any, of: Request) -> int:
            imported(self.show)(report, of, progress.console)
            if as_json:
                print(report.model_dump_json(exclude=set(self.leaves_out), indent=1))
            return int(report.exit_code)

        try:
            report = perform(imported(self.function), replace(request, report=progress))
        except UnwrittenReportError as error:
            present(error.report, replace(request, output=None))
            raise
        return present(report, request)


def _parameter(declared: Declared) -> click.Parameter:
    spec, is_required = declared.spec, declared.default is MISSING
    if spec.is_argument:
        many: dict[str, Any] = {"nargs": -1} if declared.is_several else {}
        metavar = spec.metavar or declared.name.upper()
        shown = metavar if is_required else f"[{metavar}]"
        return click.Argument([declared.name], type=_type(declared), metavar=shown, required=is_required, **many)
    says_nothing = declared.default in (None, (), MISSING) or declared.default is False
    names = [*([spec.short] if spec.short else []), declared.flag, declared.name]
    more: dict[str, Any] = {} if is_required else {"default": None if spec.writes else declared.default}
    if declared.kind is bool:
        more["is_flag"] = True
        if declared.default is not False:
            names[-2] = f"{declared.flag}/--no-{declared.flag[2:]}"
    return _Option(
        names,
        former=spec.former,
        type=None if declared.kind is bool else _type(declared),
        help=f"{spec.description}{' Can be repeated.' if declared.is_repeated else ''}",
        required=is_required,
        multiple=declared.is_repeated,
        show_default=spec.default_text or not says_nothing,
        metavar=spec.metavar,
        **more,
    )


class _Option(click.Option):
    """An option that also takes its earlier names, which no help text shows."""

    def __init__(self, *args: Any, former: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._former = former

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown, self.opts = self.opts, [*self.opts, *self._former]
        super().add_to_parser(parser, ctx)
        self.opts = shown


class _Choices(click.Choice):  # type: ignore[type-arg]  # has no parameter before click 8.2
    """Choices of a field, with their other spellings and the values that its function accepts."""

    def __init__(self, declared: Declared) -> None:
        super().__init__(list(declared.spec.choices))
        self.declared = declared

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        converted, fault = self.declared.one(value) if isinstance(value, str) else (value, None)
        return super().convert(value, param, ctx) if fault else converted


class _Commas(click.ParamType):  # type: ignore[type-arg]  # has no parameter before click 8.2
    """Several numbers in one word, with commas between them."""

    name = "numbers"

    def __init__(self, declared: Declared) -> None:
        self.declared = declared

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(map(self.declared.kind, value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers, with commas between them.", param, ctx)


def _type(declared: Declared) -> Any:
    spec = declared.spec
    if spec.has_commas:
        return _Commas(declared)
    if spec.choices:
        return _Choices(declared)
    if spec.writes is not None:
        return click.STRING
    if declared.kind in (int, float) and {spec.least, spec.above, spec.most} != {None}:
        kind: Any = click.IntRange if declared.kind is int else click.FloatRange
        least = spec.least if spec.above is None else spec.above
        return kind(min=least, max=spec.most, min_open=spec.above is not None)
    if declared.kind is Path:
        return click.Path(path_type=Path)
    return click.types.convert_type(declared.kind)
