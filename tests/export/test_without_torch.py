"""What a base installation computes by itself: the facts of a model, and the file of a plain LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loraover.adapters.numerics.tensor_rounding import STORAGE_DTYPES
from loraover.adapters.uniform.folder import write_uniform
from loraover.checkpoint.expert_stacks import find_expert_weights
from loraover.checkpoint.model_facts import FAMILIES, facts_of_class, facts_of_headers, read_facts
from loraover.checkpoint.peft_adapter import read_adapter_dir, site_key
from loraover.checkpoint.tensor_file import open_tensors, save_arrays, torch_dtype
from loraover.common.arrays import DTYPES, as_array, as_tensor
from loraover.common.errors import ConfigError
from loraover.models.load import resolve_model
from loraover_export.formats.gguf.target import FAMILIES as GGUF_FAMILIES
from loraover_export.formats.gguf.target import expert_tensors, tensor_name

from strategies import normal
from support.make_checkpoint import edit_json
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
    built = facts_of_class(source)
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


DOWN = "model.layers.1.mlp.down_proj.weight"
CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None], str]] = {
    "a matrix is missing": ({}, {DOWN: None}, "layer 1 has other tensors"),
    "a shape": ({}, {DOWN: torch.zeros(2, 2)}, "layer 1 has other tensors"),
    "layers": ({"num_hidden_layers": 3}, {}, "hold 2 layers, and config.json says 3"),
    "another model": ({"hidden_size": 48}, {}, "hold no model.embed_tokens of vocab_size rows"),
    "packed numbers": ({}, {DOWN: torch.zeros(2, 2, dtype=torch.int32)}, f"{DOWN} holds no floating-point"),
    "another part": ({}, {"v_head.summary.weight": torch.zeros(1, 2)}, "hold v_head.summary.weight"),
    "no head": ({"tie_word_embeddings": False}, {"lm_head.weight": None}, "whether the head is the embedding"),
    "an old head": ({"tie_word_embeddings": None}, {}, "whether the head is the embedding"),
    "another class": ({"architectures": ["FooForCausalLM"]}, {}, "knows the modules of a FooForCausalLM"),
}
"""Changes of the configuration and of the tensors, where None takes one away, and what is said of it."""


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_files_that_are_not_what_the_class_has_need_torch(name: str, tmp_path: Path) -> None:
    """With PyTorch, the class says what the model is."""
    fields, tensors, message = CONTRADICTIONS[name]
    tiny_decoder("Llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    kept = load_file(file := tmp_path / "model.safetensors") | tensors
    save_file({key: tensor for key, tensor in kept.items() if tensor is not None}, file)
    edit_json(tmp_path / "config.json", lambda found: found.update(fields))
    source = resolve_model(str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        facts_of_headers(source, tmp_path / "config.json")
    if name not in ("another class", "an old head", "another model"):
        assert read_facts(source) == facts_of_class(source)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_plain_lora_is_scaled_in_float64_and_rounded_once(stored: str, scaling: str, tmp_path: Path) -> None:
    """The file is the one that the safetensors library writes of PyTorch's numbers."""
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
    for dtype in STORAGE_DTYPES:
        (tmp_path / dtype).mkdir()
        found = write_uniform(adapter, tmp_path / dtype, dtype, {})
        assert all(one.passed for one in found)
        expected = {}
        for path, (a, b) in matrices.items():
            scaled = b.double() * adapter.modules[path].scaling
            missing = adapter.rank - len(a)
            for side, exact, padding in (("A", a.double(), (0, 0, 0, missing)), ("B", scaled, (0, missing))):
                rounded = correctly_rounded(exact, STORAGE_DTYPES[dtype])
                expected[site_key(f"{path}.lora_{side}")] = torch.nn.functional.pad(rounded, padding)
        save_file(expected, tmp_path / "expected", metadata={"format": "pt"})
        written = tmp_path / dtype / "adapter_model.safetensors"
        assert written.read_bytes() == (tmp_path / "expected").read_bytes()


def correctly_rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the nearer of the number that PyTorch casts to and its two neighbours."""
    cast = x.to(dtype)
    candidates = [cast, *(torch.nextafter(cast, torch.full_like(cast, end)) for end in (torch.inf, -torch.inf))]
    errors = torch.stack([(candidate.double() - x).abs() for candidate in candidates])
    return torch.stack(candidates).gather(0, errors.argmin(0, keepdim=True))[0]


def test_tensors_of_all_types_are_written_as_the_safetensors_library_does(tmp_path: Path) -> None:
    """Of arrays that are not contiguous, of one number and of none, with names of any letters."""
    names = {name: torch_dtype(name) for name in DTYPES}
    tensors = {
        f"{key}.{name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in names.items() for key in "ba"
    }
    tensors |= {"größe": torch.tensor(7), "none": torch.zeros(0, 3), "turned": torch.randn(3, 2).T}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "a", {"format": "pt"})
    save_arrays({key: as_array(tensor) for key, tensor in tensors.items()}, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with open_tensors(tmp_path / "b") as file:
        for key, tensor in tensors.items():
            assert file.holds_array(key, as_array(tensor))
            assert torch.equal(as_tensor(file.array(key)), tensor)


GOLDEN = Path(__file__).parents[1] / "golden"
BASE = GOLDEN / "base_installation" / "base"
PLAIN = GOLDEN / "base_installation" / "adapter"
ALONE = {
    **{
        name: f"export.fold_checkpoint({str(GOLDEN / 'schema_3' / name)!r}, 'out')"
        for name in ("mpo", "svd", "chain", "eigen", "dynamic")
    },
    "vllm": f"export.export_vllm({str(PLAIN)!r}, 'out', model={str(BASE)!r})",
    "attest": f"export.export_vllm({str(PLAIN)!r}, 'out', model={str(BASE)!r}); export.attest_adapter('out')",
    "check": f"export.check_adapter({str(PLAIN)!r}, model={str(BASE)!r})",
}
"""What is computed from matrices or read from headers, as calls of the public functions."""


@pytest.mark.parametrize("name", ALONE)
def test_what_needs_matrices_alone_loads_no_torch(name: str, tmp_path: Path) -> None:
    """In a process where PyTorch is installed, and of a model that was never seen."""
    program = f"import sys; import loraover_export as export; {ALONE[name]}; "
    program += "print(sorted({'torch', 'transformers', 'scipy', 'peft'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
