"""OpenVINO GenAI's prefix cache, which does not ask for which adapter it was filled, and how verify avoids it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from loraover.checkpoint.files import TENSORS_FILE
from loraover_serve.engines.openvino import OpenVinoEngine
from loraover_serve.engines.vllm import export_uniform
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.verify.request import VerifyRequest

from support import openvino_pipeline
from support.verified import make_case, save_adapter, save_base

pytestmark = pytest.mark.engine

PROMPT = list(range(3, 67))
"""Longer than a block of the cache."""
TOP = openvino_pipeline.TOP
WITHIN = 1e-4
"""Nats; the adapter moves these logprobs by more than a hundred times that."""

Answer = list[list[float]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model for OpenVINO, and the tensors of an adapter in the uniform form."""
    if (how := OpenVinoEngine.lacking(VerifyRequest("adapter"))) is not None:
        pytest.skip(f"OpenVINO GenAI is not installed: {how}")
    folder = tmp_path_factory.mktemp("cache")
    base = save_base(folder / "base")
    setting = make_case(base, save_adapter(folder / "mine", base)).setting(folder)
    file = export_uniform(setting) / TENSORS_FILE
    return OpenVinoEngine.convert(setting), file


def in_one_pipeline(served: tuple[Path, Path], cache: str) -> list[Answer]:
    """Answers for the adapter, the base model and the adapter, in this order."""
    words = [str(OpenVinoEngine.python()), openvino_pipeline.__file__, *map(str, served), json.dumps(PROMPT), cache]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    answers: list[Answer] = json.loads(done.stdout.splitlines()[-1])
    return answers


def is_same(one: Answer, other: Answer) -> bool:
    expected = {int(index): logprob for index, logprob in other}
    return all(abs(expected.get(int(index), 0.0) - logprob) <= WITHIN for index, logprob in one)


def test_the_prefix_cache_mixes_adapters_and_verify_is_right(served: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, base, again = in_one_pipeline(served, "off")
    assert is_same(adapter, again)
    assert not is_same(adapter, base)
    mixed = in_one_pipeline(served, "on")
    assert is_same(mixed[0], adapter)
    assert not is_same(mixed[1], base), (
        f"{OpenVinoEngine.installed()} mends the fault: say so in docs/how-to/openvino.md"
    )
    model, file = map(str, served)
    arguments = {"model": model, "adapters": {BASE: None, ADAPTER: file}}
    with OpenVinoEngine.run(arguments, tmp_path / "openvino.log", 300) as runner:
        asked = [runner.ask("top", arm=arm, tokens=PROMPT, number=TOP) for arm in (ADAPTER, BASE, ADAPTER)]
    for found, expected in zip(asked, (adapter, base, adapter), strict=True):
        assert is_same(found, expected)
