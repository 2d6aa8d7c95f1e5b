"""FSDP2: matrices are sharded, their cores are whole in every process, and training is as in one process."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import TrainerControl, TrainerState, TrainingArguments

from loraover import LoraOverCallback, OverParameterization, read_checkpoint, write_checkpoint
from loraover.checkpoint.training_state import restore
from loraover.common.errors import ConfigError
from loraover.overparam.sharding import full, local, trainable_state_dict
from loraover.overparam.sites import find_sites

from support.parallel_run import (
    CONFIGS,
    LR,
    SCHEDULES,
    STEPS,
    TOLERANCE,
    assert_example_folds,
    assert_trained_as_one,
    cores,
    deviation,
    equal,
    fresh,
    fsdp_run,
    loss,
    model,
    sharded,
    share,
    step,
    train,
)
from support.processes import in_two_processes
from support.tiny_models import tiny_net, trainable

pytestmark = pytest.mark.process


def run(rank: int, schedule: str, **options: Any) -> dict[str, Any]:
    return fsdp_run(rank, fresh(schedule), CONFIGS[schedule], **options)


@pytest.mark.parametrize(("schedule", "micro_batches"), [*((name, 1) for name in SCHEDULES[:-1]), ("dynamic", 2)])
def test_two_processes_train_as_one_does_at_their_global_batch(
    schedule: str, micro_batches: int, tmp_path: Path
) -> None:
    alone = train(fresh(schedule), CONFIGS[schedule], micro_batches=micro_batches)
    first, second = in_two_processes(lambda rank: run(rank, schedule, micro_batches=micro_batches), tmp_path)
    assert_trained_as_one(alone, first, second)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
def test_a_rank_too_small_to_share_and_optimizers_that_cannot_mix_tensors(
    options: dict[str, Any], tmp_path: Path
) -> None:
    alone = train(model(r=1), CONFIGS["all"], **options)
    first, second = in_two_processes(lambda rank: fsdp_run(rank, model(r=1), CONFIGS["all"], **options), tmp_path)
    assert_trained_as_one(alone, first, second)


def test_matrices_are_shards_and_cores_are_whole_in_groups_of_their_own(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Any]:
        over = OverParameterization(net := sharded(tiny_net()))
        optimizer = torch.optim.AdamW(trainable(net), lr=1e-2)
        over.attach(optimizer)
        kinds: list[list[str]] = []

        def note(optimizer: Any, args: Any, kwargs: Any) -> None:
            kinds.extend(sorted({type(p.data).__name__ for p in group["params"]}) for group in optimizer.param_groups)

        optimizer.register_step_pre_hook(note)
        net(torch.zeros(2, 6)).sum().backward()
        optimizer.step()
        return {
            "names": list(over.sites),
            "kinds": kinds,
            "held": [local(s.parameter).numel() for s in over.sites.values()],
        }

    first, second = in_two_processes(work, tmp_path)
    assert first["names"] == list(find_sites(tiny_net()))
    assert first["kinds"] == second["kinds"] == [["DTensor"], ["Tensor"], ["Tensor"]]
    assert [a + b for a, b in zip(first["held"], second["held"], strict=True)] == [
        site.parameter.numel() for site in find_sites(tiny_net()).values()
    ]


def test_cores_made_before_sharding_are_refused(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        over = OverParameterization(net := tiny_net())
        optimizer = torch.optim.AdamW(trainable(sharded(net)))
        with pytest.raises(ConfigError) as refusal:
            over.attach(optimizer)
        return str(refusal.value)

    refused = in_two_processes(work, tmp_path)[0]
    assert "Build it, and OverParameterization, after get_peft_model and after fully_shard." in refused


@pytest.mark.parametrize("schedule", ["all", "static", "dynamic"])
def test_a_step_gathers_the_gradients_that_it_pulls_back_and_sends_nothing_else(schedule: str, tmp_path: Path) -> None:
    plain, over = in_two_processes(lambda rank: [run(rank, "plain-lora"), run(rank, schedule)], tmp_path)[0]
    sites, rounds = find_sites(model()), over["rounds"]

    def gathered(names: Iterable[str]) -> int:
        """Bytes of these matrices, whose rows are filled up to an even number."""
        return sum(16 * ceil(sites[name].shape[0] / 2) * sites[name].shape[1] for name in names)

    for number in range(STEPS):
        before, after = plain["messages"][number], over["messages"][number]
        assert after[: len(before)] == before
        is_scoring = schedule == "dynamic" and number < rounds[-1]["step"]
        injected = [name for found in rounds if found["step"] <= number for name in found["chosen"]]
        expected = gathered(sites if is_scoring else injected)
        for found in rounds:
            if found["step"] == number + 1:  # scores, and matrices with both of their moments
                expected += 8 * len(sites) + 3 * gathered(found["chosen"])
        assert sum(size for _, size in after[len(before) :]) == expected
    scattered = sum(size for name, size in plain["messages"][0] if name == "_reduce_scatter_base_")
    assert gathered(sites) == scattered


def test_moments_of_sharded_matrices_are_carried(tmp_path: Path) -> None:
    def work(net: Any, rank: int, world: int) -> dict[str, Tensor]:
        over = OverParameterization(net, CONFIGS["all"], inject=False)
        optimizer = torch.optim.AdamW(trainable(net), eps=1e-3)
        over.attach(optimizer)
        loss(net, share(0, rank, world)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        over.inject(["second.lora_A", "third.lora_B"])
        return cores(over)

    alone = work(model(), 0, 1)
    first, second = in_two_processes(lambda rank: work(sharded(model()), rank, 2), tmp_path)
    assert {name.rpartition(".")[2] for name in first} >= {"exp_avg", "exp_avg_sq", "step"}
    assert all(value.any() for name, value in first.items() if name.endswith("exp_avg"))
    assert equal(first, second)
    assert deviation(first, alone) < TOLERANCE


def test_matrices_that_changed_in_one_process_only_are_adopted_by_both(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Any]:
        over = OverParameterization(sharded(model()))
        site = over.sites["second.lora_B"]
        if rank == 1:
            with torch.no_grad():
                local(site.parameter).add_(1)
        written = full(site.parameter.detach()).clone()
        names = over.adopt_matrices()
        over.check_unchanged()
        return {"names": names, "written": written, "adopted": full(site.parameter.detach()), "cores": cores(over)}

    first, second = in_two_processes(work, tmp_path)
    assert first["names"] == second["names"] == ["second.lora_B"]
    assert equal(first["cores"], second["cores"])
    assert deviation({"": first["adopted"]}, {"": first["written"]}) < TOLERANCE


def test_a_resumed_run_holds_the_rounds_to_come_bit_for_bit(tmp_path: Path) -> None:
    """Rounds after steps 2 and 4 of 6, a checkpoint after 3."""
    folder, config = tmp_path / "checkpoint", CONFIGS["dynamic"]

    def begin(net: Any, **options: Any) -> tuple[OverParameterization, torch.optim.Optimizer]:
        return OverParameterization(net, config, steps=STEPS, **options), torch.optim.AdamW(trainable(net))

    def work(rank: int) -> dict[str, Any]:
        over, optimizer = begin(net := sharded(fresh("dynamic")))
        over.attach(optimizer)
        for seed in range(3):
            step(net, optimizer, rank, seed)
        state, moments = trainable_state_dict(net), deepcopy(optimizer.state_dict())
        if rank == 0:
            net.save_pretrained(folder, state_dict=state)
            write_checkpoint(folder, over, step=3)
        distributed.barrier()
        losses = [step(net, optimizer, rank, seed) for seed in range(3, STEPS)]

        again = sharded(PeftModel.from_pretrained(fresh("dynamic").unload(), folder, is_trainable=True))
        resumed, optimizer = begin(again, inject=False)
        optimizer.load_state_dict(moments)
        restore(resumed, read_checkpoint(folder))
        resumed.attach(optimizer)
        return {
            "losses": [losses, [step(again, optimizer, rank, seed) for seed in range(3, STEPS)]],
            "cores": [cores(over), cores(resumed)],
            "rounds": [[found.model_dump() for found in each.schedule.rounds] for each in (over, resumed)],
        }

    for found in in_two_processes(work, tmp_path / "results"):
        assert found["losses"][0] == found["losses"][1]
        assert equal(*found["cores"])
        assert found["rounds"][0] == found["rounds"][1]
        assert [each["step"] for each in found["rounds"][0]] == [2, 4]
    checkpoint = read_checkpoint(folder)
    assert checkpoint.meta.world_size == 2
    assert len(checkpoint.sites) == 2


def test_the_trainers_callback_saves_whole_matrices_in_the_only_process(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"

    def work(rank: int) -> dict[str, Tensor]:
        args = TrainingArguments(str(folder), use_cpu=True, report_to="none")
        callback, net = LoraOverCallback(), sharded(model())
        told = args, TrainerState(max_steps=1), TrainerControl()
        optimizer = torch.optim.AdamW(trainable(net), lr=LR)
        callback.on_train_begin(*told, model=net, optimizer=optimizer)
        loss(net, share(0, 0, 1)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        callback.on_train_end(*told, model=net)
        return trainable_state_dict(net)

    (trained,) = in_two_processes(work, tmp_path / "results", count=1)
    kept = load_file(read_checkpoint(folder).tensors_path)
    assert equal({key.replace(".default", ""): matrix for key, matrix in trained.items()}, kept)


@pytest.mark.parametrize("schedule", ["all", "dynamic"])
def test_a_checkpoint_of_torch_leaves_the_cores_and_their_moments_alone(schedule: str, tmp_path: Path) -> None:
    """PyTorch takes a step with gradients of zero where an optimizer's state is empty, as it is between steps."""

    def work(rank: int) -> list[Any]:
        found = []
        for is_saved in (False, True):
            over = OverParameterization(net := sharded(fresh(schedule)), CONFIGS[schedule], steps=STEPS)
            optimizer = torch.optim.AdamW(trainable(net), lr=LR)
            over.attach(optimizer)
            losses = []
            for seed in range(STEPS):
                losses.append(step(net, optimizer, rank, seed))
                if is_saved:
                    assert get_optimizer_state_dict(net, optimizer)["state"]
            found.append({"losses": losses, "cores": cores(over), "step": over.step})
        return found

    for plain, saved in in_two_processes(work, tmp_path):
        assert plain["losses"] == saved["losses"]
        assert equal(plain["cores"], saved["cores"])
        assert plain["step"] == saved["step"] == STEPS


@pytest.mark.matrix
def test_the_example_leaves_a_plain_lora_whose_checkpoint_folds(tmp_path: Path) -> None:
    assert_example_folds("fsdp2", tmp_path)
