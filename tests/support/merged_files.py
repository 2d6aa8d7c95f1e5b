"""Folders of a few matrices that look like a base model, an adapter of it, and merges right or wrong, by NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from support.plain_adapter import write_adapter

Wide = npt.NDArray[np.float64]
SHAPES = {
    "model.embed_tokens": (64, 32),
    "lm_head": (64, 32),
    **{
        f"model.layers.{k}.{name}": shape
        for k in range(2)
        for name, shape in {
            "self_attn.q_proj": (32, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.up_proj": (96, 32),
            "mlp.down_proj": (32, 96),
        }.items()
    },
}
TARGETS = [path for path in SHAPES if "layers" in path]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def drawn(seed: int, *shape: int, size: float = 1.0) -> Wide:
    return size * np.random.default_rng(seed).standard_normal(shape)


@dataclass(frozen=True)
class Planted:
    """A base model and an adapter in folders.

    Args:
        folder: Folder that holds "base" and "adapter".
        dtype: Data type of the base model.
        scaling: Factor of B @ A.
        weights: Weights of the base model as they are stored, by the modules' paths.
        deltas: scaling B A, by the modules' paths.
    """

    folder: Path
    dtype: str
    scaling: float
    weights: dict[str, Wide]
    deltas: dict[str, Wide]

    @property
    def base(self) -> str:
        return str(self.folder / "base")

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def merge(
        self,
        name: str = "merged",
        dtype: str | None = None,
        change: Callable[[str, Wide, Wide], Wide] = lambda path, w, d: w + d,
        others: Mapping[str, Wide] = {},
    ) -> str:
        """Write a merge: `change` gives the new weight of an adapted module, given its path, W and delta_W."""
        weights = self.weights | {path: change(path, self.weights[path], delta) for path, delta in self.deltas.items()}
        return write_model(self.folder / name, weights | dict(others), dtype or self.dtype)


def stored(weight: Wide, dtype: str) -> Tensor:
    """Round once; PyTorch rounds float64 to 16 bits twice, which differs for one number in thousands."""
    return torch.from_numpy(np.ascontiguousarray(weight)).to(DTYPES[dtype])


def write_model(folder: Path, weights: Mapping[str, Wide], dtype: str, **config: Any) -> str:
    folder.mkdir()
    tensors = {f"{path}.weight": stored(weight, dtype) for path, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(content | config))
    return str(folder)


def plant(
    folder: Path,
    dtype: str = "BF16",
    *,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    r: int = 4,
    alpha: float = 6,
    size: float = 0.05,
    **config: Any,
) -> Planted:
    """Write a base model with weights of size 1, and an adapter of its layers whose deltas have about `size`."""
    folder.mkdir(exist_ok=True)
    weights = {path: drawn(k, *shape) for k, (path, shape) in enumerate(shapes.items())}
    weights = {path: stored(weight, dtype).double().numpy() for path, weight in weights.items()}
    write_model(folder / "base", weights, dtype)
    scaling = alpha / r**0.5 if config.get("use_rslora") else alpha / r
    part = (size / scaling) ** 0.5 / r**0.25
    matrices, deltas = {}, {}
    for k, path in enumerate(path for path in shapes if "layers" in path):
        (m, n) = shapes[path]
        pair = (drawn(100 + k, r, n, size=part), drawn(200 + k, m, r, size=part))
        a, b = (torch.from_numpy(matrix).float() for matrix in pair)
        matrices[path] = (a, b)
        deltas[path] = scaling * (b.double() @ a.double()).numpy()
    config |= {"lora_alpha": alpha, "base_model_name_or_path": str(folder / "base")}
    write_adapter(folder / "adapter", matrices, **config)
    return Planted(folder, dtype, scaling, weights, deltas)
