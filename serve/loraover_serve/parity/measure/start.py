"""Start of the engines of a parity run, with every arm loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.models.device import choose_device
from loraover.models.load import load_model
from loraover.models.memory import Needs, memory_explained
from loraover_serve.comparison.adapters import make_idle
from loraover_serve.engines.base import Engine
from loraover_serve.engines.sample import Request
from loraover_serve.parity.judge.outputs import Reference
from loraover_serve.parity.measure.arms import Arms
from loraover_serve.parity.measure.memory import Watch
from loraover_serve.parity.samples import BASE, CONTROL, FOLDED, VANILLA
from loraover_serve.vllm.serve import read_named, server_config
from loraover_serve.vllm.server import serve_vllm

if TYPE_CHECKING:
    from loraover_serve.engines.vllm import VllmEngine


LOG_FILE, MEMORY_LOG_FILE = "vllm.log", "vllm-memory.log"


@dataclass(frozen=True)
class Launch:
    """Command line and limits of a vLLM server.

    Args:
        vllm: command that starts vLLM.
        log: file for the server's output.
        timeout_s: longest silence in the middle of an answer, in seconds.
        start_timeout_s: seconds that the server may take until its first answers.
        options: further words of its command line.
    """

    vllm: str
    log: Path
    timeout_s: float
    start_timeout_s: float
    options: tuple[str, ...] = ()


@contextmanager
def started(
    engine: str,
    arms: Arms,
    requests: Sequence[Request],
    folder: Path,
    launch: Launch,
    say: Callable[[str], None],
    *,
    device: str,
    compute_dtype: str,
    graph: Path | None = None,
) -> Iterator[Sequence[Engine]]:
    """Start the engines of one name; "onnx" starts two, with merged and with swappable adapters, if no graph is given.

    Args:
        engine: "vllm", "onnx" or "torch".
        arms: the adapters to load.
        requests: the requests that will be sent.
        folder: folder for exports and copies of adapters.
        launch: command line and limits of a vLLM server.
        say: receiver of lines of progress.
        device: device that PyTorch runs on.
        compute_dtype: data type that PyTorch runs in.
        graph: folder of an earlier swappable ONNX export, whose graph "onnx" runs; None builds every graph.

    Raises:
        ConfigError: memory that does not suffice for PyTorch; the message says what would fit.
        EngineError: a server that does not start.
        ExportError: a model that cannot be written as an ONNX graph, or an earlier graph that adapters do not fit.
    """
    if engine == "vllm":
        say("starting vLLM")
        with started_vllm(arms.adapters, arms, requests, folder, launch) as running:
            yield [running]
    elif engine == "onnx":
        yield _onnx(arms, folder, graph, say)
    else:
        from loraover_serve.engines.torch import torch_engine

        say(f"loading PyTorch with PEFT to {choose_device(device)}, {compute_dtype}")
        longest = max(len(request.prompt) + request.new_tokens for request in requests)
        needs = partial(pytorch_needs, arms, longest)
        with memory_explained("PyTorch", device=device, compute_dtype=compute_dtype, needs=needs):
            load = partial(load_model, arms.base, dtype=compute_dtype, device=device)
            yield [torch_engine(load, arms.adapters, arms.checkpoint)]


@contextmanager
def started_vllm(
    adapters: Mapping[str, Path],
    arms: Arms,
    requests: Sequence[Request],
    folder: Path,
    launch: Launch,
    watch: Watch = nullcontext,
) -> Iterator[VllmEngine]:
    """Start one server for the base model and some adapters, without a prefix cache.

    Args:
        adapters: folders of the adapters to load, by the names of their arms.
        arms: all arms, with the base model.
        requests: the requests that will be sent; the server's largest length is made for them.
        folder: folder for copies of the adapters.
        launch: command line and limits of the server.
        watch: context manager that runs as long as the server; it is called with the id of the server's process.

    Raises:
        EngineError: a server that does not start, or that refuses an adapter.
    """
    from loraover_serve.engines.vllm import VllmEngine

    longest = max(len(request.prompt) + request.new_tokens for request in requests)
    options = ("--no-enable-prefix-caching", "--max-model-len", str(longest + 8), *launch.options)
    named = read_named([_named(path, folder / "adapters" / arm) for arm, path in adapters.items()])
    config = server_config(named, arms.base, options)
    with serve_vllm(
        config, launch.log, executable=launch.vllm, startup_timeout_s=launch.start_timeout_s, watch=watch
    ) as server:
        yield VllmEngine(server, {BASE: config.model} | {arm: arm for arm in adapters}, launch.timeout_s)


def _named(adapter: Path, copy: Path) -> Path:
    """Copy an adapter to a folder with the name of its arm."""
    if not copy.exists():
        shutil.copytree(adapter, copy)
    return copy


def _onnx(arms: Arms, folder: Path, graph: Path | None, say: Callable[[str], None]) -> list[Engine]:
    from loraover_serve.engines.onnx import OnnxArm, OnnxEngine
    from loraover_serve.engines.onnx_graphs import merged_arm, swappable_arms

    say("building ONNX graphs" if graph is None else f"writing the adapters for the graph in {graph}")
    sources = {arm: path for arm, path in arms.adapters.items() if arm != CONTROL}
    swappable = swappable_arms(sources, folder / "swappable", arms.base, graph)
    swappable |= {BASE: OnnxArm(swappable[VANILLA].graph), CONTROL: swappable[VANILLA]}
    modes = {"onnx swappable": swappable}
    if graph is None:
        sources[BASE] = make_idle(read_adapter_dir(arms.adapters[VANILLA]), folder / "idle")  # merges into the base
        merged = {arm: merged_arm(path, folder / f"merged-{arm}", arms.base) for arm, path in sources.items()}
        merged[CONTROL] = replace(merged[VANILLA], session=1)
        modes = {"onnx merged": merged, **modes}
    order = (BASE, VANILLA, CONTROL, FOLDED, *arms.also)  # of loading, which changes speed by some percent
    return [OnnxEngine(name, {arm: found[arm] for arm in order}) for name, found in modes.items()]


def pytorch_needs(arms: Arms, tokens: int) -> Needs:
    """Estimate what PyTorch needs for all arms; the unfolded model is a copy of the base model."""
    shapes = read_adapter_dir(arms.adapters[FOLDED]).shapes
    adapters = len(arms.adapters) * sum(map(prod, shapes.values()))
    return Needs.of_model(arms.base, adapters=adapters, tokens=tokens, copies=1 if arms.checkpoint is None else 2)


def references(arms: Arms, *, device: str, compute_dtype: str) -> tuple[dict[str, Reference], str]:
    """Models in PyTorch to compare answers with.

    Args:
        arms: the adapters.
        device: device to run on.
        compute_dtype: data type to run in.

    Returns:
        The base model and the model of each adapter by the names of their arms, where the folded one's is the unfolded
        checkpoint if there is one; and the folded one's name.
    """
    from loraover.checkpoint.checkpoint import read_checkpoint
    from loraover.reference.reference_model import reference_model

    base = load_model(arms.base, dtype=compute_dtype, device=device)
    found: dict[str, Reference] = {BASE: lambda: nullcontext(base)}
    for arm in (VANILLA, FOLDED, *arms.also):
        found[arm] = partial(reference_model, base, read_adapter_dir(arms.adapters[arm]))
    if arms.checkpoint is None:
        return found, "the folded adapter"
    found[FOLDED] = partial(reference_model, base, read_checkpoint(arms.checkpoint))
    return found, "the unfolded checkpoint"
