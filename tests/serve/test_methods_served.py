"""The methods of other papers on the real vLLM: each is trained, exported, and served beside the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loraover
from loraover.training.method_table import METHODS
from loraover_export import export_vllm
from loraover_serve import EngineResult, serve_adapters, verify_adapter
from loraover_serve.judge.names import NOT_APPLIED
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.request import LOOPBACK
from loraover_serve.vllm.server import free_port

from support.engine_forms import TINY
from support.tiny_hub import write_recipe
from support.verified import save_base
from support.vllm_command import assert_as_trained, vllm_command

pytest.importorskip("opacus", reason="the extra private is not installed")

pytestmark = pytest.mark.matrix

TRAINING = {"max_steps": 12, "learning_rate": 3e-2}
"""Enough to move logprobs by some tenths of a nat, far above the noise of float32."""
SETTINGS: dict[str, dict[str, Any]] = {"soma": {"frozen_blocks": 1}, "tensorguide": {"tt_rank": 2}}
"""A block without a LoRA, and trains with fewer numbers than A and B of such small layers have."""
RANKS = {"soma": 8, "lorasc": 12, "federated": 4, "tensorguide": 4}
"""Rank that is served where the recipe asks for 4."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, a run of each method in `runs`, and its adapter as it is served, below the method's name."""
    vllm_command()  # skips the tests before anything is trained
    folder = tmp_path_factory.mktemp("methods")
    base = save_base(folder / "base")
    for name in METHODS:
        parts = {
            "method": name,
            name: SETTINGS.get(name, {}),
            "training": TRAINING,
            "evaluation": {"exact_match": False},
        }
        result = loraover.train(write_recipe(folder / f"{name}.yaml", base, **parts), folder / "runs" / name)
        assert result.served_rank == RANKS[name]
        assert export_vllm(folder / "runs" / name / "adapter", folder / name, dtype="fp32").passed
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[VllmServer]:
    """One server of all four adapters; its --max-lora-rank holds the largest."""
    adapters, log = [folder / name for name in METHODS], folder / "vllm.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with serve_adapters(adapters, vllm=vllm_command(), port=free_port(LOOPBACK), log=log, options=TINY) as server:
            yield server


def verify(server: VllmServer, folder: Path, method: str, served_name: str) -> EngineResult:
    """The verdict on the answers under a name, beside PEFT's with the adapter that was trained."""
    report = verify_adapter(
        folder / "runs" / method / "adapter",
        endpoint=server.url,
        served_name=served_name,
        base_name=str(folder / "base"),
    )
    (found,) = report.engines
    print(f"\n{method}, {served_name}: {found.verdict}: {found.reason}\n{found.adapter}, effect {found.effect}")
    return found


@pytest.mark.parametrize("method", METHODS)
def test_vllm_serves_a_method_as_trained(method: str, server: VllmServer, folder: Path) -> None:
    found = verify(server, folder, method, method)
    assert_as_trained(found)
    assert found.greedy is not None
    assert found.greedy.equal == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_base_models_answers_would_not_pass(method: str, server: VllmServer, folder: Path) -> None:
    found = verify(server, folder, method, str(folder / "base"))
    assert (found.verdict, found.fault) == ("differs", NOT_APPLIED)
