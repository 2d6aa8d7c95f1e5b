"""Decoder graphs from onnxruntime-genai's model builder, which is run as its documented command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from loraover.common.errors import ExportError
from loraover_export.requests import OnnxRequest

GRAPH_FILE, CONFIG_FILE = "model.onnx", "genai_config.json"


class BuilderProcess:
    """The builder in a separate process, which is started before its arguments are known.

    Its imports take longer than the build of a small model. As a context, it imports while the block prepares the
    model, and is ended with the block. Outside of a context, or for a second build, `run` starts a process.
    """

    def __init__(self) -> None:
        self._waiting: subprocess.Popen[str] | None = None

    def __enter__(self) -> BuilderProcess:
        self._waiting = _start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._waiting is not None:
            _end(self._waiting)

    def run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run the builder with the arguments of its command, and return its exit code and what it printed."""
        process, self._waiting = self._waiting or _start(), None
        try:
            out, err = process.communicate(json.dumps(arguments) + "\n")
        except BaseException:
            _end(process)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loraover_export.formats.onnx.builder_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
    )


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def build_decoder(
    model: Path,
    out: Path,
    *,
    precision: str,
    device: str,
    adapter: Path | None = None,
    full_precision_nodes: Sequence[str] = (),
    builder: BuilderProcess,
) -> None:
    """Write one graph for prefill and decode with a KV cache, its genai_config.json and tokenizer files.

    Args:
        model: Folder of a transformers model with its tokenizer.
        out: An empty folder.
        precision: Precision of the weights: fp32, fp16 or int4.
        device: Cpu or cuda; decides which fused operators the graph uses.
        adapter: PEFT adapter whose matrices become separate initializers.
        full_precision_nodes: Names of nodes that int4 does not round.
        builder: Process that runs the builder.

    Raises:
        ExportError: The builder does not know the architecture, or fails.
    """
    # A KV cache as short as the window fails at run time once a text outgrows it; norms of queries and keys within the
    # attention run on CUDA only, where the checks may not run (onnxruntime-genai 0.18, ONNX Runtime 1.32).
    options = ["windowed_kv_cache=false", "fuse_qk_norm_gqa=false"]
    if adapter is not None:
        options.append(f"adapter_path={adapter}")
    if full_precision_nodes:
        options.append(f"nodes_to_exclude={','.join(full_precision_nodes)}")
    places = ["-m", "none", "-i", str(model), "-o", str(out), "-c", str(out / ".cache")]
    # The builder's own float16 layout for the CPU fails in its first decoding step (onnxruntime-genai 0.18); ONNX
    # Runtime's CPU kernels run the one for CUDA.
    layout = "cuda" if precision == "fp16" else device
    settings = ["-p", precision, "-e", layout, "--extra_options", *options]
    done = builder.run([*places, *settings])
    if done.returncode == 0 and (out / GRAPH_FILE).is_file():
        return
    name = f"onnxruntime-genai {version('onnxruntime-genai')}"
    if "is not currently supported" in done.stderr:
        raise ExportError(
            f"{name} has no decoder graph for {architecture(model)}; {OnnxRequest.named('cache', False)} exports one "
            "without a KV cache."
        )
    reason = next(reversed((done.stderr or done.stdout).strip().splitlines()), f"exit code {done.returncode}")[:600]
    raise ExportError(f"{name} could not build a {precision} graph of {architecture(model)}: {reason}")


def architecture(model: Path) -> str:
    """Return the model class that a folder's config.json names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return str((config.architectures or [type(config).__name__])[0])
