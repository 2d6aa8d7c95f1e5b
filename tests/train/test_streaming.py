"""Base models whose weights stay in their files: what they compute, what they hold, and what is refused."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraover.common.errors import ConfigError
from loraover.common.reporter import SILENT
from loraover.models import streaming
from loraover.models.load import load_model, resolve_model
from loraover.models.memory import Needs, fit_base
from loraover.models.streaming import StreamedWeight
from loraover.reference import sharing_weights

from support.machine import with_devices
from support.plain_adapter import tiny_decoder
from support.tiny_experts import tiny_moe
from support.tiny_models import tiny_gpt2

MODELS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: tiny_decoder("Llama"),
    "tied": lambda: tiny_decoder("Llama", tie_word_embeddings=True),
    "biases": lambda: tiny_decoder("Qwen2"),
    "Conv1D": tiny_gpt2,
    "experts that transformers stacks": tiny_moe,
}
IDS = torch.arange(2, 26)[None]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16, in several files, whose biases are not zero."""
    path, model = tmp_path_factory.mktemp("streamed"), MODELS[request.param]()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for vector in (parameter for parameter in model.parameters() if parameter.ndim == 1):
            vector.normal_()
    model.bfloat16().save_pretrained(path, max_shard_size="20KB")
    return path


def load(folder: Path, *, is_streamed: bool = True, is_spread: bool = False, **options: Any) -> Any:
    source = replace(resolve_model(str(folder)), is_streamed=is_streamed, is_spread=is_spread)
    return load_model(source, **options)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_are_those_of_the_model_in_memory(folder: Path, dtype: str) -> None:
    whole, streamed = load(folder, is_streamed=False, dtype=dtype), load(folder, dtype=dtype)
    assert all(isinstance(weight, StreamedWeight) for weight in streamed.parameters())
    assert len(list(streamed.parameters())) == len(list(whole.parameters())), "tied weights are one"
    assert (streamed.device, streamed.dtype) == (whole.device, whole.dtype)
    assert torch.equal(logits(streamed), logits(whole))
    assert torch.equal(logits(sharing_weights(streamed)), logits(whole))


def test_a_weight_is_released_by_the_operation_that_read_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most, computed = 0, 0, StreamedWeight._computed

    def counted(self: StreamedWeight, stored: torch.Tensor) -> torch.Tensor:
        nonlocal alive, most
        weight = computed(self, stored).clone()
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(weight, released)
        return weight

    def released() -> None:
        nonlocal alive
        alive -= 1

    model = load(folder)
    monkeypatch.setattr(StreamedWeight, "_computed", counted)
    logits(model)
    assert alive == 0
    assert 1 <= most <= 4, "the tokens' rows of two embeddings, a weight and its bias"


def test_a_large_weight_is_used_in_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 5000)
    whole, streamed = load(folder, is_streamed=False), load(folder)
    torch.testing.assert_close(logits(streamed), logits(whole), rtol=0, atol=1e-6)
    weight = next(streamed.parameters())
    assert all(torch.equal(part, whole) for part, whole in zip(weight.split(7), (weight + 0).split(7), strict=True))


def test_a_weight_that_is_replaced_stays_replaced(folder: Path) -> None:
    """accelerate's hooks would put the base model's back, whatever an adapter's `modules_to_save` holds."""
    whole, streamed = load(folder, is_streamed=False), load(folder)
    for model in (whole, streamed):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(2 * head.weight, requires_grad=False)
    assert torch.equal(logits(streamed), logits(whole))


def test_nothing_is_written_to_a_weight(folder: Path) -> None:
    weight = next(load(folder).parameters())
    with torch.no_grad(), pytest.raises(RuntimeError, match="stays in its file"):
        weight.zero_()
    assert torch.equal(torch.empty(weight.shape).copy_(weight), weight + 0), "but a weight can be copied from"


def test_a_copy_can_be_written_to(folder: Path) -> None:
    model = load(folder)
    name, weight = next(model.named_parameters())
    with torch.no_grad():
        sharing_weights(model, but=[name]).get_parameter(name).zero_()
    assert (weight + 0).any()


def test_stacked_experts_are_deleted_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    tiny_moe().save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    assert list((tmp_path / "scratch").glob("*/*"))
    del model
    gc.collect()
    assert not list((tmp_path / "scratch").iterdir())


def test_a_head_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    MODELS["Llama"]().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"the files have no score\.weight"):
        load(tmp_path, task_type="SEQ_CLS")


GIB = 2**30
PLACES = {
    "one GPU": (12, 1, {}, (False, False)),
    "all GPUs": (9, 2, {}, (False, True)),
    "not all GPUs, each of which needs room for activations": (6, 2, {}, (True, False)),
    "the first GPU": (9, 1, {}, (True, False)),
    "one GPU by its number": (9, 2, {"device": "cuda:1"}, (True, False)),
    "a limit": (9, 2, {"max_memory_gib": 1.0}, (True, False)),
}
"""Free GiB of each GPU, their number, options, and whether a model of 9 GiB is then streamed or spread."""


@pytest.mark.parametrize(("free", "count", "options", "expected"), PLACES.values(), ids=PLACES)
def test_a_model_that_fits_on_all_gpus_only_is_spread_over_them(
    free: int,
    count: int,
    options: dict[str, Any],
    expected: tuple[bool, bool],
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_devices(monkeypatch, cuda=count, free=free * GIB, total=80 * GIB)
    needs = Needs(weights=9 * GIB // 4, adapters=GIB // 4, tokens=1, per_token=0)
    asked = {"device": "cuda", "compute_dtype": "fp32", "needs": needs, "say": SILENT.line, **options}
    found = fit_base("The check", resolve_model(str(base)), **asked)
    assert (found.is_streamed, found.is_spread) == expected


def test_a_model_that_is_spread_computes_what_it_computes_in_one_place(folder: Path) -> None:
    whole, spread = load(folder, is_streamed=False), load(folder, is_streamed=False, is_spread=True)
    assert logits(spread).cpu().equal(logits(whole))


GIVEN_BACK = """
import numpy
from psutil import Process
from loraover.common.threads import KEPT_BYTES
from loraover.models.streaming import in_files

def held():
    return Process().memory_info().rss / 1e6

def made():
    return [b"x" * 100_000 for _ in range(500)]

numpy.empty(KEPT_BYTES, dtype=numpy.uint8)
start = held()
blocks = made()
kept = blocks.pop()
del blocks
in_files()
after = held()
del kept
blocks = made()
del blocks
print(after - start, held() - start)
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries than glibc have no such setting")
def test_memory_that_is_freed_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    assert max(map(float, done.stdout.split())) < 10, "of 50 MB each"
