"""Bounds of conversions: they cover what PEFT finds on another machine, and terms that cancel in exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraover.adapters.convert.methods.base import Dense
from loraover.common.errors import ExportError
from loraover_export import convert_adapter

from strategies import normal
from support.conversion_bounds import KEY, TENSORS, converted, delta_of, exact, exact_norm, low_rank_of, made
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
    assert any("for weights in bf16" in note and "its own answers change" in note for note in report.certificate.notes)


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


def test_deft_is_bounded_where_its_terms_cancel(tmp_path: Path) -> None:
    """R is P^T W rounded to float32, so that the difference is much smaller than the rounding of either."""
    weight = normal(1, 34, 34).float()
    adapter = made(tmp_path, SOURCES["deft"], weight)
    p = load_file(adapter / TENSORS)[f"{KEY}.deft_P"]
    r = (p.double().relu().mT @ weight.double() * 3 / 2).float()  # alpha / r is 2 / 3
    edit_tensors(adapter / TENSORS, lambda found: found.update({f"{KEY}.deft_R": r}))
    found = low_rank_of(adapter)
    truth = exact(p) @ (Fraction(2, 3) * exact(r) - exact(p.relu()).T @ exact(weight))
    error = exact_norm(exact(found.b) @ exact(found.a) - truth)
    assert error <= found.left_out <= 1e5 * error
    assert error > 1e-10 * float((found.b @ found.a).norm())


def in_pairs(matrix: Tensor) -> Tensor:
    """The matrix with each second column almost the column before it."""
    found = matrix.clone()
    found[:, 1::2] = found[:, ::2] * (1 + 2.0**-20)
    return found


def differences(count: int) -> Tensor:
    """Columns (34, count), each a sum of differences of the pairs in a matrix of `in_pairs`, times some numbers."""
    numbers = normal(5, 17, count).float()
    return torch.stack([numbers, -numbers], dim=1).reshape(34, count)


def exact_reflections(adapter: Path, weight: Tensor) -> Any:
    turned = exact(weight)
    for u in exact(load_file(adapter / TENSORS)[f"{KEY}.hra_u"]).T:
        turned = turned - np.outer(turned @ u, u) * (2 / (u @ u))
    return turned - exact(weight)


def exact_network(adapter: Path, weight: Tensor) -> Any:
    file = load_file(adapter / TENSORS)
    a, b, encoder, decoder = (
        exact(file[f"{KEY}.peanut_{name}.weight"]) for name in ("A", "B", "encoders.0", "decoders.0")
    )

    def relu(x: Any) -> Any:
        return x * (x > 0)

    first = relu(exact(weight).T @ a.T)
    return b @ (relu(relu(first @ encoder.T) @ decoder.T) + first).T * Fraction(1, 2)


PEANUT_OF_RELU = Source("PEANUT", {"r": 3, "depth": 1, "act_fn": "relu", "scaling": 0.5})
CANCELLING: dict[str, tuple[Source, Tensor, dict[str, Tensor], Callable[[Path, Tensor], Any]]] = {
    "hra": (
        SOURCES["hra"],
        in_pairs(normal(1, 34, 34).float()),
        {"hra_u": differences(4)},
        exact_reflections,
    ),
    "peanut": (
        PEANUT_OF_RELU,
        in_pairs(normal(1, 34, 34).float()).T.contiguous(),
        {"peanut_A.weight": differences(3).T.contiguous()},
        exact_network,
    ),
}


@pytest.mark.parametrize("case", CANCELLING)
def test_products_with_the_weight_are_bounded_where_their_terms_cancel(case: str, tmp_path: Path) -> None:
    source, weight, tensors, truth_of = CANCELLING[case]
    adapter = made(tmp_path, source, weight)
    edit_tensors(adapter / TENSORS, lambda found: found.update({f"{KEY}.{name}": new for name, new in tensors.items()}))
    found, truth = low_rank_of(adapter), truth_of(adapter, weight)
    error = exact_norm(exact(found.b) @ exact(found.a) - truth)
    size = exact_norm(truth)
    assert 1e-12 * size < error <= found.left_out <= 1e-4 * size  # the error depends on a processor's order of sums


def cancelling(*shape: int) -> Tensor:
    """Numbers (3, *shape) whose first dimension adds up to its own rounding to float32."""
    large, small = 1000 * normal(2, *shape).float(), normal(3, *shape).float()
    return torch.stack([large, small, -large - small])


def same(count: int, *shape: int) -> Tensor:
    """Numbers (count, *shape), the same in each place of the first dimension."""
    return normal(4, *shape).float().expand(count, *shape).contiguous()


def cancelling_hira(file: dict[str, Tensor], weight: Tensor) -> Any:
    a, b = file[f"{KEY}.hira_A"], file[f"{KEY}.hira_B"] = cancelling(34), same(3, 34).T.contiguous()
    return exact(weight) * (exact(b) @ exact(a))


def cancelling_lokr(file: dict[str, Tensor], weight: Tensor) -> Any:
    """W_2 (17, 17) is a product of 20 terms, all but three of which are zero."""
    del file[f"{KEY}.lokr_w2"]
    a, b = torch.zeros(17, 20), torch.zeros(20, 17)
    a[:, :3], b[:3] = same(3, 17).T, cancelling(17)
    file[f"{KEY}.lokr_w2_a"], file[f"{KEY}.lokr_w2_b"] = a, b
    return np.kron(exact(file[f"{KEY}.lokr_w1"]), exact(a) @ exact(b)) * Fraction(8, 20)


def cancelling_vblora(file: dict[str, Tensor], weight: Tensor) -> Any:
    """A is made of mixtures of the first three vectors of the bank."""
    bank = next(tensor for name, tensor in file.items() if name.endswith("vector_bank"))
    bank[:3] = cancelling(4)
    a, b = f"{KEY}.vblora_logits_A_topk", f"{KEY}.vblora_logits_B_topk"
    file[f"{a}_indices"][:] = torch.arange(3)
    file[f"{a}_weights"][:] = 1 / 3
    mixed = {}
    for side in (a, b):
        first = exact(file[f"{side}_weights"])
        mixed[side] = (
            np.concatenate([first, 1 - first.sum(-1, keepdims=True)], -1)[..., None]
            * exact(bank)[file[f"{side}_indices"].long().numpy()]
        ).sum(-2)
    return mixed[b].swapaxes(1, 2).reshape(32, 3) @ mixed[a].reshape(3, 32)


def cancelling_randlora(file: dict[str, Tensor], weight: Tensor) -> Any:
    """All rows of A are the same, and those columns of B that are not zero add up to almost nothing."""
    shared = {name[-1]: tensor for name, tensor in file.items() if name.endswith(("randlora_A", "randlora_B"))}
    shared["A"][:] = same(1, shared["A"].shape[-1])
    shared["B"][:] = 0
    shared["B"][:, 0, :3] = cancelling(len(shared["B"])).T
    file[f"{KEY}.randlora_lambda"][:] = 1
    gamma = file[f"{KEY}.randlora_gamma"]
    gamma[:] = same(1, 34)
    outer, inner = exact(shared["B"])[:34, 0, :3].sum(-1), exact(shared["A"])[0, 0, :34] * exact(gamma)[0]
    return np.outer(outer, inner) * Fraction(640, 3)


def cancelling_fourierft(file: dict[str, Tensor], weight: Tensor) -> Any:
    """The spectrum almost has the opposite sign at each negative frequency, so its transform is almost imaginary."""
    places = torch.randperm(34 * 34, generator=torch.Generator().manual_seed(777))
    values = normal(2, 34, 34).float()
    values -= values.flip(0, 1).roll((1, 1), (0, 1))
    values[:17] *= 1 + 2.0**-20
    file[f"{KEY}.fourierft_spectrum"] = values.flatten()[places]
    turn = 8 * np.arctan(np.longdouble(1)) / 34 * (np.outer(np.arange(34), np.arange(34)) % 34)
    c, s, wide = np.cos(turn), np.sin(turn), values.double().numpy().astype(np.longdouble)
    found = (c @ wide @ c - s @ wide @ s) / 34**2 * 150
    return np.vectorize(lambda x: Fraction(*x.as_integer_ratio()), otypes=[object])(found)


def cancelling_supertuning(file: dict[str, Tensor], weight: Tensor) -> Any:
    file[f"{KEY}.supertuning_values"][:] = 0
    a, b = cancelling(34), same(3, 34).T.contiguous()
    file[f"{KEY}.supertuning_lora_A.weight"], file[f"{KEY}.supertuning_lora_B.weight"] = a, b
    return exact(b) @ exact(a) * Fraction(4, 3)


def cancelling_miss(file: dict[str, Tensor], weight: Tensor) -> Any:
    """delta_W = (W + 1) D in blocks of 4; the rows of a block of D are the same, and W + 1 almost adds up to 0."""
    d = file[f"{KEY}.miss_block"] = same(4, 8, 4).transpose(0, 1).contiguous()
    blocks = exact(weight).reshape(8, 4, 8, 4).transpose(0, 2, 1, 3)  # (out block, in block, row, column)
    return (blocks @ exact(d)[:, None] + exact(d)[:, None]).transpose(0, 2, 1, 3).reshape(32, 32)


CANCELLING_SUMS: dict[str, tuple[Source, Callable[[dict[str, Tensor], Tensor], Any]]] = {
    "hira": (SOURCES["hira"], cancelling_hira),
    "lokr": (Source("LOKR", {"r": 20}), cancelling_lokr),
    "vblora": (SOURCES["vblora with the top k only"], cancelling_vblora),
    "randlora": (SOURCES["randlora"], cancelling_randlora),
    "fourierft": (Source("FOURIERFT", {"n_frequency": 34 * 34}, full=True), cancelling_fourierft),
    "supertuning": (
        Source("SUPERTUNING", {"sparsity": 0.5, "r": 3, "lora_alpha": 4}, full=True),
        cancelling_supertuning,
    ),
    "miss": (SOURCES["miss bat"], cancelling_miss),
}


@pytest.mark.parametrize("case", CANCELLING_SUMS)
def test_sums_are_bounded_where_their_terms_cancel(case: str, tmp_path: Path) -> None:
    source, edit = CANCELLING_SUMS[case]
    n = 32 if source.base == "even" else 34
    weight = normal(1, n, n).float()
    if case == "miss":
        weight = torch.cat([cancelling(n, 8), -torch.ones(1, n, 8)]).permute(1, 2, 0).reshape(n, n).contiguous()
    adapter = made(tmp_path, source, weight)
    truths: list[Any] = []
    edit_tensors(adapter / TENSORS, lambda file: truths.append(edit(file, weight)))
    module = converted(adapter, tmp_path / "out", approximate_to_rank=n)
    found = delta_of(adapter)
    value = exact(found.value) if isinstance(found, Dense) else exact(found.b) @ exact(found.a)
    error = exact_norm(value - truths[0])
    assert 1e-12 * exact_norm(truths[0]) < error <= module.arithmetic_bound <= 1e6 * error
