"""JSON files, read strictly: large files, repeated keys and NaN are refused, and every fault is named."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from loraover.common.errors import CheckpointError
from loraover.common.paths import one_below

MAX_JSON_BYTES = 64 * 2**20
Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """Contents of a JSON file, or a part of them: they do not change, and a file has no other fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_json(path: Path, model: type[Model], *, finite: bool = True) -> Model:
    """Read a JSON file and validate its contents.

    Args:
        path: The file.
        model: Type of its contents.
        finite: Whether NaN and infinity, which Python's JSON has beside numbers, are refused.

    Raises:
        CheckpointError: The file is missing, too large or not JSON, or has invalid fields, which are all named.
    """
    return _parse(_read(path), model, str(path), _finite if finite else float)


def read_json_lines(path: Path, model: type[Model]) -> list[Model]:
    """Read a file of one JSON object a line, and validate each as `read_json` does; errors have the line's number."""
    lines = enumerate(_read(path).splitlines(), start=1)
    return [_parse(line, model, f"{path}, line {number}", _finite) for number, line in lines]


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise CheckpointError(f"{path}: expected a file, found a device or a pipe.")
        if status.st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {status.st_size} bytes of JSON, expected at most {MAX_JSON_BYTES}.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; expected a folder that holds it.{one_below(path)}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error


def _parse(content: bytes, model: type[Model], place: str, number: Callable[[str], float]) -> Model:
    try:
        json.loads(content, object_pairs_hook=unique_keys, parse_constant=number, parse_float=number)
        return model.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{place}: {describe(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place}: not valid JSON: {error}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, as `json.loads` hands its keys and values to a hook; ValueError: a key occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def describe(error: ValidationError, limit: int = 8) -> str:
    """List the faults of a validation in one line, each with its place."""
    faults = [
        f"{'.'.join(map(str, fault['loc'])) or 'content'}: {fault['msg']}"
        + ("" if isinstance(fault["input"], dict | list) else f" (found {fault['input']!r:.80})")
        for fault in error.errors(include_url=False)
    ]
    return "; ".join(faults[:limit]) + (f"; and {len(faults) - limit} more" if len(faults) > limit else "")
