"""Decoder graphs from onnxruntime-genai's model builder, which is run as its documented command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from loraover.common.errors import ExportError

GRAPH_FILE, CONFIG_FILE = "model.onnx", "genai_config.json"


def build_decoder(
    model: Path,
    out: Path,
    *,
    precision: str,
    device: str,
    adapter: Path | None = None,
    full_precision_nodes: Sequence[str] = (),
) -> None:
    """Write one graph for prefill and decode with a KV cache, its genai_config.json and tokenizer files.

    Args:
        model: folder of a transformers model with its tokenizer.
        out: an empty folder.
        precision: fp32, fp16 or int4.
        device: cpu or cuda; decides which fused operators the graph uses.
        adapter: PEFT adapter whose matrices become separate initializers.
        full_precision_nodes: names of nodes that int4 does not round.

    Raises:
        ExportError: the builder does not know the architecture, or fails.
    """
    # A KV cache as short as the window fails at run time once a text outgrows it; norms of queries and keys within the
    # attention run on CUDA only, where the checks may not run (onnxruntime-genai 0.18, ONNX Runtime 1.32).
    options = ["windowed_kv_cache=false", "fuse_qk_norm_gqa=false"]
    if adapter is not None:
        options.append(f"adapter_path={adapter}")
    if full_precision_nodes:
        options.append(f"nodes_to_exclude={','.join(full_precision_nodes)}")
    module = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    places = ["-m", "none", "-i", str(model), "-o", str(out), "-c", str(out / ".cache")]
    # The builder's own float16 layout for the CPU fails in its first decoding step (onnxruntime-genai 0.18); ONNX
    # Runtime's CPU kernels run the one for CUDA.
    layout = "cuda" if precision == "fp16" else device
    settings = ["-p", precision, "-e", layout, "--extra_options", *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [*module, *places, *settings], capture_output=True, text=True, errors="replace", env=environment
    )
    if done.returncode == 0 and (out / GRAPH_FILE).is_file():
        return
    builder = f"onnxruntime-genai {version('onnxruntime-genai')}"
    if "is not currently supported" in done.stderr:
        raise ExportError(
            f"{builder} has no decoder graph for {architecture(model)}; --no-cache exports one without a KV cache."
        )
    reason = next(reversed((done.stderr or done.stdout).strip().splitlines()), f"exit code {done.returncode}")[:600]
    raise ExportError(f"{builder} could not build a {precision} graph of {architecture(model)}: {reason}")


def architecture(model: Path) -> str:
    """Return the model class that a folder's config.json names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return str((config.architectures or [type(config).__name__])[0])
