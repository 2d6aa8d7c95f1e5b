"""Bounds of conversions: they cover what PEFT finds on another machine, and starts that no machine determines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraover.common.errors import ExportError
from loraover_export import convert_adapter

from strategies import normal
from support.conversion_bounds import (
    KEY,
    TENSORS,
    converted,
    low_rank_of,
    made,
)
from support.conversions import BASES, SOURCES, Source, make_source, peft_deltas
from support.make_checkpoint import edit_tensors


def weight_with_gap(gap: float, cut: int) -> Tensor:
    """A (34, 34) weight whose singular values before and after the cut differ by `gap` of the largest."""
    s = torch.linspace(1, 0.1, 34, dtype=torch.float64)
    s[cut:] -= s[cut] - s[cut - 1] + gap
    found: Tensor = (torch.linalg.qr(normal(1, 34, 34)).Q * s) @ torch.linalg.qr(normal(2, 34, 34)).Q
    return found.float()


@contextmanager
def another_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Factorizations whose sums run in another order."""
    svd, qr = torch.linalg.svd, torch.linalg.qr
    rows = torch.randperm(34, generator=torch.Generator().manual_seed(3))

    def permuted_svd(matrix: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = svd(matrix[rows], **options)
        return u[rows.argsort()], s, vt

    def permuted_qr(matrix: Tensor, **options: Any) -> Any:
        if options:  # only R is asked for, to find a norm
            return qr(matrix, **options)
        q, upper = qr(matrix[rows])
        return q[rows.argsort()], upper

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", permuted_svd)
        patch.setattr(torch.linalg, "qr", permuted_qr)
        yield


OLORA_OF_SCALING_100 = Source("LORA", {"r": 3, "lora_alpha": 300, "init_lora_weights": "olora"})


@pytest.mark.parametrize(
    ("source", "cut"),
    [(SOURCES["pissa"], 3), (SOURCES["olora"], 3), (OLORA_OF_SCALING_100, 3), (SOURCES["osf"], 28)],
    ids=["pissa", "olora", "olora of scaling 100", "osf"],
)
def test_the_bound_covers_the_start_on_another_machine(
    source: Source, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = made(tmp_path, source, weight_with_gap(2e-4, cut))
    found = low_rank_of(adapter)
    with another_machine(monkeypatch):
        other = low_rank_of(adapter)
    apart = float((found.b @ found.a - other.b @ other.a).norm())
    assert 1e-8 < apart <= found.left_out <= 400 * apart
    module = converted(adapter, tmp_path / "out")
    assert module.arithmetic_bound >= found.left_out


@pytest.mark.parametrize("name", ["vera from its seed", "pvera from its seed"])
def test_the_bound_covers_projections_that_peft_rounds_to_the_bases_type(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    BASES["prime"]().bfloat16().save_pretrained(base)
    adapter = make_source(base, tmp_path / "adapter", SOURCES[name])
    report = convert_adapter(adapter, tmp_path / "out")
    source, written = (peft_deltas(base, folder) for folder in (adapter, tmp_path / "out"))
    for module in report.certificate.modules:
        error = float((written[module.module] - source[module.module]).norm())
        assert 1e-4 * module.norm < error <= module.error_bound <= 0.05 * module.norm


def test_osf_starts_from_what_peft_stores(tmp_path: Path) -> None:
    """PEFT keeps the factors in the weight's data type; in bfloat16 their product differs much from the weight."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = made(tmp_path, SOURCES["osf"], weight_with_gap(1e-2, 28), torch.bfloat16)
    found = low_rank_of(adapter)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, adapter)
    layer = model.get_submodule(KEY)
    start = [getattr(layer, f"_osf_{part}_low_init")["default"].double() for part in "USV"]
    stored = load_file(adapter / TENSORS)
    u, s, v = (stored[f"{KEY}.osf_svd_params.{part}_low"].double() for part in "USV")
    expected = (u * s) @ v - (start[0] * start[1]) @ start[2]
    assert float((found.b @ found.a - expected).norm()) <= 1e-12 * float(expected.norm())
    wide = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), adapter
    )
    other = wide.get_submodule(KEY).get_delta_weight("default").detach().double()
    assert 1e-4 < float((other - expected).norm()) <= found.left_out


@pytest.mark.parametrize("compute_dtype", ["fp32", "fp64", "bf16"])
def test_osf_is_compared_as_it_was_started(compute_dtype: str, tmp_path: Path) -> None:
    """A base model that is loaded in float32 gives another start, and logits that rounding does not explain."""
    adapter = made(tmp_path, SOURCES["osf"], weight_with_gap(1e-2, 28), torch.bfloat16)
    report = convert_adapter(adapter, tmp_path / "out", check_error=True, device="cpu", compute_dtype=compute_dtype)
    assert report.certificate.verdict != "failed"
    assert report.outputs is not None
    assert report.outputs.error.max_logit < (1e-5 if compute_dtype != "bf16" else 1e-2)
    assert any("loaded in bf16" in note and "answers differently" in note for note in report.certificate.notes)


def repeated(weight: Tensor) -> Tensor:
    return torch.cat([weight[:, :1], weight[:, :1], weight[:, 2:]], dim=1)


def almost_repeated(weight: Tensor) -> Tensor:
    return torch.cat([weight[:, :1], weight[:, :1] * (1 + 1e-5 * weight[:, 1:2]), weight[:, 2:]], dim=1)


UNDETERMINED: dict[str, tuple[str, Tensor, str]] = {
    "pissa": (
        "pissa",
        torch.eye(34),
        r"values 3 and 4 .* differ by 0.0e\+00 of the largest\. .* differs by 2.4, .* norm of delta_W, \d",
    ),
    "osf": ("osf", torch.eye(34), "singular values 28 and 29"),
    "olora": (
        "olora",
        repeated(normal(1, 34, 34).float()),
        "first 3 columns of the base weight are linearly",
    ),
    "olora of columns alike": (
        "olora",
        almost_repeated(normal(1, 34, 34).float()),
        "first 3 columns of the base weight are almost linearly dependent",
    ),
}


@pytest.mark.parametrize("case", UNDETERMINED)
def test_a_start_that_depends_on_the_machine_is_refused(case: str, tmp_path: Path) -> None:
    name, weight, message = UNDETERMINED[case]
    with pytest.raises(ExportError, match=f"(?s){message}.*merge_and_unload"):
        convert_adapter(made(tmp_path, SOURCES[name], weight), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "accepted"), [(2.04, True), (1.96, False)])
def test_a_start_may_differ_by_half_of_delta(size: float, accepted: bool, tmp_path: Path) -> None:
    """At a gap of 2e-5 the bound is some hundredths of the part; B is moved until delta_W is `size` times the bound."""
    adapter = made(tmp_path, SOURCES["pissa"], weight_with_gap(2e-5, 3))
    found = low_rank_of(adapter)
    assert 0.02 < found.left_out < 0.2
    b0, a0 = -found.b[:, 3:] / 2, found.a[3:]
    moved = normal(4, 34, 3)
    moved *= size * found.left_out / float((2 * moved @ a0).norm())
    trained = {f"{KEY}.lora_A.weight": a0.float(), f"{KEY}.lora_B.weight": (b0 + moved).float()}
    edit_tensors(adapter / TENSORS, lambda tensors: tensors.update(trained))
    if accepted:
        module = converted(adapter, tmp_path / "out")
        assert module.relative_error_bound == pytest.approx(1 / size, rel=1e-2)
        return
    with pytest.raises(ExportError, match=r"3 and 4 .* by 2.0e-05 of the largest.* more than half .*merge_and_unload"):
        convert_adapter(adapter, tmp_path / "out")


def test_a_module_that_training_did_not_move_is_converted(tmp_path: Path) -> None:
    adapter = made(tmp_path, SOURCES["pissa"], weight_with_gap(1e-2, 3))
    found = low_rank_of(adapter)
    untrained = {f"{KEY}.lora_A.weight": found.a[3:].float(), f"{KEY}.lora_B.weight": -found.b[:, 3:].float() / 2}
    edit_tensors(adapter / TENSORS, lambda tensors: tensors.update(untrained))
    module = converted(adapter, tmp_path / "out")
    assert module.norm < module.arithmetic_bound < 1e-3


def nearly_pairs(gap: float) -> Tensor:
    """Columns (34, 4) of which each second differs from the one before by about `gap` times its norm."""
    found = normal(6, 34, 4).float()
    found[:, 1::2] = found[:, ::2] + gap * found[:, 1::2]
    return found


def gram_schmidt(folder: Path, u: Tensor) -> Path:
    adapter = made(folder, Source("HRA", {"r": u.shape[1], "apply_GS": True}), normal(1, 34, 34).float())
    edit_tensors(adapter / TENSORS, lambda found: found.update({f"{KEY}.hra_u": u}))
    return adapter


@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4])
def test_the_bound_covers_pefts_gram_schmidt(gap: float, tmp_path: Path) -> None:
    """PEFT makes the columns orthonormal in float32, which the more alike they are the less determines the result."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = gram_schmidt(tmp_path, nearly_pairs(gap))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    turn = model.get_submodule(KEY).get_delta_weight("default").detach().double()
    weight = normal(1, 34, 34).float().double()
    found = low_rank_of(adapter)
    error = float((found.b @ found.a - weight @ (turn - torch.eye(34))).norm())
    assert error <= found.left_out <= 1e3 * error


@pytest.mark.parametrize(
    "u", [nearly_pairs(1e-6), nearly_pairs(0.0), normal(6, 34, 36).float()], ids=["alike", "same", "more"]
)
def test_dependent_columns_of_gram_schmidt_are_refused(u: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"columns of hra_u.*merge_and_unload"):
        convert_adapter(gram_schmidt(tmp_path, u), tmp_path / "out")
