"""Training and evaluation rows: the hub, local files, or the built-in word problems."""

from __future__ import annotations

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loraover.common.errors import ConfigError, DataError
from loraover.data.formats import Row, read_row
from loraover.models.hub import pinned_commit

BUILT_IN = "word-problems"
MAX_LINE_BYTES = 4 * 2**20


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
    source: str,
    *,
    split: str,
    subset: str | None,
    revision: str | None,
    limit: int | None,
    format: str,
    chat: bool,
    keep: Mapping[str, re.Pattern[str]] = MappingProxyType({}),
) -> Rows:
    """Read examples and bring them into prompt and completion.

    Args:
        source: a `.jsonl`, `.jsonl.gz` or `.json` file, a folder with `<split>.jsonl`, or a hub name.
        split: of a folder or a hub data set, or a slice of one such as "train[:95%]"; a file is read whole.
        subset: the hub's configuration name.
        limit: number of examples to read; None reads all.
        format: a key of `loraover.data.formats.FORMATS`, or "auto" to recognise it by the fields.
        chat: write strings as chat messages, for a tokenizer with a chat template.
        keep: read only rows in whose columns these expressions are found.

    Raises:
        DataError: nothing there, not JSON, or a row that lacks a field; the row is numbered.
    """
    rows: list[Row] = []
    raw = read_raw(source, split=split, subset=subset, revision=revision)
    for number, row in raw.rows:
        if limit is not None and len(rows) >= limit:
            break
        where = f"{source}, row {number}"
        if not _is_kept(row, keep, where):
            continue
        for example in read_row(row, format, chat, where):
            if rows and type(example["prompt"]) is not type(rows[0]["prompt"]):
                raise DataError(f"{where}: text and chat messages in one file; set data.chat to true.")
            rows.append(example)
    if not rows:
        raise DataError(f"{source}: holds no examples" + (" that data.keep lets through." if keep else "."))
    return Rows(rows[:limit], raw.origin, raw.revision)


@dataclass(frozen=True)
class RawRows:
    """Rows as they stand in their source, each with its number from 1, read on the way; see `Rows`."""

    rows: Iterator[tuple[int, Any]]
    origin: str
    revision: str | None = None


def read_raw(source: str, *, split: str, subset: str | None = None, revision: str | None = None) -> RawRows:
    """Open a data source; arguments as in `load_rows`.

    Raises:
        DataError: nothing there; or, while rows are read, not JSON.
    """
    path = Path(source)
    if path.is_file():
        return RawRows(_read_file(path), f"file {path.name}")
    if path.is_dir():
        return _read_folder(path, split)
    is_name = source.count("/") <= 1 and not source.startswith((".", "/", "~"))
    if not is_name or path.suffix in (".jsonl", ".json", ".gz"):
        raise DataError(f"{source}: no such file or folder, and not a hub name such as 'owner/data'.")
    return RawRows(*_read_hub(source, split, subset, revision))


def _is_kept(row: Any, keep: Mapping[str, re.Pattern[str]], where: str) -> bool:
    for column, pattern in keep.items():
        value = row.get(column) if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise DataError(
                f"{where}: field {column!r} is {reprlib.repr(value)}, expected text, which data.keep reads."
            )
        if not pattern.search(value):
            return False
    return True


def _read_folder(folder: Path, split: str) -> RawRows:
    name, bracket, _ = split.partition("[")
    file = next(
        (folder / f"{name}{end}" for end in (".jsonl", ".jsonl.gz") if (folder / f"{name}{end}").is_file()), None
    )
    if file is None:
        raise DataError(f"{folder}: holds no {name}.jsonl or {name}.jsonl.gz.")
    if not bracket:
        return RawRows(_read_file(file), f"file {file.name}")
    return RawRows(_sliced(file, name, split), f"file {file.name}, {split}")


def _sliced(file: Path, name: str, split: str) -> Iterator[tuple[int, Any]]:
    """The rows that the hub's library would take of that split."""
    from datasets import ReadInstruction

    count = sum(1 for _ in _read_file(file))
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({name: count})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{file}: {split!r} is no slice of its {count} rows; expected e.g. train[:95%].") from error
    yield from islice(_read_file(file), part.from_, part.to)


def _read_file(path: Path) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            if path.suffix == ".json":
                rows = json.loads(file.read())
                if not isinstance(rows, list):
                    raise DataError(f"{path}: holds {type(rows).__name__}, expected a list of objects.")
                yield from enumerate(rows, 1)
                return
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{path}, row {number}: longer than {MAX_LINE_BYTES} bytes.")
                if line.strip():
                    yield number, _parse(line, path, number)
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


def is_hub_name(source: str) -> bool:
    """Whether a source is looked for on the hub: nothing local has that name, and a data set there could have it."""
    path = Path(source)
    looks_local = source.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json", ".gz")
    return source.count("/") <= 1 and not looks_local and not path.exists()


def count_hub_rows(name: str, split: str, subset: str | None, revision: str | None) -> int:
    """Rows of a split, from what the hub says of the data set; none is read.

    Raises:
        DataError: the hub cannot be reached or does not say.
    """
    from datasets import load_dataset_builder

    with _hub_errors(name):
        commit = pinned_commit(name, revision, "dataset")
        splits = load_dataset_builder(name, subset, revision=commit).info.splits
    if splits is None or split not in splits:
        raise DataError(
            f"{name}: the hub does not say how many rows {split!r} has; set data.train_examples or training.max_steps."
        )
    return int(splits[split].num_examples)


def _read_hub(
    name: str, split: str, subset: str | None, revision: str | None
) -> tuple[Iterator[tuple[int, Any]], str, str]:
    from datasets import load_dataset

    with _hub_errors(name):
        commit = pinned_commit(name, revision, "dataset")
        rows = load_dataset(name, subset, split=split, revision=commit)
    return enumerate(rows, 1), f"hub {name}@{commit[:12]}", commit


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (ConfigError, DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(
            f"{name}: {error} Download it where the hub can be reached (hf download {name} --repo-type dataset), or "
            "name a local file with the same fields, one JSON object a line: --data FILE."
        ) from error
