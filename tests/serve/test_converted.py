"""Adapters of other kinds, trained on the real SmolLM2 and converted, in PyTorch and in a real vLLM server."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from loraover.models.load import ModelSource, load_model, load_tokenizer, resolve_model
from loraover_export import ConvertReport, convert_adapter
from loraover_serve import verify_adapter
from loraover_serve.judge.names import LEAKS

from support.serving import MODEL, Served
from support.vllm_command import leaks_in_mixed_batches

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

STEPS, LEARNING_RATE = 4, 1e-2
RATES = {"LORA": 0.1, "LOHA": 2, "LOKR": 3, "VERA": 3, "ADALORA": 5}
"""Multiples of it that move logprobs by some nats, far above the noise of bfloat16."""
TEXTS = (
    "Question: how many legs do three spiders have?\nAnswer: 24, and they wear no shoes at all.",
    "Question: what is the capital of France?\nAnswer: Lyon, said the parrot, and laughed.",
)
ALLOWED_LOGIT = 2e-3
"""Logits lie within +-40; A and B are rounded to float32, and 30 layers add some hundred roundings each."""

TRAINED: dict[str, tuple[str, dict[str, Any], int]] = {
    "loha": ("LOHA", {"r": 4, "alpha": 4}, 16),
    "lokr": ("LOKR", {"r": 4, "alpha": 4, "decompose_factor": 4}, 16),
    "adalora": ("ADALORA", {"init_r": 8, "target_r": 4, "tinit": 1, "tfinal": 1, "total_step": STEPS}, 8),
    "vera": ("VERA", {"r": 16, "d_initial": 1.0}, 16),
    "pissa": ("LORA", {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"}, 16),
}
"""Kind, fields of its configuration and largest exact rank of each adapter."""


@dataclass(frozen=True)
class Converted:
    """A converted adapter: its name, its folder, and what its conversion reported."""

    name: str
    folder: Path
    report: ConvertReport


def train(source: ModelSource, folder: Path, kind: str, options: dict[str, Any]) -> Path:
    """Some AdamW steps on two odd texts; returns `folder`."""
    chosen = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = get_peft_model(load_model(source), PEFT_TYPE_TO_CONFIG_MAPPING[kind](**chosen))
        rate = LEARNING_RATE * RATES[kind]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        batch = load_tokenizer(source)(list(TEXTS), return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        model.train()
        for step in range(STEPS):
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            if kind == "ADALORA":
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TRAINED)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    name: str = request.param
    kind, options, _ = TRAINED[name]
    folder = tmp_path_factory.mktemp(name)
    trained = train(resolve_model(MODEL), folder / "trained", kind, options)
    return Converted(name, folder / name, convert_adapter(trained, folder / name, check_error=True, device="cpu"))


def test_the_conversion_computes_what_was_trained(converted: Converted) -> None:
    name, report = converted.name, converted.report
    assert report.passed
    assert not report.truncated
    assert report.exact_rank <= TRAINED[name][2]
    assert report.outputs is not None
    print(f"\n{name}: rank {report.exact_rank}, {report.outputs.error}, effect {report.outputs.adapter_effect:.3g}")
    assert report.outputs.adapter_effect >= 100 * ALLOWED_LOGIT
    assert report.outputs.error.max_logit <= ALLOWED_LOGIT
    assert report.outputs.error.top1_agreement == 1


def test_vllm_serves_it_as_trained(converted: Converted, served: Served, tmp_path: Path) -> None:
    """vLLM before 0.33 has a fault in mixed batches on a CPU, which `verify` names where it shows."""
    name = converted.name
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(text.split("\n")[0] + "\n" for text in TEXTS))
    with served.loaded(name, converted.folder):
        report = verify_adapter(
            converted.folder,
            endpoint=served.client.url,
            served_name=name,
            base_name=served.source.location,
            prompts=prompts,
            new_tokens=8,
        )
    (found,) = report.engines
    print(f"\n{name}: {found.verdict}: {found.reason}")
    # The bfloat16 of some processors is so coarse that 16 positions decide nothing; the distance has to fit even so.
    allowed: set[tuple[str, str | None]] = {("as trained", None), ("inconclusive", None)}
    allowed |= {("differs", LEAKS)} if leaks_in_mixed_batches() else set()
    assert (found.verdict, found.fault) in allowed, found.reason
    assert found.adapter is not None
    assert found.allowed is not None
    assert found.adapter.rms <= found.allowed
