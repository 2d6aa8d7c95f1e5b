"""Conversions of every kind of adapter: against PEFT, against NumPy from the papers, and as files that PEFT loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

from loraover.adapters.convert.methods import METHODS
from loraover.adapters.convert.methods.base import INERT, OTHER_KINDS, Refused
from loraover.adapters.convert.methods.rotations import compact
from loraover.adapters.convert.run import VllmFit
from loraover.adapters.prompts import logits_of
from loraover_export import convert_adapter

from oracles import conversions as oracle
from support.conversions import BASES, SOURCES, Source, load_base, make_base, make_source, our_deltas, peft_deltas
from support.make_checkpoint import edit_tensors, save_tokenizer

TIED = (
    "trained tokens of a tied model",
    "trained tokens of an encoder-decoder",
    "lora with trained tokens of an encoder-decoder",
)
"""PEFT's merge adds the LoRAs of embeddings and of the head to the one weight that they share."""
STORED = 1e-6
"""Largest relative error of delta_W by rounding A and B to float32, some units of 6e-8 times the root of the rank."""


@dataclass(frozen=True)
class Made:
    """An adapter, its base model and what PEFT adds to each weight."""

    base: Path
    folder: Path
    deltas: dict[str, torch.Tensor]


Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes an adapter of `SOURCES` once, by its name."""
    folder = tmp_path_factory.mktemp("conversions")
    bases = cache(lambda name: make_base(folder / name, name))

    @cache
    def make(name: str) -> Made:
        base = bases(SOURCES[name].base)
        source = make_source(base, folder / name.replace(" ", "-") / "adapter", SOURCES[name])
        return Made(base, source, peft_deltas(base, source))

    return make


def numerical_rank(delta: torch.Tensor) -> int:
    values = np.linalg.svd(delta.numpy(), compute_uv=False)
    return int((values > 1e-6 * values[0]).sum())


@pytest.mark.parametrize("name", SOURCES)
def test_the_delta_is_pefts(name: str, made: Make) -> None:
    source, adapter = SOURCES[name], made(name)
    ranks: dict[str, int] = {}
    found = our_deltas(adapter.folder, ranks)
    assert found.keys() == adapter.deltas.keys()
    for path, delta in adapter.deltas.items():
        assert float((found[path] - delta).norm()) <= source.error * float(delta.norm()), path
        assert ranks[path] == numerical_rank(delta), path


FIRST = {source.kind: name for name, source in reversed(SOURCES.items()) if name not in TIED}
LAYOUTS = ("rslora with patterns", "lora of an embedding", "lora on conv1d", "lora with trained tokens", "dora")


@pytest.mark.parametrize("name", [*FIRST.values(), *LAYOUTS])
def test_the_written_lora_is_the_source(name: str, made: Make, tmp_path: Path) -> None:
    """Where the rank is finite, exactly; else the best approximation, whose error is that of NumPy's SVD."""
    source, adapter = SOURCES[name], made(name)
    rank = 9 if source.full else None
    report = convert_adapter(adapter.folder, tmp_path / "lora", approximate_to_rank=rank)
    assert report.passed
    assert report.truncated == source.full
    assert report.exact_rank == max(map(numerical_rank, adapter.deltas.values()))
    written = peft_deltas(adapter.base, tmp_path / "lora")
    assert written.keys() == adapter.deltas.keys()
    modules = {module.module: module for module in report.certificate.modules}
    for path, delta in adapter.deltas.items():
        values = np.linalg.svd(delta.numpy(), compute_uv=False)
        left_out = float(np.linalg.norm(values[rank:])) if rank is not None else 0.0
        norm = float(delta.norm())
        assert modules[path].norm == pytest.approx(norm, rel=source.error * 10)
        assert modules[path].truncation_error == pytest.approx(left_out, rel=1e-5, abs=source.error * norm)
        error = float((written[path] - delta).norm())
        assert error <= modules[path].error_bound + source.error * norm
        assert abs(error - left_out) <= (STORED + source.error) * norm


@torch.no_grad()
@pytest.mark.parametrize("name", TIED)
def test_trained_tokens_of_a_tied_model_reach_all_that_is_tied(name: str, made: Make, tmp_path: Path) -> None:
    adapter = made(name)
    report = convert_adapter(adapter.folder, tmp_path / "lora")
    assert any("merge_and_unload would add" in note for note in report.certificate.notes)
    ids = torch.tensor([[5, 7, 2, 9]])
    models = [
        PeftModel.from_pretrained(load_base(adapter.base), folder).eval()
        for folder in (adapter.folder, tmp_path / "lora")
    ]
    expected, found = (logits_of(model, ids, None) for model in models)
    assert float((found - expected).abs().max()) <= 1e-5
    with models[1].disable_adapter():
        assert float((logits_of(models[1], ids, None) - expected).abs().max()) >= 1e-2


def test_tokens_of_a_decoder_alone_keep_the_encoders(tmp_path: Path) -> None:
    """The base's file holds the weight that both share under one name only."""
    options = {"target_modules": ["q"], "trainable_token_indices": {"decoder.embed_tokens": [5, 2]}}
    source = Source("LORA", options | {"task_type": "SEQ_2_SEQ_LM"}, base="t5")
    adapter = make_source(make_base(tmp_path / "base", "t5"), tmp_path / "source", source)
    report = convert_adapter(adapter, tmp_path / "lora", check_error=True, device="cpu")
    assert report.passed
    assert "decoder.embed_tokens" in (modules := [module.module for module in report.certificate.modules])
    assert "encoder.embed_tokens" not in modules


def test_a_check_runs_on_the_trained_tokens(tmp_path: Path) -> None:
    """Texts seldom contain new tokens, and a conversion that leaves them out passes on all other tokens."""
    base = make_base(tmp_path / "base", "even")
    save_tokenizer(base)
    adapter = make_source(base, tmp_path / "source", Source("LORA", {"r": 2, "trainable_token_indices": [61, 62]}))
    report = convert_adapter(adapter, tmp_path / "lora", check_error=True, device="cpu")
    assert report.passed
    assert report.outputs is not None
    assert report.outputs.prompt_source.endswith("and 2 trained tokens that they lack")
    assert report.outputs.adapter_effect > 0


def test_a_full_rank_adapter_is_exact_at_full_rank(made: Make, tmp_path: Path) -> None:
    adapter = made("ia3")
    report = convert_adapter(adapter.folder, tmp_path / "lora", approximate_to_rank=34)
    assert not report.truncated
    written = peft_deltas(adapter.base, tmp_path / "lora")
    for path, delta in adapter.deltas.items():
        assert float((written[path] - delta).norm()) <= STORED * float(delta.norm())


ZERO: dict[str, tuple[Source, str, int | None, int]] = {
    "of low rank": (
        Source("LORA", {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 9}}),
        "lora_B",
        None,
        2,
    ),
    "of full rank": (Source("HIRA", {"r": 2, "target_modules": ["q_proj", "k_proj"]}, base="even"), "hira_B", 16, 16),
}


@pytest.mark.parametrize("case", ZERO)
def test_a_delta_of_zero_has_rank_0(case: str, tmp_path: Path) -> None:
    """Its factors had a larger rank than that of all others, and leaving them out loses nothing."""
    source, name, asked, rank = ZERO[case]
    adapter = make_source(make_base(tmp_path / "base", source.base), tmp_path / "source", source)
    edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda found: found.update({key: 0 * t for key, t in found.items() if f"q_proj.{name}" in key}),
    )
    report = convert_adapter(adapter, tmp_path / "lora", approximate_to_rank=asked)
    assert not report.truncated
    assert report.exact_rank == report.certificate.rank == rank


class TestOracles:
    """NumPy, from the papers, on the files' tensors."""

    PATH = "model.layers.1.mlp.down_proj"

    def tensors(self, folder: Path, *names: str) -> list[oracle.Matrix]:
        file = load_file(folder / "adapter_model.safetensors")
        return [file[f"base_model.model.{self.PATH}.{name}"].double().numpy() for name in names]

    def weight(self, base: Path) -> oracle.Matrix:
        model = load_base(base)
        found: oracle.Matrix = model.get_submodule(self.PATH).weight.detach().double().numpy()
        return found

    def compare(self, adapter: Made, expected: oracle.Matrix, error: float = 1e-12) -> None:
        found = our_deltas(adapter.folder)[self.PATH].numpy()
        assert np.linalg.norm(found - expected) <= error * np.linalg.norm(expected)

    def test_loha(self, made: Make) -> None:
        adapter = made("loha")
        a1, b1, a2, b2 = self.tensors(adapter.folder, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        self.compare(adapter, oracle.loha(a1, b1, a2, b2, 7 / 3))

    def test_lokr(self, made: Make) -> None:
        adapter = made("lokr")
        w1, w2_a, w2_b = self.tensors(adapter.folder, "lokr_w1", "lokr_w2_a", "lokr_w2_b")
        self.compare(adapter, oracle.lokr(w1, w2_a @ w2_b, 3 / 2))

    def test_hra(self, made: Make) -> None:
        adapter = made("hra")
        self.compare(adapter, oracle.hra(self.weight(adapter.base), *self.tensors(adapter.folder, "hra_u")))

    def test_pissa(self, made: Make) -> None:
        adapter = made("pissa")
        a, b = self.tensors(adapter.folder, "lora_A.weight", "lora_B.weight")
        self.compare(adapter, oracle.pissa(self.weight(adapter.base), a, b, 2.0), error=3e-6)


@given(n=st.integers(1, 9), r=st.integers(1, 5), seed=st.integers(0, 99))
def test_reflections_in_compact_form_are_their_product(n: int, r: int, seed: int) -> None:
    vectors = torch.randn(n, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, t = compact(vectors)
    expected = oracle.hra(np.eye(n), vectors.numpy())
    assert np.abs(-(u @ t @ u.T).numpy() - expected).max() <= 1e-13


class TestTheTable:
    """Of kinds: none is missing, and none reads a configuration of which it does not know all fields."""

    def test_every_kind_of_peft_has_its_answer(self) -> None:
        assert METHODS.keys() == {kind.value for kind in PeftType}

    def test_every_conversion_is_tested(self) -> None:
        converted = {kind for kind, method in METHODS.items() if not isinstance(method, Refused)}
        assert {source.kind for source in SOURCES.values()} == converted
        assert {source.base for source in SOURCES.values()} <= BASES.keys()

    @pytest.mark.parametrize("kind", [kind for kind, method in METHODS.items() if not isinstance(method, Refused)])
    def test_every_field_is_known(self, kind: str) -> None:
        method = METHODS[kind]
        assert not isinstance(method, Refused)
        read = {field.alias or name for name, field in method.config.model_fields.items()}
        fields = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)].__dataclass_fields__.keys()
        assert fields - read - INERT - method.inert - OTHER_KINDS.keys() == set()


def test_the_engines_that_take_a_rank_are_named() -> None:
    assert (VllmFit.of(512).takes, VllmFit.of(513).takes) == (True, False)
    assert (VllmFit.of(9).max_lora_rank, VllmFit.of(513).max_lora_rank) == (16, None)
    assert "--max-lora-rank 16;" in VllmFit.of(9).in_words()
    assert "rank 512 would fit" in VllmFit.of(576).in_words()
