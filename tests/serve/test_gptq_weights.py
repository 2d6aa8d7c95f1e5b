"""Weights of GPTQ: the formula of its layout, and matrices that vLLM quantises and packs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraover.common.errors import ConfigError

from support.served_weights import change_config, parameters, save_wide

LAYER = "model.layers.1.mlp.down_proj"
GROUP = 32
Numbers = npt.NDArray[Any]


def packed(numbers: Numbers, bits: int) -> Tensor:
    """Words (rows, columns * bits / 32) of numbers (rows, columns), the first in the lowest bits."""
    parts = numbers.reshape(len(numbers), -1, 32 // bits).astype(np.uint64) << np.arange(0, 32, bits, dtype=np.uint64)
    return torch.from_numpy(parts.sum(-1).astype(np.uint32).view(np.int32))


def write(base: Path, folder: Path, parts: Mapping[str, Tensor], **settings: Any) -> Path:
    """A folder with one matrix of GPTQ."""
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    del tensors[f"{LAYER}.weight"]
    own = {f"{LAYER}.{name}": part.contiguous() for name, part in parts.items()}
    save_file(tensors | own, folder / "model.safetensors")
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": GROUP} | settings)
    return folder


def make(bits: int, *, added: int, mixed: bool = False) -> tuple[dict[str, Tensor], Numbers]:
    """Tensors of a matrix (64, 128) of GPTQ, and this matrix in float64."""
    draw, rows, columns = np.random.default_rng(bits), 64, 128
    numbers = draw.integers(0, 2**bits, (columns, rows))
    zeros = draw.integers(added, 2**bits, (columns // GROUP, rows))
    scales = draw.normal(size=zeros.shape).astype(np.float16)
    group = np.arange(columns) // GROUP
    if mixed:
        draw.shuffle(group)
    parts = {
        "qweight": packed(numbers.T, bits).T,
        "qzeros": packed(zeros - added, bits),
        "scales": torch.from_numpy(scales),
    }
    if mixed:
        parts["g_idx"] = torch.from_numpy(group.astype(np.int32))
    return parts, ((numbers - zeros[group]) * scales[group].astype(np.float64)).T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("layout", "added"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_matrix_has_the_numbers_of_its_layout(
    bits: int, layout: str, added: int, mixed: bool, tmp_path: Path
) -> None:
    base, (parts, expected) = save_wide(tmp_path / "base"), make(bits, added=added, mixed=mixed)
    folder = write(base, tmp_path / "gptq", parts, bits=bits, checkpoint_format=layout)
    assert np.array_equal(parameters(folder, base)[f"{LAYER}.weight"].double().numpy(), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 3}, "GPTQ with 3 bits"),
        ({"checkpoint_format": "marlin"}, "layout 'marlin'"),
        ({"checkpoint_format": ["gptq"]}, "layout"),
        ({"bits": 8}, "do not fit together"),
        ({}, "zero points of 16"),
    ],
)
def test_other_layouts_are_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    base, (parts, _) = save_wide(tmp_path / "base"), make(4, added=0)  # whose zero points are up to 15
    with pytest.raises(ConfigError, match=words):
        parameters(write(base, tmp_path / "gptq", parts, **settings), base)


QUANTISE = """
import sys, torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.scalar_type import scalar_types
weight = load_file(sys.argv[1])["weight"].T.contiguous()
found = quant_utils.gptq_quantize_weights(weight, scalar_types.uint4b8, 32)
reference, numbers, scales = found[0], found[1], found[2]
words = quant_utils.gptq_pack(numbers, 4, *weight.shape)
save_file({"reference": reference.contiguous(), "qweight": words.contiguous(), "scales": scales}, sys.argv[2])
"""


def test_vllm_packs_what_is_read(tmp_path: Path) -> None:
    vllm = Path(os.environ.get("LORAOVER_VLLM", "none"))
    if not vllm.exists():
        pytest.skip("no environment with vLLM")
    base = save_wide(tmp_path / "base")
    save_file({"weight": load_file(base / "model.safetensors")[f"{LAYER}.weight"]}, tmp_path / "w.safetensors")
    words = [str(vllm.with_name("python")), "-c", QUANTISE, *(str(tmp_path / f"{n}.safetensors") for n in "wq")]
    subprocess.run(words, check=True, capture_output=True)
    theirs = load_file(tmp_path / "q.safetensors")
    zeros = packed(np.full(tuple(theirs["scales"].shape), 7), 4)
    parts = {"qweight": theirs["qweight"], "scales": theirs["scales"], "qzeros": zeros}
    found = parameters(write(base, tmp_path / "gptq", parts), base)[f"{LAYER}.weight"]
    assert (found - theirs["reference"].T).abs().max() <= 2**-23 * found.abs().max()
