"""The exports that adapters are prepared with, one for each engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraover.checkpoint.source import read_source
from loraover.checkpoint.tensor_file import FLOATS, open_tensors
from loraover.common.dtypes import DTYPES
from loraover.common.errors import ExportError, FoldError
from loraover.common.strict_json import read_json
from loraover_export.numerics.matrix_certificate import MatrixCertificate

ADAPTER = "adapter"
"""Name of what the engine loads, in the folder of a prepared adapter."""


@dataclass(frozen=True)
class Target:
    """What an adapter is prepared for.

    Args:
        engine: Name of the engine.
        model: Folder or hub name of the base model; for ONNX Runtime, folder of the swappable export with the graph.
        dtype: Data type to store A and B in: fp32, bf16 or fp16.
        engine_version: Release of the engine; None means the one whose sources the rules were read from.
    """

    engine: str
    model: str
    dtype: str
    engine_version: str | None = None

    def base(self) -> str:
        """Return the folder or hub name of the base model.

        Raises:
            CheckpointError: The folder for ONNX Runtime holds no export.
        """
        if self.engine != "onnx":
            return self.model
        from loraover_export.onnx.report import REPORT_FILE, OnnxReport

        return read_json(Path(self.model) / REPORT_FILE, OnnxReport).base_model

    def files(self) -> list[Path]:
        """Return the files beside those of the base model on which the result depends: those that describe a graph."""
        if self.engine != "onnx":
            return []
        from loraover_export.onnx.layout import LAYOUT_FILE
        from loraover_export.onnx.report import REPORT_FILE

        return [Path(self.model) / REPORT_FILE, Path(self.model) / LAYOUT_FILE]


@dataclass(frozen=True)
class Written:
    """What an export wrote.

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


def write_for_vllm(source: Path, folder: Path, target: Target) -> Written:
    """Write the uniform form, which OpenVINO GenAI reads as well, after the pre-flight of vLLM's rules.

    Raises:
        ExportError: An adapter that vLLM would refuse, or serve wrongly without a message.
    """
    from loraover_export.vllm.report import CERTIFICATE_FILE
    from loraover_export.vllm.run import export_vllm

    report = export_vllm(
        source,
        folder / ADAPTER,
        model=target.model,
        convert=False,
        dtype=target.dtype,
        vllm_version=target.engine_version,
    )
    errors = [found for found in report.preflight.findings if found.level == "error"]
    if errors:
        found = " ".join(f"{error.rule}: {error.found}; {error.remedy}." for error in errors)
        raise ExportError(f"{source}: {found}")
    certificate = report.certificate
    assert certificate is not None
    taken = {*certificate.scaling.values()} == {1.0} and _is_taken(source, target.dtype)
    return Written(ADAPTER, f"{ADAPTER}/{CERTIFICATE_FILE}", certificate.rank, certificate.matrices, taken)


def write_for_llamacpp(source: Path, folder: Path, target: Target) -> Written:
    """Write the GGUF file of an adapter, and its report beside it."""
    from loraover_export.gguf.run import export_gguf

    report = export_gguf(source, folder / f"{ADAPTER}.gguf", model=target.model, dtype=target.dtype)
    (folder / "gguf_report.json").write_text(report.model_dump_json(indent=1) + "\n")
    return Written(f"{ADAPTER}.gguf", "gguf_report.json", report.rank, report.matrices)


def write_for_mlx(source: Path, folder: Path, target: Target) -> Written:
    """Write an adapter in mlx-lm's form."""
    from loraover_export.mlx.report import CERTIFICATE_FILE
    from loraover_export.mlx.run import export_mlx

    report = export_mlx(source, folder / ADAPTER, model=target.model, dtype=target.dtype)
    return Written(ADAPTER, f"{ADAPTER}/{CERTIFICATE_FILE}", report.rank, report.matrices)


def write_for_onnx(source: Path, folder: Path, target: Target) -> Written:
    """Write an adapter for the graph of an earlier swappable export, whose number format it takes."""
    from loraover_export.onnx.report import REPORT_FILE
    from loraover_export.onnx.run import export_onnx

    report = export_onnx(
        [source],
        folder / ADAPTER,
        mode="swappable",
        graph=target.model,
        model=target.base(),
        names=[ADAPTER],
        check=False,
    )
    rank = read_source(source).rank
    return Written(ADAPTER, f"{ADAPTER}/{REPORT_FILE}", rank, report.matrices)


TARGETS: dict[str, Callable[[Path, Path, Target], Written]] = {
    "vllm": write_for_vllm,
    "llamacpp": write_for_llamacpp,
    "onnx": write_for_onnx,
    "openvino": write_for_vllm,
    "mlx": write_for_mlx,
}
"""Export of each engine, which writes into an empty folder."""


def check_matrices(source: Path, matrices: list[MatrixCertificate]) -> None:
    """Refuse what was written of an adapter where a matrix is outside its bound."""
    wrong = [matrix.name for matrix in matrices if not matrix.passed]
    if wrong:
        raise FoldError(
            f"{source}: {len(wrong)} of {len(matrices)} written matrices are outside their bounds, the first of them "
            f"{wrong[0]}; choose a wider data type, such as fp32."
        )


def _is_taken(source: Path, dtype: str) -> bool:
    """Whether the uniform form of an adapter of scaling 1 holds, in a data type, the numbers that its file holds."""
    adapter = read_source(source)
    with open_tensors(adapter.tensors_path) as file:
        types = {FLOATS.get(file.dtype(key)) for key in file.keys}
    return (
        adapter.is_run_by_peft
        and not adapter.others
        and types == {DTYPES[dtype]}
        and all(module.rank == adapter.rank for module in adapter.modules.values())
    )
