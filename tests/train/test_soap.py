"""SOAP as the optimizer of a recipe."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

import loraover
from loraover.common.errors import ConfigError
from loraover.training.recipe import load_recipe
from loraover.training.run_result import read_run

from support.tiny_hub import save_llama, write_recipe

pytest.importorskip("pytorch_optimizer", reason="pip install 'loraover[soap]'")

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soap")
    training = {"optim": "soap", "optim_args": "precondition_frequency=2", "weight_decay": 0.1}
    evaluation = {"exact_match": False}
    return write_recipe(
        folder / "soap.yaml", save_llama(folder / "llama"), method="lora", training=training, evaluation=evaluation
    )


def test_soap_trains_and_resumes_to_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    """With two rates, those of LoRA+."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    asked = load_recipe(recipe, {"training.loraplus_lr_ratio": 4.0})
    loraover.train(asked, whole)
    before, after = read_run(whole).before, read_run(whole).after
    assert before is not None
    assert after is not None
    assert after.loss < before.loss
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("adapter", "run.json", "checkpoint-4"))
    assert loraover.train(asked, resumed, resume=True).timed_steps == 2
    found, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (resumed, whole))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class Oracle:
    """SOAP of one matrix in float64, after Vyas et al. 2024, algorithm 3; `basis` is its power step, algorithm 4."""

    def __init__(self, start: Array, lr: float, frequency: int, beta: float = 0.95, eps: float = 1e-8) -> None:
        self.matrix, self.lr, self.frequency, self.beta, self.eps = start, lr, frequency, beta, eps
        self.moment, self.square = np.zeros_like(start), np.zeros_like(start)
        self.left, self.right = (np.zeros((size, size)) for size in start.shape)
        self.steps = -1

    def step(self, gradient: Array) -> None:
        self.steps += 1
        if self.steps == 0:  # the first gradient only gives the bases
            self._measure(gradient)
            self.u, self.v = (np.linalg.eigh(covariance)[1][:, ::-1] for covariance in (self.left, self.right))
            return
        mix = 1 - self.beta
        self.moment += mix * (gradient - self.moment)
        self.square += mix * ((self.u.T @ gradient @ self.v) ** 2 - self.square)
        correction = 1 - self.beta**self.steps
        scaled = (self.u.T @ self.moment @ self.v / correction) / (
            np.sqrt(self.square / correction) + self.eps / np.sqrt(correction)
        )
        self.matrix = self.matrix - self.lr * self.u @ scaled @ self.v.T
        self._measure(gradient)
        if self.steps % self.frequency == 0:
            self.u, self.square = basis(self.left, self.u, self.square)
            self.v, turned = basis(self.right, self.v, self.square.T)
            self.square = turned.T

    def _measure(self, gradient: Array) -> None:
        self.left += (1 - self.beta) * (gradient @ gradient.T - self.left)
        self.right += (1 - self.beta) * (gradient.T @ gradient - self.right)


def basis(covariance: Array, present: Array, square: Array) -> tuple[Array, Array]:
    order = np.argsort(-np.diag(present.T @ covariance @ present))
    return np.linalg.qr(covariance @ present[:, order])[0], square[order]


def test_the_update_of_a_matrix_is_the_papers() -> None:
    import pytorch_optimizer

    draw = np.random.default_rng(0)
    start = draw.standard_normal((4, 4))  # square, so that the first gradient settles both bases
    parameter = nn.Parameter(torch.tensor(start))
    optimizer: Any = pytorch_optimizer.SOAP([parameter], lr=0.1, weight_decay=0.0, precondition_frequency=3)
    oracle = Oracle(start, lr=0.1, frequency=3)
    for _ in range(11):
        gradient = draw.standard_normal((4, 4)) * np.array([1.0, 2.0, 4.0, 8.0])
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        oracle.step(gradient)
        np.testing.assert_allclose(parameter.detach().numpy(), oracle.matrix, rtol=0, atol=1e-6)  # its QR is float32
    assert np.abs(oracle.matrix - start).max() > 0.3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown option": ({"training.optim_args": "max_precond_dim=8"}, "'max_precond_dim' is none of betas, "),
    "an impossible option": ({"training.optim_args": "precondition_frequency=0"}, "SOAP refuses them"),
    "cores": ({"method": "lora-over"}, "soap works only with method lora, not with lora-over"),
    "all weights": ({"method": "full"}, "soap works only with method lora, not with full"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_soap_does_not_take_is_refused(
    changes: dict[str, Any], message: str, recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        loraover.train(recipe, tmp_path / "out", overrides=changes)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError, match=r"pip install 'loraover\[soap\]'"):
        loraover.train(recipe, tmp_path / "out")
