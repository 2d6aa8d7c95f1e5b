"""Start the engines of a parity run with every arm loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraover.errors import EngineError
from loraover.models import load_model
from loraover_serve.parity.analysis import CONTROL, FOLDED, VANILLA
from loraover_serve.parity.arms import Arms
from loraover_serve.parity.engines.base import Engine
from loraover_serve.parity.outputs import BASE
from loraover_serve.parity.workload import Request
from loraover_serve.up import server_config
from loraover_serve.vllm_server import serve_vllm

ENGINES = ("vllm", "onnx", "torch")


@contextmanager
def started(
    engine: str, arms: Arms, requests: Sequence[Request], folder: Path, vllm: str, say: Callable[[str], None]
) -> Iterator[list[Engine]]:
    """The engines behind one name: ONNX Runtime is two, merged and swappable.

    Args:
        folder: for exports and logs.
        vllm: the command `vllm`.
    Raises:
        EngineError: a server that does not start.
        ExportError: a model that has no graph.
    """
    if engine == "vllm":
        with _vllm(arms, requests, folder, vllm, say) as running:
            yield [running]
    elif engine == "onnx":
        yield _onnx(arms, folder, say)
    else:
        from loraover_serve.parity.engines.torch import torch_engine

        say("loading PyTorch with PEFT")
        yield [torch_engine(lambda: load_model(arms.base), arms.adapters, arms.checkpoint)]


@contextmanager
def _vllm(
    arms: Arms, requests: Sequence[Request], folder: Path, executable: str, say: Callable[[str], None]
) -> Iterator[Engine]:
    """One server for all arms; every request fits, and no prompt is remembered."""
    from loraover_serve.parity.engines.vllm import VllmEngine

    longest = max(len(request.prompt) + request.new_tokens for request in requests)
    renamed = [_linked(path, folder / "adapters" / arm) for arm, path in arms.adapters.items()]
    options = ("--no-enable-prefix-caching", "--max-model-len", str(longest + 8))
    config = server_config(renamed, arms.base.location, options)
    say(f"starting vLLM; its log is {folder / 'vllm.log'}")
    with serve_vllm(config, folder / "vllm.log", executable=executable) as client:
        yield VllmEngine(client, {BASE: config.model} | {arm: arm for arm in arms.adapters})


def _linked(adapter: Path, link: Path) -> Path:
    """A copy of an adapter under the name of its arm."""
    shutil.copytree(adapter, link)
    return link


def _onnx(arms: Arms, folder: Path, say: Callable[[str], None]) -> list[Engine]:
    from loraover_serve.parity.engines.onnx import OnnxArm, OnnxEngine

    say("building ONNX graphs")
    swappable = _exported(arms, (VANILLA, FOLDED), "swappable", folder)
    merged = {arm: _exported(arms, (arm,), "merged", folder) for arm in (VANILLA, FOLDED)}
    vanilla, folded = (swappable / f"{arm}.onnx_adapter" for arm in (VANILLA, FOLDED))
    return [
        OnnxEngine(
            "onnx merged",
            {
                VANILLA: OnnxArm(merged[VANILLA]),
                CONTROL: OnnxArm(merged[VANILLA], session=1),
                FOLDED: OnnxArm(merged[FOLDED]),
            },
        ),
        OnnxEngine(
            "onnx swappable",
            {
                BASE: OnnxArm(swappable),
                VANILLA: OnnxArm(swappable, vanilla),
                CONTROL: OnnxArm(swappable, vanilla),
                FOLDED: OnnxArm(swappable, folded),
            },
        ),
    ]


def _exported(arms: Arms, names: Sequence[str], mode: str, folder: Path) -> Path:
    """A graph by `loraover-export onnx`; its check is that command's business."""
    from loraover_export.onnx.request import OnnxRequest
    from loraover_export.onnx.run import run_onnx

    output = folder / "-".join((mode, *names))
    sources = tuple(arms.adapters[name] for name in names)
    request = OnnxRequest(sources, output, mode, base=arms.base.location, names=tuple(names), check=False)
    if run_onnx(request, as_json=False) != 0:
        raise EngineError(f"{output}: the ONNX export failed.")
    return output


def reference_contexts(arms: Arms) -> tuple[Any, str, Any]:
    """PyTorch's answer to the folded adapter, unfolded where there is a checkpoint, its name, and the base model."""
    from contextlib import nullcontext

    from loraover.adapter_dir import read_adapter_dir
    from loraover.checkpoint import read_checkpoint
    from loraover.unfolded import unfolded

    base = load_model(arms.base)
    if arms.checkpoint is not None:
        return unfolded(base, read_checkpoint(arms.checkpoint)), "the unfolded checkpoint in PyTorch", nullcontext(base)
    folded = read_adapter_dir(arms.adapters[FOLDED])
    return unfolded(base, folded), "the folded adapter in PyTorch", nullcontext(base)
