"""What a base installation computes by itself: the facts of a model, and the file of a plain LoRA."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub
import pytest
import torch
import transformers

from loraover.adapters.uniform.folder import STORAGE, write_plain, write_uniform
from loraover.checkpoint.expert_stacks import find_expert_weights
from loraover.checkpoint.model_facts import FAMILIES, facts_of_headers, read_facts
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.errors import ConfigError, FoldError
from loraover.models.load import resolve_model
from loraover_export.formats.gguf.target import FAMILIES as GGUF_FAMILIES
from loraover_export.formats.gguf.target import expert_tensors, tensor_name

from strategies import normal
from support.make_checkpoint import edit_tensors
from support.plain_adapter import tiny_decoder, write_adapter
from support.tiny_experts import EXPERT_SIZES

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SCALINGS = {"power of two": 8, "another": 6, "below one": 1}
CHANGES = {"Phi": {"num_key_value_heads": 2}}
CLASSES = {
    model_type: name.removesuffix("ForCausalLM")
    for model_type, name in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    if model_type in FAMILIES
}


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_say_of_a_family_what_its_class_says(family: str, tmp_path: Path) -> None:
    model = tiny_decoder(CLASSES[family], **CHANGES.get(CLASSES[family], {}))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")  # an older one, which transformers does not read
    found = facts_of_headers(source := resolve_model(str(tmp_path)), tmp_path / "config.json")
    built = read_facts(source)
    matrices = [
        {path: (facts.kind, facts.shape, facts.weight) for path, facts in one.modules.items() if facts.kind != "other"}
        for one in (found, built)
    ]
    assert matrices[0] == matrices[1]
    assert found.modules.keys() <= built.modules.keys()
    assert found.shapes() == built.shapes()
    for name in ("architecture", "model_type", "dtype", "vocabulary", "layers", "heads", "key_value_heads", "is_tied"):
        assert getattr(found, name) == (getattr(built, name) or getattr(found, name)), name
    assert found.experts == built.experts == {}


@pytest.mark.parametrize("library", ["httpx", "httpx2", None])
def test_a_hub_that_cannot_be_reached_is_told(
    library: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HTTPError(Exception): ...

    def fails(*_: object, **__: object) -> None:
        raise (OSError if library is None else HTTPError)("no connection")

    tiny_decoder("Llama").save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", fails)
    if library is not None:
        monkeypatch.setitem(sys.modules, library, SimpleNamespace(HTTPError=HTTPError))
    source = replace(resolve_model(str(tmp_path)), location="owner/model")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no connection"):
        facts_of_headers(source, tmp_path / "config.json")


@pytest.mark.parametrize("family", sorted(GGUF_FAMILIES))
def test_names_of_matrices_are_those_of_the_gguf_package(family: str) -> None:
    with torch.device("meta"):
        model = tiny_decoder(family.removesuffix("ForCausalLM"), **(EXPERT_SIZES if "Moe" in family else {}))
    known = GGUF_FAMILIES[family]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    names = gguf.get_tensor_name_map(kind, 2)
    matrices = [path for path, module in model.named_modules() if getattr(module, "weight", torch.empty(0)).ndim == 2]
    assert "lm_head" in matrices
    assert {path: tensor_name(known, path) for path in matrices} == {path: names.get_name(path) for path in matrices}
    for path in find_expert_weights(model):
        parts = ("gate_proj", "up_proj") if path.endswith("gate_up_proj") else ("down_proj",)
        owner = path.rpartition(".")[0]
        assert expert_tensors(known, path) == [names.get_name(f"{owner}.{part}") for part in parts]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "knows the modules of a Mixtral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "knows the modules of a LlamaFor"),
        ({"quantization_config": {"quant_method": "fp8"}}, "of a quantised Llama"),
        ({}, r"headers of its weights cannot be read .*model.safetensors"),
    ],
    ids=["experts", "a classifier", "quantised", "no weights"],
)
def test_other_models_need_torch(change: dict[str, object], message: str, tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf'{message}.*pip install "\.\[torch\]"'):
        facts_of_headers(resolve_model(str(tmp_path)), tmp_path / "config.json")


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_numpy_writes_the_file_that_torch_writes(stored: str, scaling: str, tmp_path: Path) -> None:
    matrices = {
        f"model.layers.{k}.q_proj": (
            (normal(k, r, 7) * 10.0**k).to(STORED[stored]),
            (normal(k + 9, 5, r) * 10.0 ** (-2 * k)).to(STORED[stored]),
        )
        for k, r in enumerate((4, 2, 4))
    }
    source = write_adapter(
        tmp_path / "in", matrices, lora_alpha=SCALINGS[scaling], rank_pattern={r"layers\.1\.q_proj": 2}
    )
    adapter = read_adapter_dir(source)
    for dtype in STORAGE:
        (tmp_path / dtype).mkdir()
        expected = write_uniform(adapter, tmp_path / dtype, dtype, {})
        found = write_plain(adapter, tmp_path / f"{dtype}.safetensors", dtype)
        written = (tmp_path / dtype / "adapter_model.safetensors").read_bytes()
        assert (tmp_path / f"{dtype}.safetensors").read_bytes() == written
        for one, other in zip(found, expected, strict=True):
            kept = one.model_dump(exclude={"relative_error", "relative_bound", "worst_to_bound"})
            assert kept == other.model_dump(include=set(kept))
            assert one.relative_error == pytest.approx(other.relative_error, rel=1e-5)
            assert one.relative_bound == pytest.approx(other.relative_bound, rel=1e-5)
            assert one.worst_to_bound == pytest.approx(other.worst_to_bound, rel=1e-5)
        assert one.passed


def test_ties_and_the_range_are_those_of_torch(tmp_path: Path) -> None:
    """Numbers halfway between two of bf16 and of fp16, also after one rounding to float32."""
    half = [1 + k * 2.0**-bits for bits in (8, 11) for k in range(1, 16, 2)]
    near = [x * (1 + sign * 2.0**-40) for x, sign in itertools.product(half, (-1, 0, 1))]
    a = torch.tensor([near, [2.0**-24 * x for x in near]], dtype=torch.float64)
    adapter = read_adapter_dir(write_adapter(tmp_path / "in", {"q_proj": (a, torch.eye(3, 2).double())}, lora_alpha=2))
    for dtype in STORAGE:
        (tmp_path / dtype).mkdir()
        expected = write_uniform(adapter, tmp_path / dtype, dtype, {})
        found = write_plain(adapter, tmp_path / "out", dtype)
        assert (tmp_path / "out").read_bytes() == (tmp_path / dtype / "adapter_model.safetensors").read_bytes()
        lost = [(one.flushed_to_zero, one.subnormal) for one in found]
        assert lost == [(one.flushed_to_zero, one.subnormal) for one in expected]
    edit_tensors(tmp_path / "in" / "adapter_model.safetensors", lambda tensors: tensors.update(large(tensors)))
    with pytest.raises(FoldError, match=r"lora_A.*exceeds the largest F16 number"):
        write_plain(read_adapter_dir(tmp_path / "in"), tmp_path / "out", "fp16")


def large(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor * 1e6 for key, tensor in tensors.items() if "lora_A" in key}
