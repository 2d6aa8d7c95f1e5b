"""Port of the engines: findings on an adapter as it is and as exported, the export's command, and the export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.uniform.request_fields import export_command
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.errors import CheckpointError, ConfigError, ExportError
from loraover.models.load import ModelSource
from loraover_export.check.features import FEATURES, MORE_THAN_AB
from loraover_export.check.report import EngineFinding, Level
from loraover_export.check.subject import Subject
from loraover_export.publishing import PRODUCTS, EngineFormat


@dataclass(frozen=True)
class Reaction:
    """Reaction of an engine to an adapter that has a feature.

    Args:
        level: Whether it refuses the adapter, applies it wrongly without a message, or neither.
        text: What it does, in words, which continue the description of the feature.
    """

    level: Level
    text: str


def refused(text: str) -> Reaction:
    """Return the reaction of an engine that stops with a message."""
    return Reaction("refused", text)


def silent(text: str) -> Reaction:
    """Return the reaction of an engine that answers wrongly without a message."""
    return Reaction("wrong silently", text)


def note(text: str) -> Reaction:
    """Return the reaction of an engine that answers as the adapter was trained, with a fact worth knowing."""
    return Reaction("note", text)


CORES = note(
    "the engine reads A and B, which are the rounded product of the cores; the export computes A and B from the cores"
)
LOST = silent("it answers without them")
NOT_NUMBERS = silent("the engine computes with these numbers, and answers nonsense")
OTHER_BASE = note("the engine runs other base weights than the adapter was trained on")

UNREADABLE = ("method", "DoRA", "rank", "key prefix", "unnamed modules", "lost matrices")
"""Features of adapters that the exports cannot read, but some engines can."""


ADAPTER = "adapter"
"""Name of what the engine loads, in the folder of a prepared adapter."""


@dataclass(frozen=True)
class Target:
    """Purpose for which an adapter is prepared.

    Args:
        model: Folder or hub name of the base model; for ONNX Runtime, folder of the swappable export with the graph.
        dtype: Data type to store A and B in: fp32, bf16 or fp16.
        engine_version: Release of the engine; None means the one whose sources the rules were read from.
    """

    engine: str
    model: str
    dtype: str
    engine_version: str | None = None


@dataclass(frozen=True)
class Written:
    """Result of an export.

    Args:
        name: Name of what the engine loads, in the folder.
        certificate: Path of the certificate, below the folder.
        rank: Rank of every module.
        matrices: Errors of the matrices.
        taken: Whether A and B are those of the source, bit for bit.
    """

    name: str
    certificate: str
    rank: int
    matrices: list[MatrixCertificate]
    taken: bool = False


class EngineRules(ABC):
    """Rules of an engine: its treatment of adapters, and the writing of adapters for it.

    Args:
        reader: Program that reads the adapter, with the release whose sources or runs the reactions come from.
        version: Release that is judged; None if the rules hold for several.
        extra: Extra of this package that writing an adapter needs; None: a base installation writes plain LoRAs.
        largest_rank: Largest rank that the engine can be started for; None if it names none.
        rank_option: Option with which the engine is started for a rank; None if it has none.
        model_is: What a target's `model` is instead of a base model, and then has to be named; None: a base model.
    """

    reader: str
    version: str | None = None
    extra: str | None = None
    largest_rank: int | None = None
    rank_option: str | None = None
    model_is: str | None = None

    @abstractmethod
    def as_it_is(self, subject: Subject) -> Iterator[EngineFinding]:
        """Yield what the engine does with the adapter's folder in PEFT's form."""

    @abstractmethod
    def exported(self, subject: Subject) -> Iterator[EngineFinding]:
        """Yield what the export refuses, and what the engine does with what the export writes."""

    @abstractmethod
    def export(self, subject: Subject) -> str:
        """Return the command that writes the exported form."""

    @abstractmethod
    def write(self, source: Path, folder: Path, target: Target) -> Written:
        """Write the exported form of an adapter that the export takes into an empty folder.

        Raises:
            ExportError: An adapter that the engine would refuse, or serve wrongly without a message.
        """

    def base(self, model: str) -> str:
        """Return the folder or hub name of the base model, given a target's `model`."""
        return model

    def files(self, model: str) -> list[Path]:
        """Return the files, besides those of the base model, on which the written form depends."""
        return []


@final
class FormatRules(EngineRules):
    """Rules of an engine that refuses PEFT's form, since it reads another format, which one of our exports writes.

    Args:
        form: The format, which is declared in the module that writes it.
    """

    extra = "torch"

    def __init__(self, form: EngineFormat) -> None:
        self.form, self.reader = form, form.reader

    def as_it_is(self, subject: Subject) -> Iterator[EngineFinding]:
        yield EngineFinding(feature="format", level="refused", found=f"PEFT's form; {self.form.refuses_peft}")

    def exported(self, subject: Subject) -> Iterator[EngineFinding]:
        if subject.lora is not None:
            yield from react(subject, {"quantised base": OTHER_BASE})
        yield from refused_by(self.form.check, subject)

    def export(self, subject: Subject) -> str:
        return command(subject, self.form.verb, ending=f"-{self.form.verb}")

    def write(self, source: Path, folder: Path, target: Target) -> Written:
        report = self.form.export(source, folder / ADAPTER, model=target.model, dtype=target.dtype)
        certificate = f"{ADAPTER}/{PRODUCTS[self.form.verb].certificate}"
        return Written(ADAPTER, certificate, report.rank, report.matrices)


def react(subject: Subject, reactions: Mapping[str, Reaction]) -> Iterator[EngineFinding]:
    """Yield a finding for each feature that the adapter has and that the engine reacts to.

    An adapter that the exports cannot read for another reason than such a feature is damaged, and refused.
    """
    is_explained = False
    for name, feature in FEATURES.items():
        found = feature(subject) if name in reactions else None
        if found is not None:
            yield EngineFinding(feature=name, level=reactions[name].level, found=f"{found}; {reactions[name].text}")
            is_explained = is_explained or name in UNREADABLE
    if subject.unreadable is not None and not is_explained:
        yield EngineFinding(feature="files", level="refused", found=subject.unreadable)


def more_than_ab(subject: Subject) -> Iterator[EngineFinding]:
    """Yield the features that keep any export from expressing the adapter by A and B alone."""
    yield from react(subject, dict.fromkeys(MORE_THAN_AB, refused("A and B cannot hold this")))


def refused_by(check: Callable[[AdapterDir, ModelSource], object], subject: Subject) -> Iterator[EngineFinding]:
    """Yield the reason for which an export refuses the adapter, which is the error that `check` raises."""
    if subject.lora is None:
        yield from more_than_ab(subject)
        return
    try:
        check(subject.lora, subject.served.source)
    except (CheckpointError, ConfigError, ExportError) as error:
        yield EngineFinding(feature="export", level="refused", found=str(error))


def command(subject: Subject, *words: str, ending: str) -> str:
    """Return `export_command` for the adapter, with the base model that the user named."""
    model = [] if subject.model is None else ["--model", subject.model]
    return export_command(subject.written or subject.path, *words, *model, ending=ending)
