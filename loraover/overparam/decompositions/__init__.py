"""The decompositions that can stand behind a LoRA matrix; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
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
MAX_FAULTS = 8  # that a message lists

_READER: TypeAdapter[Decomposition] = TypeAdapter(AnyDecomposition)


def make_decomposition(name: str, options: Mapping[str, Any] | None = None) -> Decomposition:
    """The decomposition of that name with these options.

    Raises:
        ConfigError: an unknown name, an unknown option or an option out of range; all faults are listed.
    """
    if name not in DECOMPOSITIONS:
        raise ConfigError(f"decomposition is {name!r}, expected one of {', '.join(DECOMPOSITIONS)}.")
    given = dict(options or {})
    if "name" in given:
        raise ConfigError(f"{name}: 'name' is no option.")
    try:
        return _READER.validate_python({"name": name, **given})
    except ValidationError as error:
        faults = [_fault(fault) for fault in error.errors(include_url=False)]
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise ConfigError(f"{name}: {'; '.join(faults[:MAX_FAULTS])}{more}.") from error


def _fault(fault: ErrorDetails) -> str:
    """Which option it is, what was found and what was expected."""
    option, *within = fault["loc"][1:]  # behind the decomposition's name
    place = str(option) + "".join(f"[{key}]" for key in within if key != "[key]")
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])  # a sentence of ours
    if fault["type"] == "unexpected_keyword_argument":
        return f"{place!r} is no option"
    return f"{place} is {fault['input']!r:.80} and {fault['msg'].removeprefix('Input ')}"


__all__ = ["DECOMPOSITIONS", "AnyDecomposition", "Chain", "Decomposition", "Eigen", "Mpo", "Svd", "make_decomposition"]
