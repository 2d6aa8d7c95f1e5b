"""Method lorasc: blends of stages, noise on the base, and the plain LoRA of their sum."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loraover
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.training.run_result import read_run
from loraover_lab.methods.layers import Pair, get_weight, truncate
from loraover_lab.methods.lorasc import LoraSc, blend_weights, stage_of

from oracles.methods import Matrix, slow_sum
from support.make_checkpoint import numpy64
from support.methods import PREFIX, RANK, SCALING, started, watched_steps
from support.resumed_run import assert_resumes
from support.tiny_hub import save_t5, write_recipe
from support.tiny_models import fill_b, tiny_llama
from support.trained_run import loss, matrices
from tolerances import UNIT

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]

STAGES, PACE = 3, 0.6
STAGE_OF_STEP = [0, 0, 1, 1, 2]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Pair]]]:
    """The folder of a finished run, and the factors of its stages."""
    folder = tmp_path_factory.mktemp("run")
    return train(make(folder / "lorasc.yaml", base), folder / "whole")


def make(path: Path, base: Path, **settings: Any) -> Path:
    stages = {"stages": STAGES, "pace": PACE} | settings
    training = {"max_steps": len(STAGE_OF_STEP), "save_steps": 1, "save_total_limit": len(STAGE_OF_STEP)}
    return write_recipe(
        path, base, method="lorasc", lorasc=stages, training=training, evaluation={"exact_match": False}
    )


def train(recipe: Path, output: Path, **options: Any) -> tuple[Path, list[dict[str, Pair]]]:
    seen: list[LoraSc] = []
    finish = LoraSc.finish

    def watching(self: LoraSc, model: Any) -> float | None:
        seen.append(self)
        return finish(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraSc, "finish", watching)
        loraover.train(recipe, output, **options)
    return output, seen[0].ended


def served(folder: Path) -> dict[str, Any]:
    """scaling * B A of every module of a run's adapter, in float64."""
    config = read_adapter_dir(folder / "adapter").config
    tensors = {key.removeprefix(PREFIX): numpy64(tensor) for key, tensor in matrices(folder).items()}
    paths = [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    return {p: config.scaling(p) * tensors[f"{p}.lora_B.weight"] @ tensors[f"{p}.lora_A.weight"] for p in paths}


@pytest.mark.parametrize("pace", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("stages", [1, 2, 5])
def test_the_weights_of_the_stages_follow_from_the_blends(pace: float, stages: int) -> None:
    fast = [np.eye(stages)[t : t + 1] for t in range(stages)]
    np.testing.assert_allclose(blend_weights(pace, stages), slow_sum(fast, pace)[0], rtol=1e-12)


def test_the_result_is_the_sum_of_the_slow_updates(run: tuple[Path, list[dict[str, Pair]]]) -> None:
    folder, stages = run
    found = served(folder)
    assert len(stages) == STAGES
    assert len(found) == 14
    for path, update in found.items():
        fast = [SCALING * numpy64(stage[path].b) @ numpy64(stage[path].a) for stage in stages]
        assert all(np.abs(one).max() > 1e-4 for one in fast)
        np.testing.assert_allclose(update, slow_sum(fast, PACE), rtol=0, atol=1e-6)
    result = read_run(folder)
    assert result.served_rank == STAGES * RANK
    assert 0 < (result.served_error or 0) < 1e-5
    assert result.trained_parameters == result.lora_parameters // STAGES
    assert loss(result.after) < loss(result.before)


def test_a_smaller_rank_is_the_best_one_and_its_error_is_measured(
    base: Path, run: tuple[Path, list[dict[str, Pair]]], tmp_path: Path
) -> None:
    whole = served(run[0])
    folder, _ = train(make(tmp_path / "r.yaml", base, rank=RANK), tmp_path / "small")
    square = 0.0
    for path, update in served(folder).items():
        u, s, vt = np.linalg.svd(whole[path])
        np.testing.assert_allclose(update, u[:, :RANK] * s[:RANK] @ vt[:RANK], rtol=0, atol=1e-5)
        square += float((s[RANK:] ** 2).sum())
    result = read_run(folder)
    assert result.served_rank == RANK
    assert result.served_error == pytest.approx(math.sqrt(square), rel=1e-4)
    assert square > 1e-6


def test_a_truncation_beyond_the_rank_is_exact() -> None:
    draw = torch.Generator().manual_seed(0)
    b, a = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((6, 2), (2, 5)))
    pair, error = truncate(b, a, 4)
    assert (pair.b.shape, pair.a.shape, error) == ((6, 4), (4, 5), 0.0)
    torch.testing.assert_close(pair.b @ pair.a, b @ a)


def test_a_run_that_was_killed_resumes_to_the_same_bits(
    run: tuple[Path, list[dict[str, Pair]]], tmp_path: Path
) -> None:
    """From checkpoint 4 a stage begins, from 3 it is half over, and at 5 nothing is left."""
    for kept in (3, 4, 5):
        assert_resumes(run[0], tmp_path / str(kept), *range(kept + 1, len(STAGE_OF_STEP) + 1))


@dataclass
class Step:
    """What one optimizer step of a real run sees and does, each by (module, "A" or "B")."""

    weights: dict[str, Matrix]
    before: dict[tuple[str, str], Matrix]
    gradients: dict[tuple[str, str], Matrix]
    rate: float
    after: dict[tuple[str, str], Matrix] = field(default_factory=dict)


class NoisyRun(NamedTuple):
    """The steps of a run, and the strength of the noise on its base."""

    noise: float
    steps: list[Step]


def watched_run(recipe: Path, output: Path) -> list[Step]:
    steps: list[Step] = []

    def watch(method: LoraSc, optimizer: Any, is_taken: bool) -> None:
        factors = {
            (path, name): getattr(layer, f"lora_{name}")["default"].weight
            for path, layer in method.layers.items()
            for name in "AB"
        }
        values = {key: numpy64(factor).copy() for key, factor in factors.items()}
        if is_taken:
            steps[-1].after = values
            return
        weights = {path: numpy64(get_weight(layer)).copy() for path, layer in method.layers.items()}
        gradients = {key: numpy64(factor.grad).copy() for key, factor in factors.items()}
        steps.append(Step(weights, values, gradients, optimizer.param_groups[0]["lr"]))

    with watched_steps(watch):
        loraover.train(recipe, output)
    return steps


@pytest.fixture(scope="module", params=[0.0, 0.2])
def noisy(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> NoisyRun:
    folder = tmp_path_factory.mktemp("noisy")
    recipe = make(folder / "r.yaml", base, noise=request.param)
    return NoisyRun(request.param, watched_run(recipe, folder / "out"))


def test_a_stage_trains_on_the_slow_updates_and_its_noise(base: Path, noisy: NoisyRun) -> None:
    noise, steps = noisy.noise, noisy.steps
    assert len(steps) == len(STAGE_OF_STEP)
    original = load_file(base / "model.safetensors")
    for path in steps[0].weights:
        weight, fast = numpy64(original[f"{path}.weight"]), list[Matrix]()
        noises = []
        for step, stage in zip(steps, STAGE_OF_STEP, strict=True):
            while len(fast) < stage:
                last = steps[STAGE_OF_STEP.index(stage) - 1].after
                fast.append(SCALING * last[path, "B"] @ last[path, "A"])
                assert np.abs(fast[-1]).max() > 1e-4
            slow = slow_sum(fast, PACE) if fast else np.zeros_like(weight)
            noises.append(step.weights[path] - weight - slow)
        bound = noise / 2 * weight.std()
        assert all(np.abs(left).max() <= 1.001 * bound + 1e-6 for left in noises)
        if noise:  # uniform, of this width, drawn once for each stage
            assert all(left.std() == pytest.approx(2 * bound / math.sqrt(12), rel=0.1) for left in noises)
            np.testing.assert_allclose(noises[1], noises[0], rtol=0, atol=1e-6)
            np.testing.assert_allclose(noises[3], noises[2], rtol=0, atol=1e-6)
            assert all(abs(np.corrcoef(noises[s].ravel(), noises[0].ravel())[0, 1]) < 0.2 for s in (2, 4))


def test_the_optimizer_starts_again_in_each_stage(noisy: NoisyRun) -> None:
    """Each stage is Adam from its first step on: Kingma and Ba 2015, algorithm 1, on a new A and a zero B."""
    steps = noisy.steps
    for key in steps[0].before:
        mean = square = value = np.zeros(())
        for at, step in enumerate(steps):
            began = STAGE_OF_STEP.index(STAGE_OF_STEP[at])
            if at == began:
                value = step.before[key]
                mean = square = np.zeros_like(value)
                assert at == 0 or not np.allclose(value, steps[at - 1].after[key])
                assert bool(value.any()) == (key[1] == "A")
            np.testing.assert_allclose(step.before[key], value, rtol=0, atol=1e-6)
            mean = 0.9 * mean + 0.1 * step.gradients[key]
            square = 0.999 * square + 0.001 * step.gradients[key] ** 2
            taken = at - began + 1
            value = value - step.rate * (mean / (1 - 0.9**taken)) / (np.sqrt(square / (1 - 0.999**taken)) + 1e-8)
            np.testing.assert_allclose(step.after[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 3])
def test_the_error_has_the_rounding_of_the_last_stages_base(rank: int | None) -> None:
    """The same base weights in float32 hold the same sum with the same noise, rounded 2^16 times less."""
    held, errors = [], []
    for dtype in (torch.bfloat16, torch.float32):
        model, method = started("lorasc", tiny_llama().bfloat16().to(dtype), stages=2, noise=0.2, pace=PACE, rank=rank)
        method.begin_fast_lora()
        method.set_base()
        fill_b(model, seed=1)
        method.end_stage()
        method.begin_fast_lora()
        method.set_base()
        fill_b(model, seed=2)
        held.append(np.concatenate([numpy64(get_weight(layer)).ravel() for layer in method.layers.values()]))
        errors.append(method.finish(model))
    rounding = np.linalg.norm(held[0] - held[1])
    assert math.sqrt(errors[0] ** 2 - errors[1] ** 2) == pytest.approx(rounding, rel=1e-3)
    assert rounding > 1e-3
    if rank is None:  # a sum of 8 products, a scaling and two sums
        assert errors[1] < 16 * UNIT[torch.float32] * np.linalg.norm(held[1])


def test_the_end_leaves_the_base_as_it_was() -> None:
    model, method = started("lorasc", tiny_llama(), stages=1)
    method.set_base()
    assert all(not torch.equal(get_weight(layer), method.original.kept[p]) for p, layer in method.layers.items())
    method.finish(model)
    weights = tiny_llama().state_dict()
    assert all(torch.equal(get_weight(layer), weights[f"{path}.weight"]) for path, layer in method.layers.items())


def test_stages_have_about_equal_numbers_of_steps() -> None:
    lengths = np.bincount([stage_of(step, 11, 4) for step in range(11)])
    assert lengths.tolist() == [3, 3, 3, 2]


def test_an_encoder_decoder_trains(tmp_path: Path) -> None:
    folder, stages = train(make(tmp_path / "r.yaml", save_t5(tmp_path / "t5"), stages=2), tmp_path / "out")
    assert len(stages) == 2
    assert read_run(folder).served_rank == 2 * RANK
