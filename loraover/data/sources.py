"""Sources of training and evaluation rows: the hub and local files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import reprlib
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loraover.common.errors import ConfigError, DataError
from loraover.common.paths import kind_of
from loraover.common.request import as_written
from loraover.data.formats import Row, RowForm, parse_json, read_row, said, unread
from loraover.data.pictures import with_pictures
from loraover.sources.hub import pinned_commit

BUILT_IN = "word-problems"
LOCAL_SUFFIXES = (".jsonl", ".json", ".gz", ".parquet", ".csv", ".tsv")
MAX_LINE_BYTES = 4 * 2**20
SHOWN = 3  # rows by which messages show a kind


@dataclass
class Counted:
    """Rows of one kind.

    Args:
        count: Their number.
        first: Numbers of the first three rows, from 1; with the source if there are several.
    """

    count: int = 0
    first: list[int | str] = field(default_factory=list)

    def add(self, number: int | str) -> None:
        """Count one more, which may be in a row that was counted already."""
        self.count += 1
        if len(self.first) < SHOWN and number not in self.first:
            self.first.append(number)

    def and_those(self, others: Counted) -> Counted:
        """Return these rows and others of the same kind."""
        return Counted(self.count + others.count, [*self.first, *others.first][:SHOWN])

    @property
    def rows(self) -> str:
        """The numbers, for messages."""
        return f"rows {', '.join(map(str, self.first))}{', ...' if self.count > len(self.first) == SHOWN else ''}"


@dataclass
class BadRows:
    """Rows that cannot be learned, and why.

    Args:
        reasons: Message of each row, by its number.
        examples: Indices of their examples; empty where rows are read.
    """

    reasons: dict[int | str, str] = field(default_factory=dict)
    examples: set[int] = field(default_factory=set)

    @contextmanager
    def of(self, number: int | str, example: int | None = None) -> Iterator[None]:
        """Note a row as bad, by its number and the index of its example, if the block raises a DataError."""
        try:
            yield
        except DataError as error:
            self.reasons.setdefault(number, str(error) if len(self.reasons) < REASONS else "")
            if example is not None:
                self.examples.add(example)

    @property
    def rows(self) -> Counted:
        """Their number, and the first of them."""
        return Counted(len(self.reasons), [*islice(self.reasons, SHOWN)])

    def refuse(self, origin: str) -> None:
        """Raise DataError with all reasons if there are any such rows; `origin` names their source."""
        count, advice = len(self.reasons), "leave such rows out: --skip-bad-rows, or data.skip_bad_rows in a recipe."
        reasons = [*islice(self.reasons.values(), REASONS)]
        if count == 1:
            raise DataError(f"{reasons[0]} Or {advice}")
        if count:
            more = [f"... and {count - REASONS} more"] if count > REASONS else []
            head = f"{origin}: {count} rows cannot be learned. Correct them, or {advice}"
            raise DataError("\n".join([head, *reasons, *more]))


REASONS = 10
"""Rows whose faults are listed."""


def together(parts: Iterable[tuple[str, Counted]]) -> Counted:
    """Return the rows of one kind in several sources, which come with their origins."""
    found = [*parts]
    first: list[int | str] = [f"{number} of {origin}" for origin, part in found for number in part.first]
    return Counted(sum(part.count for _, part in found), first[:SHOWN])


@dataclass(frozen=True)
class Rows:
    """Examples of a data set.

    Args:
        rows: Examples in the form that the trainer takes, such as `prompt` and `completion`.
        origin: Description of the source in one line.
        revision: Commit of a data set on the hub; None for local data.
        numbers: Number of the source's row, from 1, that each example comes from, with the source where there are
            several; empty if they are generated.
        filtered: Rows that `keep` has left out.
        unread: Columns that are not learned, with the rows that have them.
        skipped: Rows that are left out, since they cannot be learned.
    """

    rows: list[Row]
    origin: str
    revision: str | None = None
    numbers: Sequence[int | str] = ()
    filtered: Counted = field(default_factory=Counted)
    unread: Mapping[str, Counted] = field(default_factory=dict)
    skipped: Counted = field(default_factory=Counted)

    def number(self, example: int) -> int | str:
        """Return the number of the source's row that an example comes from, or the example's own."""
        return self.numbers[example] if self.numbers else example + 1

    def place(self, example: int) -> str:
        """Return the source and the row of an example, for messages."""
        return f"{self.origin}: row {self.number(example)}"


def load_rows(
    source: str,
    *,
    split: str,
    subset: str | None,
    revision: str | None,
    limit: int | None,
    format: str,
    form: RowForm,
    keep: Mapping[str, re.Pattern[str]] = MappingProxyType({}),
    streaming: bool = False,
    skip_bad_rows: bool = False,
) -> Rows:
    """Read examples in the form that a trainer takes.

    Args:
        source: File (`.jsonl`, `.json`, `.csv` or `.tsv`, also with `.gz`, or `.parquet`), folder with `<split>.jsonl`
            or another of these, or hub name, with `@` and a commit where it shall not be that of `revision`.
        split: Split of a folder or of a data set on the hub, or a slice of one such as "train[:95%]". A file has no
            splits: a name is not used, and a slice is refused.
        subset: Name of the data set's configuration on the hub.
        revision: Branch, tag or commit on the hub.
        limit: Number of examples to read; None reads all.
        format: Key of `loraover.data.formats.FORMATS`, or "auto" to recognise the format by the fields.
        form: Rows that the trainer takes.
        keep: Regular expressions by column; only rows in which all of them are found are read.
        streaming: Whether rows of the hub are downloaded one after the other, as far as the limit.
        skip_bad_rows: Whether to leave out rows that cannot be learned, and to count them.

    Raises:
        DataError: No examples, or rows that cannot be learned; the message lists the first ten with their numbers.
    """
    rows: list[Row] = []
    numbers: list[int] = []
    filtered, others, bad = Counted(), defaultdict[str, Counted](Counted), BadRows()
    raw = read_raw(source, split=split, subset=subset, revision=revision, streaming=streaming)
    for number, row in raw.rows:
        if limit is not None and len(rows) >= limit:
            break
        where = f"{source}, row {number}"
        with bad.of(number):
            if isinstance(row, DataError):
                raise row
            if not _is_kept(row, keep, where):
                filtered.add(number)
                continue
            row = _with_text(with_pictures(row, raw.folder, where) if form.pictures else row, form.text, where)
            found = [*read_row(row, format, form, where)]
            for column in unread(row, format, form, where):
                others[column].add(number)
            rows += found
            numbers += [number] * len(found)
    if not (rows and skip_bad_rows):
        bad.refuse(source)
    if not rows:
        raise DataError(f"{source}: holds no examples" + (" that data.keep lets through." if keep else "."))
    columns = {name: found for name, found in others.items() if name not in keep}
    return Rows(rows[:limit], raw.origin, raw.revision, numbers[:limit], filtered, columns, bad.rows)


def _with_text(row: Any, column: str, where: str) -> Any:
    """Return a row whose column of texts is called `text`, as trainers call it."""
    if column == "text" or not isinstance(row, dict) or column not in row:
        return row
    if "text" in row:
        raise DataError(f"{where}: has a column 'text' besides {column!r}, which training.dataset_text_field names.")
    return {"text" if name == column else name: value for name, value in row.items()}


@dataclass(frozen=True)
class RawRows:
    """Rows in the form that their source has.

    Args:
        rows: Rows with their numbers, from 1; each is read when it is needed. An error stands for a row that cannot be
            read.
        origin: Description of the source in one line.
        revision: Commit of a data set on the hub; None for local data.
        folder: Folder of the file; None for data of the hub.
    """

    rows: Iterator[tuple[int, Any]]
    origin: str
    revision: str | None = None
    folder: Path | None = None


def read_raw(
    source: str, *, split: str, subset: str | None = None, revision: str | None = None, streaming: bool = False
) -> RawRows:
    """Open a data source; the arguments are those of `load_rows`.

    Raises:
        DataError: The source does not exist, or is a file of which a slice is asked for, or, while rows are read, is
            not JSON.
        ConfigError: The path is too long, or a folder on it may not be entered.
    """
    path = Path(source)
    kind = kind_of(path)
    if kind == "file":
        name, bracket, _ = split.partition("[")
        if bracket:
            raise DataError(
                f"{source}: is one file, and slices such as {split!r} are taken from folders only. To read the whole "
                f"file, set the split to {name!r}; to take the slice, put the file into a folder as {name}.jsonl and "
                "name the folder."
            )
        return RawRows(_read_file(path), f"file {path.name}", folder=path.parent)
    if kind == "folder":
        name, bracket, _ = split.partition("[")
        *names, last = (f"{name}{end}" for end in (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".tsv"))
        file = next((path / one for one in (*names, last) if kind_of(path / one) == "file"), None)
        if file is None:
            raise DataError(f"{path}: holds no {', '.join(names)} or {last}.")
        if not bracket:
            return RawRows(_read_file(file), f"file {file.name}", folder=path)
        return RawRows(_sliced(file, name, split), f"file {file.name}, {split}", folder=path)
    if not is_hub_name(source):
        raise DataError(f"{source}: no such file or folder, and not a hub name such as 'owner/data'.")
    from datasets import load_dataset

    keep_numbers()
    name, _, own = source.partition("@")
    with _hub_errors(name):
        commit = pinned_commit(name, own or revision, "dataset")
        rows = load_dataset(name, subset, split=split, revision=commit, streaming=streaming)
    return RawRows(_downloaded(rows, name), f"hub {name}@{commit[:12]}", commit)


def _is_kept(row: Any, keep: Mapping[str, re.Pattern[str]], where: str) -> bool:
    for column, pattern in keep.items():
        if not isinstance(row, dict) or column not in row:
            raise DataError(f"{where}: has no field {column!r}, which data.keep reads.")
        value = row[column]
        text = said(value) if isinstance(value, list) else "" if value is None else value
        if not isinstance(text, str):
            raise DataError(
                f"{where}: field {column!r} is {reprlib.repr(value)}, expected text or chat messages, which data.keep "
                "reads."
            )
        if not pattern.search(text):
            return False
    return True


def _sliced(file: Path, name: str, split: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows that the `datasets` library would take of a slice of a split."""
    from datasets import ReadInstruction

    count = sum(1 for _ in _read_file(file))
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({name: count})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{file}: {split!r} is not a slice of its {count} rows; expected e.g. train[:95%].") from error
    yield from islice(_read_file(file), part.from_, part.to)


def _read_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file with their numbers, or an error in the place of one that cannot be read alone."""
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            if kind in DELIMITERS:
                yield from _read_table(file, DELIMITERS[kind], path)
            elif kind == ".json" and (listed := _listed(file, path)) is not None:
                yield from enumerate(listed, 1)
            else:
                file.seek(0)
                yield from _read_lines(file, path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error


def _read_lines(file: Any, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > MAX_LINE_BYTES:
            yield number, DataError(f"{path}, row {number}: longer than {MAX_LINE_BYTES} bytes.")
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
        elif line.strip():
            try:
                row = parse_json(line)
            except (ValueError, RecursionError) as error:
                row = DataError(
                    f"{path}, row {number}: not JSON: {error}. Write one JSON object a line, in UTF-8, or name a .csv, "
                    ".tsv or .parquet file."
                )
            yield number, row


def _listed(file: Any, path: Path) -> list[Any] | None:
    """Return the rows of a .json file that holds a list; None for one that holds an object a line, as .jsonl does."""
    try:
        found = parse_json(file.read())
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return None
        raise DataError(f"{path}: not JSON: {error}.") from error
    if not isinstance(found, list):
        raise DataError(f"{path}: holds {type(found).__name__}, expected a list of objects, or one object a line.")
    return found


DELIMITERS = {".csv": ",", ".tsv": "\t"}
NUMBERS = ("label", "margin")
"""Columns of numbers, which a table has as text; those of other columns are text, such as 007."""


def _read_table(file: Any, delimiter: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows below the header of a table, whose cells are text except in the columns `NUMBERS`."""
    csv.field_size_limit(max(MAX_LINE_BYTES, csv.field_size_limit()))
    cells = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(cells, [])
        if "" in header or len({*header}) < len(header):
            raise DataError(f"{path}: the first line is {reprlib.repr(header)}, expected a name for each column.")
        for number, row in enumerate(filter(None, cells), 1):
            if len(row) != len(header):
                yield number, DataError(f"{path}, row {number}: has {len(row)} cells, and the header {len(header)}.")
                continue
            found: dict[str, Any] = dict(zip(header, row, strict=True))
            for name in found.keys() & {*NUMBERS}:
                with suppress(ValueError):
                    found[name] = json.loads(found[name].lower())
            yield number, found
    except csv.Error as error:
        raise DataError(f"{path}, line {cells.line_num}: no {path.suffix[1:].upper()} in UTF-8: {error}.") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    keep_numbers()
    try:
        yield from enumerate(_undecoded(Dataset.from_parquet(str(path), keep_in_memory=True)), 1)
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}.") from error


def is_hub_name(source: str) -> bool:
    """Whether a source is looked for on the hub: it has the form of a hub name, and no local file has this name."""
    path = Path(source)
    looks_local = source == BUILT_IN or source.startswith((".", "/", "~")) or path.suffix in LOCAL_SUFFIXES
    return source.count("/") <= 1 and not looks_local and kind_of(path) is None


def count_hub_rows(name: str, split: str, subset: str | None, revision: str | None) -> int:
    """Return the number of rows of a split, as the hub states it, without reading them."""
    from datasets import load_dataset_builder

    with _hub_errors(name):
        commit = pinned_commit(name, revision, "dataset")
        splits = load_dataset_builder(name, subset, revision=commit).info.splits
    if splits is None or split not in splits:
        raise DataError(
            f"{name}: the hub does not state how many rows {split!r} has; set data.train_examples or "
            "training.max_steps."
        )
    return int(splits[split].num_examples)


def _downloaded(rows: Any, name: str) -> Iterator[tuple[int, Any]]:
    with _hub_errors(name):
        yield from enumerate(_undecoded(rows), 1)


def _undecoded(rows: Any) -> Any:
    """Return a data set whose images are files, which a trainer decodes when it needs them."""
    from datasets import Image, List

    for name, kind in (rows.features or {}).items():
        if isinstance(kind, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows


def keep_numbers() -> None:
    """Let `datasets` write and read the JSON of its columns with Python's json.

    It takes the ujson of pandas, which keeps ten decimals of a number, reads -1.7 as -1.7000000000000002, and knows no
    integer beyond 64 bits, whose message `datasets` 5.2 then returns as text.
    """
    from datasets import arrow_writer
    from datasets.features import features
    from datasets.packaged_modules.json import json as reader
    from datasets.utils import json as fields

    for module in (arrow_writer, features, reader, fields):
        module.ujson_dumps, module.ujson_loads = json.dumps, json.loads


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (ConfigError, DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(
            f"{name}: {error} Download it where the hub can be reached (hf download {name} --repo-type dataset), or "
            f"name a local file with the same fields, one JSON object a line, with {as_written('data')}."
        ) from error
