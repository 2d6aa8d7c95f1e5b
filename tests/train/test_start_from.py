"""A run that starts from trained adapters: the first A and B, and what a smaller rank leaves out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import loraover
from loraover.callbacks.step_norm import factors
from loraover.common.reporter import SILENT
from loraover.models.load import load_model, resolve_model
from loraover.sources.address import HubName, address_text, read_address
from loraover.sources.fetch import Fetched
from loraover.training.launch.settings import with_adapter
from loraover.training.plan import make_plan
from loraover.training.recipe import load_recipe
from loraover.training.run.folder import with_commits
from loraover.training.run.folder import write_recipe as keep_recipe
from loraover.training.run_result import read_run
from loraover.training.start import START_FILE, pin_start
from loraover_lab.study.outcome import digest

from support.conversions import BOTH, SOURCES, load_base, make_base, make_source, peft_deltas
from support.lines import Lines
from support.make_checkpoint import ATTENTION, make_checkpoint
from support.refusals import only_error
from support.resumed_run import assert_same_run, steps_taken, stopped
from support.started import adapter, started
from support.tiny_experts import EXPERT_LORA, expert_lora, tiny_moe
from support.tiny_experts import peft_deltas as expert_deltas
from support.tiny_hub import write_recipe
from support.tiny_models import lora_matrices, saved, token_ids
from support.train_command import train
from support.trained_run import loss, matrices
from support.versions import needs_expert_stacks

pytestmark = pytest.mark.usefixtures("no_network")

Matrix = NDArray[np.float64]
U32 = 2.0**-24


def updates(model: PeftModel) -> dict[str, Matrix]:
    """scaling * B A of each module in float64."""
    return {path: one.scaling * (one.b @ one.a).numpy() for path, one in factors(model).items()}


def expected(base: Path, folder: Path) -> dict[str, Matrix]:
    """delta_W of each module, as PEFT merges it in float64."""
    return {path: delta.numpy() for path, delta in peft_deltas(base, folder).items()}


def norm(matrices: Sequence[Matrix]) -> float:
    return math.sqrt(sum(float(np.square(matrix).sum()) for matrix in matrices))


def distance(model: PeftModel, wanted: Mapping[str, Matrix]) -> float:
    """Norm of the difference over all modules, relative to that of the wanted update."""
    found = updates(model)
    assert wanted.keys() <= found.keys()
    off = [update - wanted.get(path, np.zeros_like(update)) for path, update in found.items()]
    return norm(off) / norm([*wanted.values()])


def tail(wanted: Mapping[str, Matrix], ranks: Mapping[str, int]) -> float:
    """Smallest relative error of these ranks, by the ends of module names, from dense SVDs (Eckart and Young)."""
    left: list[Matrix] = []
    for path, delta in wanted.items():
        rank = next(r for end, r in ranks.items() if path.endswith(end))
        left.append(np.asarray(np.linalg.svd(delta, compute_uv=False)[rank:], dtype=np.float64))
    return norm(left) / norm([*wanted.values()])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=token_ids()).logits
    return found


# The first A and B


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 7, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 5}},
    ],
)
def test_a_lora_of_the_same_rank_and_scaling_keeps_its_bits(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    source = adapter(base, tmp_path / "source", **lora)
    model, origin = started(base, tmp_path / "out", source, **lora)
    kept = load_file(source / "adapter_model.safetensors")
    found = {name.replace(".default", ""): matrix for name, matrix in lora_matrices(model).items()}
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[key], kept[key]) for key in kept)
    assert (origin.relative_error, origin.modules, origin.fresh_modules) == (0, 14, 0)
    assert origin.sources[0].path == str(source)
    assert origin.sources[0].sha256.keys() == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_smaller_rank_is_the_best_one_and_its_error_is_told(
    base: Path, tmp_path: Path, rank: int, use_rslora: bool
) -> None:
    source, report = adapter(base, tmp_path / "source", r=6, lora_alpha=9), Lines()
    lora = {"r": rank, "lora_alpha": 7, "use_rslora": use_rslora, "rank_pattern": {"down_proj": 2}}
    model, origin = started(base, tmp_path / "out", source, report, **lora)
    wanted = expected(base, source)
    best = tail(wanted, {"down_proj": 2, "": rank})
    assert 0.05 < best < 0.95
    assert origin.relative_error == pytest.approx(best, rel=1e-6)
    assert distance(model, wanted) == pytest.approx(best, rel=1e-6)
    assert any(f"leaves out {best:.3g} of the update's norm" in line for line in report.lines)
    for one in factors(model).values():
        assert torch.allclose(one.a.norm(dim=1), one.b.norm(dim=0), rtol=1e-5)


def test_a_larger_rank_adds_directions_that_can_be_trained(base: Path, tmp_path: Path) -> None:
    """Zeros in both A and B would stay zeros for ever."""
    source = adapter(base, tmp_path / "source", r=2)
    model, origin = started(base, tmp_path / "out", source, r=5)
    assert origin.relative_error == 0
    assert distance(model, expected(base, source)) < 4 * U32
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert not parameter[:, 2:].any()
            assert parameter.grad is not None
            assert bool((parameter.grad.norm(dim=0) > 0).all())


@pytest.mark.parametrize(
    ("name", "rank", "error"),
    [
        ("rslora with patterns", 7, 4 * U32),
        ("loha", 9, 3e-6),
        ("pissa", 6, 3e-6),
        ("lora of an embedding", 3, 4 * U32),
        ("dora", 5, None),
    ],
)
def test_other_kinds_start_as_peft_runs_them(tmp_path: Path, name: str, rank: int, error: float | None) -> None:
    source = SOURCES[name]
    base = make_base(tmp_path / "base", source.base)
    folder = make_source(base, tmp_path / "source", source)
    targets = source.options.get("target_modules", BOTH)
    model, origin = started(base, tmp_path / "out", folder, r=rank, lora_alpha=3, target_modules=targets)
    wanted = expected(base, folder)
    if error is not None:
        assert origin.relative_error == 0
        assert distance(model, wanted) < error
    else:
        best = tail(wanted, {"": rank})
        assert best > 0.01
        assert origin.relative_error == pytest.approx(best, rel=1e-4)
        assert distance(model, wanted) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("rank", [4, 6])
def test_a_loraover_checkpoint_starts_a_run(tmp_path: Path, rank: int) -> None:
    made = make_checkpoint(tmp_path)
    lora: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ATTENTION}
    model, origin = started(made.base, tmp_path / "out", made.path, **lora)
    assert origin.relative_error == 0
    assert "loraover.safetensors" in origin.sources[0].sha256
    if rank == 4:
        found, kept = lora_matrices(model), lora_matrices(made.model)
        assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert torch.allclose(logits(model), logits(made.model), atol=1e-5)


def test_the_sum_of_several_adapters_starts_a_run(base: Path, tmp_path: Path) -> None:
    first = adapter(base, tmp_path / "first", seed=1, r=2)
    second = adapter(base, tmp_path / "second", seed=2, r=3, target_modules=["q_proj", "down_proj"])
    model, origin = started(base, tmp_path / "out", {str(first): 0.5, str(second): -2}, r=5)
    deltas, others = expected(base, first), expected(base, second)
    halves, minus = ({p: w * m for p, m in one.items()} for w, one in ((0.5, deltas), (-2, others)))
    assert distance(model, added(halves, minus)) < 8 * U32
    assert [(one.path, one.weight) for one in origin.sources] == [(str(first), 0.5), (str(second), -2)]
    model, origin = started(base, tmp_path / "list", [first, second], r=2)
    assert origin.relative_error == pytest.approx(tail(added(deltas, others), {"": 2}), rel=1e-6)


def added(first: Mapping[str, Matrix], other: Mapping[str, Matrix]) -> dict[str, Matrix]:
    return {path: delta + other.get(path, np.zeros_like(delta)) for path, delta in first.items()}


def test_a_sum_takes_adapters_of_other_kinds(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "even")
    loha = make_source(base, tmp_path / "loha", SOURCES["loha"])
    plain = adapter(base, tmp_path / "plain", target_modules=["q_proj"])
    model, _ = started(base, tmp_path / "out", [loha, plain], r=16, target_modules=BOTH)
    assert distance(model, added(expected(base, loha), expected(base, plain))) < 3e-6


@needs_expert_stacks
@pytest.mark.parametrize("rank", [4, 5])
def test_experts_start_from_those_of_an_adapter(tmp_path: Path, rank: int) -> None:
    saved(tiny_moe(), tmp_path / "base")
    trained = expert_lora(load_base(tmp_path / "base"), tmp_path / "source")
    lora = {key: value for key, value in EXPERT_LORA.items() if key != "task_type"} | {"r": rank}
    model, origin = started(tmp_path / "base", tmp_path / "out", tmp_path / "source", **lora)
    assert origin.relative_error == 0
    found, kept = expert_deltas(model), expert_deltas(trained)
    assert len(kept) == 16
    assert found.keys() == kept.keys()
    assert all(torch.allclose(found[path], kept[path], atol=1e-6) for path in kept)
    if rank == 4:
        matrices, others = lora_matrices(model), lora_matrices(trained)
        assert all(torch.equal(matrices[name], others[name]) for name in others)


def test_modules_that_the_adapter_lacks_start_as_usual(base: Path, tmp_path: Path) -> None:
    source, report = adapter(base, tmp_path / "source", target_modules=["q_proj"]), Lines()
    model, origin = started(base, tmp_path / "out", source, report)
    plain = load_recipe(write_recipe(tmp_path / "plain.yaml", base))
    torch.manual_seed(7)
    untouched = with_adapter(load_model(resolve_model(str(base))), plain, "CAUSAL_LM", resolve_model(str(base)))
    others = lora_matrices(untouched)
    assert (origin.modules, origin.fresh_modules) == (2, 12)
    assert "12 other modules start as PEFT starts them, with B = 0" in report.lines
    for name, matrix in lora_matrices(model).items():
        assert torch.equal(matrix, others[name]) == ("q_proj" not in name)


# Runs


@pytest.fixture
def source(base: Path, tmp_path: Path) -> Path:
    return adapter(base, tmp_path / "source", r=6)


@pytest.fixture
def recipe(base: Path, source: Path, tmp_path: Path) -> Path:
    parts: dict[str, Any] = {"lora": {"start_from": str(source), "lora_dropout": 0.2}}
    parts |= {"training": {"max_steps": 7}, "evaluation": {"exact_match": False}}
    return write_recipe(tmp_path / "recipe.yaml", base, **parts)


@pytest.mark.process
def test_a_resumed_run_needs_its_source_no_more(recipe: Path, source: Path, tmp_path: Path) -> None:
    assert train(recipe, tmp_path / "whole") == 0
    out = stopped(recipe, tmp_path / "out")
    shutil.rmtree(source)
    with steps_taken() as taken:
        assert train(recipe, out, "--resume") == 0
    assert taken == [5, 6, 7]
    assert_same_run(out, tmp_path / "whole")
    result = read_run(out)
    assert result.started_from is not None
    assert 0.05 < result.started_from.relative_error < 0.95
    assert "source" in result.facts()["started from"]
    assert "started from" in (out / "adapter" / "README.md").read_text()


Elsewhere = Callable[[Callable[[str, Any], Fetched]], None]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """Takes the function that stands in for the download of adapters from the hub, from servers and from buckets."""
    return lambda fetch: monkeypatch.setattr("loraover.training.start.fetch_adapter", fetch)


@pytest.mark.process
def test_secrets_of_an_address_stay_out_of_what_is_published(
    base: Path, source: Path, tmp_path: Path, elsewhere: Elsewhere
) -> None:
    elsewhere(lambda name, say: Fetched(source, name))
    recipe = write_recipe(tmp_path / "r.yaml", base, training={"max_steps": 1}, evaluation={"examples": 0})
    start = {"lora.start_from": "https://me:sesame@localhost/maths?token=sesame"}
    loraover.train(recipe, tmp_path / "out", overrides=start)
    published = [path for path in (tmp_path / "out" / "adapter").iterdir() if path.suffix in (".json", ".md")]
    assert "localhost/maths" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert not [path.name for path in (*published, tmp_path / "out" / "run.json") if "sesame" in path.read_text()]


@pytest.mark.process
def test_the_loss_before_training_is_that_of_the_adapter(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", base, evaluation={"exact_match": False})
    done = loraover.train(recipe, tmp_path / "first", overrides={"method": "lora"})
    start = {"lora.start_from": str(tmp_path / "first" / "adapter"), "training.max_steps": 1}
    found = loraover.train(recipe, tmp_path / "again", overrides=start)
    assert loss(found.before) == pytest.approx(loss(done.after), rel=1e-5)
    assert loss(found.before) < loss(done.before) - 0.01


@pytest.mark.process
def test_federated_clients_share_the_b_of_the_adapter_and_keep_its_a(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    source = adapter(base, tmp_path / "source")
    parts: dict[str, Any] = {"lora": {"start_from": str(source)}, "evaluation": {"examples": 0}}
    result = loraover.train(write_recipe(tmp_path / "r.yaml", base, method="federated", **parts), tmp_path / "out")
    assert result.started_from is not None
    kept, found = load_file(source / "adapter_model.safetensors"), matrices(tmp_path / "out")
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[key], kept[key]) == ("lora_A" in key) for key in kept)


@pytest.mark.process
def test_a_plan_and_its_trial_need_no_adapter_and_a_run_does(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", base, lora={"start_from": str(tmp_path / "absent")})
    assert make_plan(load_recipe(recipe), tries=True).step_seconds is not None
    assert train(recipe, tmp_path / "out") == 2
    assert "lora.start_from: " in only_error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_start_is_part_of_a_recipe_and_its_absence_is_not(base: Path, tmp_path: Path) -> None:
    asked = load_recipe(write_recipe(tmp_path / "r.yaml", base))
    other = load_recipe(asked, {"lora.start_from": "maths"})
    assert digest(other) != digest(asked)
    assert digest(load_recipe(other, {"lora.start_from": {"maths": 2}})) != digest(other)
    assert digest(load_recipe(other, {"lora.start_from": None})) == digest(asked)
    assert load_recipe(other) == other


SHA = 40 * "c"


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("runs/maths/", "runs/maths"),
        ("./runs/maths", "runs/maths"),
        ("s3://bucket/maths/", "s3://bucket/maths"),
        *((name, f"owner/maths@{SHA}") for name in ("owner/maths@main", "hf://owner/maths", f"owner/maths@{SHA}")),
        ("https://huggingface.co/owner/maths/tree/main", f"owner/maths@{SHA}"),
    ],
)
def test_a_run_is_resumed_however_its_start_is_spelt(
    base: Path, tmp_path: Path, elsewhere: Elsewhere, name: str, kept: str
) -> None:
    def fetch(name: str, say: Any) -> Fetched:
        found = read_address(name)
        return Fetched(tmp_path, f"{found.name}@{commit}" if isinstance(found, HubName) else address_text(name))

    elsewhere(fetch)
    commit, asked = SHA, load_recipe(write_recipe(tmp_path / "r.yaml", base, lora={"start_from": name}))
    pinned = pin_start(asked, tmp_path, SILENT)
    assert pinned.lora.start_from == kept
    keep_recipe(tmp_path, pinned)
    (tmp_path / START_FILE).write_text("{}")
    assert pin_start(with_commits(asked, tmp_path), tmp_path, SILENT).lora == pinned.lora
    commit = 40 * "d"
    moved = pin_start(with_commits(asked, tmp_path), tmp_path, SILENT).lora.start_from
    assert moved == (f"owner/maths@{commit}" if "main" in name else kept)


@pytest.mark.parametrize("start", ["owner/maths", ["owner/maths", "here"], {"owner/maths": 0.5, "here": 2.0}])
def test_a_run_keeps_the_commits_of_the_hub(base: Path, tmp_path: Path, elsewhere: Elsewhere, start: Any) -> None:
    def fetch(name: str, say: Any) -> Fetched:
        return Fetched(tmp_path, f"{name}@c0ffee" if "/" in name else name)

    elsewhere(fetch)
    asked = load_recipe(write_recipe(tmp_path / "r.yaml", base, lora={"start_from": start}))
    pinned = pin_start(asked, tmp_path, SILENT)
    names = {"owner/maths": "owner/maths@c0ffee", "here": "here"}
    assert pinned.lora.start_weights == {names[name]: weight for name, weight in asked.lora.start_weights.items()}
    keep_recipe(tmp_path, pinned)
    assert with_commits(asked, tmp_path).lora == pinned.lora
    for other in ("owner/code", None, ["owner/maths", "code", "law"]):
        changed = load_recipe(asked, {"lora.start_from": other})
        assert with_commits(changed, tmp_path).lora == changed.lora
