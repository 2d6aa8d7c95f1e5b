"""The frame of every export: whether its output may be written, a draft of it, its certificate, card and reference.

An export reads its source and the base model, refuses what its format cannot hold, and fills a `Draft`, which takes the
output's place if the certificate passes. What it writes is a `Product`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.verdict import Certificate
from loraover.checkpoint.base_model import OnBase, resolve_base
from loraover.checkpoint.carried_files import ADAPTER_FILES, keep_chat_template, keep_reference
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.atomic_output import check_replaceable, publish_directory
from loraover.common.provenance import environment, hardware_used
from loraover.models.load import ModelSource
from loraover.models.model_file import known_licence
from loraover.reporting.model_card import model_card

if TYPE_CHECKING:
    from loraover_export.requests import FoldRequest, GgufRequest, MergeRequest, MlxRequest, OnnxRequest, VllmRequest

    FolderRequest = FoldRequest | MergeRequest | MlxRequest | OnnxRequest | VllmRequest

Sealed = TypeVar("Sealed", bound=Certificate)


@dataclass(frozen=True)
class Product:
    """Kind of folder that an export writes.

    Args:
        name: Noun for such a folder, such as "folded adapter".
        certificate: Name of the certificate's file in the folder.
        title: Heading of its model card.
        kind: Description of the folder's contents, for the card.
        library: Library that reads the folder.
    """

    name: str
    certificate: str
    title: str
    kind: str = "A plain LoRA adapter"
    library: str = "peft"

    def check_output(self, request: FolderRequest, *inputs: Path) -> None:
        """Check that the output can be written, or replaced by `force`.

        Args:
            inputs: Folders that it reads, in which the output may not lie.

        Raises:
            OutputError: The output is not free, or holds something else.
        """
        check_replaceable(request.output, self.name, self.certificate, inputs=inputs, replace=request.force)

    @contextmanager
    def draft(self, request: FolderRequest, outside: Path) -> Iterator[Draft]:
        """Make a draft, which takes the output's place after the block, unless its certificate has failed.

        Args:
            outside: Folder in which the output may not lie.
        """
        with publish_directory(request.output, outside=outside, replace=request.force) as folder:
            yield Draft(self, request, folder)


FOLDED = Product("folded adapter", "fold_certificate.json", "Folded LoRA adapter")
MERGED = Product(
    *("merged model", "merge_certificate.json", "Merged model"),
    kind="A LoRA adapter merged into the weights",
    library="transformers",
)
VLLM = Product("vLLM adapter", "vllm_certificate.json", "LoRA adapter for vLLM")
MLX = Product("mlx-lm adapter", "mlx_certificate.json", "LoRA adapter for mlx-lm")
ONNX = Product(
    *("ONNX export", "onnx_report.json", "ONNX export"),
    kind="ONNX graphs, with their LoRA adapters,",
    library="onnx",
)
PRODUCTS = {"fold": FOLDED, "merge": MERGED, "vllm": VLLM, "mlx": MLX, "onnx": ONNX}
"""Products by the verbs that write them."""


@dataclass(frozen=True)
class Draft:
    """Folder that is about to be the output of an export.

    Args:
        product: Kind of the finished output.
        folder: Path of the draft.
    """

    product: Product
    request: FolderRequest
    folder: Path

    def seal(self, certificate: Sealed, source: Path | None = None, known: Mapping[str, str] | None = None) -> Sealed:
        """Write the certificate, with the digests of all files in the folder.

        Args:
            certificate: Certificate of the files.
            source: Folder of the adapter, whose chat template is copied first.
            known: Digests of files that were hashed before.

        Raises:
            AbandonedError: The verdict is "failed", so that the block ends without an output.
        """
        if source is not None and certificate.verdict != "failed":
            keep_chat_template(source, self.folder)
        return certificate.keep(self.folder / self.product.certificate, known)

    def describe(self, base_model: str | None, revision: str | None, facts: Mapping[str, str]) -> None:
        """Write the model card.

        Args:
            base_model: Base model that the product names.
            revision: Its commit on the hub.
            facts: Rows of the card's table.
        """
        licence = None if base_model is None else known_licence(base_model, revision)
        product = self.product
        text = model_card(
            *(product.title, base_model, facts, self.request.command()),
            licence=licence,
            kind=product.kind,
            library=product.library,
        )
        (self.folder / "README.md").write_text(text, encoding="utf-8")

    def keep_reference(self, source: Path, files: Sequence[str] = ADAPTER_FILES, *, stem: str | None = None) -> None:
        """Keep the adapter's reference, which holds for these files too; see `carried_reference.keep_reference`."""
        keep_reference(source, self.folder, self.request.report.line, files, stem=stem)


def base_of(request: FolderRequest | GgufRequest, *adapters: OnBase) -> ModelSource:
    """Find the base model of adapters, or the one that the request names; see `resolve_base`."""
    return resolve_base(adapters, request.model, option=request.named("model"), say=request.report.line)


def certified(adapter: AdapterDir, dtype: str, matrices: list[MatrixCertificate]) -> dict[str, Any]:
    """Return the fields that certificates of a written adapter share.

    Args:
        adapter: The adapter that was read.
        dtype: Data type that it was written in.
        matrices: Errors of the written matrices.
    """
    return {
        "verdict": "passed" if all(matrix.passed for matrix in matrices) else "failed",
        "dtype": dtype,
        "rank": adapter.rank,
        "scaling": {path: module.scaling for path, module in adapter.modules.items()},
        "matrices": matrices,
        "versions": environment(),
        "hardware": hardware_used(),
    }


@dataclass(frozen=True)
class EngineFormat:
    """Format that one engine alone reads, for `loraover check` and `loraover export prepare`.

    Args:
        verb: Verb that writes it, one of `PRODUCTS`.
        reader: The engine, with the release whose sources were read.
        refuses_peft: What the engine does with an adapter in PEFT's form, which it refuses, in words.
        check: Function that raises an error for an adapter that the export refuses, given its base model.
        export: Function of the verb.
    """

    verb: str
    reader: str
    refuses_peft: str
    check: Callable[[AdapterDir, ModelSource], object]
    export: Callable[..., Any]
