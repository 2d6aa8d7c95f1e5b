"""The arguments of a verb, declared once.

A verb is a command such as `loraover export vllm` and the function beneath it, here `export_vllm`. Its request is a
frozen dataclass derived from `Request`, whose fields are made by `argument` and `option`. From the fields come the
checks, the keywords and `Args:` of the function (verb.py), the options of the command (request_command.py) and
the command line that reports record (`Request.command`). A module of requests imports nothing heavy, so that `--help`
is fast.
"""

from __future__ import annotations

import inspect
import shlex
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from loraover.common.errors import ConfigError
from loraover.common.paths import AddressPath, without_secrets
from loraover.common.reporter import SILENT, Reporter

if TYPE_CHECKING:
    AnyPath: TypeAlias = Any
    AnyName: TypeAlias = Any
    AnyPaths: TypeAlias = Any
    AnyNames: TypeAlias = Any
    AnyNumbers: TypeAlias = Any
    AnyIntegers: TypeAlias = Any
else:
    AnyPath = Path
    """Type of a field that takes a path or a text, and holds a Path."""
    AnyName = str
    """Type of a field that takes a path or a text, and holds a text, such as a folder or a name on the hub."""
    AnyPaths = tuple[Path, ...]
    """Type of a field that takes one path or several, and holds a tuple."""
    AnyNames = tuple[str, ...]
    """Type of a field that takes one text or several, and holds a tuple."""
    AnyNumbers = tuple[float, ...]
    """Type of a field that takes several numbers, and holds a tuple."""
    AnyIntegers = tuple[int, ...]
    """Type of a field that takes several integers, and holds a tuple."""

_as_flags: ContextVar[bool] = ContextVar("as_flags", default=False)


@dataclass(frozen=True)
class Spec:
    """Description of a request's field beyond its name, type and default.

    Args:
        description: Help text: a noun phrase that makes sense alone, without the default.
        default_text: What the default means, where its value does not say it.
        flag: Name of the option in place of the field's name, such as "--engine".
        short: Short form of the option, such as "-o".
        former: Earlier names of the option, which still work and are not shown.
        metavar: Word for the value in the help text.
        choices: Values that are allowed; empty: all.
        alone: Choice that the option means where it stands without a value; None: it needs one.
        also: Other spellings of choices, by spelling.
        accepts: Function that says whether a value that is none of `choices` is allowed.
        least: Smallest number that is allowed.
        above: Largest number that is too small.
        most: Largest number that is allowed.
        needs: Name of another field that has to be given with this one.
        converts: Function that makes the value from the caller's input, such as the texts of a command line; where it
            raises a ValueError, the message says what is wrong.
        writes: Function that gives the texts of the option on a command line, which is repeated for each of them.
        are_different: Whether several values have to be different.
        is_argument: Whether the command takes the value by its place, without a flag.
        is_hidden: Whether only the function takes the value.
        is_rest: Whether the command takes the words after "--" as the value.
        has_commas: Whether the command takes several values as one word, with commas between them.
        is_recorded: Whether the recorded command line has the option.
        is_source: Whether the value is an adapter, which may be an address elsewhere; the work gets its folder here.
    """

    description: str
    default_text: str | None = None
    flag: str | None = None
    short: str | None = None
    former: Sequence[str] = ()
    metavar: str | None = None
    choices: Sequence[str] = ()
    alone: str | None = None
    also: Mapping[str, str] = field(default_factory=dict)
    accepts: Callable[[str], bool] | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    needs: str | None = None
    converts: Callable[[Any], Any] | None = None
    writes: Callable[[Any], Sequence[str]] | None = None
    are_different: bool = False
    is_argument: bool = False
    is_hidden: bool = False
    is_rest: bool = False
    has_commas: bool = False
    is_recorded: bool = True
    is_source: bool = False


def option(description: str, *, default: Any = MISSING, **more: Any) -> Any:
    """Declare a field that the command takes by a flag; see `Spec` for the keywords."""
    return field(default=default, metadata={"spec": Spec(description, **more)}, kw_only=default is not MISSING)


def argument(description: str, *, default: Any = MISSING, **more: Any) -> Any:
    """Declare a field that the command takes by its place; see `Spec` for the keywords."""
    return field(default=default, metadata={"spec": Spec(description, is_argument=True, **more)})


@dataclass(frozen=True)
class Request:
    """Base of the requests, whose fields are checked and converted when one is made.

    Args:
        addresses: Addresses that fields had before their adapters were fetched, by the fields' names.

    Raises:
        ConfigError: Values that cannot be used; the message names all of them.
    """

    verb: ClassVar[str]
    """Words of the command, such as "loraover export vllm"; its help is the request's docstring."""
    examples: ClassVar[Sequence[str]] = ()
    """Complete command lines."""
    extra: ClassVar[str] = "torch"
    """Extra of this package that has what the command needs beyond a base installation."""
    json_help: ClassVar[str | None] = "Print the report as JSON."
    """Help text of `--json`; None: the command has no such option."""

    report: Reporter = field(default=SILENT, kw_only=True, repr=False, compare=False)
    addresses: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        faults = []
        for name, declared in declarations(type(self)).items():
            value, fault = declared.converted(getattr(self, name))
            object.__setattr__(self, name, value)
            faults += [] if fault is None else [f"{self.named(name)} {fault}"]
        if not faults:
            for name, declared in declarations(type(self)).items():
                needs = declared.spec.needs
                if needs and self._is_given(name) and not self._is_given(needs):
                    faults.append(f"{self.named(name)} needs {self.named(needs)}, which is missing.")
            faults += self.faults()
        if faults:
            raise ConfigError(" ".join(faults))

    def _is_given(self, name: str) -> bool:
        """Whether an argument is not at its default."""
        return not declarations(type(self))[name].is_default(getattr(self, name))

    def faults(self) -> Iterator[str]:
        """Yield a sentence about each fault that concerns several fields; subclasses override it."""
        yield from ()

    @classmethod
    def named(cls, name: str, value: Any = MISSING) -> str:
        """Return a field's name as the caller wrote it, with a value if one is given.

        In a command that is a flag such as "--engine vllm", else a keyword such as "engines='vllm'".
        """
        declared = declarations(cls)[name]
        if not _as_flags.get():
            return name if value is MISSING else f"{name}={value!r}"
        if declared.spec.is_rest:
            return 'the words after "--"'
        if declared.spec.is_argument:
            return declared.spec.metavar or name.upper()
        return declared.flag if value is MISSING else shlex.join(declared.words(declared.converted(value)[0]))

    def given(self, *names: str) -> str:
        """Return those of some arguments that are not at their defaults, as the caller wrote them."""
        return ", ".join(self.named(name) for name in names if self._is_given(name))

    def shown(self, name: str) -> str:
        """Return the value of a field as reports show it: of an adapter that was fetched, its address."""
        return without_secrets(str(self.addresses.get(name, getattr(self, name))))

    @property
    def loads_models(self) -> bool:
        """Whether the verb loads models, with libraries that take seconds to import."""
        return True

    def command(self) -> str:
        """Return the command line that repeats this request, without options at their defaults.

        Secrets in addresses are left out; see `without_secrets`.
        """
        places: list[str] = []
        words: list[str] = []
        rest: list[str] = []
        for name, declared in declarations(type(self)).items():
            value = self.addresses.get(name, getattr(self, name))
            if declared.is_default(value) or declared.spec.is_hidden or not declared.spec.is_recorded:
                continue
            if declared.spec.is_argument:
                places += map(str, value) if declared.is_several else [str(value)]
            elif declared.spec.is_rest:
                rest += ["--", *value]
            else:
                words += declared.words(value)
        return shlex.join(map(without_secrets, [*self.verb.split(), *places, *words, *rest]))


@dataclass(frozen=True)
class Declared:
    """Field of a request.

    Args:
        kind: Type of its value, or of each of several.
        is_several: Whether the value is a tuple.
        is_optional: Whether the value may be None.
        default: Its default; MISSING: it has to be given.
        spec: Its other properties.
    """

    name: str
    kind: type
    is_several: bool
    is_optional: bool
    default: Any
    spec: Spec

    @property
    def flag(self) -> str:
        """Name of the command's option."""
        return self.spec.flag or f"--{self.name.replace('_', '-')}"

    @property
    def help(self) -> str:
        """Description of the field with its default, as it stands in the docstring of the verb's function."""
        text = self.spec.default_text or ("none" if self.default is None else repr(self.default))
        if self.spec.default_text is None and (self.default is MISSING or self.default is False or self.default == ()):
            return self.spec.description
        return f"{self.spec.description} Default: {text}."

    @property
    def is_repeated(self) -> bool:
        """Whether the command takes the option several times."""
        return (self.is_several and not self.spec.has_commas) or self.spec.writes is not None

    def is_default(self, value: Any) -> bool:
        """Whether a converted value is the default."""
        return self.default is not MISSING and bool(value == self.converted(self.default)[0])

    def converted(self, value: Any) -> tuple[Any, str | None]:
        """Return the value in the field's type, and what is wrong with it, if anything."""
        if self.spec.converts is not None:
            try:
                value = self.spec.converts(value)
            except ValueError as error:
                return value, str(error)
        if value is None and self.is_optional:
            return None, None
        if not self.is_several:
            return self.one(value)
        pairs = [self.one(one) for one in ((value,) if isinstance(value, str | Path) else value)]
        several = tuple(one for one, _ in pairs)
        fault = next((fault for _, fault in pairs if fault is not None), None)
        if fault is None and not several and (self.default is MISSING or self.default):
            fault = "is empty, expected one or more."
        if fault is None and self.spec.are_different and len(set(several)) < len(several):
            fault = f"names one twice: {', '.join(map(str, several))}; name each once."
        return several, fault

    def one(self, value: Any) -> tuple[Any, str | None]:
        """Convert one value as `converted` does, or one of several."""
        takes = {Path: (str, Path), str: (str, Path), float: (int, float), int: (int,), bool: (bool,)}
        allowed = takes.get(self.kind)
        if allowed is None:
            return value, None
        if not isinstance(value, allowed) or (isinstance(value, bool) and self.kind is not bool):
            return value, f"is {value!r}, expected {'a number' if self.kind is float else self.kind.__name__.lower()}."
        kind = AddressPath if self.spec.is_source else self.kind
        value = kind(self.spec.also.get(value, value) if isinstance(value, str) else value)
        fault, spec = None, self.spec
        if spec.choices and value not in spec.choices and not (spec.accepts and spec.accepts(value)):
            fault = f"is {value!r}, expected one of {', '.join(spec.choices)}."
        elif spec.least is not None and not value >= spec.least:
            fault = f"is {value}, expected {spec.least:g} or more."
        elif spec.above is not None and not value > spec.above:
            fault = f"is {value}, expected more than {spec.above:g}."
        elif spec.most is not None and not value <= spec.most:
            fault = f"is {value}, expected {spec.most:g} at most."
        return value, fault

    def words(self, value: Any) -> list[str]:
        """Return the words of a command line that give the value."""
        if value is None:
            return []
        if self.kind is bool:
            return [self.flag] if value else [f"--no-{self.flag[2:]}"]
        flag = self.spec.short or self.flag
        if self.spec.has_commas:
            return [f"{flag}={','.join(map(str, value))}"]
        if self.spec.writes is not None:
            value = self.spec.writes(value)
        several = value if self.is_repeated and not isinstance(value, str | Path) else (value,)
        return [word for one in several for word in (flag, str(one))]


def declarations(request: type[Request]) -> Mapping[str, Declared]:
    """Return the fields of a request by name, its own first, without those that only functions take."""
    kind: Any = request
    found: Mapping[str, Declared] = _declarations(kind)
    return found


@cache  # the hints of all fields are evaluated, and checks ask for a name with each module of a model
def _declarations(request: Any) -> Mapping[str, Declared]:
    hints = typing.get_type_hints(request)
    known: dict[str, Field[Any]] = {one.name: one for one in fields(request) if "spec" in one.metadata}
    found = {}
    for name in dict.fromkeys(name for kind in request.__mro__ for name in inspect.get_annotations(kind)):
        if name not in known:
            continue
        hint, is_optional = hints[name], False
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            parts = [part for part in typing.get_args(hint) if part is not type(None)]
            is_optional = len(parts) < len(typing.get_args(hint))
            hint = parts[0] if len(parts) == 1 else object
        is_several = typing.get_origin(hint) is tuple
        kind = typing.get_args(hint)[0] if is_several else hint
        one = known[name]
        found[name] = Declared(name, kind, is_several, is_optional, one.default, one.metadata["spec"])
    return found


@contextmanager
def written_as_flags() -> Iterator[None]:
    """Let messages name arguments as flags during a block, as a command does."""
    token = _as_flags.set(True)
    try:
        yield
    finally:
        _as_flags.reset(token)


def as_written(name: str, value: str | None = None) -> str:
    """Return an argument's name, and a value, as the caller writes them, where no request is at hand.

    In a command that is "--compute-dtype bf16", else "compute_dtype='bf16'".
    """
    if _as_flags.get():
        return " ".join([f"--{name.replace('_', '-')}", *([] if value is None else [value])])
    return name if value is None else f"{name}={value!r}"
