"""A run that was killed in the middle of a dynamic schedule goes on, bit for bit, from its last whole checkpoint."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import loraover.callbacks.seal_checkpoints
import loraover.checkpoint.training_state
from loraover import Budget, LoraOverCallback, LoraOverConfig, SealCheckpoints, last_whole_checkpoint, read_checkpoint
from loraover.data.word_problems import split_word_problems
from loraover.overparam.round import Round

from support.children import Child
from support.tiny_models import token_ids
from support.versions import needs_order_of_batches

pytestmark = pytest.mark.process

STEPS = 10
SAVED = 2
"""A checkpoint after every second step; rounds after steps 3, 4 and 6."""

PLACED: dict[str, Any] = {"schedule": "dynamic", "rounds": 3, "start": 0.3, "end": 0.6}
LORA: dict[str, Any] = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "warmup_steps": 1,
    "save_steps": SAVED,
    "save_total_limit": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def trainer(base: Path, output: Path) -> None:
    """The Hugging Face Trainer, with a score that reads the last steps."""
    set_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA))
    config = LoraOverConfig(score="sensitivity", budget=Budget(fraction=0.5), **PLACED)
    Trainer(
        model,
        TrainingArguments(str(output), **ARGUMENTS),
        train_dataset=[{"input_ids": row, "labels": row} for row in token_ids(seed=7, batch=24)],
        callbacks=[LoraOverCallback(config), SealCheckpoints()],
    ).train(resume_from_checkpoint=last_whole_checkpoint(output))
    model.save_pretrained(output / "adapter")


def sft(base: Path, output: Path) -> None:
    """TRL's SFTTrainer, with a score that runs the model in the middle of training."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    set_seed(0)
    config = LoraOverConfig(score="loss_impact", calibration_batches=1, budget=Budget(parameters=600), **PLACED)
    trainer = trl.SFTTrainer(
        str(base),
        trl.SFTConfig(str(output), **ARGUMENTS),
        train_dataset=datasets.Dataset.from_list(split_word_problems(train=24, held_out=0, seed=0)[0]),
        peft_config=LoraConfig(**LORA),
        callbacks=[LoraOverCallback(config), SealCheckpoints()],
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(output))
    trainer.model.save_pretrained(output / "adapter")


def plain_loop(base: Path, output: Path) -> None:
    """The script in docs/examples, with its own dynamic schedule."""
    script = Path(__file__).parents[2] / "docs" / "examples" / "plain_loop.py"
    options = {"--model": base, "--output": output, "--steps": STEPS, "--save-every": SAVED}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *(str(part) for option in options.items() for part in option)])
        runpy.run_path(str(script), run_name="__main__")


Training = Callable[[Path, Path], None]
TRAININGS: dict[str, Training] = {"trainer": trainer, "sft": sft, "plain-loop": plain_loop}


@dataclass(frozen=True)
class Outcome:
    """What a run computed: the loss of every micro-batch, the decisions, the adapter and the cores at the end."""

    losses: list[float]
    rounds: list[Round]
    tensors: dict[str, Tensor]

    def assert_continues(self, whole: Outcome, step: int) -> None:
        """It is the same as `whole`, of which it took the steps after `step`, bit for bit."""
        assert self.losses == whole.losses[2 * step :]
        assert self.rounds == whole.rounds
        assert self.tensors.keys() == whole.tensors.keys()
        assert [key for key, tensor in self.tensors.items() if not torch.equal(tensor, whole.tensors[key])] == []


def outcome(training: Training, base: Path, output: Path) -> Outcome:
    losses = []
    backward: Any = Tensor.backward

    def noted(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss.item())
        backward(loss, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", noted)
        training(base, output)
    last = output / f"checkpoint-{STEPS}"
    tensors = load_file(output / "adapter" / "adapter_model.safetensors") | load_file(last / "loraover.safetensors")
    return Outcome(losses, read_checkpoint(last).meta.rounds, tensors)


@pytest.fixture(scope="module", params=TRAININGS)
def training(request: pytest.FixtureRequest) -> Training:
    return TRAININGS[request.param]


@pytest.fixture(scope="module")
def whole(training: Training, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run that was never killed."""
    return outcome(training, base, tmp_path_factory.mktemp("whole") / "out")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(step: int) -> None:
    """Once the optimizer has taken it, a round that is due was held, and nothing was saved."""
    taken = count(1)
    register_optimizer_step_post_hook(lambda *_: kill() if next(taken) == step else None)


def kill_before(module: Any, function: str, step: int) -> None:
    """When it is called for the checkpoint of that step."""
    original = getattr(module, function)
    times = count(1)

    def killing(*args: Any, **kwargs: Any) -> Any:
        return kill() if next(times) == step // SAVED else original(*args, **kwargs)

    setattr(module, function, killing)


def run_and_die(training: Training, base: Path, output: Path, prepare: Callable[[], None]) -> None:
    def command() -> int:
        training(base, output)
        return 0

    ended = Child(command, prepare=prepare).end()
    assert ended.code == -signal.SIGKILL, ended.output


def test_rounds_lie_between_the_checkpoints(whole: Outcome) -> None:
    assert [found.step for found in whole.rounds] == [3, 4, 6]
    assert all(found.chosen for found in whole.rounds)
    assert len(whole.losses) == 2 * STEPS


@pytest.mark.parametrize(
    ("training", "killed", "resumed"),
    [*((name, 5, 4) for name in TRAININGS), pytest.param("trainer", 10, 8, marks=needs_order_of_batches)],
    indirect=["training"],
)
def test_a_killed_run_goes_on_bit_for_bit(
    killed: int, resumed: int, training: Training, whole: Outcome, base: Path, tmp_path: Path
) -> None:
    """Between its rounds, or after all of them; and a Trainer's log tells each round once."""
    run_and_die(training, base, tmp_path, partial(kill_in_step, killed))
    assert last_whole_checkpoint(tmp_path) == tmp_path / f"checkpoint-{resumed}"
    outcome(training, base, tmp_path).assert_continues(whole, resumed)
    if training is trainer:
        rows = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
        assert [row["step"] for row in rows if "loraover_injected_sites" in row] == [3, 4, 6]


@pytest.mark.parametrize("training", ["trainer"], indirect=True)
@pytest.mark.parametrize(
    "place",
    [(loraover.checkpoint.training_state, "save_tensors"), (loraover.callbacks.seal_checkpoints, "seal")],
    ids=lambda p: p[1],
)
def test_a_checkpoint_that_was_being_written_is_not_resumed_from(
    place: tuple[Any, str], training: Training, whole: Outcome, base: Path, tmp_path: Path
) -> None:
    run_and_die(training, base, tmp_path, partial(kill_before, *place, step=6))
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").is_file()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    outcome(training, base, tmp_path).assert_continues(whole, 4)
