"""`loraover export gguf` on what llama.cpp would apply wrongly, in part or not at all: one message, and no file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from loraover.common.errors import ExportError, OutputError
from loraover.common.extras import install
from loraover.common.reporter import Reporter
from loraover_export import check_adapter, export_gguf
from loraover_export.formats.gguf import run
from loraover_export.formats.gguf.base import write_base

from support.children import Child, limit_file_size
from support.gguf_export import GgufMade, adapted, export, large_weights, make_gguf, tiny_base
from support.make_checkpoint import edit_tensors, tree
from support.plain_adapter import tiny_decoder
from support.refusals import Refused, only_error
from support.tiny_models import saved, tiny_gpt2
from support.vllm_damage import added, config, renamed

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> GgufMade:
    """Tests copy its adapter before they damage it."""
    return make_gguf(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture
def source(made: GgufMade, tmp_path: Path) -> Path:
    return shutil.copytree(made.adapter, tmp_path / "in")


def nan(folder: Path) -> None:
    edit_tensors(folder / TENSORS, lambda tensors: tensors[f"{Q}.lora_B.weight"].__setitem__((0, 0), torch.nan))


def rank_zero(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.lora_A.weight"] = torch.zeros(0, 64)
        tensors[f"{Q}.lora_B.weight"] = torch.zeros(64, 0)

    edit_tensors(folder / TENSORS, change)


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "DoRA": (config(use_dora=True), (CONFIG, "DoRA")),
    "PiSSA": (config(init_lora_weights="pissa"), (CONFIG, "changes the base weights")),
    "an unknown field": (config(use_novelty=3, peft_version="99.0"), ("use_novelty is 3", "does not know")),
    "a bias of B": (added(**{f"{Q}.lora_B.bias": torch.ones(64)}), (f"{Q}.lora_B.bias is a bias of B",)),
    "a norm": (added(**{NORM: torch.ones(64)}), (NORM, "loads the norms of an adapter but never applies them")),
    "another tensor": (added(**{"base_model.model.extra": torch.ones(2)}), ("neither A nor B",)),
    "NaN": (nan, (TENSORS, f"{Q}.lora_B.weight holds NaN")),
    "rank 0": (rank_zero, (TENSORS, f"{Q}.lora_A.weight has shape (0, 64)")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_llama_cpp_cannot_hold_is_named(damage: str, source: Path, refused: Refused) -> None:
    change, named = DAMAGES[damage]
    change(source)
    refused("gguf", source, named=named)


def test_a_module_without_a_tensor_is_named(source: Path, refused: Refused) -> None:
    renamed("self_attn.q_proj", "self_attn.w")(source)
    refused("gguf", source, named=("layers.0.self_attn.w, which", "does not have", "--model"))


def test_experts_with_a_pair_each_are_refused(tmp_path: Path, refused: Refused) -> None:
    """Their tensors would share one name, and llama.cpp ends the process on the file that is left."""
    model = saved(tiny_base("Qwen3Moe", num_hidden_layers=1), tmp_path / "base")
    adapted(model, tmp_path / "adapter", target_modules=["q_proj"], lora_alpha=12, r=4, rank_pattern={})
    paths = [f"model.layers.0.mlp.experts.{expert}.down_proj" for expert in range(4)]
    shapes = {"A": (4, 48), "B": (64, 4)}
    pairs = {f"base_model.model.{path}.lora_{x}.weight": torch.ones(shapes[x]) for path in paths for x in shapes}
    added(**pairs)(tmp_path / "adapter")
    config(target_modules=["q_proj", "down_proj"])(tmp_path / "adapter")
    refused("gguf", tmp_path / "adapter", named=(f"adapts the single expert {paths[0]}", "blk.0.ffn_down_exps.weight"))
    report = check_adapter(tmp_path / "adapter", engines="llamacpp")
    assert report.engines[0].exported.verdict == "refused"


@pytest.mark.parametrize("targets", ["embed_tokens", "lm_head"])
def test_a_tied_head_is_refused(targets: str, tmp_path: Path, refused: Refused) -> None:
    """llama.cpp has no weight for the one, and ends the process or answers wrongly for the other."""
    make_gguf(tmp_path, "Llama", changes={"tie_word_embeddings": True}, target_modules=[targets])
    refused("gguf", tmp_path / "adapter", named=(f"{targets}, but the embedding and the head", "one matrix"))


def test_gemma_has_no_head_of_its_own(tmp_path: Path, refused: Refused) -> None:
    model = saved(tiny_decoder("Gemma", tie_word_embeddings=False), tmp_path / "base")
    adapted(model, tmp_path / "adapter", target_modules=["lm_head"])
    refused("gguf", tmp_path / "adapter", named=("lm_head, for which llama.cpp's gemma has no weight",))


def test_a_family_without_an_entry_is_refused_by_name(tmp_path: Path, refused: Refused) -> None:
    model = saved(tiny_gpt2(), tmp_path / "base")
    adapted(model, tmp_path / "adapter", target_modules=["c_attn"])
    refused("gguf", tmp_path / "adapter", named=("GPT2LMHeadModel", "not known here", "Llama, Mistral, Phi3"))


def test_another_base_model_is_refused(source: Path, tmp_path: Path, refused: Refused) -> None:
    tiny_decoder("Llama", intermediate_size=80).save_pretrained(tmp_path / "wide")
    refused("gguf", source, "--model", tmp_path / "wide", named=("(64, 96) in the adapter and (64, 80)", "--model"))
    refused("gguf", source, "--model", tmp_path / "absent", named=("absent",))


SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6, "use_sliding_window": True}
OTHER_MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("SmolLM3", {"no_rope_layer_interval": 2}, "no_rope_layers"),
    ("SmolLM3", {"no_rope_layers": [0, 0]}, "no_rope_layers"),
    ("Qwen2", SLIDING, "layer_types"),
    ("Gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("Gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
    ("Gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("Gemma", {"hidden_act": "relu"}, "hidden_act"),
    ("Llama", {"hidden_act": "gelu"}, "hidden_act"),
]
"""Models whose files llama.cpp would load, and compute with what it knows of the family instead."""


@pytest.mark.parametrize(("family", "changes", "named"), OTHER_MODELS)
def test_a_model_that_llama_cpp_computes_otherwise_is_not_written(
    family: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=rf"{named} is .* llama\.cpp computes every .* with"):
        write_base(tiny_base(family, **changes), tmp_path / "base.gguf")
    assert not (tmp_path / "base.gguf").exists()


# Outputs


def test_an_output_that_cannot_be_is_named(made: GgufMade, source: Path, tmp_path: Path, refused: Refused) -> None:
    """A base model's file among them, which --force would replace by an adapter."""
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    refused("gguf", source, output=out, named=("exists already",))
    refused("gguf", source, "--force", output=out, named=("holds no GGUF adapter",))
    (tmp_path / "folder.gguf").mkdir()
    refused("gguf", source, "--force", output=tmp_path / "folder.gguf", named=("is a folder",))
    refused("gguf", source, output=source / "out.gguf", named=("lies inside the input",))
    refused("gguf", source, output=out / "inner.gguf", named=(str(out),))
    base = shutil.copy(made.base_gguf, tmp_path / "base.gguf")
    options = ("--force", "--base-gguf", base)
    refused("gguf", source, *options, output=tmp_path / "base.gguf", named=("holds no GGUF adapter",))


@pytest.mark.process
def test_a_file_size_limit_leaves_nothing(source: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    child = Child(lambda: export(source, tmp_path / "out.gguf"), prepare=lambda: limit_file_size(1000))
    assert f"cannot write {tmp_path / 'out.gguf'}: File too large" in only_error(child.end().output)
    assert tree(tmp_path) == before


def test_missing_folders_are_made_for_an_output_and_removed_without_one(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder" / "out.gguf"
    lost = shutil.copytree(source, tmp_path / "lost")
    edit_tensors(lost / TENSORS, lambda tensors: tensors.update({key: 1e-9 * tensors[key] for key in tensors}))
    assert export(lost, output, "--dtype", "fp16") == 1
    assert not (tmp_path / "new").exists()
    assert export(source, output) == 0
    assert [path.name for path in output.parent.iterdir()] == ["out.gguf"]


def test_force_replaces_an_adapter(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "my adapter.gguf"
    assert export(source, output) == 0
    first = output.read_bytes()
    assert export(source, output, "--force", "--dtype", "bf16") == 0
    assert len(output.read_bytes()) < len(first)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "my adapter.gguf"}
    assert f"run it: llama-server -m BASE.gguf --lora '{output}'" in capsys.readouterr().out


def test_what_another_command_wrote_meanwhile_stays(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"

    class Writing(Reporter):
        @contextmanager
        def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
            yield lambda done: None
            output.write_text("theirs")

    with pytest.raises(OutputError, match="exists already and is a file"):
        export_gguf(source, output, report=Writing())
    assert output.read_text() == "theirs"


# GGUF files of the base model


@pytest.mark.engine
def test_a_base_of_another_kind_is_named(made: GgufMade, source: Path, tmp_path: Path, refused: Refused) -> None:
    other = write_base(large_weights(tiny_base("Qwen2")), tmp_path / "qwen.gguf")
    refused("gguf", source, "--base-gguf", other, named=("is for the architecture 'llama'", "'qwen2'"))
    deep = write_base(large_weights(tiny_base("Llama", num_hidden_layers=1)), tmp_path / "flat.gguf")
    refused("gguf", source, "--base-gguf", deep, named=("adapts blk.1.", "flat.gguf does not have"))
    words = write_base(large_weights(tiny_base("Llama", vocab_size=80)), tmp_path / "words.gguf")
    refused("gguf", source, "--base-gguf", words, "--threads", 1, named=("has 80 tokens", "has 64"))
    assert export(source, tmp_path / "adapter.gguf") == 0
    refused("gguf", source, "--base-gguf", tmp_path / "adapter.gguf", named=("holds an adapter, expected",))
    refused("gguf", source, "--base-gguf", tmp_path / "absent.gguf", named=("absent.gguf: cannot be read",))
    refused("gguf", source, "--base-gguf", source / CONFIG, named=("not a GGUF file",))
    (tmp_path / "short.gguf").write_bytes(made.base_gguf.read_bytes()[:-1])
    refused("gguf", source, "--base-gguf", tmp_path / "short.gguf", named=("its tensors need",))


@pytest.mark.usefixtures("no_model")
def test_an_engine_that_is_not_installed_is_named(
    made: GgufMade, source: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded and run in PyTorch."""

    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'llama_cpp_py_sync'", name="llama_cpp_py_sync")

    monkeypatch.setattr(run, "load_library", missing)
    message = refused("gguf", source, "--base-gguf", made.base_gguf)
    assert message == f"error: this needs llama_cpp_py_sync: {install('llamacpp')}"
