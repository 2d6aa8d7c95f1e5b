"""Two foreign readers of the written adapters, vLLM's loader and PEFT, for every family; one process asks vLLM all."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraover.adapters.uniform.request_fields import MAX_LORA_RANKS, max_lora_rank
from loraover.common.command_line import run
from loraover_export import export_vllm
from loraover_export.cli import cli
from loraover_export.formats.vllm.releases import known_architectures

from oracles.contraction import Array
from support.check_cases import CASES, EXPECTED
from support.compatibility import ARCHITECTURES, record
from support.make_checkpoint import logits, make_checkpoint, numpy64, oracle_matrices
from support.plain_adapter import FAMILIES, make_adapter
from support.tiny_experts import EXPERTS, expert_lora, peft_deltas, tiny_moe
from support.tiny_models import saved
from support.versions import needs_expert_stacks
from support.vllm_command import vllm_command
from support.vllm_damage import DAMAGES
from tolerances import UNIT, gamma

pytestmark = pytest.mark.engine

READER = Path(__file__).with_name("vllm_reader.py")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OF_EXPERTS = (
    *("q_proj", "v_proj"),
    *(f"experts.{e}.{name}_proj" for e in range(EXPERTS) for name in ("gate", "up", "down")),
)
EMBEDDINGS = ("embed_tokens", "lm_head")
READ_BY = f"vLLM {known_architectures().version}, its loader"
NAMES = {
    "Gemma3ForConditionalGeneration": ("model.language_model.layers.0.mlp.up_proj", "lm_head", "model.vision_tower.x"),
    "Idefics3ForConditionalGeneration": ("model.text_model.layers.0.mlp.up_proj", "lm_head"),
    "InternVLForConditionalGeneration": (
        "model.language_model.layers.0.mlp.up_proj",
        "model.vision_tower.x",
        "lm_head",
    ),
    "MistralLarge3ForCausalLM": ("layers.0.attention.wkv_b", "model.layers.0.self_attn.kv_b_proj"),
    "Qwen2_5_VLForConditionalGeneration": ("model.layers.0.mlp.up_proj", "model.visual.x", "lm_head"),
    "Qwen3VLForConditionalGeneration": ("model.language_model.layers.0.mlp.up_proj", "model.visual.blocks.0.x"),
    "SmolVLMForConditionalGeneration": ("model.text_model.layers.0.mlp.up_proj", "model.connector.x"),
}
"""Module paths of adapters, by classes whose names vLLM maps, or of which it adapts a part only."""

UNSERVED = ("GPT2LMHeadModel", "BertForSequenceClassification", "T5ForConditionalGeneration")


@dataclass(frozen=True)
class Written:
    """Adapters before and after the command, by family, and `loraover` for a checkpoint; other ones by name.

    Args:
        experts: PEFT's model of an adapter of experts, which lies below this name in `output`; None for an older PEFT.
    """

    source: Mapping[str, Path]
    output: Mapping[str, Path]
    damaged: Mapping[str, Path]
    cases: Mapping[str, Path]
    experts: Any


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("families")
    source = {family: make_adapter(folder / family, family) for family in FAMILIES}
    lora: dict[str, Any] = {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    }
    source["loraover"] = make_checkpoint(folder / "loraover", base_options={"head_dim": 8}, **lora).path
    for name, path in source.items():
        assert run(cli, ["vllm", str(path), "-o", str(folder / "out" / name), "--dtype", "fp32"]) == 0
    plain = make_adapter(folder / "plain", "Llama", rank_pattern={}, r=4, lora_alpha=4)
    damaged = {name: changed(source["Llama"], folder / "damaged" / name, DAMAGES[name].change) for name in DAMAGES}
    cases = {name: changed(plain, folder / "cases" / name, CASES[name]) for name in CASES}
    output = {name: folder / "out" / name for name in source}
    experts = None
    if not needs_expert_stacks.args[0]:
        experts = expert_lora(saved(tiny_moe(), folder / "experts" / "base"), folder / "experts" / "adapter")
        output["experts"] = folder / "out" / "experts"
        assert export_vllm(folder / "experts" / "adapter", output["experts"], dtype="fp32").passed
    return Written(source, output, damaged, cases, experts)


def changed(source: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(source, folder)
    change(folder)
    return folder


@dataclass(frozen=True)
class VllmsReading:
    """Per adapter: why vLLM refuses it, or None; the deltas it would add; what its classes say; and names it maps."""

    refused: Mapping[str, str | None]
    deltas: Mapping[str, dict[str, Array]]
    classes: Mapping[str, Any]
    names: Mapping[str, list[str]]


@pytest.fixture(scope="module")
def vllm(written: Written, tmp_path_factory: pytest.TempPathFactory) -> VllmsReading:
    python, out = vllm_command().parent / "python", tmp_path_factory.mktemp("vllm")
    paths = {**written.output, **{f"source of {name}": path for name, path in written.source.items()}}
    adapters = [
        {"path": str(path), "expected": OF_EXPERTS if name == "experts" else PROJECTIONS, "rank": 8}
        for name, path in paths.items()
    ]
    for path in (*written.damaged.values(), *written.cases.values()):
        adapters += [{"path": str(path), "expected": PROJECTIONS + EMBEDDINGS, "rank": MAX_LORA_RANKS[-1]}]
    paths |= {**written.damaged, **{f"case {name}": path for name, path in written.cases.items()}}
    classes = [f"{family}ForCausalLM" for family in (*FAMILIES, "Qwen3Moe")] + list(UNSERVED) + list(NAMES)
    request = json.dumps({"adapters": adapters, "architectures": classes, "names": NAMES, "out": str(out)})
    done = subprocess.run([python, READER], input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    files = {name: out / f"{k}.safetensors" for k, name in enumerate(paths)}
    deltas = {
        name: {module: numpy64(delta) for module, delta in load_file(file).items()}
        for name, file in files.items()
        if file.exists()
    }
    return VllmsReading(dict(zip(paths, answer["read"], strict=True)), deltas, answer["classes"], answer["names"])


def source_deltas(path: Path) -> dict[str, tuple[Array, Array]]:
    """scaling * B @ A of every module by PEFT's formula, from the files, in float64; and |scaling B| @ |A|."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = {key: numpy64(tensor) for key, tensor in load_file(path / "adapter_model.safetensors").items()}
    if (path / "loraover.json").exists():
        tensors |= oracle_matrices(path)
    deltas = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            scaling = config["lora_alpha"] / (np.sqrt(len(a)) if config["use_rslora"] else len(a))
            deltas[module] = scaling * b @ a, abs(scaling * b) @ abs(a)
    return deltas


SOURCES = (*FAMILIES, "loraover")


@pytest.mark.parametrize("name", SOURCES)
def test_vllm_reads_the_sources_delta(name: str, written: Written, vllm: VllmsReading) -> None:
    assert vllm.refused[name] is None
    expected, found = source_deltas(written.source[name]), vllm.deltas[name]
    assert found.keys() == expected.keys()
    errors, limits = [], []
    for module, (delta, magnitude) in expected.items():
        u, terms = UNIT[torch.float32], 64  # both factors are rounded once; each product sums up to 6 + 6 terms
        limit = ((1 + u) ** 2 - 1 + gamma(terms, UNIT[torch.float64])) * magnitude
        assert (abs(found[module] - delta) <= limit).all(), module
        assert float(np.linalg.norm(delta)) > 1e-3
        errors.append(float(np.max(abs(found[module] - delta))))
        limits.append(float(np.max(limit)))
    if name in FAMILIES:
        record(name, READ_BY, "LoRA, elements of delta_W", "fp32", "passed", max(errors), max(limits))


@needs_expert_stacks
def test_vllm_loads_the_pairs_of_experts(written: Written, vllm: VllmsReading) -> None:
    """With the names that its class of this model expects; no expert's LoRA runs on a CPU."""
    assert vllm.refused["experts"] is None
    assert vllm.classes["Qwen3MoeForCausalLM"]["stacked_experts"] is False
    for path, delta in peft_deltas(written.experts).items():
        owner, _, parameter = path.rpartition(".")
        parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
        read = np.concatenate([vllm.deltas["experts"][f"{owner}.{part}"] for part in parts])
        np.testing.assert_allclose(read, numpy64(delta), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOURCES)
def test_peft_reads_the_sources_function(name: str, written: Written) -> None:
    base = written.source[name].parent / "base"
    outputs = []
    for folder in (written.source[name], written.output[name]):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        outputs.append(logits(model))
    with model.disable_adapter():
        plain = logits(model)
    scale = float(outputs[0].abs().max())
    # two more roundings of each factor, and sums in another order: some tens of 2^-24
    assert float((outputs[0] - outputs[1]).abs().max()) < 1e-5 * scale
    assert float((outputs[0] - plain).abs().max()) > 1e-2 * scale
    assert {n for n, p in model.named_parameters() if "lora_" in n} == {
        f"base_model.model.{module}.lora_{kind}.default.weight"
        for module in source_deltas(written.source[name])
        for kind in "AB"
    }


@pytest.mark.parametrize("name", DAMAGES)
def test_what_vllm_does_with_a_mistake(name: str, vllm: VllmsReading) -> None:
    """What it refuses, and what the pre-flight alone keeps from being served wrongly."""
    assert (vllm.refused[name] is not None) == DAMAGES[name].vllm_refuses, vllm.refused[name]


@pytest.mark.parametrize("name", [name for name in CASES if name != "a lost matrix"])  # which the server refuses
def test_vllm_loads_what_a_check_does_not_call_refused(name: str, vllm: VllmsReading) -> None:
    """With `test_check.py`, where the verdicts of `loraover check` are those of the same table."""
    refused = vllm.refused[f"case {name}"]
    assert (refused is not None) == (EXPECTED["vllm"][name][0] == "refused"), refused


def test_the_table_is_what_vllm_says(vllm: VllmsReading) -> None:
    known = known_architectures()
    for name, description in vllm.classes.items():
        assert (name in known.lora) == (description is not None)
        if description is not None:
            assert json.loads(known.lora[name].model_dump_json()) == description
    assert {name for name, description in vllm.classes.items() if description is None} == set(UNSERVED)
    for family, name in ARCHITECTURES.items():
        if name in UNSERVED:
            record(family, READ_BY, "LoRA", "any", "refused by name", None, None)


def test_names_are_mapped_as_vllm_maps_them(vllm: VllmsReading) -> None:
    known = known_architectures().lora
    assert {name: [known[name].rename(path) for path in paths] for name, paths in NAMES.items()} == vllm.names
    assert any(vllm.names[name] != list(paths) for name, paths in NAMES.items())


@pytest.mark.parametrize(("r", "expected"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512), (513, None)])
def test_the_smallest_allowed_rank(r: int, expected: int | None) -> None:
    assert max_lora_rank(r) == expected
    assert expected is None or expected in MAX_LORA_RANKS
