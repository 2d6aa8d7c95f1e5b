"""Training and evaluation rows: the hub, local files, or the built-in word problems."""

from __future__ import annotations

import gzip
import json
import reprlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraover.errors import ConfigError, DataError
from loraover.hub import pinned_commit

BUILT_IN = "word-problems"
MAX_LINE_BYTES = 4 * 2**20
Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Examples with `prompt` and `completion`, each a string or a list of chat messages.

    Args:
        revision: commit of a hub data set; None for local data.
    """

    rows: list[Row]
    origin: str
    revision: str | None = None


def load_rows(
    source: str, *, split: str, subset: str | None, revision: str | None, limit: int | None, format: str, chat: bool
) -> Rows:
    """Read examples and bring them into prompt and completion.

    Args:
        source: a `.jsonl`, `.jsonl.gz` or `.json` file, a folder with `<split>.jsonl`, or a hub name.
        split: of a folder or a hub data set.
        subset: the hub's configuration name.
        limit: number of rows to read; None reads all.
        format: a key of `FORMATS`, or "auto" to recognise it by the fields.
        chat: write strings as chat messages, for a tokenizer with a chat template.
    Raises:
        DataError: nothing there, not JSON, or a row that lacks a field; the row is numbered.
    """
    path = Path(source)
    commit = None
    if path.is_file():
        raw, origin = _read_file(path), f"file {path.name}"
    elif path.is_dir():
        file = next(
            (path / f"{split}{end}" for end in (".jsonl", ".jsonl.gz") if (path / f"{split}{end}").is_file()), None
        )
        if file is None:
            raise DataError(f"{path}: holds no {split}.jsonl or {split}.jsonl.gz.")
        raw, origin = _read_file(file), f"file {file.name}"
    elif (
        source.count("/") <= 1
        and not source.startswith((".", "/", "~"))
        and path.suffix not in (".jsonl", ".json", ".gz")
    ):
        raw, origin, commit = _read_hub(source, split, subset, revision)
    else:
        raise DataError(f"{source}: no such file or folder, and not a hub name such as 'owner/data'.")
    rows: list[Row] = []
    for number, row in enumerate(raw, 1):
        if limit is not None and len(rows) >= limit:
            break
        for example in _convert(row, format, chat, f"{source}, row {number}"):
            if rows and type(example["prompt"]) is not type(rows[0]["prompt"]):
                raise DataError(f"{source}, row {number}: text and chat messages in one file; set data.chat to true.")
            rows.append(example)
    if not rows:
        raise DataError(f"{source}: holds no examples.")
    return Rows(rows[:limit], origin, commit)


def _prompt_completion(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    prompt, completion = _field(row, "prompt", where), _field(row, "completion", where)
    if type(prompt) is not type(completion):
        raise DataError(f"{where}: prompt and completion must both be text or both be chat messages.")
    yield {"prompt": prompt, "completion": completion}


def _gsm8k(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    question, answer = _field(row, "question", where), _field(row, "answer", where)
    yield {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def _messages(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    """One example per assistant turn, with all that came before as its prompt."""
    messages = _field(row, "messages", where)
    if isinstance(messages, str):
        raise DataError(f"{where}: messages is text, expected a list of objects with role and content.")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not turns:
        raise DataError(f"{where}: messages holds no assistant turn to learn from.")
    for i in turns:
        yield {"prompt": messages[:i], "completion": [messages[i]]}


FORMATS: dict[str, tuple[frozenset[str], Callable[[Mapping[str, Any], str], Iterator[Row]]]] = {
    "prompt-completion": (frozenset({"prompt", "completion"}), _prompt_completion),
    "messages": (frozenset({"messages"}), _messages),
    "gsm8k": (frozenset({"question", "answer"}), _gsm8k),
}


def _convert(row: Any, format: str, chat: bool, where: str) -> Iterator[Row]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}.")
    if format == "auto":
        fitting = [name for name, (fields, _) in FORMATS.items() if fields <= row.keys()]
        if not fitting:
            raise DataError(
                f"{where}: has fields {sorted(row)}; expected "
                + " or ".join(f"{sorted(fields)} ({name})" for name, (fields, _) in FORMATS.items())
                + "."
            )
        format = fitting[0]
    for example in FORMATS[format][1](row, where):
        yield as_chat(example) if chat and isinstance(example["prompt"], str) else example


def as_chat(example: Row) -> Row:
    """Prompt and completion of text as one user and one assistant message."""
    return {
        "prompt": [{"role": "user", "content": example["prompt"].strip()}],
        "completion": [{"role": "assistant", "content": example["completion"].strip()}],
    }


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    value = row.get(name)
    if not isinstance(value, str | list) or not value:
        raise DataError(f"{where}: field {name!r} is {reprlib.repr(value)}, expected text.")
    if isinstance(value, list) and not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise DataError(f"{where}: field {name!r} is not a list of objects with role and content.")
    return value


def _read_file(path: Path) -> Iterator[Any]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            if path.suffix == ".json":
                rows = json.loads(file.read())
                if not isinstance(rows, list):
                    raise DataError(f"{path}: holds {type(rows).__name__}, expected a list of objects.")
                yield from rows
                return
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{path}, row {number}: longer than {MAX_LINE_BYTES} bytes.")
                if line.strip():
                    yield _parse(line, path, number)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not JSON: {error}.") from error


def _parse(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, row {number}: not JSON: {error}.") from error


def _read_hub(name: str, split: str, subset: str | None, revision: str | None) -> tuple[Iterator[Any], str, str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        commit = pinned_commit(name, revision, "dataset")
        rows = load_dataset(name, subset, split=split, revision=commit)
    except (ConfigError, DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(f"{name}: {error} Name a local file with the same fields instead, e.g. --data FILE.") from error
    return iter(rows), f"hub {name}@{commit[:12]}", commit
