"""`prepare_adapter`: any adapter in the form that an engine loads, kept in a cache, or refused with the reason."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraover.adapters.uniform.certificate import CONVERSION_FILE
from loraover.common.errors import CheckpointError, ConfigError, ExportError, LoraOverError
from loraover_export import check_adapter, prepare_adapter
from loraover_export.check.engines import ENGINES
from loraover_export.check.engines.base import Target, Written
from loraover_export.check.engines.vllm import UniformRules, VllmRules
from loraover_export.prepare.cache import LOCKS, Record

from support.conversions import SINGLE, Source, make_source
from support.make_checkpoint import SERVABLE, edit_json, edit_tensors, make_checkpoint
from support.plain_adapter import tiny_decoder, write_adapter
from support.tiny_models import token_ids

KINDS: dict[str, tuple[Source, dict[str, Any], str]] = {
    "plain": (Source("LORA", {"r": 4, "lora_alpha": 4}), {}, "taken"),
    "rslora and patterns": (
        Source("LORA", {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 7}}),
        {"dtype": "fp32"},
        "rewritten",
    ),
    "loha": (Source("LOHA", {"r": 2, "alpha": 2}), {}, "converted"),
    "pissa": (Source("LORA", {"r": 3, "lora_alpha": 6, "init_lora_weights": "pissa"}), {}, "converted"),
    "oft": (Source("OFT", {"oft_block_size": 8}), {"approximate_to_rank": 64}, "converted"),
    "above the server's rank": (
        Source("LOHA", {"r": 4, "alpha": 4}), {"max_lora_rank": 8, "approximate_to_rank": 8}, "approximated"
    ),
}  # fmt: skip
"""Kinds of adapters, with options, and what is done to each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and an adapter of each kind; tests copy what they change."""
    folder = tmp_path_factory.mktemp("prepare")
    tiny_decoder("Llama").save_pretrained(folder / "base")
    for name, (source, _, _) in KINDS.items():
        make_source(folder / "base", folder / name, source)
    return folder


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    with torch.no_grad():
        found: torch.Tensor = model(token_ids()).logits
    return found


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_answers_as_peft_does(name: str, folder: Path, tmp_path: Path) -> None:
    source, options, done = KINDS[name]
    found = prepare_adapter(folder / name, tmp_path, model=folder / "base", **({"dtype": "fp32"} | options))
    assert (found.done, found.cached, found.path.parent.name) == (done, False, found.digest)
    assert found.certificate.is_file()
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301
    expected, written = logits(folder / "base", folder / name), logits(folder / "base", found.path)
    if done == "approximated":
        assert found.rank == 8
        assert found.certificate.name == CONVERSION_FILE
    else:
        allowed = 1e-4 if source.kind == "OFT" else max(SINGLE, 1e-5)
        torch.testing.assert_close(written, expected, rtol=0, atol=allowed * float(expected.abs().max()))
    again = prepare_adapter(folder / name, tmp_path, model=folder / "base", **({"dtype": "fp32"} | options))
    assert again.cached
    assert (again.path, again.digest, again.done) == (found.path, found.digest, found.done)


def test_every_engine_gets_its_form(folder: Path, tmp_path: Path) -> None:
    """The graph of ONNX Runtime is in `test_an_adapter_for_an_existing_graph`."""
    pytest.importorskip("gguf", reason="the extra llamacpp is not installed")
    for engine in ENGINES.keys() - {"onnx"}:
        found = prepare_adapter(folder / "loha", tmp_path, model=folder / "base", engine=engine)
        assert found.rank == 4
        assert found.path.exists()
        assert Record.model_validate_json((found.path.parent / "prepared.json").read_bytes()).engine == engine


def test_an_adapter_for_an_existing_graph(onnx_made: Any, tmp_path: Path) -> None:
    found = prepare_adapter(onnx_made.folder / "second", tmp_path, model=onnx_made.folder / "graph", engine="onnx")
    assert list(found.path.rglob("*.onnx_adapter"))


def test_a_checkpoint_is_exported_from_its_cores(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "made", base_options=SERVABLE)
    found = prepare_adapter(made.path, tmp_path / "cache", model=made.base, dtype="fp32")
    assert found.done == "rewritten"
    assert '"over_parameterised": true' in found.certificate.read_text()


def test_the_key_is_of_contents_and_options(folder: Path, tmp_path: Path) -> None:
    def key(source: Path = folder / "pissa", **options: Any) -> str:
        return prepare_adapter(source, tmp_path / "cache", **({"model": folder / "base"} | options)).digest

    first = key()
    assert key(shutil.copytree(folder / "pissa", tmp_path / "copy")) == first
    edit_json(tmp_path / "copy" / "adapter_config.json", lambda config: config.update(lora_alpha=5))
    other = shutil.copytree(folder / "base", tmp_path / "base")
    others = [
        key(tmp_path / "copy"),
        key(dtype="fp32"),
        key(max_lora_rank=16),
        key(engine_version="0.33.0"),
        key(model=other),
    ]
    edit_tensors(other / "model.safetensors", lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
    assert len({first, *others, key(model=other)}) == 7  # PiSSA depends on the base model's weights


def test_a_new_chat_template_is_not_that_of_the_cache(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder / "plain", tmp_path / "in")
    for template in ("{{ messages }}", "{{ messages[1:] }}", None):
        place = source / "chat_template.jinja"
        place.unlink() if template is None else place.write_text(template)
        found = prepare_adapter(source, tmp_path / "cache", model=folder / "base").path / place.name
        assert (found.read_text() if found.exists() else None) == template


def damage(file: Path) -> None:
    file.write_text("{")


@pytest.mark.parametrize("lost", [damage, Path.unlink, lambda file: shutil.rmtree(file.parent / "adapter")])
def test_a_damaged_result_is_made_again(lost: Callable[[Path], object], folder: Path, tmp_path: Path) -> None:
    first = prepare_adapter(folder / "plain", tmp_path, model=folder / "base")
    lost(first.path.parent / "prepared.json")
    second = prepare_adapter(folder / "plain", tmp_path, model=folder / "base")
    assert (second.path, second.cached) == (first.path, False)
    assert load_file(second.path / "adapter_model.safetensors").keys()
    assert prepare_adapter(folder / "plain", tmp_path, model=folder / "base").cached


def test_a_damaged_refusal_is_made_again(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ExportError, match="rank is 4"):
            prepare_adapter(folder / "plain", tmp_path, model=folder / "base", max_lora_rank=2)
        (refused,) = tmp_path.glob("*.refused.json")
        assert refused.stat().st_size > 9
        damage(refused)


Change = Callable[[Path], object]


def drop(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def narrow(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
    tensors[key] = tensors[key][:, :48].contiguous()


REFUSED: dict[str, tuple[Change, dict[str, Any], type[LoraOverError], str]] = {
    "DoRA": (
        lambda folder: edit_json(folder / "adapter_config.json", lambda c: c.update(use_dora=True)),
        {}, LoraOverError, "magnitude"
    ),
    "no tensors": (drop, {}, CheckpointError, "no such file"),
    "the server's rank": (lambda folder: None, {"max_lora_rank": 2}, ExportError, "rank is 4.*--max-lora-rank 8"),
    "another engine's rank": (
        lambda folder: None, {"max_lora_rank": 2, "engine": "mlx"}, ExportError, "takes 2 at most; allow an approx"
    ),
    "another width": (
        lambda folder: edit_tensors(folder / "adapter_model.safetensors", narrow), {}, ExportError, "other shapes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_that_lies_in_the_adapter_is_remembered(name: str, folder: Path, tmp_path: Path) -> None:
    change, options, kind, message = REFUSED[name]
    source = shutil.copytree(folder / "plain", tmp_path / "in")
    change(source)
    with pytest.raises(kind, match=message) as first:
        prepare_adapter(source, tmp_path / "cache", model=folder / "base", **options)
    (refused,) = [path for path in (tmp_path / "cache").iterdir() if path.name != LOCKS]
    edit_json(refused, lambda refusal: refusal.update(message=f"{refusal['message']} It is remembered."))
    moved = source.rename(tmp_path / "moved")
    with pytest.raises(kind) as second:
        prepare_adapter(moved, tmp_path / "cache", model=folder / "base", **options)
    assert str(second.value) == f"{first.value} It is remembered.".replace(str(source), str(moved))


def test_a_lost_base_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(folder / "base", tmp_path / "base")
    weights = (base / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(ConfigError):
        prepare_adapter(folder / "pissa", tmp_path / "cache", model=base)
    edit_tensors(
        Path(shutil.copy(weights, base / "model.safetensors")),
        lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()],
    )
    with pytest.raises(ConfigError, match="NaN"):
        prepare_adapter(folder / "pissa", tmp_path / "cache", model=base)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [LOCKS]
    weights.replace(base / "model.safetensors")
    assert prepare_adapter(folder / "pissa", tmp_path / "cache", model=base).done == "converted"


BeforeWriting = Callable[[Callable[[Path, Path], object]], None]


@pytest.fixture
def before_writing(monkeypatch: pytest.MonkeyPatch) -> BeforeWriting:
    """Function that makes another one run before vLLM's file is written, on the plain adapter and on the draft."""

    def plant(function: Callable[[Path, Path], object]) -> None:
        def write(rules: VllmRules, plain: Path, draft: Path, target: Target) -> Written:
            function(plain, draft)
            return UniformRules.write(rules, plain, draft, target)

        monkeypatch.setattr(VllmRules, "write", write)

    return plant


def test_a_file_that_could_not_be_read_is_not_remembered(
    folder: Path, tmp_path: Path, before_writing: BeforeWriting
) -> None:
    """A stale handle of NFS, or too many open files, says nothing about the adapter."""
    source = shutil.copytree(folder / "plain", tmp_path / "plain")
    config = source / "adapter_config.json"
    kept = config.read_bytes()

    def damage(plain: Path, draft: Path) -> None:
        config.unlink()
        config.symlink_to("/proc/self/mem")

    before_writing(damage)
    with pytest.raises(CheckpointError, match=r"plain.*cannot be read: Input/output error"):
        prepare_adapter(source, tmp_path / "cache", model=folder / "base")
    config.unlink()
    config.write_bytes(kept)
    before_writing(lambda plain, draft: None)
    assert prepare_adapter(source, tmp_path / "cache", model=folder / "base").done == "rewritten"


def test_files_that_change_meanwhile_leave_nothing(folder: Path, tmp_path: Path, before_writing: BeforeWriting) -> None:
    source = shutil.copytree(folder / "plain", tmp_path / "in")
    change = partial(edit_tensors, source / "adapter_model.safetensors")
    before_writing(lambda plain, draft: change(lambda tensors: [tensor.mul_(2) for tensor in tensors.values()]))
    with pytest.raises(CheckpointError, match="changed while they were read"):
        prepare_adapter(source, tmp_path / "cache", model=folder / "base")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [LOCKS]


def test_many_callers_make_each_adapter_once(folder: Path, tmp_path: Path, before_writing: BeforeWriting) -> None:
    """A lock of a file excludes threads as it does processes, since each caller opens the file."""
    made: list[str] = []
    both_at_work = threading.Barrier(2)

    def wait(plain: Path, draft: Path) -> None:
        made.append(draft.name)
        both_at_work.wait(timeout=60)  # passes only if one adapter does not wait for the other

    before_writing(wait)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda name=name: found.append(
            prepare_adapter(folder / name, tmp_path, model=folder / "base").cached
        ))
        for name in ("plain", "loha") * 4
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2
    assert sorted(found) == [False] * 2 + [True] * 6


def renamed(source: Path, target: Path, change: Callable[[str], str]) -> Path:
    """A copy of an adapter with other keys, whose configuration names modules by their last part."""
    shutil.copytree(source, target)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({change(key): tensor for key, tensor in tensors.items()}, target / "adapter_model.safetensors")
    return target


PREFIXES: Mapping[str, Callable[[str], str]] = {
    "a multimodal model's": lambda key: key.replace(".model.layers", ".model.language_model.layers"),
    "a wrapper's": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "without PEFT's": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["rslora and patterns", "loha"])
def test_a_prefix_is_mended_and_reported(kind: str, prefix: str, folder: Path, tmp_path: Path) -> None:
    source = renamed(folder / kind, tmp_path / "in", PREFIXES[prefix])
    found = prepare_adapter(source, tmp_path / "cache", model=folder / "base", dtype="fp32")
    assert len(found.notes) == 1
    expected = logits(folder / "base", folder / kind)
    written = logits(folder / "base", found.path)
    torch.testing.assert_close(written, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_prefix_that_fits_two_parts_is_refused(tmp_path: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    model = BartForConditionalGeneration(
        BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                   encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32)
    )  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    matrices = {"layers.0.self_attn.q_proj": (torch.ones(2, 16), torch.ones(16, 2))}
    source = write_adapter(tmp_path / "in", matrices, target_modules=["q_proj"])
    with pytest.raises(ExportError, match=r"'model\.decoder', 'model\.encoder'"):
        prepare_adapter(source, tmp_path / "cache", model=tmp_path / "base")


def test_shapes_decide_between_two_parts(tmp_path: Path) -> None:
    """The vision tower of a multimodal model has layers of the same names, and other widths."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "llama", "hidden_size": 16, "vocab_size": 32, **sizes},
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 24,
                "image_size": 8,
                "patch_size": 4,
                **sizes,
            },
        )
    )
    model.save_pretrained(tmp_path / "base")
    matrices = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 16), torch.ones(16, 2))}
    source = write_adapter(tmp_path / "in", matrices, target_modules=["q_proj"])
    check = check_adapter(source, engines="vllm", model=tmp_path / "base").engines[0]
    assert (check.as_it_is.verdict, check.by_us.verdict) == ("wrong silently", "right")
    found = prepare_adapter(source, tmp_path / "cache", model=tmp_path / "base")
    keys = load_file(found.path / "adapter_model.safetensors").keys()
    assert {key.partition(".lora_")[0] for key in keys} == {
        "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "triton"}, "expected one of vllm"),
        ({"dtype": "int8"}, "expected one of fp32"),
        ({"max_lora_rank": 0}, "1 or more"),
        ({"max_lora_rank": 8, "approximate_to_rank": 16}, "takes rank 8 at most"),
        ({"model": "nowhere/../x"}, "neither a folder, an address nor a hub name"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_adapter(folder / "plain", tmp_path / "cache", **({"model": folder / "base"} | options))
    assert not (tmp_path / "cache").exists()


IN_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from loraover_export import prepare_adapter

together = Barrier(4)

def prepare(number):
    together.wait()
    return prepare_adapter(sys.argv[2], f"{sys.argv[3]}/{number}", model=sys.argv[1]).done

with ThreadPoolExecutor(4) as pool:
    print(*pool.map(prepare, range(4)))
"""


@pytest.mark.process
def test_threads_of_a_new_process_prepare_at_once(folder: Path, tmp_path: Path) -> None:
    """transformers imports a model's code when it is first named, which threads at once used to break."""
    command = [sys.executable, "-c", IN_THREADS, str(folder / "base"), str(folder / "loha"), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["converted"] * 4, found.stderr
