"""Write an adapter as mlx-lm reads it.

mlx-lm computes y + scale * (x @ lora_a) @ lora_b, with lora_a (in_features, r) and lora_b (r, out_features), so A and B
are transposed. Source: mlx_lm/tuner/lora.py and `load_adapters` of mlx_lm/tuner/utils.py, release 0.32.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.numerics.rounded_adapter import round_exact, save_and_compare
from loraover.adapters.uniform.matrices import to_uniform
from loraover.adapters.uniform.served import ServedModel
from loraover.checkpoint.exact_tensors import Exact
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import AdapterDir

TENSORS_FILE = "adapters.safetensors"


def write_adapter(
    adapter: AdapterDir,
    target: ServedModel,
    directory: Path,
    dtype: str,
    on_tensor: Callable[[int], None] = lambda done: None,
) -> list[MatrixCertificate]:
    """Write the tensors and the configuration, and certify each matrix against its exact value.

    Args:
        adapter: Adapter whose cores or stored values are the exact ones.
        target: The base model.
        directory: An empty folder.
        dtype: Data type to store: fp32, bf16 or fp16.
        on_tensor: Called after each tensor with the number of tensors so far.

    Raises:
        CheckpointError: NaN, or a stored matrix that contradicts its cores.
        FoldError: An element beyond the range of `dtype`, or a file that does not hold what was written.
        OutputError: The folder cannot be written.
    """
    form = to_uniform(adapter)

    def transposed(key: str, exact: Exact) -> Exact:
        matrix = form(key, exact)
        return Exact(matrix.value.mT.contiguous(), matrix.bound.mT.contiguous(), matrix.site)

    rounded, certificates = round_exact(adapter, adapter.matrices, dtype, prepare=transposed, on_tensor=on_tensor)
    places = adapter.matrices.items()
    tensors = {f"{module.path}.lora_{side.lower()}": rounded[key] for key, (module, side) in places}
    save_and_compare(tensors, directory / TENSORS_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(adapter_config(adapter, target), indent=2) + "\n")
    return certificates


def adapter_config(adapter: AdapterDir, target: ServedModel) -> dict[str, Any]:
    """Return the contents of mlx-lm's `adapter_config.json`: which modules are adapted, by their full paths."""
    return {
        "model": target.source.name,
        "fine_tune_type": "lora",
        "num_layers": target.layers,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": list(adapter.modules),
        },
    }
