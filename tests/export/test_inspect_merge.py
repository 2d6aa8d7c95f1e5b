"""What inspect-merge says of right merges, of planted faults, and of foreign mergers, against NumPy in float64."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from loraover.common.command_line import run
from loraover.common.errors import CheckpointError, ConfigError
from loraover.common.request import written_as_flags
from loraover_export import InspectMergeReport, inspect_merge, merge_adapter
from loraover_export.cli import cli
from loraover_export.formats.gguf.base import write_base
from loraover_export.merged.changes import AddedDelta
from loraover_export.merged.matrices import FLOATS
from loraover_export.merged.strength import ABSENT, ONCE, Hypothesis, Sums, measure

from support.conversions import SOURCES, load_base, make_base, make_source
from support.make_checkpoint import edit_tensors
from support.merge_cases import CASES, save
from support.merged_files import DTYPES, SHAPES, TARGETS, Planted, Wide, drawn, plant, stored, write_model


def verdicts(report: InspectMergeReport) -> dict[str, set[str]]:
    """Modules by verdict."""
    found: dict[str, set[str]] = {}
    for module in report.modules:
        found.setdefault(module.verdict, set()).add(module.module)
    return found


def inspect(planted: Planted, merged: str) -> InspectMergeReport:
    return inspect_merge(planted.adapter, merged, model=planted.base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.5, 0.05, 0.004])
def test_a_right_merge_passes_and_its_absence_never_does(dtype: str, size: float, tmp_path: Path) -> None:
    planted = plant(tmp_path, dtype, size=size)
    report = inspect(planted, planted.merge())
    assert (report.verdict, report.exit_code) == ("passed", 0), report.sentence
    assert verdicts(report) == {"merged": set(TARGETS)}
    assert report.equal == len(SHAPES) - len(TARGETS)
    absent = inspect(planted, planted.base)
    assert (absent.verdict, absent.exit_code) == ("failed", 1)
    assert verdicts(absent) == {"not merged": set(TARGETS)}
    assert absent.sentence == f"all {len(TARGETS)} modules: not merged"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_strength_is_the_oracles(dtype: str, tmp_path: Path) -> None:
    planted = plant(tmp_path, dtype)
    planted.merge()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for module in inspect(planted, str(tmp_path / "merged")).modules:
        w, d = planted.weights[module.module], planted.deltas[module.module]
        y = merged[f"{module.module}.weight"].double().numpy() - w
        s = (d * y).sum() / (d * d).sum()
        residual = y - s * d
        half = 5 * np.sqrt((d**2 * residual**2).sum()) / (d * d).sum()
        assert module.strength == pytest.approx(s, rel=1e-5)
        assert module.interval == pytest.approx((s - half, s + half), rel=1e-3)
        assert module.residual == pytest.approx(np.linalg.norm(residual) / np.linalg.norm(d), rel=1e-3, abs=1e-4)
        kept = stored(w + d, dtype).double().numpy() == w
        assert module.erased == pytest.approx((d[kept] ** 2).sum() / (d * d).sum(), abs=1e-6)


def twice(path: str, w: Wide, d: Wide) -> Wide:
    return w + 2 * d


def without_alpha(path: str, w: Wide, d: Wide) -> Wide:
    return w + d / 1.5


def subtracted(path: str, w: Wide, d: Wide) -> Wide:
    return w - d


def scaled(path: str, w: Wide, d: Wide) -> Wide:
    return w + 0.4 * d


LARGE = {
    "model.embed_tokens": (64, 600),
    "model.layers.0.self_attn.q_proj": (700, 700),
    "model.layers.0.mlp.up_proj": (2100, 600),
    "model.layers.0.mlp.down_proj": (613, 601),
}
"""Shapes that are measured in float32, and of which one is read in several pieces."""


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("size", [0.5, 0.004])
def test_large_weights_are_measured_as_well(dtype: str, size: float, tmp_path: Path) -> None:
    planted = plant(tmp_path, dtype, shapes=LARGE, size=size)
    report = inspect(planted, planted.merge())
    assert verdicts(report) == {"merged": set(planted.deltas)}, report.sentence
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for module in report.modules:
        w, d = planted.weights[module.module], planted.deltas[module.module]
        y = merged[f"{module.module}.weight"].double().numpy() - w
        s = (d * y).sum() / (d * d).sum()
        half = 5 * np.sqrt((d**2 * (y - s * d) ** 2).sum()) / (d * d).sum()
        assert module.strength == pytest.approx(s, abs=1e-5)
        assert module.interval is not None
        least, most = module.interval
        assert least <= s <= most
        assert 0.7 * half <= (most - least) / 2 <= 1.4 * half + 4e-3
        assert module.expected == pytest.approx(s, abs=1e-4)
        assert module.residual == pytest.approx(np.linalg.norm(y - s * d) / np.linalg.norm(d), rel=1e-2, abs=1e-4)
        assert module.rounding == pytest.approx(np.linalg.norm(y - d) / np.linalg.norm(d), rel=1e-2, abs=1e-4)
    assert verdicts(inspect(planted, planted.base)) == {"not merged": set(planted.deltas)}
    assert verdicts(inspect(planted, planted.merge("two", change=twice))) == {"merged twice": set(planted.deltas)}


@pytest.mark.parametrize("first", [700, 2000])
def test_a_large_weight_whose_first_rows_alone_are_the_base_models_is_read_to_its_end(
    first: int, tmp_path: Path
) -> None:
    planted = plant(tmp_path, shapes=LARGE)
    path = "model.layers.0.mlp.up_proj"
    merged = planted.merge(change=lambda name, w, d: w + d * (np.arange(len(w))[:, None] >= first))
    (module,) = (m for m in inspect(planted, merged).modules if m.module == path)
    assert module.verdict == "other changes"
    assert module.strength == pytest.approx(1 - first / 2100, abs=0.05)


def test_a_part_of_a_row_of_a_large_weight_that_was_left_out_is_seen(tmp_path: Path) -> None:
    """Of 2100 rows, a quarter of one changes less than rounding may in the whole."""
    planted = plant(tmp_path, shapes=LARGE, size=0.2)

    def part(name: str, w: Wide, d: Wide) -> Wide:
        found = w + d
        found[5, : w.shape[1] // 4] = w[5, : w.shape[1] // 4]
        return found

    assert verdicts(inspect(planted, planted.merge(change=part))) == {"other changes": set(planted.deltas)}


@pytest.mark.parametrize("size", [0.2, 0.02])
@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
def test_a_single_row_that_was_left_out_or_merged_alone_is_seen(
    shapes: dict[str, tuple[int, int]], size: float, tmp_path: Path
) -> None:
    """Of 2100 rows, it changes the strength by 0.0005."""
    planted = plant(tmp_path, shapes=shapes, size=size)

    def part(is_left_out: bool, w: Wide, d: Wide) -> Wide:
        found = w + d if is_left_out else w.copy()
        found[5] = w[5] if is_left_out else (w + d)[5]
        return found

    for is_left_out in (True, False):
        merged = planted.merge(str(is_left_out), change=lambda _, w, d, out=is_left_out: part(out, w, d))  # type: ignore[misc]
        assert verdicts(inspect(planted, merged)) == {"other changes": set(planted.deltas)}


def test_a_scale_that_is_wrong_by_little_is_seen_in_all_modules_together(tmp_path: Path) -> None:
    """Of each module alone, rounding leaves 3 % open."""
    shapes = {f"model.layers.{k}.mlp.up_proj": (64, 64) for k in range(40)}
    planted = plant(tmp_path, shapes=shapes, size=0.005)
    right = inspect(planted, planted.merge("right"))
    assert verdicts(right) == {"merged": set(shapes)}
    assert all(m.interval is not None and m.interval[1] - m.interval[0] > 0.04 for m in right.modules)
    for factor in (0.97, 1.03):
        merged = planted.merge(f"by {factor}", change=lambda path, w, d, factor=factor: w + factor * d)  # type: ignore[misc]
        report = inspect(planted, merged)
        assert "merged" not in verdicts(report), report.sentence
        assert report.exit_code == 1


FAULTS: dict[str, tuple[Callable[[str, Wide, Wide], Wide], str, str]] = {
    "twice": (twice, "merged twice", "merged twice"),
    "alpha left out": (without_alpha, "another factor", "alpha was left out"),
    "subtracted": (subtracted, "another factor", "subtracted"),
    "by 0.4": (scaled, "another factor", "merged 0.4"),
}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_factor_is_named(fault: str, dtype: str, tmp_path: Path) -> None:
    planted = plant(tmp_path, dtype)
    change, verdict, reason = FAULTS[fault]
    report = inspect(planted, planted.merge(change=change))
    assert report.exit_code == 1
    assert verdicts(report) == {verdict: set(TARGETS)}, report.sentence
    assert reason in report.sentence


@pytest.mark.parametrize(("dtype", "size"), [("BF16", 1e-4), ("BF16", 2e-4), ("BF16", 3e-4), ("F16", 3e-5)])
def test_a_wrong_factor_never_passes_where_rounding_hides_it(dtype: str, size: float, tmp_path: Path) -> None:
    planted = plant(tmp_path, dtype, size=size)
    assert inspect(planted, planted.merge()).exit_code != 1
    for factor in (-1, 0.5, 1.25, 1.5, 2, 3):
        merged = planted.merge(f"by {factor}", change=lambda path, w, d, factor=factor: w + factor * d)  # type: ignore[misc]
        report = inspect(planted, merged)
        assert report.exit_code != 0
        assert "merged" not in verdicts(report), (factor, report.sentence)


@pytest.mark.parametrize("factor", [0.5, 3])
def test_a_factor_is_named_after_rounding_has_changed_the_strength(factor: float, tmp_path: Path) -> None:
    planted = plant(tmp_path, size=0.003)
    report = inspect(planted, planted.merge(change=lambda path, w, d: w + factor * d))
    assert verdicts(report) == {"another factor": set(TARGETS)}, report.sentence
    for module in report.modules:
        assert float(module.reason.removeprefix("merged ").removesuffix(" times")) == pytest.approx(factor, rel=0.2)


def to_fp8(key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key: weight.to(torch.float8_e4m3fn), f"{key}_scale": torch.ones(1)}


def to_bitsandbytes(key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    packed = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    state = f"{key}.quant_state.bitsandbytes__nf4"
    return {
        key: packed,
        f"{key}.absmax": torch.zeros(4),
        f"{key}.quant_map": torch.zeros(16),
        state: packed[:4, 0].clone(),
    }


def to_gptq(key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    path = key.removesuffix("weight")
    numbers = torch.zeros(4, 4, dtype=torch.int32)
    return {f"{path}qweight": numbers, f"{path}qzeros": 1 * numbers, f"{path}scales": torch.zeros(4, 4)}


@pytest.mark.parametrize("quantise", [to_fp8, to_bitsandbytes, to_gptq])
def test_a_quantised_merge_is_not_compared_and_no_fault(
    quantise: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    planted = plant(tmp_path)
    merged = Path(planted.merge())
    # The adapter knows nothing of these: they are quantised, too.
    for file in (merged / "model.safetensors", Path(planted.base) / "model.safetensors"):
        edit_tensors(file, lambda found: found.update({"model.layers.0.mlp.gate_proj.weight": torch.ones(16, 16)}))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "layers" in key]:
            tensors |= quantise(key, tensors.pop(key))

    edit_tensors(merged / "model.safetensors", change)
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "some-method"}}))
    report = inspect(planted, str(merged))
    assert (report.verdict, report.exit_code) == ("inconclusive", 3), report.sentence
    assert verdicts(report) == {"not compared": set(TARGETS)}
    assert "is quantised (some-method)" in report.not_compared[0]
    (other,) = report.others
    assert (other.name, other.state) == ("model.layers.0.mlp.gate_proj.weight", "not compared")


def test_tensors_of_half_bytes_are_compared(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    folders = (planted.base, planted.merge(), planted.merge("other"))
    for folder in folders:
        file = Path(folder) / "model.safetensors"
        packed = torch.arange(9, dtype=torch.uint8) + (folder == folders[2])
        edit_tensors(file, partial(dict.update, packed=packed.view(torch.float4_e2m1fn_x2)))
    assert inspect(planted, folders[1]).verdict == "passed"
    (other,) = inspect(planted, folders[2]).others
    assert (other.name, other.state, other.reason) == ("packed", "changed", "its bytes differ")


@pytest.mark.parametrize("adapted", [False, True])
def test_rows_for_further_tokens_are_told_and_no_pass(adapted: bool, tmp_path: Path) -> None:
    shapes = {f"model.{'layers.' * adapted}embed_tokens": (64, 32), "lm_head": (64, 32)}
    shapes |= {path: SHAPES[path] for path in TARGETS}
    planted = plant(tmp_path, shapes=shapes)
    path = next(iter(shapes))
    for padded, verdict, state in ((0.0, "inconclusive", "resized"), (0.5, "failed", "changed")):
        more = planted.weights[path] + planted.deltas.get(path, 0) + padded
        others = {path: np.vstack([more, np.zeros((8, 32))])}
        report = inspect(planted, planted.merge(f"by {padded}", others=others))
        assert report.verdict == verdict, report.sentence
        found = {other.state: other.reason for other in report.others}
        assert found.keys() == ({"resized"} if adapted else {state})
        assert "resized" not in found or found["resized"].startswith("8 rows were added, and its first 64")


def test_an_adapter_beside_the_merged_weights_is_told_and_no_pass(tmp_path: Path) -> None:
    """Transformers would load the base model and the adapter, in place of the merged weights."""
    planted = plant(tmp_path)
    merged = Path(planted.merge())
    (merged / "adapter_config.json").write_bytes((planted.adapter / "adapter_config.json").read_bytes())
    report = inspect(planted, str(merged))
    assert report.verdict == "inconclusive"
    assert "holds adapter_config.json beside the merged weights" in report.not_compared[0]


def test_shards_beside_a_single_file_are_told_and_no_pass(tmp_path: Path) -> None:
    """Transformers reads the single file; vLLM reads what the index names."""
    planted = plant(tmp_path)
    merged = Path(planted.merge())
    (merged / "model-00001-of-00001.safetensors").write_bytes((Path(planted.base) / "model.safetensors").read_bytes())
    index = {"weight_map": {FIRST: "model-00001-of-00001.safetensors"}}
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    report = inspect(planted, str(merged))
    assert report.verdict == "inconclusive"
    assert "transformers reads model.safetensors beside it" in report.not_compared[0]


@pytest.mark.parametrize("shape", [(4, 0), (0,)])
def test_tensors_without_elements_are_compared(shape: tuple[int, ...], tmp_path: Path) -> None:
    planted = plant(tmp_path)
    for folder in (planted.base, planted.merge()):
        file = Path(folder) / "model.safetensors"
        edit_tensors(file, lambda found: found.update(empty=torch.zeros(shape)))
    assert inspect(planted, str(tmp_path / "merged")).verdict == "passed"


@pytest.mark.parametrize("is_rslora", [False, True])
def test_the_other_scaling_is_named(is_rslora: bool, tmp_path: Path) -> None:
    planted = plant(tmp_path, r=4, alpha=5, use_rslora=is_rslora)
    wrong = 0.5 if is_rslora else 2.0
    report = inspect(planted, planted.merge(change=lambda path, w, d: w + wrong * d))
    names = ["sqrt(r) in place of alpha / r", "alpha / r in place of alpha / sqrt(r)"]
    assert names[is_rslora] in report.sentence


def test_modules_that_were_left_out_are_named(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    half = {path for path in TARGETS if "layers.1" in path}
    report = inspect(planted, planted.merge(change=lambda path, w, d: w if path in half else w + d))
    assert report.exit_code == 1
    assert verdicts(report) == {"merged": set(TARGETS) - half, "not merged": half}
    assert "5 of 10 modules: not merged (model.layers.1." in report.sentence


def test_a_transposed_delta_is_named(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    square = {path for path in TARGETS if SHAPES[path][0] == SHAPES[path][1]}
    report = inspect(planted, planted.merge(change=lambda path, w, d: w + (d.T if path in square else d)))
    assert verdicts(report) == {"merged": set(TARGETS) - square, "transposed": square}
    assert report.exit_code == 1


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("size", [1.0, 0.03])
def test_another_base_is_told_from_rounding(dtype: str, size: float, tmp_path: Path) -> None:
    planted = plant(tmp_path, dtype)
    other = drawn(77, 96, 96, size=size)
    head = {"lm_head": planted.weights["lm_head"] + other[:64, :32]}
    for name, others, verdict in (("merged", head, "another base"), ("more", {}, "other changes")):
        merged = planted.merge(name, None, lambda path, w, d: w + d + other[: w.shape[0], : w.shape[1]], others)
        report = inspect(planted, merged)
        assert verdicts(report) == {verdict: set(TARGETS)}, report.sentence
        assert report.exit_code == 1


def test_modules_without_a_delta_are_not_counted_as_merged(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    empty = {path for path in TARGETS if "layers.1" in path}
    edit_tensors(
        planted.adapter / "adapter_model.safetensors",
        lambda found: found.update({k: 0 * t for k, t in found.items() if "layers.1" in k and "lora_B" in k}),
    )
    report = inspect(planted, planted.merge(change=lambda path, w, d: w if path in empty else w + d))
    assert report.verdict == "passed"
    assert verdicts(report) == {"merged": set(TARGETS) - empty, "nothing to merge": empty}
    assert report.sentence.startswith("5 of 10 modules hold the adapter once")


@pytest.mark.parametrize(("size", "verdict"), [(1e-25, "rounded away"), (1e30, "merged")])
def test_very_small_and_very_large_deltas_are_measured(size: float, verdict: str, tmp_path: Path) -> None:
    planted = plant(tmp_path, size=size)
    assert verdicts(inspect(planted, planted.merge())) == {verdict: set(TARGETS)}


def test_what_the_format_erases_is_no_pass(tmp_path: Path) -> None:
    planted = plant(tmp_path, size=1e-7)
    for merged in (planted.base, planted.merge()):
        report = inspect(planted, merged)
        assert (report.verdict, report.exit_code) == ("inconclusive", 3)
        assert verdicts(report) == {"rounded away": set(TARGETS)}
        assert report.erased > 0.99


@pytest.mark.parametrize("changed", ["lm_head", "model.embed_tokens"])
def test_what_changed_beside_the_adapter_is_named(changed: str, tmp_path: Path) -> None:
    planted = plant(tmp_path)
    report = inspect(planted, planted.merge(others={changed: planted.weights[changed] + drawn(5, 64, 32, size=0.1)}))
    assert report.exit_code == 1
    assert verdicts(report) == {"merged": set(TARGETS)}
    (other,) = report.others
    assert (other.name, other.state) == (f"{changed}.weight", "changed")
    assert f"1 other tensor changed ({changed}.weight)" in report.sentence


@pytest.mark.parametrize(("before", "after"), [("F32", "BF16"), ("BF16", "F16"), ("F16", "BF16"), ("BF16", "F32")])
def test_another_format_is_no_fault(before: str, after: str, tmp_path: Path) -> None:
    planted = plant(tmp_path, before)
    report = inspect(planted, planted.merge(dtype=after))
    assert report.verdict == "passed", report.sentence
    missing = inspect(planted, write_model(tmp_path / "copy", planted.weights, after))
    assert verdicts(missing) == {"not merged": set(TARGETS)}


def test_a_merge_in_bf16_stored_in_f32_is_none_of_another_base(tmp_path: Path) -> None:
    planted = plant(tmp_path, "F32")

    def in_bf16(path: str, w: Wide, d: Wide) -> Wide:
        return stored(stored(w, "BF16").double().numpy() + stored(d, "BF16").double().numpy(), "BF16").double().numpy()

    other = {path: stored(planted.weights[path], "BF16").double().numpy() for path in ("lm_head", "model.embed_tokens")}
    report = inspect(planted, planted.merge(change=in_bf16, others=other))
    assert report.verdict == "passed", report.sentence
    assert all(module.reason == "rounded to BF16 first" for module in report.modules)


@pytest.mark.parametrize("name", CASES)
def test_our_own_merges_pass(name: str, tmp_path: Path) -> None:
    saved = save(name, tmp_path)
    assert merge_adapter(saved.adapter, tmp_path / "merged", model=tmp_path / "base").passed
    report = inspect_merge(saved.adapter, tmp_path / "merged", model=tmp_path / "base")
    assert report.verdict == "passed", report.sentence
    missing = inspect_merge(saved.adapter, tmp_path / "base", model=tmp_path / "base")
    assert set(verdicts(missing)) == {"not merged"}


@pytest.mark.parametrize("name", ["linear", "Conv1D", "bfloat16", "float16", "saved classifier", "saved norm"])
def test_pefts_merges_pass(name: str, tmp_path: Path) -> None:
    saved = save(name, tmp_path)
    PeftModel.from_pretrained(saved.base(), saved.adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    report = inspect_merge(saved.adapter, tmp_path / "merged", model=tmp_path / "base")
    assert report.verdict == "passed", (report.sentence, report.others)


def test_a_head_that_only_shares_the_embeddings_matrix_is_named(tmp_path: Path) -> None:
    """PEFT's merge adds the embedding's delta to the one matrix, so that it reaches the head."""
    saved = save("tied embedding", tmp_path)
    PeftModel.from_pretrained(saved.base(), saved.adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    report = inspect_merge(saved.adapter, tmp_path / "merged", model=tmp_path / "base")
    assert set(verdicts(report)) == {"merged"}
    (other,) = report.others
    assert (other.name, other.state) == ("lm_head.weight", "changed")
    assert "shares its matrix" in other.reason


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(deadline=None)
@given(shapes, st.sampled_from([*FLOATS]), st.sampled_from([0.0, 1.0, 2.0, -0.3]), st.integers(0, 1000))
def test_sums_are_those_of_float64(shape: tuple[int, int], dtype: str, factor: float, seed: int) -> None:
    w = stored(drawn(seed, *shape), dtype).double().numpy()
    d = 0.1 * drawn(seed + 1, *shape)
    m = stored(w + factor * d, dtype).double().numpy()
    third = Hypothesis(factor)
    sums = Sums()
    for rows in (slice(0, shape[0] // 2), slice(shape[0] // 2, None)):
        if len(w[rows]):
            sums.add(measure(w[rows], m[rows], d[rows], FLOATS[dtype].nearest, [ABSENT, ONCE, third]))
    y = m - w
    assert sums.strength == pytest.approx((d * y).sum() / (d * d).sum(), rel=1e-9, abs=1e-12)
    for hypothesis, found in sums.explained.items():
        target = w + hypothesis.factor * d
        written = stored(target, dtype).double().numpy()
        assert found.error == pytest.approx(((written - target) ** 2).sum(), rel=1e-3, abs=1e-12)
        excess = ((m - target) ** 2).sum() - ((written - target) ** 2).sum()
        assert found.excess == pytest.approx(excess, rel=1e-3, abs=1e-6 * (y**2).sum() + 1e-12)
        assert found.excess >= -1e-9
    assert sums.fits(third, is_quantised=False)


seeds = st.integers(0, 99)
wide = st.tuples(st.integers(1, 40), st.sampled_from([1, 7, 63, 64, 601, 2048, 4099]))


@settings(deadline=None)
@given(
    wide, st.integers(1, 9), st.sampled_from(["F16", "BF16"]), st.sampled_from([1e-4, 1e-2, 1.0]), st.integers(0, 99)
)
def test_sums_in_float32_are_within_their_bounds(
    shape: tuple[int, int], r: int, dtype: str, size: float, seed: int
) -> None:
    """The factors of delta_W cancel: its elements are a hundredth of what is added up."""
    w = stored(drawn(seed, *shape), dtype).double().numpy()
    b, a = drawn(seed + 1, shape[0], r, size=size), drawn(seed + 2, r, shape[1])
    factors = np.hstack([b, -0.99 * b]), np.vstack([a, a])
    delta, d = AddedDelta(*factors), factors[0] @ factors[1]
    m = stored(w + d, dtype).double().numpy()
    narrow, out = delta.to(np.float32), np.empty(shape, np.float32)
    narrow.write(0, shape[0], out)
    assert np.linalg.norm(out - d) <= delta.error(2.0**-24)
    sums = measure(w.astype(np.float32), m.astype(np.float32), out, FLOATS[dtype].nearest, [ABSENT, ONCE])
    sums.spread = delta.error(2.0**-24)
    assert abs(sums.strength - (d * (m - w)).sum() / (d * d).sum()) <= sums.arithmetic
    assert delta.norm() == pytest.approx(np.linalg.norm(d), rel=1e-9)
    assert sums.explained[ONCE].excess <= sums.allowed(ONCE, is_quantised=False)
    assert sums.fits(ONCE, is_quantised=False)


def truncate(folder: Path) -> None:
    file = folder / "merged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def to_nan(folder: Path) -> None:
    edit_tensors(folder / "merged" / "model.safetensors", lambda found: found[FIRST].__setitem__((0, 0), torch.nan))


def reshape(folder: Path) -> None:
    for name in ("base", "merged"):
        file = folder / name / "model.safetensors"
        edit_tensors(file, lambda found: found.update({FIRST: torch.zeros(33, 32).to(found[FIRST])}))


def leave_the_folder(folder: Path) -> None:
    (folder / "merged" / "model.safetensors").rename(folder / "elsewhere.safetensors")
    index = {"weight_map": {FIRST: "../elsewhere.safetensors"}}
    (folder / "merged" / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_shard(folder: Path) -> None:
    (folder / "merged" / "model.safetensors").unlink()
    index = {"weight_map": {FIRST: "model-00002-of-00002.safetensors"}}
    (folder / "merged" / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_module(folder: Path) -> None:
    edit_tensors(folder / "merged" / "model.safetensors", lambda found: found.pop(FIRST))


def adapt_another_model(folder: Path) -> None:
    edit_tensors(
        folder / "adapter" / "adapter_model.safetensors",
        lambda found: found.update({key.replace("layers.1", "layers.7"): found.pop(key) for key in [*found]}),
    )
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace("layers.1", "layers.7"))


def pickle_the_weights(folder: Path) -> None:
    (folder / "merged" / "model.safetensors").rename(folder / "merged" / "pytorch_model.bin")


FIRST = f"{TARGETS[0]}.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"merged.*not a complete safetensors file .*copy or save it again"),
    "NaN": (to_nan, r"merged.*q_proj.weight holds NaN or infinity; expected finite weights"),
    "another shape": (reshape, r"base.*has shape \(33, 32\).*\(32, 32\); name the model"),
    "an index that leaves the folder": (leave_the_folder, r"names '../elsewhere.safetensors', which is not a"),
    "an index that names a missing shard": (
        lose_a_shard,
        r"merged.*names 'model-00002-of-00002.* is not a safetensors",
    ),
    "a module without weight": (lose_a_module, r"adapts .*q_proj, but folder .*merged has no such weight; name"),
    "another model": (adapt_another_model, r"adapts model.layers.7.*, but folder .*base has no such weight; name"),
    "a pickle": (pickle_the_weights, r"merged has no model.safetensors .*pytorch_model.bin"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_refused_with_what_to_do(damage: str, tmp_path: Path) -> None:
    planted = plant(tmp_path)
    planted.merge()
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        inspect(planted, str(tmp_path / "merged"))


@pytest.mark.parametrize(("change", "code"), [(None, 0), (twice, 1), ("erased", 3), ("absent", 2)])
def test_the_command_tells_by_its_exit_code(
    change: Any, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = plant(tmp_path, size=1e-7 if change == "erased" else 0.05)
    merged = planted.merge(change=change) if callable(change) else planted.merge()
    merged = str(tmp_path / "nowhere") if change == "absent" else merged
    with written_as_flags():
        found = run(cli, ["inspect-merge", str(planted.adapter), merged, "--model", planted.base, "--json"])
    assert found == code
    output, told = capsys.readouterr()
    if code == 2:
        assert "nowhere" in told
        return
    report = InspectMergeReport.model_validate_json(output)
    assert report.exit_code == code
    assert f"inspect-merge {report.verdict}: " in " ".join(told.split())


def write_tokenizer(folder: Path, tokens: list[str], added: Sequence[str] = (), eos: str = "b", **model: Any) -> None:
    """A tokenizer of these tokens, in the form of the tokenizers library."""
    extra = [{"id": len(tokens) + k, "content": token, "special": True} for k, token in enumerate(added)]
    content = {"model": {"type": "BPE", "vocab": {t: k for k, t in enumerate(tokens)}, "merges": ["a b"]} | model}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": extra}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos}}))


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "one added": (
        {"tokens": ["a", "b", "ab"], "added": ["<new>"]},
        "has 1 tokens more than folder .*, such as '<new>'",
    ),
    "one lost": ({"tokens": ["a", "b"]}, "lacks 1 tokens of folder .*base, such as 'ab'"),
    "two swapped": ({"tokens": ["b", "a", "ab"]}, "gives 2 tokens other ids than folder .*base"),
    "other pairs": ({"tokens": ["a", "b", "ab"], "merges": [["b", "a"]]}, "has other merges"),
    "another end": ({"tokens": ["a", "b", "ab"], "eos": "a"}, "eos_token of folder .*merged is 'a', expected 'b'"),
}


@pytest.mark.parametrize("change", TOKENIZERS)
def test_another_tokenizer_is_told(change: str, tmp_path: Path) -> None:
    planted = plant(tmp_path)
    merged = Path(planted.merge())
    for folder in (planted.folder / "base", merged):
        write_tokenizer(folder, ["a", "b", "ab"])
    assert inspect(planted, str(merged)).verdict == "passed"
    write_tokenizer(merged, **TOKENIZERS[change][0])
    report = inspect(planted, str(merged))
    assert report.exit_code == 1
    (difference,) = report.tokenizer
    assert re.search(TOKENIZERS[change][1], difference), difference
    assert report.sentence.endswith("; the tokenizer differs")
    write_tokenizer(planted.adapter, **TOKENIZERS[change][0])  # trained with this one
    assert inspect(planted, str(merged)).verdict == "passed"


def test_a_tokenizer_that_cannot_be_compared_is_no_pass(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    merged = Path(planted.merge())
    (merged / "tokenizer.model").write_bytes(b"sentencepiece")
    report = inspect(planted, str(merged))
    assert report.verdict == "inconclusive"
    assert "which has no tokenizer.json" in report.not_compared[0]


def test_a_tokenizer_that_was_left_out_or_reads_texts_otherwise_is_no_pass(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    merged = Path(planted.merge())
    write_tokenizer(Path(planted.base), ["a", "b", "ab"])
    report = inspect(planted, str(merged))
    assert report.verdict == "inconclusive"
    assert report.not_compared == [f"the tokenizer of folder {merged}, which has no tokenizer.json"]
    write_tokenizer(merged, ["a", "b", "ab"])
    assert inspect(planted, str(merged)).verdict == "passed"
    content = json.loads((merged / "tokenizer.json").read_text())
    (merged / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    (merged / "chat_template.jinja").write_text("{{ messages }}")
    report = inspect(planted, str(merged))
    assert report.verdict == "inconclusive"
    assert {line.split(" of ")[1] for line in report.not_compared} == {"the normalizer", "the chat template"}


@pytest.mark.parametrize(
    ("base", "merged", "told"),
    [
        ({}, {"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, []),  # with a head in the files
        ({"rope_theta": 1e4}, {"rope_theta": 1.0}, ["rope_theta"]),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, []),
        ({}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["factor", "rope_type"]),
        ({}, {"model_type": 3}, ["model_type"]),
    ],
)
def test_another_setting_is_told_and_no_pass(
    base: dict[str, Any], merged: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    planted = plant(tmp_path)
    for folder, changes in ((planted.base, base), (planted.merge(), merged)):
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    report = inspect(planted, str(tmp_path / "merged"))
    assert [line.split()[3] for line in report.not_compared] == told
    assert report.verdict == ("inconclusive" if told else "passed")


@pytest.mark.parametrize("part", ["", "layers.1"])
def test_other_names_of_tensors_are_told_and_no_pass(part: str, tmp_path: Path) -> None:
    planted = plant(tmp_path)
    merged = Path(planted.merge())

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if part in key]:
            tensors[f"base_model.model.{key}"] = tensors.pop(key)

    edit_tensors(merged / "model.safetensors", rename)
    report = inspect(planted, str(merged))
    assert (report.verdict, report.exit_code) == ("inconclusive", 3), report.sentence
    assert any("names begin with 'base_model.model.'" in line for line in report.not_compared)


KINDS = ["dora", "pissa", "olora", "loha", "lokr", "vera", "hra", "ia3", "oft", "lora with trained tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_other_kinds_are_found(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind]
    base = make_base(tmp_path / "base", source.base)
    adapter = make_source(base, tmp_path / "adapter", source)
    PeftModel.from_pretrained(load_base(base), adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    report = inspect_merge(adapter, tmp_path / "merged", model=base)
    assert report.verdict == "passed", (report.sentence, report.others)
    assert report.peft_type == source.kind
    assert set(verdicts(inspect_merge(adapter, base, model=base))) == {"not merged"}


def test_a_kind_that_needs_the_base_weights_is_refused_on_gguf(tmp_path: Path) -> None:
    source = SOURCES["loha"]
    base = make_base(tmp_path / "base", source.base)
    adapter = make_source(base, tmp_path / "adapter", source)
    write_base(load_base(base), tmp_path / "base.gguf")
    with pytest.raises(ConfigError, match=r"kind LOHA: its deltas are computed from .*safetensors"):
        inspect_merge(adapter, base, model=tmp_path / "base.gguf")


def test_a_plain_lora_needs_no_pytorch(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    merged = planted.merge()
    words = [str(planted.adapter), merged, "--model", planted.base]
    program = (
        "import sys; from loraover.common.command_line import run; from loraover_export.cli import cli; "
        f"code = run(cli, ['inspect-merge', *{words!r}]); "
        "sys.exit(code or int('torch' in sys.modules or 'transformers' in sys.modules) * 9)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(("weight", "verdict"), [(1.0, "merged"), (0.5, "another factor")])
def test_mergekits_merges_are_judged(weight: float, verdict: str, tmp_path: Path) -> None:
    """Its `task_arithmetic` adds a weight times the difference that a LoRA makes."""
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    saved = save("linear", tmp_path)
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": f"{tmp_path / 'base'}+{saved.adapter}", "parameters": {"weight": weight}}],
        "dtype": "float32",
    }
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"), copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(content), str(tmp_path / "merged"), options)
    report = inspect_merge(saved.adapter, tmp_path / "merged", model=tmp_path / "base")
    assert set(verdicts(report)) == {verdict}, report.sentence
    assert report.exit_code == (0 if verdict == "merged" else 1), report.others
