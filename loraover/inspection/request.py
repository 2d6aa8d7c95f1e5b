"""Arguments of `loraover inspect` and `loraover doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.common.request import AnyPath, Request, argument, option


@dataclass(frozen=True)
class InspectRequest(Request):
    """Describe PATH: what it is, what was trained, and what may be done with it.

    PATH is the folder of a run, a LoRA-Over checkpoint, a plain or folded adapter, an export for vLLM or to ONNX.
    For a checkpoint, a map shows which matrices got cores, the extra parameters during training, and when.
    Whether a merged model holds an adapter is what `loraover export inspect-merge` says; whether a server applies it,
    `loraover verify`, also to vectors, classes and scores.
    """

    verb = "loraover inspect"
    examples = (
        "loraover inspect runs/demo-1",
        "loraover inspect runs/demo-1/adapter --html inspect.html",
    )
    json_help = "Print the description, with every score, as JSON."

    path: AnyPath = argument("Folder to describe, or hub name or address of an adapter.", is_source=True)
    plot: AnyPath | None = option(
        "New .svg file for a map of the matrices with cores, and for their scores over time.", default=None
    )
    html: AnyPath | None = option("New .html file for the description, with these figures.", default=None)


@dataclass(frozen=True)
class DoctorRequest(Request):
    """Show devices, versions and engines of this installation, what is missing, and how to get it."""

    verb = "loraover doctor"
    examples = (
        "loraover doctor",
        "loraover doctor --offline --json",
    )
    json_help = "Print what was found as JSON."

    offline: bool = option("Do not try to reach the Hugging Face hub, which takes up to three seconds.", default=False)
