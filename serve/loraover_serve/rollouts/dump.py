"""Files of sampled tokens, which any training loop can write: one JSON object a line, read step by step.

    {"step": 3, "prompt_id": 7, "row": 12, "position": 0, "e": -1.25, "a": -1.27, "b": -1.4}

A file may be larger than memory: one step is held at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loraover.common.errors import DataError
from loraover_serve.rollouts.tokens import STALE_BY, is_logprob, is_name

NUMBERS = ("e", "a", "b")
NEEDED = ("step", "prompt_id", "position", *NUMBERS)
OPTIONAL = ("row", "token", "earlier", "candidates", "engine_prompt_id")
MAX_LINE_BYTES, MAX_TOKENS, MAX_STEPS = 2**18, 2**20, 100_000
"""Largest line in bytes, number of tokens in a step, and number of steps in a file."""

Row = dict[str, Any]


class DumpedStep(NamedTuple):
    """A step of a file.

    Args:
        step: Its number.
        arguments: Arguments of `judge_rollouts`, by name; `faults` has the candidates.
    """

    step: int
    arguments: dict[str, Any]


def read_dump(path: Path) -> Iterator[DumpedStep]:
    """Yield the steps of a file.

    Raises:
        DataError: A file that cannot be read, or a line that is not as expected; the message names it.
    """
    rows: list[Row] = []
    seen: list[int] = []
    for line, row in _rows(path):
        step, place = row["step"], f"{path}, line {line}"
        if rows and step != rows[0]["step"]:
            yield _step_of(rows)
            rows = []
        if not rows:
            _check_next(seen, step, place)
            seen = [*seen[:2], step]
            first_line = line
        elif (mine := _layout(row)) != (first := _layout(rows[0])):
            raise DataError(
                f"{place}: found {', '.join(mine)}; expected {', '.join(first)} as in line {first_line} of the same "
                "step: give each row of a step the same keys, with null for a candidate that was not computed."
            )
        if len(rows) == MAX_TOKENS:
            raise DataError(f"{place}: step {step} has more than {MAX_TOKENS} tokens; write a part of its rows.")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: found no rows, expected one JSON object a line for each sampled token.")
    yield _step_of(rows)


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield each row with the number of its line; empty lines are left out."""
    try:
        with path.open("rb") as file:
            number = 0
            while content := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(content) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}, line {number}: more than {MAX_LINE_BYTES} bytes, expected one token a line; write "
                        "JSON Lines."
                    )
                if content.strip():
                    yield number, _row(content, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; give a file of JSON Lines.") from error


def _row(content: bytes, place: str) -> Row:
    """Read a line; DataError: anything but the known keys with values of their types."""

    def refuse(text: str) -> float:
        raise ValueError(f"{text} is not a number; leave out the tokens that the trainer masks")

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice in one object")
        return found

    try:
        row = json.loads(content, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}; write one object a line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: found {_shown(row)}, expected an object with the keys {', '.join(NEEDED)}.")
    missing = [name for name in NEEDED if name not in row]
    unknown = [name for name in row if name not in NEEDED + OPTIONAL]
    if missing or unknown:
        odd = f"the key {_shown(unknown[0])}" if unknown else f"no {missing[0]}"
        raise DataError(
            f"{place}: found {odd}, expected the keys {', '.join(NEEDED)}, and where they are known "
            f"{', '.join(OPTIONAL)}; other models of yours belong into candidates."
        )
    for name, fault in _faults(row):
        raise DataError(f"{place}: {name} {fault}.")
    return row


def _faults(row: Row) -> Iterator[tuple[str, str]]:
    """Yield each key whose value is not as expected, with the fault in words."""
    for name in ("step", "position"):
        if type(row[name]) is not int or not 0 <= row[name] < 2**63:
            yield name, f"is {_shown(row[name])}, expected an integer from 0"
    for name in ("prompt_id", "row", "token", "engine_prompt_id"):
        if name in row and type(row[name]) not in (int, str):
            yield name, f"is {_shown(row[name])}, expected an integer or a text"
    for name in NUMBERS:
        if not _is_logprob(row[name]):
            yield name, f"is {_shown(row[name])}, expected a logprob in nats, from -10000 to 0"
    earlier, candidates = row.get("earlier", []), row.get("candidates", {})
    if not isinstance(earlier, list) or not all(map(_is_logprob, earlier)):
        yield "earlier", f"is {_shown(earlier)}, expected a list of logprobs in nats, those of one step before first"
    if not isinstance(candidates, dict) or not all(v is None or _is_logprob(v) for v in candidates.values()):
        yield "candidates", f"is {_shown(candidates)}, expected an object of names with logprobs in nats, or null"
    elif odd := [name for name in candidates if not is_name(name) or name.startswith(STALE_BY.format(""))]:
        yield (
            "candidates",
            (
                f"has the name {_shown(odd[0])}, expected 1 to 80 printable characters that name neither b nor "
                "earlier; give it another name"
            ),
        )


def _is_logprob(value: Any) -> bool:
    return type(value) in (int, float) and is_logprob(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _layout(row: Row) -> list[str]:
    """Names of a row's keys and candidates, and its number of earlier adapters, which a step's rows share."""
    found = sorted(name for name in row if name not in ("candidates", "earlier", "token"))
    return [*found, f"{len(row.get('earlier', []))} earlier", *sorted(row.get("candidates", {}))]


def _check_next(seen: list[int], step: int, place: str) -> None:
    """Check that a step follows those before as far as the second one followed the first; see `read_dump`."""
    if not seen:
        return
    stride = seen[1] - seen[0] if len(seen) > 1 else 1
    expected = seen[-1] + stride
    if step <= seen[-1] or (len(seen) > 1 and step != expected):
        raise DataError(
            f"{place}: step {step} follows step {seen[-1]}, expected {expected}: write the rows of each step together, "
            "in order and without gaps; put what a restart repeats into another file."
        )


def _step_of(rows: list[Row]) -> DumpedStep:
    first, found = rows[0], {name: [row[name] for row in rows] for name in NUMBERS}
    found["prompt_ids"] = [row["prompt_id"] for row in rows]
    found["positions"] = [row["position"] for row in rows]
    for name, argument in {"row": "rows", "engine_prompt_id": "engine_prompt_ids"}.items():
        if name in first:
            found[argument] = [row[name] for row in rows]
    earlier = [[row["earlier"][k] for row in rows] for k in range(len(first.get("earlier", [])))]
    faults = {name: [row["candidates"][name] for row in rows] for name in first.get("candidates", {})}
    return DumpedStep(first["step"], {**found, "earlier": earlier, "faults": faults})
