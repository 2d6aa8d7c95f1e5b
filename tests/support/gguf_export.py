"""`loraover export gguf` on tiny models: their bases as folders and GGUF files, adapters, and llama.cpp's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from peft import PeftModel
from torch import Tensor

from loraover.common.command_line import run
from loraover_export.cli import cli
from loraover_export.formats.gguf.base import write_base
from loraover_export.formats.gguf.llamacpp import LlamaCppModel

from support.plain_adapter import tiny_decoder
from support.tiny_experts import EXPERT_SIZES, PARAMETERS
from support.tiny_models import VOCABULARY, fill_b, with_lora

UNEVEN: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 12,
    "rank_pattern": {"o_proj": 6, "down_proj": 1},
    "alpha_pattern": {r"1\..*_proj": 5},
    "target_modules": "all-linear",
}
"""LoRA on every linear layer but the head, with three ranks and several scalings."""

HEAD_SIZE = {"query_pre_attn_scalar": 32}
"""llama.cpp takes it to be the size of a head in all but one of the sizes of Gemma 2 and 3."""

CONFIGS: dict[str, Mapping[str, Any]] = {
    "Gemma2": HEAD_SIZE,
    "Gemma3": HEAD_SIZE,
    "Phi3": {"original_max_position_embeddings": 128},
    "Qwen3Moe": EXPERT_SIZES,
    "Granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
}
LORA: dict[str, Mapping[str, Any]] = {
    "Qwen3Moe": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": [*PARAMETERS, "mlp.gate.weight"],
    }
}
"""Options beside UNEVEN that a family needs."""

IDS = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class GgufMade:
    """A base model and an adapter of it in one folder, and PEFT's model of the adapter."""

    folder: Path
    model: Any

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def base_gguf(self) -> Path:
        return self.folder / "base.gguf"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def logits(self) -> Tensor:
        return logits(self.model)

    def base_logits(self) -> Tensor:
        with self.model.disable_adapter():
            return self.logits()


def make_gguf(folder: Path, family: str, *, changes: Mapping[str, Any] | None = None, **lora: Any) -> GgufMade:
    """A base model whose positions and norms matter, as a folder and as a GGUF file, and an adapter."""
    model = large_weights(tiny_base(family, **(changes or {})))
    model.save_pretrained(folder / "base")
    write_base(model, folder / "base.gguf")
    model.name_or_path = str(folder / "base")
    return GgufMade(folder, adapted(model, folder / "adapter", **{**LORA.get(family, {}), **lora}))


def tiny_base(family: str, **changes: Any) -> Any:
    """A decoder of two layers."""
    return tiny_decoder(family, **{**CONFIGS.get(family, {}), **changes})


def adapted(model: Any, folder: Path, **lora: Any) -> PeftModel:
    """Put an adapter on a model and save it in `folder`; returns PEFT's model."""
    wrapped = with_lora(model, draw_b=False, seed=1, **{"task_type": "CAUSAL_LM", **UNEVEN, **lora})
    fill_b(wrapped, seed=2)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@torch.no_grad()
def large_weights(model: Any) -> Any:
    """Norms and biases that differ, and eight times the initial weights of the layers, so that attention matters."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        elif "layers." in name:
            parameter.mul_(8)
    return model


def export(source: Path, output: Path, *options: str) -> int:
    return run(cli, ["gguf", str(source), "-o", str(output), *options])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """PyTorch's logits of IDS, (tokens, vocabulary)."""
    found: Tensor = model(input_ids=IDS).logits[0]
    return found


def engine_logits(base: Path, adapter: Path | None = None) -> Tensor:
    """llama.cpp's logits of IDS."""
    with LlamaCppModel(base, adapter, threads=1) as engine:
        return torch.from_numpy(engine.logits(IDS[0].tolist()))


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a GGUF file in float32, read by the gguf package."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def rewrite(
    source: Path,
    output: Path,
    change: Callable[[dict[str, Any], dict[str, Tensor]], object],
    matrices_as: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A copy of a GGUF file in F32 whose fields and tensors `change` has edited in place; returns `output`."""
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = read_tensors(source)
    change(fields, tensors)
    writer = gguf.GGUFWriter(output, fields.pop("general.architecture"))
    for name, value in fields.items():
        new = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)  # as ids are
        kind = reader.fields[name].types[0] if name in reader.fields else new
        writer.add_key_value(name, value, kind)
    for name, tensor in tensors.items():
        dtype = matrices_as if tensor.ndim == 2 and name.startswith("blk.") else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output
