"""Which runs a study consists of: its methods, rates, seeds and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import ConfigError
from loraover.data.formats import RowForm
from loraover.overparam.config import Budget
from loraover.training.recipe import load_recipe
from loraover.training.rows.data import load_examples
from loraover_lab.study.grid import grid_of, is_plain, matched_rank
from loraover_lab.study.request import DEFAULT_METHODS, StudyRequest, split_outside_brackets

from support.study_grid import make_grid


def test_every_seed_is_measured_on_the_same_examples(recipe: Path) -> None:
    grid = make_grid([str(recipe)], {"lora": [1e-3]}, 3, {})
    found = [load_examples(run.recipe, RowForm()) for run in grid]
    tests = [one.test.rows for one in found if one.test is not None]
    assert tests[0] == tests[1] == tests[2] != []
    assert found[0].train.rows != found[1].train.rows


def test_settings_of_a_method_may_be_lists_and_mappings(recipe: Path) -> None:
    text = "lora,lora-over:schedule=dynamic:budget={fraction: 0.25}:sites=['*.q_proj.*', '*.v_proj.*'],lora-over:"
    text += (
        "decomposition=chain:options={depth: 3, expansion: 1.5},lora-over:schedule=static:budget.sites=2:score=random"
    )
    methods = split_outside_brackets(text, ",")
    assert len(methods) == 4
    _, dynamic, chain, static = (
        found.recipe.over for found in make_grid([str(recipe)], dict.fromkeys(methods, (1e-3,)), 1, {})
    )
    assert (dynamic.schedule, dynamic.budget) == ("dynamic", Budget(fraction=0.25))
    assert dynamic.sites == ["*.q_proj.*", "*.v_proj.*"]
    assert (chain.decomposition, chain.options) == ("chain", {"depth": 3, "expansion": 1.5})
    assert (static.schedule, static.budget, static.score) == ("static", Budget(sites=2), "random")


def test_what_is_compared_by_default(recipe: Path) -> None:
    grid = make_grid([str(recipe)], dict.fromkeys(DEFAULT_METHODS, (1e-3,)), 1, {})
    lora, matched, over, fisher, chance = (found.recipe for found in grid)
    assert matched.lora.r > lora.lora.r
    assert over.over.schedule == "all"
    assert [found.over.budget for found in (fisher, chance)] == [Budget(fraction=0.25)] * 2
    assert [found.over.score for found in (fisher, chance)] == ["fisher", "random"]


def test_a_matched_rank_counts_what_the_schedule_can_inject(recipe: Path) -> None:
    def rank(**over: Any) -> int:
        return matched_rank(load_recipe(str(recipe), {f"over.{key}": value for key, value in over.items()}))

    wide = {"expansion": 3.0}
    everything = rank(options=wide)
    assert everything >= 12  # 4 times 3
    assert (
        4 < rank(options=wide, sites=["*.q_proj.*"]) < rank(options=wide, schedule="dynamic", budget={"fraction": 0.5})
    )
    assert rank(options=wide, schedule="dynamic", budget={"fraction": 1.0}) == everything
    assert rank(options=wide, schedule="static", budget={"fraction": 0.5}) < everything


def test_every_method_makes_a_recipe(recipe: Path) -> None:
    methods = ["lora", "rslora", "dora", "pissa", "lora+", "lora-matched", "full", "lora-over:decomposition=svd"]
    grid = make_grid([str(recipe)], {method: [1e-3] for method in methods}, 1, {})
    by_method = {found.method: found.recipe for found in grid}
    assert by_method["dora"].lora.use_dora
    assert by_method["lora+"].training.loraplus_lr_ratio == 16
    assert by_method["lora-over:decomposition=svd"].over.decomposition == "svd"
    assert by_method["lora-matched"].lora.r == matched_rank(load_recipe(str(recipe))) > 4
    assert len({found.folder for found in grid}) == len(methods)


def test_a_setting_may_be_any_key_of_a_recipe(recipe: Path) -> None:
    over = "lora-over:decomposition=svd:options={}:training.loraplus_lr_ratio=4:lora.lora_alpha=4"
    plain = "lora:r=2:training.optim=adamw_torch:data.train_examples=8"
    plus = "lora+:training.weight_decay=0.1"
    one, other, third = (
        found.recipe for found in make_grid([str(recipe)], {m: [1e-3] for m in (over, plain, plus)}, 1, {})
    )
    assert (one.method, one.over.decomposition, one.training.loraplus_lr_ratio) == ("lora-over", "svd", 4)
    assert (one.lora.r, one.lora.lora_alpha) == (4, 4)
    assert (other.method, other.lora.r, other.training.optim) == ("lora", 2, "adamw_torch")
    assert other.data.train_examples == 8
    assert (third.training.loraplus_lr_ratio, third.training.weight_decay) == (16, 0.1)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        *((method, True) for method in ("lora", "lora+", "lora-matched", "lora:r=64", "lora:lora.r=64")),
        *(
            (method, True)
            for method in ("lora:training.loraplus_lr_ratio=4", "lora+:training.lr_scheduler_kwargs={min_lr_rate: 0.1}")
        ),
        *((method, False) for method in ("rslora", "dora", "pissa", "full", "lora-over", "soma:soma.frozen_blocks=1")),
        *((method, False) for method in ("lora:use_dora=true", "lora+:lora.init_lora_weights=pissa")),
        ("lora-over:training.loraplus_lr_ratio=4", False),
        ("lora:training.optim=soap", False),
    ],
)
def test_what_counts_as_a_baseline(method: str, expected: bool) -> None:
    assert is_plain(method) == expected


def test_a_matched_rank_is_that_of_the_methods_own_settings(recipe: Path) -> None:
    methods = ("lora-matched", "lora-matched:over.options={expansion: 3.0}")
    plain, wide = (found.recipe.lora.r for found in make_grid([str(recipe)], dict.fromkeys(methods, (1e-3,)), 1, {}))
    assert wide > plain


def test_seeds_come_one_after_the_other(recipe: Path) -> None:
    seeds = [found.seed for found in make_grid([str(recipe)], {"lora": [1e-3, 1e-2], "lora-over": [1e-4]}, 3, {})]
    assert seeds == sorted(seeds)


PAIR = {"methods": ["lora", "lora-over"]}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"methods": ["lora", "galore"]}, "'galore' is unknown, expected one of"),
        ({"methods": ["lora", "lora-over:decomposition"]}, "expected key=value"),
        ({"methods": ["lora", "lora-over:decompositoin=svd"]}, "did you mean 'decomposition'"),
        ({"methods": "lora-over,dora"}, "compares with plain LoRA"),
        ({"methods": "lora-over", "rulers": "lora"}, "compares with plain LoRA"),
        ({"methods": "lora-matched:r=64"}, "lora-matched chooses its rank; write lora:r=N"),
        ({"methods": "lora-matched:lora.target_modules=[absent]"}, "lora: PEFT refuses it"),
        ({"methods": "lora-matched", "settings": {"lora.rank_pattern": {"q_proj": 2}}}, "lora.rank_pattern would keep"),
        ({"methods": "lora:training.learning_rate=1"}, "training.learning_rate, which a study varies; use lr_sweep"),
        ({"methods": "lora:training.seed=1"}, "training.seed, which a study varies; use seeds"),
        ({"methods": "lora:training.loraplus_ratio=4"}, "did you mean 'loraplus_lr_ratio'"),
        ({"settings": {"method": "lora"}}, "settings sets method, which a study varies; use methods"),
        ({"settings": {"evaluation.examples": 1}}, "4 held-out examples or more, found 1"),
        ({"settings": {"data.test_examples": 2}}, "4 held-out examples or more, found 2"),
        ({"lr_sweep": (1e-3, 1e-3)}, "different positive numbers"),
        ({"lr_sweep": ["fast"]}, "different positive numbers"),
        ({"lr_sweep": {"dora": (1e-3,)}}, "'dora', which is none of methods"),
        ({"lr_sweep": ["1e-3", "1e-2"]}, "two sweeps to one name, or two without a name"),
        ({"lr_sweep": {"lora-over": (1e-4,)}, **PAIR}, "no rates for 'lora'"),
        ({"lr_sweep": {"words/lora": (1e-4,)}, **PAIR}, "no rates for 'lora-over'"),
        ({"lr_sweep": {"words/dora": (1e-4,), "": (1e-3,)}}, "not RECIPE/METHOD"),
        ({"lr_sweep": {"lora": (1e-3,)}, "rulers": "lora:r=16"}, "no rates for 'lora:r=16'"),
        ({"recipes": "lora", "lr_sweep": {"lora": (1e-4,), "": (1e-3,)}}, "a method and a recipe"),
        ({"recipes": ["demo", "demo"]}, "give recipes different names"),
        ({"tuning_seeds": 4}, "tuning_seeds is 4, expected 1 to 3"),
        ({"tuning_seeds": 0}, "tuning_seeds is 0, expected 1 or more"),
        ({"rulers": "lora"}, "rulers names 'lora', which is one of methods"),
        ({"required": 2}, "expected 1 to 1, the number of recipes"),
        ({"names": {"wide": "lora:r=64"}}, "names 'lora:r=64', which is none of methods and rulers"),
        ({"names": ["wide"]}, "expected NAME=METHOD"),
        ({"names": {"a b": "lora"}}, "names 'a b', expected letters"),
        ({"names": ["a=lora", "b=lora"]}, "two names to one method"),
        ({"names": {"dora": "lora:r=64"}, "methods": "dora"}, "'dora' is a method"),
    ],
)
def test_what_is_no_study_is_refused(asked: dict[str, Any], message: str, recipe: Path) -> None:
    whole: dict[str, Any] = {"recipes": recipe, "methods": "lora", "lr_sweep": (1e-3,)} | asked
    with pytest.raises(ConfigError, match=message):
        grid_of(StudyRequest(output="out", **whole))


def test_a_recipe_that_leads_out_of_the_study_is_refused(recipe: Path, tmp_path: Path) -> None:
    odd = tmp_path / "...yaml"
    odd.write_bytes(recipe.read_bytes())
    with pytest.raises(ConfigError, match="give it another name"):
        make_grid([str(odd)], {"lora": [1e-3]}, 1, {})


def asked(methods: Sequence[str], recipes: Sequence[str], **lr_sweep: tuple[float, ...]) -> StudyRequest:
    sweep = {"" if name == "others" else name: rates for name, rates in lr_sweep.items()}
    return StudyRequest(recipes, "out", methods=methods, lr_sweep=sweep, seeds=1)


def test_a_method_may_have_a_sweep_of_its_own() -> None:
    svd = "lora-over:decomposition=svd"
    found = asked(["lora", svd], ["gsm8k"], others=(1e-3, 1e-2), **{svd: (1e-4, 3e-4)})
    assert found.rates == {"lora": (1e-3, 1e-2), svd: (1e-4, 3e-4)}
    assert found.task_rates == {}


def test_a_long_method_has_a_folder_that_a_file_system_takes(recipe: Path) -> None:
    methods = [f"lora-over:sites={[name * 60]}" for name in ("*.layers.0.*a", "*.layers.0.*b")]
    grid = make_grid([str(recipe)], dict.fromkeys(("lora", *methods), (1e-3,)), 1, {})
    assert len({found.folder for found in grid}) == 3
    assert all(len(part) < 200 for found in grid for part in found.folder.parts)


def test_a_task_may_have_a_sweep_of_its_own(recipe: Path) -> None:
    found = asked(["lora", "lora-over"], [str(recipe)], **{recipe.stem: (1e-4, 3e-4)})
    runs = grid_of(found)
    assert [(run.method, run.rate) for run in runs] == [
        (method, rate) for method in ("lora", "lora-over") for rate in (1e-4, 3e-4)
    ]
    found = asked(["lora"], [str(recipe), "other"], lora=(1e-3,), **{recipe.stem: (1e-4,)})
    assert (found.rates, found.task_rates) == ({"lora": (1e-3,)}, {recipe.stem: (1e-4,)})


def test_a_method_may_have_a_sweep_of_its_own_on_one_task(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_bytes(recipe.read_bytes())
    own = f"{recipe.stem}/lora-over"
    found = asked(
        ["lora", "lora-over"], [str(recipe), str(other)], others=(1e-3,), other=(1e-2,), **{own: (1e-4, 3e-4)}
    )
    runs = grid_of(found)
    assert [(run.task, run.method, run.rate) for run in runs] == [
        (recipe.stem, "lora", 1e-3),
        (recipe.stem, "lora-over", 1e-4),
        (recipe.stem, "lora-over", 3e-4),
        ("other", "lora", 1e-2),
        ("other", "lora-over", 1e-2),
    ]
