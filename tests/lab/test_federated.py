"""Method federated: a round by hand, noise, the accountant, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, Trainer

import loraover
from loraover.common.errors import ConfigError
from loraover.training.plan import make_plan
from loraover.training.recipe import load_recipe
from loraover.training.run_result import Privacy, RunResult
from loraover_lab.methods.federated import Federated, epsilon_of, steps_within

from oracles.methods import clipped_mean, gaussian_epsilon
from support.tiny_hub import save_llama, tiny_tokenizer, write_recipe
from support.tiny_models import VOCABULARY, lora_matrices, tiny_llama, with_lora
from support.trained_run import matrices, metrics

pytest.importorskip("opacus", reason="the extra private is not installed")

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


def make(path: Path, base: Path, **settings: Any) -> Path:
    return write_recipe(path, base, method="federated", federated=settings, evaluation={"exact_match": False})


def train(recipe: Path, output: Path, **overrides: Any) -> tuple[RunResult, Trainer]:
    seen: list[Trainer] = []
    train_it = Federated.train

    def watching(self: Federated, trainer: Trainer, *rest: Any) -> None:
        seen.append(trainer)
        train_it(self, trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federated, "train", watching)
        result = loraover.train(recipe, output, overrides={k.replace("__", "."): v for k, v in overrides.items()})
    return result, seen[0]


def guarantee(result: RunResult) -> Privacy:
    assert result.privacy is not None
    return result.privacy


def b_of(output: Path) -> dict[str, Tensor]:
    return {key: value for key, value in matrices(output).items() if "lora_B" in key}


@pytest.mark.parametrize("local_steps", [1, 2])
def test_two_clients_without_noise_are_clipped_steps_and_averages(local_steps: int, base: Path, tmp_path: Path) -> None:
    clip, rate, steps, rows = 0.21, 0.5, 2, 7
    recipe = make(tmp_path / "r.yaml", base, clients=2, local_steps=local_steps, clip=clip, noise_multiplier=0)
    result, trainer = train(
        recipe,
        tmp_path / "out",
        data__train_examples=rows,
        training__max_steps=steps,
        training__optim="sgd",
        training__learning_rate=rate,
        training__lr_scheduler_type="constant",
        training__per_device_train_batch_size=4,  # every client draws all of its rows
    )
    loader = trainer.get_train_dataloader()
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    model = by_hand(base, tmp_path / "out")
    names = list(b_of(tmp_path / "out"))
    norms: list[float] = []
    average = [np.zeros(tuple(b.shape)) for b in b_of(tmp_path / "out").values()]
    for _ in range(steps // local_steps):
        shared, average = average, [np.zeros_like(total) for total in average]
        for client in (order[::2], order[1::2]):
            values = shared
            for _ in range(local_steps):
                gradients = [row_gradient(model, names, values, loader, row) for row in client]
                norms += [math.sqrt(sum(float((g**2).sum()) for g in row)) for row in gradients]
                values = [v - rate * g for v, g in zip(values, clipped_mean(gradients, clip), strict=True)]
            average = [total + v * len(client) / rows for total, v in zip(average, values, strict=True)]
    assert min(norms) < clip < max(norms)
    for found, expected in zip(b_of(tmp_path / "out").values(), average, strict=True):
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=2e-6)
    assert max(np.abs(total).max() for total in average) > 1e-3
    assert guarantee(result).epsilon is None
    assert "no noise" in result.facts()["differential privacy"]
    assert result.trained_parameters == sum(total.size for total in average)
    assert result.lora_parameters > 2 * result.trained_parameters - 1000


def by_hand(base: Path, output: Path) -> Any:
    """The run's model in float64, with the run's A."""
    model = AutoModelForCausalLM.from_pretrained(base).double()
    return PeftModel.from_pretrained(model, str(output / "adapter"), autocast_adapter_dtype=False).double().eval()


def row_gradient(model: Any, names: list[str], values: list[Any], loader: Any, row: int) -> list[Any]:
    """Gradient of one row's mean loss in B, at some values of B."""
    parameters = dict(model.named_parameters())
    mine = [parameters[name.replace(".weight", ".default.weight")] for name in names]
    for parameter, value in zip(mine, values, strict=True):
        parameter.data.copy_(torch.tensor(value))
        parameter.requires_grad_(True)
    batch = loader.collate_fn([loader.dataset[row]])
    loss = model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}).loss
    return [g.numpy() for g in torch.autograd.grad(loss, mine)]


def test_every_step_draws_some_rows_and_adds_noise_of_the_stated_size(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are clipped to almost nothing, and the noise multiplier is so large that B is the noise."""
    drawn: list[int] = []

    def watched(self: Federated, *rest: Any) -> list[float]:
        losses = step(self, *rest)
        drawn.append(len(losses))
        return losses

    step = Federated._step
    monkeypatch.setattr(Federated, "_step", watched)
    recipe = make(tmp_path / "r.yaml", base, clients=1, clip=1e-3, noise_multiplier=1e4, noise_seed=0)
    train(
        recipe,
        tmp_path / "out",
        training__optim="sgd",
        training__learning_rate=1.0,
        training__lr_scheduler_type="constant",
        training__max_steps=9,
        training__per_device_train_batch_size=1,
        training__gradient_accumulation_steps=2,  # two of 20 rows on average
    )
    assert len(drawn) == 9
    assert min(drawn) == 0
    assert max(drawn) > 2
    assert sum(drawn) == pytest.approx(18, abs=3 * math.sqrt(9 * 20 * 0.1 * 0.9))
    noise = torch.cat([b.flatten() for b in b_of(tmp_path / "out").values()])
    assert float(noise.std()) == pytest.approx(10 / 2 * 3, rel=0.05)  # sigma C / batch, nine times
    assert abs(float(noise.mean())) < 1


def test_clients_train_and_the_run_says_what_it_has_spent(base: Path, tmp_path: Path) -> None:
    from opacus.accountants import RDPAccountant

    recipe = make(tmp_path / "r.yaml", base, clients=3, local_steps=2, noise_multiplier=0.8, epsilon=50.0)
    result, _ = train(recipe, tmp_path / "out", training__max_steps=5)
    accountant = RDPAccountant()
    for _ in range(5):
        accountant.step(noise_multiplier=0.8, sample_rate=4 / 6)  # 20 rows: the smallest client has 6
    found = guarantee(result)
    assert found.epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert (found.clients, found.delta, result.served_rank, result.steps) == (3, 1e-5, 4, 5)
    assert f"epsilon {found.epsilon:.4g} at delta 1e-05" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    steps = [line for line in metrics(tmp_path / "out") if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 5]
    assert steps[-1]["epsilon"] == found.epsilon


def test_noise_comes_from_the_system_unless_a_seed_is_given(base: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path / "r.yaml", base, clients=2)
    seeds = {"one": 3, "two": 3, "secret": None, "again": None}
    ran = {
        name: train(recipe, tmp_path / name, training__max_steps=1, federated__noise_seed=seed)[0]
        for name, seed in seeds.items()
    }
    first = {name: next(iter(b_of(tmp_path / name).values())) for name in ran}
    assert torch.equal(first["one"], first["two"])
    assert not any(torch.equal(first["one"], first[name]) for name in ("secret", "again"))
    assert not torch.equal(first["secret"], first["again"])
    assert "as long as federated.noise_seed is secret" in ran["one"].facts()["differential privacy"]
    assert "secret" not in ran["secret"].facts()["differential privacy"]


@pytest.mark.parametrize(("noise", "rate", "steps"), [(2.0, 1.0, 20), (0.45, 2 / 494, 100)])
def test_epsilon_is_that_of_the_sampled_gaussian_mechanism(noise: float, rate: float, steps: int) -> None:
    from opacus.accountants import RDPAccountant

    expected = gaussian_epsilon(noise, rate, steps, 1e-5, RDPAccountant.DEFAULT_ALPHAS)
    assert epsilon_of(noise, rate, steps, 1e-5) == pytest.approx(expected, rel=1e-6)
    assert epsilon_of(0.0, rate, steps, 1e-5) == math.inf
    assert epsilon_of(noise, rate, 0, 1e-5) == 0


def test_a_budget_that_the_run_would_exceed_is_refused_with_the_steps_that_fit(base: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path / "r.yaml", base, clients=2, epsilon=8.0)
    fit = steps_within(8.0, 1.0, 0.4, 400, 1e-5)
    assert epsilon_of(1.0, 0.4, fit, 1e-5) <= 8.0 < epsilon_of(1.0, 0.4, fit + 1, 1e-5)
    with pytest.raises(ConfigError, match=rf"federated.epsilon is 8, but 400 steps.* {fit} steps would fit"):
        train(recipe, tmp_path / "out", training__max_steps=400)
    assert not (tmp_path / "out").exists()


def test_turns_of_one_conversation_are_refused(base: Path, tmp_path: Path) -> None:
    said = ["how many?", "two", "and then?", "four"]
    messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (messages[:2], messages)))
    chat = save_llama(tmp_path / "chat", chat=True)
    with pytest.raises(ConfigError, match=r"example 3 is a later turn of the conversation of example 2"):
        train(
            make(tmp_path / "r.yaml", chat, clients=2),
            tmp_path / "out",
            data={"train": str(rows)},
            evaluation__examples=0,
        )
    assert not (tmp_path / "out").exists()


def test_a_module_whose_inputs_are_no_rows_is_refused(tmp_path: Path) -> None:
    """OPT gives all tokens of a batch to its feed-forward layers as if each were a row."""
    sizes = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=VOCABULARY, num_attention_heads=2, max_position_embeddings=256, **sizes)
    base = tmp_path / "opt"
    OPTForCausalLM(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    recipe = make(tmp_path / "r.yaml", base, clients=2)
    with pytest.raises(ConfigError, match=r"lora.target_modules: .*fc1.* gradients for \d+ rows"):
        train(recipe, tmp_path / "out", lora__target_modules=["fc1"], training__max_steps=2)
    result, _ = train(recipe, tmp_path / "other", lora__target_modules=["q_proj"], training__max_steps=2)
    assert result.steps == 2


def test_a_resumption_is_refused_with_its_reason(base: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path / "r.yaml", base, clients=2)
    (tmp_path / "out").mkdir()
    shown = recipe.read_text()
    (tmp_path / "out" / "recipe.yaml").write_text(shown)
    with pytest.raises(ConfigError, match="would spend privacy that is not accounted for"):
        loraover.train(recipe, tmp_path / "out", resume=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "out" / "recipe.yaml").read_text() == shown


def test_a_plan_counts_the_rows_and_moments_of_all_clients(base: Path, tmp_path: Path) -> None:
    plans = [make_plan(load_recipe(make(tmp_path / "r.yaml", base, clients=clients))) for clients in (1, 3)]
    assert [plan.examples for plan in plans] == [16, 48]
    assert plans[1].optimizer_states == 3 * plans[0].optimizer_states
    drawn = lora_matrices(with_lora(tiny_llama(), r=4, target_modules="all-linear"))
    trained = 4 * sum(matrix.numel() for name, matrix in drawn.items() if "lora_B" in name)
    assert plans[0].optimizer_states == 2 * trained
    assert plans[0].gradients == 5 * trained  # of a sum and of each of 4 rows


def test_opacus_that_is_missing_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opacus", None)
    with pytest.raises(ConfigError, match=r'pip install "\.\[private\]"'):
        loraover.train(make(tmp_path / "r.yaml", base, clients=2), tmp_path / "out")
