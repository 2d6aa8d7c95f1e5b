"""What a conversion refuses, what it takes over, and what its command shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertModel

from loraover.adapters.convert.methods import METHODS
from loraover.adapters.convert.methods.base import Refused
from loraover.common.command_line import run
from loraover.common.errors import CheckpointError, ConfigError, ExportError
from loraover_export import LoraCertificate, convert_adapter
from loraover_export.cli import cli

from support.conversions import SOURCES, Source, fill, make_base, make_source, our_deltas
from support.faults import Scaling
from support.refusals import only_error
from support.tiny_models import tiny_bert, token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("refused")
    for base in ("prime", "even", "bias"):
        make_base(found / base, base)
    make_source(found / "prime", found / "loha", SOURCES["loha"])
    make_source(found / "prime", found / "lora", Source("LORA", {"r": 4, "lora_alpha": 4}))
    make_source(found / "even", found / "oft", SOURCES["oft"])
    make_source(found / "prime", found / "vera", SOURCES["vera"])
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    found = tmp_path_factory.mktemp("bases")
    return cache(lambda name: make_base(found / name, name))


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def changed(source: Path, target: Path, change: Change = dict, **config: Any) -> Path:
    """A copy of an adapter with other tensors, or other values in its configuration."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / "adapter_model.safetensors")), target / "adapter_model.safetensors")
    found = json.loads((source / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(found))
    return target


def first(change: Callable[[Tensor], Tensor]) -> Change:
    def applied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        key = next(iter(tensors))
        return tensors | {key: change(tensors[key]).contiguous()}

    return applied


def test_a_kind_that_is_no_delta_is_refused(folder: Path, tmp_path: Path) -> None:
    for kind in (kind for kind, method in METHODS.items() if isinstance(method, Refused)):
        source = changed(folder / "loha", tmp_path / kind, peft_type=kind)
        with pytest.raises(ExportError, match=f"a {kind} adapter cannot become a LoRA"):
            convert_adapter(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CHANGES: dict[str, tuple[Change, dict[str, Any], type[Exception], str]] = {
    "an unknown kind": (dict, {"peft_type": "QUANTUM"}, CheckpointError, "'QUANTUM', which this version does not know"),
    "NaN": (first(lambda t: t * torch.nan), {}, CheckpointError, "NaN or infinity"),
    "no tensor of the kind": (lambda t: {"other": torch.zeros(1)}, {}, CheckpointError, "names no adapted module"),
    "another module": (
        lambda t: {key.replace("layers.1", "layers.7"): tensor for key, tensor in t.items()},
        {
            "target_modules": [
                "layers.0.mlp.down_proj",
                "layers.0.self_attn.q_proj",
                "7.mlp.down_proj",
                "7.self_attn.q_proj",
            ]
        },
        ExportError,
        "has no such module",
    ),
    "biases": (dict, {"bias": "all"}, ExportError, "biases were trained too"),
    "an unknown task": (dict, {"task_type": "GUESSING"}, CheckpointError, "task_type: .*'CAUSAL_LM'.*'GUESSING'"),
    "an unknown field": (dict, {"twisted": True}, ExportError, "a field that this version does not know"),
    "a whole module": (
        lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(64, 34)},
        {"modules_to_save": ["lm_head"]},
        ExportError,
        "belongs to lm_head of modules_to_save",
    ),
    "a trained bias": (
        lambda t: t | {"base_model.model.model.norm.bias": torch.zeros(34)},
        {},
        ExportError,
        "is a trained bias",
    ),
    "a convolution": (
        lambda t: t | {"base_model.model.model.layers.0.mlp.down_proj.hada_w1_a": torch.zeros(3, 34, 1)},
        {},
        CheckpointError,
        "Convolutions are not converted",
    ),
    "nothing trained": (
        lambda t: {key: torch.zeros_like(tensor) for key, tensor in t.items()},
        {},
        ExportError,
        "every delta_W is zero",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_damaged_adapter_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    change, config, error, words = CHANGES[name]
    source = changed(folder / "loha", tmp_path / "source", change, **config)
    with pytest.raises(error, match=words):
        convert_adapter(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", sorted({source.kind for source in SOURCES.values()}))
def test_a_tensor_of_another_form_never_passes(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever tensor of a kind is cut, in whatever dimension, or has a type without fractions: our own error."""
    name = next(name for name, source in SOURCES.items() if source.kind == kind)
    adapter = make_source(bases(SOURCES[name].base), tmp_path / "whole", SOURCES[name])
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {"randlora_A", "randlora_B", "zeros"}  # copies that nobody reads
    keys = {key.split(".", 5)[-1]: key for key in tensors if key.split(".")[-1] not in kept}
    for number, (label, key) in enumerate(keys.items()):
        whole = tensors[key]
        wrong = [whole.narrow(dim, 0, size - 1).contiguous() for dim, size in enumerate(whole.shape)]
        wrong += [] if "indices" in label else [(whole > 0).to(dtype) for dtype in (torch.bool, torch.int8)]
        for change, tensor in enumerate(wrong):
            source = changed(adapter, tmp_path / f"{number}-{change}", replacing(key, tensor))
            with pytest.raises((CheckpointError, ExportError)):
                print(label, change, our_deltas(source).keys())


def replacing(key: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors | {key: tensor}


@pytest.mark.parametrize("name", ["lora", "loha", "lokr"])
def test_a_rank_that_the_file_contradicts_is_refused(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT refuses it too; the scaling would be another."""
    adapter = make_source(bases(SOURCES[name].base), tmp_path / "whole", SOURCES[name])
    source = changed(adapter, tmp_path / "source", r=8)
    with pytest.raises(CheckpointError, match=r"expected \(.*8.*\) for the base model and the rank in adapter_config"):
        convert_adapter(source, tmp_path / "out")


LORAS: dict[str, tuple[Source, str]] = {
    **{
        f"dora of {start}": (
            Source("LORA", {"r": 3, "use_dora": True, "init_lora_weights": start}),
            f"both use_dora and init_lora_weights '{start}'.*merge_and_unload",
        )
        for start in ("pissa", "olora")
    },
    "olora of a square Conv1D": (
        Source(
            "LORA",
            {"r": 3, "init_lora_weights": "olora", "target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
            base="gpt2",
        ),
        "OLoRA of a Conv1D is not converted.*merge_and_unload",
    ),
    "trained tokens of both tied ends": (
        Source("TRAINABLE_TOKENS", {"token_indices": [3], "target_modules": ["embed_tokens", "lm_head"]}, base="tied"),
        r"lm_head: it has trained tokens twice, .* shares its weight .* train with the embedding alone",
    ),
    "trained tokens beside a lora of a tied head": (
        Source("LORA", {"r": 2, "target_modules": ["lm_head"], "trainable_token_indices": [3, 5, 9]}, base="tied"),
        "trained tokens, and lm_head, which shares its weight, has a LoRA; train with one",
    ),
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_of_another_weight_is_refused(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    source, words = LORAS[name]
    adapter = make_source(bases(source.base), tmp_path / "source", source)
    with pytest.raises(ExportError, match=words):
        convert_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_rank_needs_a_rank_to_truncate_to(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"full rank, 32.*with approximate_to_rank R.*--max-lora-rank 32"):
        convert_adapter(folder / "oft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scaled_bias_is_refused(folder: Path, tmp_path: Path) -> None:
    source = make_source(folder / "bias", tmp_path / "ia3", SOURCES["ia3"])
    with pytest.raises(ExportError, match="scales the bias of the layer too"):
        convert_adapter(source, tmp_path / "out", approximate_to_rank=4)


def test_projections_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trained on with model\."):
        convert_adapter(folder / "vera", tmp_path / "out", model=folder / "even")


def test_a_classifier_is_taken_over(folder: Path, tmp_path: Path) -> None:
    def load() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = AutoModelForSequenceClassification.from_pretrained(folder / "prime", num_labels=3)
        found.config.pad_token_id = 0
        return found

    config = LoHaConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(load(), config)
        fill(model, "LOHA")
    model.save_pretrained(tmp_path / "source")
    report = convert_adapter(tmp_path / "source", tmp_path / "out", check_error=True, device="cpu")
    assert any("score of modules_to_save was taken over" in note for note in report.certificate.notes)
    assert report.outputs is not None
    assert report.outputs.error.max_logit <= 1e-5
    ids = token_ids()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        found = PeftModel.from_pretrained(load(), tmp_path / "out").eval()(input_ids=ids).logits
        plain = load().eval()(input_ids=ids).logits
    assert float((found - expected).abs().max()) <= 1e-5
    assert float((plain - expected).abs().max()) >= 1e-2


@torch.no_grad()
def test_an_adapter_without_a_task_stays_so(tmp_path: Path) -> None:
    """PEFT loads it on a model without a head; a check would load a causal language model, which lacks its modules."""
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        base = BertModel.from_pretrained(tmp_path / "base")
        trained = get_peft_model(base, LoHaConfig(r=2, target_modules=["query"]))
        fill(trained, "LOHA")
    trained.save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"task_type is None.* has no module encoder\.layer\.0\.attention"):
        convert_adapter(tmp_path / "source", tmp_path / "out", check_error=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "source"]
    convert_adapter(tmp_path / "source", tmp_path / "out")
    expected = trained.eval()(input_ids=token_ids()).last_hidden_state
    loaded = PeftModel.from_pretrained(BertModel.from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
    assert loaded.peft_config["default"].task_type is None
    assert float((loaded(input_ids=token_ids()).last_hidden_state - expected).abs().max()) <= 1e-5


class TestTheCommand:
    """What it prints, and its exit codes."""

    def test_json(self, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        rank = ["--approximate-to-rank", "8"]
        words = ["convert", str(folder / "oft"), "-o", str(tmp_path / "out"), *rank, "--check-error", "--json"]
        assert run(cli, words) == 0
        found = json.loads(capfd.readouterr().out)
        assert (found["method"], found["exact_rank"], found["truncated"]) == ("OFT", 32, True)
        assert found["vllm"] == {"takes": True, "max_lora_rank": 8, "largest": 512}
        assert found["certificate"]["asked"] == {"rank": "8"}
        outputs = found["certificate"]["outputs"]
        assert 0 < outputs["error"]["max_logit"] < outputs["adapter_effect"]
        assert (outputs["noise"], found["certificate"]["output_bound"]) == (None, None)  # an approximation is no fault

    def test_an_exact_conversion_keeps_logits(
        self, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert run(cli, ["convert", str(folder / "loha"), "-o", str(tmp_path / "out"), "--check-error"]) == 0
        shown = " ".join(capfd.readouterr().out.split())
        assert "LOHA: exact, of rank 9" in shown
        assert "vLLM takes it with --max-lora-rank 16" in shown
        assert "at 100.00%" in shown
        found = LoraCertificate.model_validate_json((tmp_path / "out" / "lora_certificate.json").read_bytes())
        assert found.outputs is not None
        assert found.output_bound is not None
        assert 0 < found.outputs.error.max_logit <= found.output_bound < found.outputs.adapter_effect / 2
        assert f"allowed {found.output_bound:.2e}" in shown
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            *("adapter_config.json", "adapter_model.safetensors", "lora_certificate.json", "README.md")
        }

    def test_an_exact_conversion_that_loses_logits_is_not_left_behind(
        self, folder: Path, tmp_path: Path, wrong_scaling: Scaling, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Each matrix is within its bound of the factors, which are wrong themselves."""
        wrong_scaling(1.001)
        assert run(cli, ["convert", str(folder / "lora"), "-o", str(tmp_path / "out"), "--check-error", "--json"]) == 1
        out, err = capfd.readouterr()
        certificate = json.loads(out)["certificate"]
        assert certificate["verdict"] == "failed"
        assert all(matrix["worst_to_bound"] <= 1 for matrix in certificate["matrices"])
        assert "nothing was written: the logits are further from the source's" in err
        assert list(tmp_path.iterdir()) == []

    def test_a_check_that_sees_too_little_is_inconclusive(
        self, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        weak = changed(folder / "loha", tmp_path / "weak", alpha=1e-9)
        assert run(cli, ["convert", str(weak), "-o", str(tmp_path / "out"), "--check-error"]) == 3
        assert "certificate inconclusive" in capfd.readouterr().out
        assert (tmp_path / "out").is_dir()

    def test_one_message(self, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        assert run(cli, ["convert", str(folder / "oft"), "-o", str(tmp_path / "out")]) == 2
        assert "with --approximate-to-rank R" in only_error(capfd.readouterr().err)


def test_trained_tokens_of_a_classifier_are_refused_until_no_task_is_named(bases: Any, tmp_path: Path) -> None:
    """PEFT loads a LoRA of that task only with a head in its file."""
    source = make_source(bases("prime"), tmp_path / "tokens", SOURCES["trained tokens"])
    classifier = changed(source, tmp_path / "classifier", task_type="SEQ_CLS")
    with pytest.raises(ExportError, match=r"task_type is 'SEQ_CLS'.*Write null there"):
        convert_adapter(classifier, tmp_path / "out")
    assert convert_adapter(changed(source, tmp_path / "mended", task_type=None), tmp_path / "out").passed
