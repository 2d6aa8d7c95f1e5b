"""What an adapter adds to each module, against NumPy in extended precision, and below the bound that it states."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraover import LoraOverConfig, read_checkpoint
from loraover.adapters.numerics.delta import Delta, read_deltas
from loraover.checkpoint.exact_tensors import Exact
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.errors import CheckpointError, ExportError
from loraover.overparam.decompositions import DECOMPOSITIONS

from strategies import matrices, normal, sizes
from support.make_checkpoint import EMBEDDING, LINEAR, edit_tensors, make_checkpoint, oracle_matrices
from support.plain_adapter import write_adapter
from support.speed import examples
from tolerances import UNIT

Long = npt.NDArray[np.longdouble]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


class Case(NamedTuple):
    """Two modules with a rank, alpha, A and B each."""

    ranks: tuple[int, int]
    alphas: tuple[float, float]
    rslora: bool
    a: tuple[Tensor, Tensor]
    b: tuple[Tensor, Tensor]

    def write(self, folder: Path) -> Path:
        """Q's rank and alpha are the configuration's, DOWN's come from patterns behind one that does not match."""
        config = {
            "r": self.ranks[0],
            "lora_alpha": self.alphas[0],
            "rank_pattern": {"proj": 99, "layers.1.mlp.down_proj": self.ranks[1]},
            "alpha_pattern": {"own_proj": 99.0, "down_proj": self.alphas[1], "mlp.down_proj": 98.0},
            "use_rslora": self.rslora,
        }
        return write_adapter(folder, {Q: (self.a[0], self.b[0]), DOWN: (self.a[1], self.b[1])}, **config)

    def truth(self, k: int) -> Long:
        """The scaling is a float64, as PEFT's is; the rest is exact but for 2^-64."""
        return self.scaling(k) * (long(self.b[k]) @ long(self.a[k]))

    def scaling(self, k: int) -> np.longdouble:
        return np.longdouble(self.alphas[k] / (sqrt(self.ranks[k]) if self.rslora else self.ranks[k]))


def long(tensor: Tensor) -> Long:
    return tensor.double().numpy().astype(np.longdouble)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks = (draw(sizes()), draw(sizes()))
    alphas = (draw(st.sampled_from([8.0, 1.0, 0.1, 12.5, -3.0])), draw(st.sampled_from([16.0, 7.0, 1e-3])))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    a = tuple(draw(matrices(r, draw(sizes())))[0].to(dtype) for r in ranks)
    b = tuple(draw(matrices(draw(sizes()), r))[0].to(dtype) for r in ranks)
    return Case(ranks, alphas, draw(st.booleans()), (a[0], a[1]), (b[0], b[1]))


def excess(product: Exact, truth: Long) -> float:
    """The largest ratio of error to bound; infinity where the bound is zero and the error is not."""
    error = np.abs(long(product.value) - truth)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0, error / long(product.bound))
    return float(ratio.max())


@examples(60)
@given(case=cases())
def test_stored_matrices(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        deltas = {delta.module: delta for delta in read_deltas(read_adapter_dir(case.write(Path(folder) / "a")))}
    assert list(deltas) == [Q, DOWN]
    for k, delta in enumerate(deltas.values()):
        product = delta.product()
        assert not delta.embedding
        assert delta.rank == case.ranks[k]
        assert product.value.shape == (len(case.b[k]), case.a[k].shape[1])
        assert excess(product, case.truth(k)) <= 1
        # the bound is as small as rounding can be: r products, and the scaling
        magnitude = np.abs(case.scaling(k)) * (abs(long(case.b[k])) @ abs(long(case.a[k])))
        assert bool((long(product.bound) <= (case.ranks[k] + 3) * UNIT[torch.float64] * magnitude).all())


LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR, "lora_alpha": 8},
    "r = 1": {"target_modules": LINEAR, "r": 1, "lora_alpha": 3},
    "rslora": {"use_rslora": True, "r": 2, "lora_alpha": 5},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 7}},
    "embedding": {"target_modules": EMBEDDING},
}
SCALING: dict[str, Callable[[str], float]] = {
    "plain": lambda name: 8 / 4,
    "r = 1": lambda name: 3.0,
    "rslora": lambda name: 5 / sqrt(2),
    "patterns": lambda name: {"q_proj": 8 / 2, "down_proj": 7 / 4}.get(name, 8 / 4),
    "embedding": lambda name: 8 / 4,
}


def checkpoint_deltas(folder: Path, lora: str, decomposition: str) -> Iterator[tuple[Delta, Long]]:
    """Deltas of a checkpoint, and each one's truth."""
    made = make_checkpoint(folder, config=LoraOverConfig(decomposition=decomposition, seed=5), **LORA[lora])
    exact = oracle_matrices(made.path, np.longdouble)
    for delta in read_deltas(read_checkpoint(made.path)):
        kind, ending = ("lora_embedding_", "") if delta.embedding else ("lora_", ".weight")
        a, b = (exact[f"base_model.model.{delta.module}.{kind}{matrix}{ending}"] for matrix in "AB")
        yield delta, np.longdouble(SCALING[lora](delta.module.rpartition(".")[2])) * (b @ a)


@pytest.mark.parametrize(
    ("lora", "decomposition"),
    [*((lora, "mpo") for lora in LORA), *(("patterns", name) for name in DECOMPOSITIONS if name != "mpo")],
)
def test_cores(lora: str, decomposition: str, tmp_path: Path) -> None:
    found = []
    for delta, truth in checkpoint_deltas(tmp_path, lora, decomposition):
        product = delta.product()
        assert product.value.shape == truth.shape
        assert np.linalg.norm(truth.astype(np.float64)) > 1e-3
        assert excess(product, truth) <= 1
        assert float(product.bound.norm()) < 1e-12 * float(product.value.norm())
        assert product.site is not None
        found.append(delta)
    names = LORA[lora].get("target_modules", ["q_proj", "v_proj"])
    assert sorted(delta.module.rpartition(".")[2] for delta in found) == sorted(
        name for name in names for _ in range(1 if name == "embed_tokens" else 2)
    )
    assert [delta.module for delta in found if delta.embedding] == ["model.embed_tokens"] * (lora == "embedding")


def test_the_bound_of_a_product_covers_the_errors_of_both_factors() -> None:
    """Numbers above zero whose errors all point upwards come as close to the bound as rounding lets them."""
    size = [normal(seed, *shape).abs() for seed, shape in enumerate([(4, 7), (4, 7), (5, 4), (5, 4)])]
    a, b = Exact(size[0], 1e-3 * size[1], None), Exact(size[2], 1e-3 * size[3], None)
    product = Delta(Q, False, a, b).product()
    largest = (b.value + b.bound) @ (a.value + a.bound) - product.value
    assert bool((product.bound >= (1 - 1e-9) * largest).all())
    assert bool((product.bound <= (1 + 1e-9) * largest).all())


def test_a_bias_of_a_lora_is_refused(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, lora_bias=True)
    with pytest.raises(ExportError, match=r"q_proj\.lora_B\.bias is a bias of a LoRA.*lora_bias=False"):
        next(read_deltas(read_checkpoint(made.path)))


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    right, wrong = ((torch.ones(2, 3), torch.full((4, 2), value)) for value in (1.0, float("nan")))
    write_adapter(tmp_path / "a", {Q: right, DOWN: wrong})
    deltas = read_deltas(read_adapter_dir(tmp_path / "a"))
    with pytest.raises(CheckpointError, match=r"down_proj\.lora_B\.weight.*NaN"):
        list(deltas)


def test_other_tensors_by_their_names_in_the_base_model(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", {Q: (torch.ones(2, 3), torch.ones(4, 2))})

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.lm_head.weight"] = torch.ones(2)
        tensors[f"base_model.model.{Q}.base_layer.bias"] = torch.ones(2)

    edit_tensors(folder / "adapter_model.safetensors", add)
    assert sorted(read_adapter_dir(folder).others.values()) == ["lm_head.weight", f"{Q}.bias"]
