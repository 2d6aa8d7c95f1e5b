"""The judge of rollouts inside TRL's trainers, on a tiny Llama and an engine in which faults are planted live."""

from __future__ import annotations

import copy
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerControl, TrainerState

import loraover
from loraover import LoraOverCallback, LoraOverConfig
from loraover.common.errors import CheckpointError, ConfigError, ParityError
from loraover_serve import RolloutJudge
from loraover_serve.judge.names import INTERMITTENT, NOT_APPLIED, STALE
from loraover_serve.rollouts.policy import EngineNumbers, Policy, Row

from support.plain_adapter import tiny_decoder
from support.tiny_experts import EXPERT_SIZES
from support.tiny_hub import save_llama, write_recipe
from support.tiny_models import fill_b
from support.train_command import data_file

trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

from loraover_serve import VerifyRollouts  # noqa: E402
from loraover_serve.rollouts.sources import SOURCES  # noqa: E402
from loraover_serve.rollouts.trl import FAILURE_FILE, STATE_FILE  # noqa: E402

from support.async_trainer import async_trainer, online_dpo_trainer  # noqa: E402
from support.online_trainers import PROMPTS, online_trainer, planted  # noqa: E402

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base") / "llama")


def run(trainer: Any, **options: Any) -> VerifyRollouts:
    verify = VerifyRollouts(trainer, **({"rows": 16, "merged": False} | options))
    trainer.train()
    return verify


def verdicts(trainer: Any) -> list[float]:
    return [line["verify/verdict"] for line in trainer.state.log_history if "verify/verdict" in line]


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_right_engine_is_as_trained_at_every_step_with_an_adapter(
    kind: str, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loraover")
    with planted():
        trainer = online_trainer(kind, llama, tmp_path, steps=5, report_to="tensorboard")
        run(trainer)
    assert verdicts(trainer) == [0.0, 1.0, 1.0, 1.0, 1.0]
    last = next(line for line in reversed(trainer.state.log_history) if "verify/strength" in line)
    assert last["verify/low"] <= last["verify/strength"] <= last["verify/high"]
    assert last["verify/strength"] == pytest.approx(1, abs=2e-3)
    assert 0 <= last["verify/noise"] < 1e-5 < last["verify/effect"]
    told = [record.message for record in caplog.records if "rollouts" in record.message]
    assert [line.split(": ")[2] for line in told] == ["no verdict", "as trained"]
    assert not (tmp_path / FAILURE_FILE).exists()


@pytest.mark.parametrize(
    ("fault", "step", "name"),
    [
        ("base", 2, NOT_APPLIED),
        ("half", 2, "half the scale"),
        ("stale", 3, STALE),
        ("mixed", 2, INTERMITTENT),
        ("attention", 2, "attention layers only"),
        ("upper", 2, "the upper half of the layers missing"),
    ],
)
def test_a_fault_is_named_at_the_first_step_that_shows_it(
    fault: str, step: int, name: str, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At step 2, an adapter that is stale by one is the base model, since B was zero."""
    with planted(fault):
        trainer = online_trainer("GRPO", llama, tmp_path, steps=4)
        verify = run(trainer)
    assert verdicts(trainer)[1:] == [-1.0, -1.0, -1.0]
    lines = [record.message for record in caplog.records if "differs" in record.message]
    assert any(line.startswith(f"step {step}: rollouts: differs: {name}") for line in lines)
    assert verify.finding is not None
    assert verify.finding.fault == name
    assert len(verify.judge.state_dict()["steps"]) == 3, "an alarm does not add its step again"
    failure = json.loads((tmp_path / FAILURE_FILE).read_text())
    assert (failure["step"], failure["fault"], failure["verdict"]) == (4, name, "differs")
    assert failure["to_do"]


def test_a_fault_that_begins_later_ends_a_run_that_stops(llama: Path, tmp_path: Path) -> None:
    with planted("base", since=2):
        trainer = online_trainer("GRPO", llama, tmp_path, steps=8)
        with pytest.raises(ParityError, match=r"after step 4.*served as base.*What to do: the sync has not reached"):
            run(trainer, action="stop")
    assert verdicts(trainer) == [0.0, 1.0, -1.0, -1.0]
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / FAILURE_FILE).read_text())["step"] == 4


def one_reads_for_all(trainer: Any, checkpoint: Path, known: RolloutJudge) -> None:
    """Restore the judge in a process that cannot read the checkpoint."""
    content, judge = (checkpoint / STATE_FILE).read_bytes(), RolloutJudge()
    verify = VerifyRollouts(trainer, merged=False, judge=judge)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "is_main_process", False)
        first = [content]  # of the process that reads
        broadcast = "loraover_serve.rollouts.trl.broadcast_object_list"
        patch.setattr(broadcast, lambda found: first if found == [None] else found)
        trainer.args.resume_from_checkpoint = str(checkpoint.parent / "elsewhere")
        verify.on_train_begin(trainer.args, TrainerState(global_step=3), TrainerControl())
    assert judge.noise == known.noise


def test_a_resumed_run_keeps_what_the_judge_has_learned(llama: Path, tmp_path: Path) -> None:
    with planted():
        first = online_trainer("GRPO", llama, tmp_path, steps=3, save_strategy="steps", save_steps=3)
        known = run(first).judge
        assert known.noise is not None
        trainer = online_trainer("GRPO", llama, tmp_path, steps=4)
        judge = RolloutJudge()
        verify = VerifyRollouts(trainer, rows=16, merged=False, judge=judge)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert judge.noise == known.noise
        assert verify.finding is not None
        assert verify.finding.tokens > 16 * 8  # of earlier steps as well
        one_reads_for_all(online_trainer("GRPO", llama, tmp_path, steps=4), tmp_path / "checkpoint-3", known)
        (tmp_path / "checkpoint-3" / STATE_FILE).write_text('{"schema": 1, "judge": {}}')
        trainer = online_trainer("GRPO", llama, tmp_path, steps=4)
        VerifyRollouts(trainer, merged=False)
        with pytest.raises(CheckpointError, match=f"{STATE_FILE}.*begins anew"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("fault", ["", "stale"])
def test_cores_are_judged_by_the_a_and_b_that_are_synced(fault: str, llama: Path, tmp_path: Path) -> None:
    with planted(fault):
        over = LoraOverCallback(LoraOverConfig(schedule="all"))
        trainer = online_trainer("GRPO", llama, tmp_path, steps=4, callbacks=[over], learning_rate=1e-2)
        verify = run(trainer)
    assert over.over is not None
    assert verify.finding is not None
    assert (verify.finding.verdict, verify.finding.fault) == (("differs", STALE) if fault else ("as trained", None))


def test_several_steps_and_micro_batches_share_what_was_sampled_once(llama: Path, tmp_path: Path) -> None:
    """The engine samples at every second step, and a check follows every second sampling."""
    with planted():
        trainer = online_trainer(
            "GRPO", llama, tmp_path, steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            steps_per_generation=4,
        )  # fmt: skip
        verify = run(trainer, every=2)
    assert len(verdicts(trainer)) == 2
    assert verify.finding is not None
    assert verify.finding.verdict == "as trained"


@pytest.mark.parametrize(
    ("fault", "since", "checked"), [("", 0, [1, 2, 3, 4, 6, 8, 10]), ("half", 6, [*range(1, 5), 6, *range(8, 12)])]
)
def test_small_steps_are_checked_less_often_after_the_start(
    fault: str, since: int, checked: list[int], llama: Path, tmp_path: Path
) -> None:
    """Two of 16 rows at each second step are a sixteenth; while a check differs, each step is checked."""
    with planted(fault, since=since):
        trainer = online_trainer("GRPO", llama, tmp_path, steps=11)
        run(trainer, rows=None)
    found = [line["step"] for line in trainer.state.log_history if "verify/verdict" in line]
    assert found == checked


def test_dropout_of_the_trainer_is_no_fault(llama: Path, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4, lora_dropout=0.1)
    with planted():
        trainer = online_trainer("GRPO", llama, tmp_path, steps=4, peft_config=lora)
        run(trainer)
    assert verdicts(trainer) == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("merged", [False, True])
def test_training_is_the_same_with_it(merged: bool, llama: Path, tmp_path: Path) -> None:
    """Also where A is frozen, whose gradients PEFT would turn on again, and with logprobs that TRL does not compute."""
    found = []
    for has_judge in (False, True):
        with planted():
            trainer = online_trainer(
                "GRPO", llama, tmp_path, steps=3, max_grad_norm=1e-3, vllm_importance_sampling_correction=False
            )
            for name, one in trainer.model.named_parameters():
                if "lora_A" in name:
                    one.requires_grad_(False)
            if has_judge:
                verify = VerifyRollouts(trainer, rows=16, merged=merged)
            trainer.train()
        found.append(
            {name: (one.detach().clone(), one.requires_grad) for name, one in trainer.model.named_parameters()}
        )
    assert verify.finding is not None
    assert verify.finding.verdict == "as trained"
    for name, (one, is_trained) in found[0].items():
        assert torch.equal(one, found[1][name][0]), name
        assert is_trained == found[1][name][1], name


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_run_in_which_nothing_was_judged_is_no_plain_pass(
    action: Any, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with planted("base") as engine:
        trainer = online_trainer("GRPO", llama, tmp_path, steps=3)
        if action == "warn":
            run(trainer, every=100)
            assert "has not judged the engine in any step of this run" in caplog.text
            return
        answer = engine.answer
        engine.answer = lambda *given: [(ids, [math.nan] * len(told)) for ids, told in answer(*given)]  # type: ignore[method-assign]
        with pytest.raises(ParityError, match="has not judged the engine"):
            run(trainer, action="stop")


def test_a_check_runs_a_part_of_the_rows(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    logprobs = Policy.logprobs

    def seen(self: Policy, rows: Any, *args: Any, **options: Any) -> Any:
        counted.append((len(rows), len({row.prompt for row in rows})))
        return logprobs(self, rows, *args, **options)

    monkeypatch.setattr(Policy, "logprobs", seen)
    with planted():
        run(online_trainer("GRPO", llama, tmp_path, steps=2), rows=None)
    assert counted == [(2, 2), (2, 2)]  # without the adapter; the trainer's own logprobs are those with it


@pytest.mark.parametrize("merged", [False, True])
def test_logprobs_are_those_of_a_model_in_the_engine_s_number_format(merged: bool) -> None:
    from support.tiny_models import tiny_llama, token_ids

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    fill_b(model)
    before = {name: one.clone() for name, one in model.named_parameters()}
    ids = token_ids(batch=3, length=12).tolist()
    rows = [Row((*each[: 9 + i],), tuple(range(4 + i, 9 + i)), (0.0,) * 5) for i, each in enumerate(ids)]
    policy = Policy(model, EngineNumbers(torch.bfloat16, merged), 0.7, 2)
    found = policy.logprobs(rows), policy.logprobs(rows, base=True)
    rounded: Any = copy.deepcopy(model)
    rounded = (rounded.merge_and_unload() if merged else rounded).to(torch.bfloat16)
    for told, kind in zip(found, (rounded, copy.deepcopy(model).get_base_model().to(torch.bfloat16)), strict=True):
        if kind is not rounded:
            kind = tiny_llama().to(torch.bfloat16)
        expected = []
        for row in rows:
            scores = (kind(input_ids=torch.tensor([row.ids])).logits[0].float() / 0.7).log_softmax(-1)
            expected += [float(scores[place - 1, row.ids[place]]) for place in row.places]
        assert told == pytest.approx(expected, abs=2e-2)
        assert sum(abs(x - y) for x, y in zip(told, expected, strict=True)) / len(told) < 5e-3
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters())
    assert policy.logprobs(rows, policy.copy()) == found[0]


@pytest.mark.parametrize(("family", "mixes"), [("Llama", True), ("Qwen2Moe", False)])
def test_rows_without_the_adapter_are_run_beside_others(family: str, mixes: bool) -> None:
    """Where each module sees rows; the shared expert of Qwen2-MoE sees tokens of all rows in one list."""
    sizes = {} if mixes else {"shared_expert_intermediate_size": 48, **EXPERT_SIZES}
    model = get_peft_model(tiny_decoder(family, **sizes), LoraConfig(target_modules="all-linear", r=4))
    fill_b(model)
    rows = [Row(tuple(range(3 + i, 15 + i)), (9, 10 + i), (0.0,) * 2) for i in range(2)]
    policy = Policy(model, EngineNumbers(torch.float32, False), 1.0, 4)
    together = policy.logprobs([*rows, *(replace(row, is_base=True) for row in rows)])
    apart = [policy.logprobs(rows), policy.logprobs(rows, base=True)]
    assert policy.mixes is mixes
    assert together[:4] == pytest.approx(apart[0], abs=1e-5)
    assert (together[4:] == pytest.approx(apart[1], abs=1e-5)) is mixes
    assert apart[0] != pytest.approx(apart[1], abs=1e-2)


@pytest.mark.parametrize("fault", ["", "base"])
def test_an_engine_in_bfloat16_is_judged_in_bfloat16(fault: str, llama: Path, tmp_path: Path) -> None:
    with planted(fault, dtype=torch.bfloat16):
        trainer = online_trainer("GRPO", llama, tmp_path, steps=8, learning_rate=5e-2)
        verify = run(trainer)
    assert verify.finding is not None
    if fault:
        assert verify.finding.fault == NOT_APPLIED
    else:
        assert -1.0 not in verdicts(trainer)
        assert NOT_APPLIED in verify.finding.excluded


@pytest.mark.parametrize(
    ("max_staleness", "fault", "name"),
    [(1, "", None), (1, "base", NOT_APPLIED), (1, "stale", STALE), (0, "", "some answers are those of: stale by 1")],
)
def test_async_grpo_trains_on_samples_of_an_older_adapter_than_it_says(
    max_staleness: int, fault: str, name: str | None, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loader fetches one micro-batch ahead, which an adapter that is older by one has sampled.

    With `max_staleness=0` TRL 1.16 reports staleness 0, and half of the rows of each step are stale.
    """
    trainer = async_trainer(llama, tmp_path, monkeypatch, fault, max_steps=4, max_staleness=max_staleness)
    verify = VerifyRollouts(trainer, rows=16, engine_dtype="float32")
    trainer.train()
    assert verify.finding is not None
    assert verify.finding.fault == name, verify.finding.reason
    if name is None:
        assert verdicts(trainer) == [0.0, 1.0, 1.0, 1.0]
    if max_staleness == 0:
        assert verify.finding.share == 0.5
        logged = [line["sample/staleness_max"] for line in trainer.state.log_history if "verify/verdict" in line]
        assert logged == [0.0] * 4


def test_a_staleness_that_is_known_of_is_allowed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = async_trainer(llama, tmp_path, monkeypatch, "", max_steps=4, max_staleness=0)
    VerifyRollouts(trainer, rows=16, engine_dtype="float32", max_staleness=1)
    trainer.train()
    assert verdicts(trainer) == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("fault", "name"), [("", None), ("base", NOT_APPLIED)])
def test_online_dpo_with_a_server_is_judged_before_the_temperature_as_the_server_tells_logprobs(
    fault: str, name: str | None, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = online_dpo_trainer(llama, tmp_path, monkeypatch, fault)
    verify = VerifyRollouts(trainer, rows=16)
    trainer.train()
    assert verify.finding is not None
    assert verify.finding.fault == name, verify.finding.reason
    assert verdicts(trainer) == [0.0, *[-1.0 if fault else 1.0] * 3]


@pytest.mark.parametrize(("asked", "fault"), [(True, ""), ("stop", "base")])
def test_a_recipe_asks_for_it(asked: Any, fault: str, llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        llama,
        trainer="grpo",
        method="lora-over",
        reward_funcs=["support.rewards.length"],
        verify_rollouts=asked,
        data={"train": str(data_file(tmp_path / "rows.jsonl", *rows))},
        training={
            "max_steps": 6,
            "per_device_train_batch_size": 16,
            "num_generations": 2,
            "max_completion_length": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_vllm": True,
            "vllm_mode": "server",
        },
        evaluation={"examples": 0},
    )
    with planted(fault):
        if not fault:
            assert loraover.train(str(recipe), tmp_path / "out").steps == 6
        else:
            with pytest.raises(ParityError, match="served as base"):
                loraover.train(str(recipe), tmp_path / "out")
            assert "served as base" in json.loads((tmp_path / "out" / FAILURE_FILE).read_text())["message"]
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = [row["verify/verdict"] for row in logged if "verify/verdict" in row]
    assert found[0] == 0
    assert found[-1] == (-1 if fault else 1)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_trl_that_lacks_a_private_name_is_refused_with_the_name(
    kind: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract with TRL: all names that are read are there, or the missing ones are named."""
    with planted():
        trainer = online_trainer(kind, llama, tmp_path)
        VerifyRollouts(trainer)
        with pytest.raises(ConfigError, match="already has VerifyRollouts"):
            VerifyRollouts(trainer)
        trainer.remove_callback(VerifyRollouts)
        source = SOURCES[f"{kind}Trainer"]
        monkeypatch.setattr(source, "needs", (*source.needs, "_metrics_of_later", "vllm_generation.of_later"))
        with pytest.raises(ConfigError, match=r"lacks _metrics_of_later, vllm_generation.of_later; install trl==1\.16"):
            VerifyRollouts(trainer)


def test_a_trainer_that_nothing_can_be_judged_in_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"samples by itself.*use_vllm"):
        VerifyRollouts(online_trainer("GRPO", llama, tmp_path, use_vllm=False))
    with planted():
        trainer = online_trainer("GRPO", llama, tmp_path)
        for options in ({"every": 0}, {"action": "end"}, {"rows": 1}, {"engine_dtype": "int4"}):
            with pytest.raises(ConfigError, match="expected"):
                VerifyRollouts(trainer, **options)
        with pytest.raises(ConfigError, match="max_staleness is for AsyncGRPOTrainer, and not for"):
            VerifyRollouts(trainer, max_staleness=1)
        trainer.vllm_generation.vllm_client.get_server_info = dict
        with pytest.raises(ConfigError, match=r"does not report its dtype.*engine_dtype"):
            VerifyRollouts(trainer)
        with pytest.raises(ConfigError, match="full fine-tuning"):
            VerifyRollouts(online_trainer("GRPO", llama, tmp_path, peft_config=None))
        lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        with pytest.raises(ConfigError, match=r"lm_head.*modules_to_save"):
            VerifyRollouts(online_trainer("GRPO", llama, tmp_path, peft_config=lora))
