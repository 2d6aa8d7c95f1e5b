"""vLLM's own reading of adapters, for tests: run by the Python of vLLM's environment, once for many adapters.

Standard input: JSON with `adapters`, each with `path`, `expected` (module suffixes that vLLM would accept) and `rank`
(--max-lora-rank), and with `out`, a folder. Last line of standard output: JSON with `read`, one entry per adapter:
null, or why vLLM refuses it; `classes`, what vLLM's classes of the `architectures` asked for say of themselves; and
`names`, by class, what vLLM's loader makes of the module paths asked for there.
The deltas that vLLM would add lie in `out`, one safetensors file per adapter, by number: scaling * B @ A in float64.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import ModelRegistry

SCRIPT = Path(__file__).resolve().parents[2] / "serve" / "vllm-cpu" / "list_architectures.py"


def read(adapter: dict[str, Any], out: Path) -> str | None:
    """The steps of WorkerLoRAManager._load_adapter."""
    try:
        helper = PEFTHelper.from_local_dir(adapter["path"], 128)
        helper.validate_legal(LoRAConfig(max_lora_rank=adapter["rank"]))
        model = LoRAModel.from_local_checkpoint(
            adapter["path"], set(adapter["expected"]), peft_helper=helper, lora_model_id=1, device="cpu"
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    deltas = {
        name: (layer.scaling * layer.lora_b.double() @ layer.lora_a.double()).contiguous()
        for name, layer in model.loras.items()
        if layer.lora_a is not None and layer.lora_b is not None and layer.lora_b.shape[1] == len(layer.lora_a)
    }
    save_file(deltas, out)
    return None


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    found = [read(adapter, Path(request["out"]) / f"{k}.safetensors") for k, adapter in enumerate(request["adapters"])]
    describe = runpy.run_path(str(SCRIPT))["describe"]
    classes = {}
    for name in request["architectures"]:
        cls = ModelRegistry.models[name].load_model_cls() if name in ModelRegistry.models else None
        classes[name] = describe(name, cls) if cls is not None and supports_lora(cls) else None
    names = {name: [mapped(name, path) for path in paths] for name, paths in request["names"].items()}
    print(json.dumps({"read": found, "classes": classes, "names": names}))


def mapped(architecture: str, path: str) -> str:
    """The module that WorkerLoRAManager._load_adapter would look for."""
    mapper = getattr(ModelRegistry.models[architecture].load_model_cls(), "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    return str(parse_fine_tuned_lora_name(f"base_model.model.{path}.lora_A.weight", mapper)[0])


if __name__ == "__main__":
    main()
