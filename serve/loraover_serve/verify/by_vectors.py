"""Verification of engines by vectors, classes or scores: those started here, servers, and ONNX exports."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir
from loraover.common.errors import ConfigError, EngineError, LoraOverError
from loraover.common.extras import install
from loraover.models.device import choose_device
from loraover.models.load import ModelSource, load_tokenizer, resolve_model
from loraover.reference import reference_name
from loraover_serve.engines import ENDPOINT, ENGINES
from loraover_serve.engines.base import Setting, engine_errors
from loraover_serve.engines.installed import machine, versions
from loraover_serve.engines.onnx import OnnxArm, merged_arms, swappable_arms
from loraover_serve.judge.command import CheckOptions, check_reference, unanswered
from loraover_serve.judge.vectors.reference import VectorReference, read_any_reference
from loraover_serve.judge.vectors.verdict import judge_vectors
from loraover_serve.verify.by_reference import check_seals, endpoint_of, named_files
from loraover_serve.verify.report import faults_known_of
from loraover_serve.verify.request import Found, RecordRequest, VerifyRequest
from loraover_serve.verify.vector_engines import GraphVectors, TorchVectors, VectorEngine, exported_arms
from loraover_serve.verify.vector_models import reading_of
from loraover_serve.verify.vector_recorder import VectorRecording, content_of, load_recording

HERE = ("torch", "onnx")
"""Engines that are started here for vectors."""
OF_TEXT = ("new_tokens", "max_memory_gib", "confusable", "base_weights", "base_gguf", "without_template")
"""Fields of a verification that only adapters of generated text have."""


def by_vectors(request: VerifyRequest, adapter: AdapterDir, base: ModelSource, setting: Setting) -> Found:
    """Record what both models answer, and compare each engine with that.

    Args:
        setting: Settings of the engines, with an empty folder for exports.

    Raises:
        ConfigError: Options of generated text, or engines that are not started here for vectors.
        EngineError: ONNX Runtime is not installed, or every engine failed.
    """
    if given := request.given(*OF_TEXT):
        raise ConfigError(f"{given}: for generated text, and {adapter.path} has none; leave it out.")
    if others := [name for name in request.asked if name not in (*HERE, ENDPOINT)]:
        raise ConfigError(
            f"{request.named('engines', others[0])}: not started here for vectors, classes and scores. Start "
            f"{ENGINES[others[0]].title} with the adapter, and name it with {request.named('endpoint')}."
        )
    if "onnx" in request.asked and GraphVectors.installed() is None:
        raise EngineError(f"{request.named('engines', 'onnx')} is not installed here; install it: {install('export')}.")
    same = {name: getattr(request, name) for name in ("model", "prompts", "device", "compute_dtype")}
    asked = RecordRequest(adapter.path, force=True, report=request.report, **same)
    recording = load_recording(asked, adapter, base)
    made = {"made": {"device": str(choose_device(request.device))}}
    reference = VectorReference(content_of(recording, asked, base, {}) | made)
    results, failures = list[dict[str, Any]](), list[LoraOverError]()
    for name in request.asked:
        start = time.perf_counter()
        try:
            results.append(_verify_one(name, request, recording, reference, adapter, setting))
        except LoraOverError as error:
            failures.append(error)
            results.append({"engine": name, "seconds": time.perf_counter() - start, **unanswered(error)})
    facts = reference.facts | {
        "adapter": request.shown("adapter"),
        "reference": reference_name(adapter),
        "prompt_source": "the built-in texts" if request.prompts is None else f"those of {request.prompts}",
        "versions": versions(request.asked),
        "hardware": machine(),
    }
    return Found(facts, results, failures)


def _verify_one(
    name: str,
    request: VerifyRequest,
    recording: VectorRecording,
    reference: VectorReference,
    adapter: AdapterDir,
    setting: Setting,
) -> dict[str, Any]:
    """Result of one engine; PyTorch changes the recorded model, which nothing else needs any more."""
    if name == ENDPOINT:
        options = CheckOptions.of(request, served_format=request.declared_format, option=request.named)
        endpoint, (served,) = endpoint_of(request), request.served_name
        found = check_reference(reference, endpoint, served, options)
        return {"engine": name} | found | faults_known_of(endpoint.engine())
    start, reading = time.perf_counter(), recording.reading
    if name == "torch":
        engine: VectorEngine = TorchVectors(recording.runner, adapter, reading)
    else:
        scratch = setting.scratch / name
        scratch.mkdir()
        engine = GraphVectors(_arms(replace(setting, scratch=scratch)), reading)
    request.report.line(f"asking {name} for both models")
    found = _judged(engine, request, reference, recording.inputs(reading))
    return {"engine": name} | found | {"seconds": time.perf_counter() - start}


def _arms(setting: Setting) -> Mapping[str, OnnxArm]:
    """Graphs of both models: a swappable one, or two merged ones where a graph has no place for a part of the adapter.

    The pooler of BERT is such a part: its output is no vector of a text.
    """
    adapter = read_adapter_dir(setting.adapter)
    has_place = (not module.is_embedding and "pooler" not in path for path, module in adapter.modules.items())
    if setting.request.graph is not None or (not adapter.others and all(has_place)):
        return swappable_arms(setting)
    return merged_arms(setting)


def by_graph(request: VerifyRequest) -> Found:
    """Compare an ONNX export of a classifier or a model of vectors with references, without the base model.

    Raises:
        CheckpointError: No file is a reference, or a published one seals another file.
        ConfigError: References of generated text alone.
    """
    check_seals(request)
    known, results, failures = list[dict[str, Any]](), list[dict[str, Any]](), list[LoraOverError]()
    for name, file in named_files(request):
        start, shown = time.perf_counter(), name or str(file)
        try:
            reference = read_any_reference(file)
            if not isinstance(reference, VectorReference):
                raise ConfigError(
                    f"{file}: has logprobs of generated text; verify {request.named('graph')} with "
                    f"{request.named('adapter')} in place of a reference."
                )
            known.append(reference.facts)
            shown = name or reference.adapter_name
            found = _of_graph(request, reference, name)
        except LoraOverError as error:
            failures.append(error)
            found = unanswered(error)
        results.append({"engine": shown, "seconds": time.perf_counter() - start} | found)
    if not known:
        raise failures[0]
    facts = known[0] | {
        "adapter": ", ".join(dict.fromkeys(one["adapter"] for one in known)),
        "sensitivity": max(one["sensitivity"] for one in known),
        "reference": "the reference",
        "prompt_source": "those of the reference",
        "versions": versions(["onnx"]),
        "hardware": machine(),
    }
    return Found(facts, results, failures)


def _of_graph(request: VerifyRequest, reference: VectorReference, name: str | None) -> dict[str, Any]:
    """Result of an export's graph; the name is that of the adapter's file, if the user gave one."""
    graph = request.graph
    assert graph is not None
    request.report.line(f"asking the graph in {graph} for {reference.adapter_name}")
    arms, reading = exported_arms(graph, reference.adapter_name, name), reading_of(reference)
    tokenizer = load_tokenizer(resolve_model(str(graph)))
    with engine_errors(GraphVectors.name):
        inputs = [reading.encode(tokenizer, each.text, each.pair) for each in reference.questions]
    return _judged(GraphVectors(arms, reading), request, reference, inputs)


@torch.inference_mode()
def _judged(engine: VectorEngine, request: VerifyRequest, reference: VectorReference, inputs: Any) -> dict[str, Any]:
    """The verdict on an engine, with its version."""
    answers, version = engine.answers(inputs), engine.installed()
    found = judge_vectors(reference, answers, request.declared_format, request.named)
    told = faults_known_of(None if version is None else (engine.name, version))
    return told | found | {"not_checked": [*found["not_checked"], *engine.not_checked]}
