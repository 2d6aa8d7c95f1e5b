"""What `loraover-export check` says of PEFT and of onnxruntime-genai's builder, from runs of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraover_export import check_adapter
from loraover_export.onnx.genai import build_decoder

from support.onnx_export import ForkedBuilder, tiny_base
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
    "DoRA": {"use_dora": True},
    "a bias of B": {"lora_bias": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
BUILDER_IS_RIGHT = ("plain", "rsLoRA", "PiSSA", "trained head")
"""Where the verdict is not right nevertheless, it is Olive's."""


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
def test_the_builder(name: str, base: Path, train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train(**BUILT[name])
    build(base, tmp_path / "graph", trained.folder)
    error = trained.error(Graph(tmp_path / "graph" / "model.onnx").logits(FEED))
    found = check_adapter(trained.folder, engines="onnx").engines[0].as_it_is
    if name in BUILDER_IS_RIGHT:
        assert error < WRONG
        assert all("the builder is right" in finding.found for finding in found.findings)
    else:
        assert error > WRONG
        assert found.verdict == "wrong silently"


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


@pytest.mark.parametrize("name", BUILT)
def test_peft_loads_all_that_it_saved(name: str, base: Path, train: Callable[..., Trained]) -> None:
    trained = train(**BUILT[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained.folder)
    assert trained.error(torch_logits(model.eval(), FEED)) < WRONG
    assert check_adapter(trained.folder, engines="torch").engines[0].as_it_is.verdict == "right"
