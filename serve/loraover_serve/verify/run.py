"""Verification, from its arguments to the report: by PyTorch or by references, and published alike."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from loraover.common.atomic_output import check_file_writable, check_writable
from loraover.common.errors import EngineError
from loraover.common.provenance import environment, processor
from loraover.sources.verb import verb
from loraover_serve.verify.by_reference import ask_server, ask_without_reference, endpoint_of, neighbours
from loraover_serve.verify.request import Found, VerifyRequest

if TYPE_CHECKING:
    from loraover_serve.verify.report import VerifyReport


@verb(VerifyRequest)
def verify_adapter(request: VerifyRequest) -> VerifyReport:
    """Verify that engines answer as an adapter was trained, and name the likely fault of one that does not.

    Each engine gets the adapter in the form that it needs, and answers the same prompts with the base model and with
    the adapter. Its answers are compared with those of PyTorch in float32: of the unfolded model for a LoRA-Over
    checkpoint, of PEFT for any other adapter, which is converted for the engines if it is no plain LoRA. The engine's
    distance on the base model is its noise. A server is asked for each of the two models again while it answers for the
    other one. The report's `verdict` is "as trained", "differs", "inconclusive" if the adapter moves the answers less
    than the noise, or "failed" if an engine failed after another had answered.

    With references, a running server is compared with PyTorch's answers that they hold, and PyTorch is not imported;
    with a graph, ONNX Runtime answers here, and PyTorch runs no model.

    Raises:
        ConfigError: Arguments that cannot be used, a task that is neither a causal language model nor one of vectors,
            classes or scores, or a base model that cannot be loaded.
        CheckpointError: Files that cannot be read as an adapter, a checkpoint, a reference or an ONNX export.
        DataError: A file of prompts that cannot be read.
        EngineError: An engine that is not installed, or every engine failed; the message names the logs that are kept.
        ExportError: An adapter that cannot be exported for the only engine, or a `graph` that it cannot be run on.
        OutputError: An output that exists or cannot be written.
        UnwrittenReportError: An output that could not be written after the verification; `error.report` has the report.
    """
    if request.output is not None:
        check_writable(request.output, outside=request.adapter)
    if request.junit is not None:
        check_file_writable(request.junit)
    if request.adapter is None:
        found = _without_adapter(request)
        from loraover_serve.verify.show import publish

        return publish(request, found)
    from loraover_serve.verify.by_pytorch import by_pytorch  # with PyTorch
    from loraover_serve.verify.show import publish

    with by_pytorch(request) as found:
        return publish(request, found)


def _without_adapter(request: VerifyRequest) -> Found:
    """Findings of a verification without ADAPTER, in which PyTorch runs no model."""
    if request.references and request.endpoint is None:
        from loraover_serve.verify.by_vectors import by_graph  # with PyTorch, for its tensors

        return by_graph(request)
    return by_references(request) if request.references else by_itself(request)


def by_itself(request: VerifyRequest) -> Found:
    """Compare answers of a running server with one another, without a reference."""
    facts, found = ask_without_reference(request)
    own = {"reference": "the server itself", "prompt_source": f"those of {request.prompts}"}
    return Found(
        facts | own | {"versions": environment(), "hardware": f"{processor()}, {platform.platform()}"}, [found]
    )


def by_references(request: VerifyRequest) -> Found:
    """Verify a running server by references."""
    known, found = ask_server(request, neighbours(request.references))
    from loraover_serve.verify.report import faults_known_of  # with packages that the requests do not need

    server = faults_known_of(endpoint_of(request).engine())
    found = [result if result["verdict"] == "failed" else result | server for result in found]
    facts = known[0] | {
        "adapter": ", ".join(dict.fromkeys(one["adapter"] for one in known)),
        "sensitivity": max(one["sensitivity"] for one in known),
        "reference": "the reference",
        "prompt_source": "those of the reference",
        "versions": environment(),
        "hardware": f"{processor()}, {platform.platform()}",
    }
    failures = [EngineError(str(result["reason"])) for result in found if result["verdict"] == "failed"]
    return Found(facts, found, failures)
