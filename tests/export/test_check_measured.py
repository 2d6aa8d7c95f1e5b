"""What `loraover check` says of PEFT and of onnxruntime-genai's builder, from runs of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraover.common.errors import ExportError
from loraover_export import check_adapter
from loraover_export.formats.onnx.kinds.decoder import build_decoder

from support.builder_forks import ForkedBuilder
from support.onnx_export import tiny_base
from support.onnx_graph import FEEDS, Graph, torch_logits
from support.tiny_models import fill_b
from support.vllm_damage import renamed

pytestmark = pytest.mark.process

FEED = FEEDS["one row"]
WRONG = 0.01
"""Share of the adapter's effect on the logits that no rounding explains."""

BUILT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "DoRA": {"use_dora": True},
    "aLoRA": {"alora_invocation_tokens": [3]},
    "a bias of B": {"lora_bias": True},
    "biases": {"bias": "all"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [3, 5, 7]}},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained norm": {"modules_to_save": ["norm"]},
}
WRONG_SILENTLY = ("DoRA", "aLoRA", "a bias of B", "embedding", "trained tokens")
"""Adapters of which onnxruntime-genai's builder makes a wrong graph."""


@dataclass(frozen=True)
class Trained:
    """An adapter, and the logits (tokens, vocabulary) of the model that saved it and of its base."""

    folder: Path
    logits: Tensor
    base_logits: Tensor

    def error(self, logits: Tensor) -> float:
        """Largest error of logits, as a share of what the adapter changes."""
        return float((logits - self.logits).abs().max() / (self.logits - self.base_logits).abs().max())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), "Llama")


@pytest.fixture
def train(base: Path, tmp_path: Path) -> Callable[..., Trained]:
    def make(**options: Any) -> Trained:
        before = torch_logits(AutoModelForCausalLM.from_pretrained(base), FEED)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            lora = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(lora | options)))
            fill_b(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.05 * torch.randn(parameter.shape))
            model.eval().save_pretrained(tmp_path / "adapter")
        return Trained(tmp_path / "adapter", torch_logits(model, FEED), before)

    return make


def build(base: Path, graph: Path, adapter: Path) -> None:
    """Write the builder's graph with an adapter; the builder runs in a fork, which spares it its imports."""
    builder: Any = ForkedBuilder()
    with builder:
        build_decoder(base, graph, precision="fp32", device="cpu", adapter=adapter, builder=builder)


@pytest.mark.parametrize("name", BUILT)
def test_the_builder_and_peft(name: str, base: Path, train: Callable[..., Trained], tmp_path: Path) -> None:
    """PEFT loads all that it saved, and the builder not."""
    trained = train(**BUILT[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained.folder)
    assert trained.error(torch_logits(model.eval(), FEED)) < WRONG
    build(base, tmp_path / "graph", trained.folder)
    error = trained.error(Graph(tmp_path / "graph" / "model.onnx").logits(FEED))
    assert (error > WRONG) == (name in WRONG_SILENTLY)
    verdicts = [check.as_it_is.verdict for check in check_adapter(trained.folder, engines=("onnx", "torch")).engines]
    assert verdicts == ["wrong silently" if name in WRONG_SILENTLY else "right", "right"]


def test_the_builder_builds_the_base_model_for_another_method(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoHaConfig(target_modules=["v_proj"], r=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.eval().save_pretrained(tmp_path / "adapter")
    build(base, tmp_path / "graph", tmp_path / "adapter")
    found = Graph(tmp_path / "graph" / "model.onnx").logits(FEED)
    with model.disable_adapter():
        plain = torch_logits(model, FEED)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert float((torch_logits(model, FEED) - plain).abs().max()) > WRONG
    assert check_adapter(tmp_path / "adapter", engines="onnx").engines[0].as_it_is.verdict == "wrong silently"


def test_the_builder_stops_at_adapted_experts(tmp_path: Path) -> None:
    experts = {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    base = tiny_base(tmp_path / "base", "GptOss", initial_context_length=128, **experts)
    options: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options)).save_pretrained(tmp_path / "in")
    with pytest.raises(ExportError, match="could not build"):
        build(base, tmp_path / "graph", tmp_path / "in")
    assert check_adapter(tmp_path / "in", engines="onnx", model=base).engines[0].as_it_is.verdict == "refused"


def test_the_builders_graph_of_an_adapted_head_does_not_load(
    base: Path, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train(target_modules=["q_proj", "lm_head"])
    build(base, tmp_path / "graph", trained.folder)
    with pytest.raises(Exception, match="lm_head"):
        Graph(tmp_path / "graph" / "model.onnx")
    assert check_adapter(trained.folder, engines="onnx").engines[0].as_it_is.verdict == "refused"


@pytest.mark.parametrize("old", ["base_model.model.", "model.model.model."])
def test_peft_ignores_keys_under_another_prefix(old: str, base: Path, train: Callable[..., Trained]) -> None:
    trained = train()
    renamed(old, old.removeprefix("model.").removeprefix("base_model.model."))(trained.folder)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained.folder)
    torch.testing.assert_close(torch_logits(model.eval(), FEED), trained.base_logits)
    assert check_adapter(trained.folder, engines="torch").engines[0].as_it_is.verdict == "wrong silently"
