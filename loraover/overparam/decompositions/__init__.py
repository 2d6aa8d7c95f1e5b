"""Decompositions of a LoRA matrix into cores; a new one takes one file, and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Annotated, Any, get_args

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from loraover.common.errors import ConfigError
from loraover.overparam.decompositions.base import Decomposition
from loraover.overparam.decompositions.chain import Chain
from loraover.overparam.decompositions.eigen import Eigen
from loraover.overparam.decompositions.mpo import Mpo
from loraover.overparam.decompositions.svd import Svd

AnyDecomposition = Annotated[Mpo | Svd | Chain | Eigen, Field(discriminator="name")]
DECOMPOSITIONS: dict[str, type[Decomposition]] = {kind.name: kind for kind in get_args(get_args(AnyDecomposition)[0])}
MAX_FAULTS = 8  # a message lists no more

_READER: TypeAdapter[Decomposition] = TypeAdapter(AnyDecomposition)


def make_decomposition(name: str, options: Mapping[str, Any] | None = None) -> Decomposition:
    """Return the decomposition of a name, with some options; a ConfigError lists all faults of name and options."""
    if name not in DECOMPOSITIONS:
        raise ConfigError(f"decomposition is {name!r}, expected one of {', '.join(DECOMPOSITIONS)}.")
    given = dict(options or {})
    if "name" in given:
        raise ConfigError(f"{name}: 'name' is not an option.")
    try:
        return _READER.validate_python({"name": name, **given})
    except ValidationError as error:
        faults = [_fault(fault, name) for fault in error.errors(include_url=False)]
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise ConfigError(f"{name}: {'; '.join(faults[:MAX_FAULTS])}{more}.") from error


def _fault(fault: ErrorDetails, name: str) -> str:
    """Describe a fault: the option, what was found and what was expected."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])  # the sentence of our own validator
    option, *within = fault["loc"][1:]  # behind the decomposition's name
    place = str(option) + "".join(f"[{key}]" for key in within if key != "[key]")
    if fault["type"] == "unexpected_keyword_argument":
        known = ", ".join(option for option in signature(DECOMPOSITIONS[name]).parameters if option != "name")
        return f"{place!r} is not an option; {f'the options are {known}' if known else 'there are none'}"
    return f"{place} is {fault['input']!r:.80}, but {fault['msg'].removeprefix('Input ')}"


__all__ = ["DECOMPOSITIONS", "AnyDecomposition", "Chain", "Decomposition", "Eigen", "Mpo", "Svd", "make_decomposition"]
