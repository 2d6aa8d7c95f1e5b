"""Arguments of an ONNX export, checked before any file is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from loraover.adapters.uniform.request_fields import base_model, check_faults, given_adapter, replaces
from loraover.common.dtypes import DTYPES
from loraover.common.request import AnyName, AnyNames, AnyPath, AnyPaths, Request, option
from loraover.models import request_fields
from loraover.sources.address import name_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class OnnxRequest(Request):
    """Write ONNX graphs with SOURCE merged into the weights, or with adapters to swap at run time.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA; swappable takes several. Decoder models
    become one onnxruntime-genai graph with a KV cache, T5 an encoder and a decoder, classifiers one graph.

    Exit code 1: ONNX Runtime's outputs are too far from the PyTorch reference's, and nothing was left at the
    output. Exit code 3: the export was written, but an adapter changes logits too little for the check to distinguish
    it from one that does nothing.
    """

    verb = "loraover export onnx"
    extra = "export"
    examples = (
        "loraover export onnx folded -o onnx-merged --mode merged --precision int4",
        "loraover export onnx adapter-a adapter-b -o onnx-swappable --mode swappable --name support --name sales",
        "loraover export onnx adapter-a adapter-b -o onnx-web --mode swappable --web",
        "loraover export onnx adapter-c -o more --mode swappable --web --graph onnx-web",
    )

    sources: AnyPaths = given_adapter(
        "LoRA-Over checkpoint, folded adapter or plain PEFT LoRA, exactly one for a merged graph",
        metavar="SOURCE...",
    )
    output: AnyPath = option("New folder for the graphs, the adapters' files, the report and a model card.", short="-o")
    mode: str = option(
        "How the adapter is exported: merged into the graph's weights, or as a file that is loaded at run time.",
        choices=("merged", "swappable"),
    )
    precision: str | None = option(
        "Number format of the graph's weights.",
        default=None,
        default_text="that of an earlier graph, else fp32",
        choices=("fp32", "fp16", "int4"),
        also={DTYPES[short]: short for short in ("fp32", "fp16")},
    )
    device: str | None = option(
        "Device to build the graph for.",
        default=None,
        default_text="that of an earlier graph, else cpu",
        choices=("cpu", "cuda"),
    )
    model: AnyName | None = base_model()
    cache: bool = option(
        "Give a decoder model's graph a KV cache; an encoder-decoder model always has one, a classifier none.",
        default=True,
    )
    names: AnyNames = option(
        "Names of swappable adapters' files, in the order of the sources.",
        default=(),
        default_text="the names of the sources' folders",
        flag="--name",
    )
    graph: AnyPath | None = option(
        "Folder of an earlier swappable export whose graph the new adapters are for; only their files are written.",
        default=None,
    )
    web: bool = option(
        "Write a swappable graph and adapters for onnxruntime-web, in a browser or in node.", default=False
    )
    check: bool = option(
        "Compare ONNX Runtime's outputs with PyTorch's before anything is left at the output.", default=True
    )
    check_device: str = request_fields.device("Device that PyTorch runs on for the check, wherever the graph will run.")
    compute_dtype: str = request_fields.compute_dtype("Data type that PyTorch runs in for the check.")
    force: bool = replaces("ONNX export")

    def faults(self) -> Iterator[str]:
        swappable = self.named("mode", "swappable")
        if self.mode == "merged":
            if len(self.sources) != 1:
                merged = self.named("mode", "merged")
                yield f"{merged} takes one adapter, found {len(self.sources)}; export each alone, or use {swappable}."
            if given := self.given("names", "graph", "web"):
                yield f"{given}: for {swappable} only. A merged graph runs in onnxruntime-web as it is."
        else:
            yield from self._faults_of_names()
        if self.web and self.device == "cuda":
            yield f"{self.named('web')} is for onnxruntime-web's CPU operators, found {self.named('device', 'cuda')}."
        yield from check_faults(self, "check", "check_device", "compute_dtype")

    def _faults_of_names(self) -> Iterator[str]:
        names, option = self.adapter_names, self.named("names")
        if len(names) != len(self.sources):
            yield f"{option} is given {len(names)} times for {len(self.sources)} sources."
        for name in names:
            if not _NAME.fullmatch(name):
                yield (
                    f"{name!r} cannot be the name of an adapter's file; choose one of letters, digits, '.', '_' and "
                    f"'-' with {option}."
                )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"two sources are named {twice[0]!r}; give each another name with {option}, in their order."

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the adapters, which are those of a swappable graph's files, in the order of the sources."""
        return self.names or tuple(map(name_of, self.addresses.get("sources", self.sources)))
