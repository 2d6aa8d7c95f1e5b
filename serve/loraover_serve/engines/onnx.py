"""onnxruntime-genai in this process; each arm is a graph with a merged adapter, or a graph and a separate adapter.

The graphs are built for the run, or one is that of an earlier swappable export.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.errors import EngineError, ExportError
from loraover.common.extras import install
from loraover.models.load import ModelSource
from loraover_serve.comparison.adapters import make_idle
from loraover_serve.engines.base import LogitEngine, Sample, Setting, TimedEngine, TokenRequest, engine_errors
from loraover_serve.judge.limits import BASE


@dataclass(frozen=True)
class OnnxArm:
    """A graph, and the adapter to run it with.

    Args:
        graph: Folder of the graph.
        adapter: `.onnx_adapter` file; None if the graph needs no adapter.
        session: Number of the session. Arms with the same graph and number share a session, and so the place of its
            weights in memory, which changes speed by some percent.
    """

    graph: Path
    adapter: Path | None = None
    session: int = 0


@final
class OnnxEngine(LogitEngine, TimedEngine):
    """ONNX Runtime with one session for each graph and session number.

    Args:
        name: "onnx", or "onnx merged" and "onnx swappable" where both are measured.
        arms: Graph and adapter of each arm, by the arm's name.

    Raises:
        EngineError: A graph or an adapter that cannot be loaded.
    """

    distributions = ("onnxruntime-genai", "onnxruntime-genai-cuda")
    needs = ("onnx",)
    reported: ClassVar = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "onnxruntime-genai": distributions}
    hint = install("export")

    def __init__(self, name: str, arms: Mapping[str, OnnxArm]) -> None:
        self.name, self.arms = name, tuple(arms)
        self._models: dict[str, Any] = {}
        self._adapters: dict[str, Any] = {}
        with engine_errors(name):
            import onnxruntime_genai as og

            models: dict[tuple[Path, int], Any] = {}
            for arm, spec in arms.items():
                key = (spec.graph, spec.session)
                if key not in models:
                    # `min_length` forbids the end-of-text token instead of ignoring it, which would change the answer.
                    # So the last token of the vocabulary becomes the end of the text.
                    config = og.Config(str(spec.graph))
                    vocabulary = json.loads((spec.graph / "genai_config.json").read_text())["model"]["vocab_size"]
                    config.overlay(json.dumps({"model": {"eos_token_id": vocabulary - 1}}))
                    models[key] = og.Model(config)
                self._models[arm] = models[key]
                if spec.adapter is not None:
                    self._adapters[arm] = og.Adapters(self._models[arm])
                    self._adapters[arm].load(str(spec.adapter), arm)

    @classmethod
    def check(cls, setting: Setting) -> None:
        """Check that onnxruntime-genai can run an earlier export with other adapters of the same base model.

        Raises:
            CheckpointError: No ONNX export in the folder.
            ExportError: A merged export, one of another base model, or one that onnxruntime-genai cannot run.
        """
        from loraover_export.formats.onnx.run import read_earlier

        graph = setting.request.graph
        if graph is None:
            return
        earlier = read_earlier(graph, setting.base)
        if earlier.web or not earlier.cache:
            option = "--web" if earlier.web else "--no-cache"
            raise ExportError(
                f"{graph} was exported with {option}, and onnxruntime-genai cannot run such a graph; export one "
                f"without it, or leave out {setting.request.named('graph')} to have one built."
            )

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[OnnxEngine]:
        """Start it on a swappable graph, or on two merged graphs where a swappable one cannot hold the adapter."""
        name, adapter = setting.adapter.name, read_adapter_dir(setting.adapter)
        # A swappable graph takes A and B of linear layers, and nothing else.
        fits = not adapter.others and not any(module.is_embedding for module in adapter.modules.values())
        if setting.request.graph is not None or fits:
            _say(setting, f"swappable ONNX graph of {name}")
            arms = swappable_arms(setting)
        else:
            setting.request.report.line(f"building the merged ONNX graphs of {name} and of the base model")
            arms = merged_arms(setting)
        yield cls("onnx", arms)

    @classmethod
    @contextmanager
    def start_arms(cls, setting: Setting) -> Iterator[Sequence[OnnxEngine]]:
        """Start it with merged and with swappable adapters; for an earlier graph, only with swappable ones."""
        _say(setting, "ONNX graphs")
        ways = {"onnx swappable": swappable_arms(setting)}
        if setting.request.graph is None:
            ways = {"onnx merged": merged_arms(setting), **ways}
        yield [cls(name, arms) for name, arms in ways.items()]

    def logits(self, arm: str, sequences: Iterable[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        for tokens in sequences:
            with engine_errors(self.name):
                generator = self._generator(arm, len(tokens) + 1)
                generator.append_tokens(np.array(tokens, dtype=np.int64))
                found = np.array(generator.get_output("logits")[0], dtype=np.float32)
            yield found

    def generate(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        answers = []
        with engine_errors(self.name):
            for prompt in prompts:  # each answer has that number of tokens, any of which may end a text
                generator = self._generator(arm, len(prompt) + tokens)
                appended, found = list(prompt), []
                for _ in range(tokens):
                    generator.append_tokens(np.array(appended, dtype=np.int64))
                    appended = [int(np.argmax(generator.get_logits()[0, -1]))]
                    found += appended
                answers.append(tuple(found))
        return answers

    def run(self, arm: str, block: int, first: int, requests: Sequence[TokenRequest]) -> list[Sample]:
        with engine_errors(self.name):
            return [self._answer(arm, block, first + i, request) for i, request in enumerate(requests)]

    def _generator(self, arm: str, length: int) -> Any:
        import onnxruntime_genai as og

        parameters = og.GeneratorParams(self._models[arm])
        parameters.set_search_options(min_length=length, max_length=length, do_sample=False, repetition_penalty=1.0)
        generator = og.Generator(self._models[arm], parameters)
        if arm in self._adapters:
            generator.set_active_adapter(self._adapters[arm], arm)
        return generator

    def _answer(self, arm: str, block: int, index: int, request: TokenRequest) -> Sample:
        generator = self._generator(arm, len(request.prompt) + request.new_tokens)
        prompt = np.array(request.prompt, dtype=np.int64)
        times: list[float] = []
        start = time.perf_counter()
        generator.append_tokens(prompt)
        before = time.perf_counter()
        logits = generator.get_logits()[0, -1].astype(np.float64)
        start += time.perf_counter() - before  # reading logits is not part of answering
        while not generator.is_done():
            generator.generate_next_token()
            times.append(time.perf_counter())
        ids = tuple(int(token) for token in generator.get_sequence(0)[len(prompt) :])
        logits -= np.max(logits)
        logprob = float(logits[ids[0]] - np.log(np.sum(np.exp(logits))))
        return Sample(arm, block, index, start, tuple(times), ids, (logprob,))


def _say(setting: Setting, graphs: str) -> None:
    """Report that graphs are built, or which earlier one is used."""
    graph = setting.request.graph
    setting.request.report.line(
        f"building the {graphs}" if graph is None else f"writing adapters for the graph {graph}"
    )


def merged_arms(setting: Setting) -> dict[str, OnnxArm]:
    """Build a graph of each arm; an adapter that changes nothing is merged into the base model's.

    Arms are loaded in the order of the result, which changes speed by some percent.
    """
    like = read_adapter_dir(next(iter(setting.adapters.values())))
    arms: dict[str, OnnxArm] = {}
    for arm, folder in {BASE: make_idle(like, setting.scratch / "idle"), **setting.adapters}.items():
        if arm in setting.copies:
            arms[arm] = replace(arms[setting.copies[arm]], session=1)
            continue
        arms[arm] = OnnxArm(setting.scratch / f"merged-{arm}")
        _export({"adapter": folder}, arms[arm].graph, "merged", setting.base)
    return arms


def swappable_arms(setting: Setting) -> dict[str, OnnxArm]:
    """Write adapters for one graph, which answers as the base model without an adapter."""
    output, graph = setting.scratch / "swappable", setting.request.graph
    adapters = {arm: folder for arm, folder in setting.adapters.items() if arm not in setting.copies}
    _export(adapters, output, "swappable", setting.base, graph)
    files = {arm: output / f"{setting.copies.get(arm, arm)}.onnx_adapter" for arm in setting.adapters}
    return {BASE: OnnxArm(graph or output)} | {arm: OnnxArm(graph or output, file) for arm, file in files.items()}


def _export(
    adapters: Mapping[str, Path], output: Path, mode: str, base: ModelSource, graph: Path | None = None
) -> None:
    """Export adapters without the export's own comparison with PyTorch."""
    from loraover_export.formats.onnx.run import export_onnx

    paths, names = tuple(adapters.values()), tuple(adapters) if mode == "swappable" else ()
    found = export_onnx(paths, output, mode=mode, model=base.name, names=names, graph=graph, check=False)
    if found.verdict == "failed":
        raise EngineError(f"onnx: a matrix of the {mode} export is not within its error bound.")
