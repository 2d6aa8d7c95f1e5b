"""Federated LoRA with differential privacy: clients train B on disjoint rows and a shared, frozen A.

All clients are simulated in this process. In a round, each client k starts from the shared B and takes `local_steps`
steps of DP-SGD on its rows. A step draws each row with probability q_k = batch / rows_k, clips the gradient g_i of each
drawn row's loss to norm C, and adds noise:

    g = (sum_i g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2 I)) / (q_k rows_k)

Then B = sum_k (rows_k / rows) B_k. Since all clients have the same A, the average of the updates B_k A is B A exactly,
which averages of A and B separately would not be. The result is a plain LoRA of rank r.

Opacus computes the gradients of single rows, clips them and adds the noise, and its RDP accountant states epsilon for
the given delta: for one row of one client, against someone who sees the averages of all rounds and every other row.
Rows are disjoint, so a row is touched by its client's steps only, and the run's epsilon is that of the client with the
fewest rows. A row's loss is the mean over its tokens, so that no row's gradient depends on another row. Epsilon
compares a run with one in which a row has no gradient: how many rows there are counts as known.

The guarantee covers B only. It does not cover the losses in the log and in `run.json`. The seeds of the noise and of
the draws come from the operating system, but PyTorch's generator, which draws the noise, is not made for cryptography:
on a CPU its seed has 32 bits, all of which can be tried.

Source: Kang et al. 2024, arXiv:2411.07806. The abstract and an overview (objective, clients, only one of the two
matrices updated) were read. The paper's equations and its theorem on epsilon were not, and no public code was found.
The step is DP-SGD (Abadi et al. 2016, arXiv:1607.00133); freezing A is also FFA-LoRA's (Sun et al. 2024,
arXiv:2403.12313).

Departures: the radio channel is left out. There, the noise of the channel takes the place of sigma, signals of clients
add up in the air, and fading and power limits decide epsilon. Nor is the model split between devices and a server:
every client holds all of it. Rows are divided at random, so clients do not differ in what they have. Clients step with
AdamW, or SGD if `training.optim` is sgd.
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from loraover.common.errors import ConfigError
from loraover.common.extras import install
from loraover.common.reporter import Reporter
from loraover.common.strict_json import StrictModel
from loraover.data.formats import Row, later_turn
from loraover.overparam.sites import lora_layers
from loraover.training.method import ADAPTER, TrainingMethod
from loraover.training.recipe_parts import BaseRecipe
from loraover.training.run.log import log_measures
from loraover.training.run_result import Privacy
from loraover_lab.methods.layers import check_optimizer, make_optimizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer, TrainingArguments

    from loraover.training.run.trainer import TrainingProgress


@dataclass
class Client:
    """A simulated client: indices of its rows, the rate at which a step draws each, and Opacus's optimizer."""

    rows: Tensor
    rate: float
    optimizer: Any


@final
class Federated(TrainingMethod):
    """B trained by clients with differential privacy."""

    settings: FederatedSettings
    trains_seq2seq: ClassVar[bool] = False
    no_resume: ClassVar[str] = "a step taken twice with other noise would spend privacy that is not accounted for"
    one_process: ClassVar[str] = "its clients take their steps one after another, each with its own rows"
    keeps_row_gradients: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 3e-2
    needs_fp32: ClassVar[bool] = True

    def __init__(self, recipe: BaseRecipe) -> None:
        super().__init__(recipe)
        self.batch = recipe.training.micro_batch * recipe.training.gradient_accumulation_steps
        try:
            import opacus
        except ImportError as error:
            raise ConfigError(f"method federated needs Opacus: {install('private')}.") from error
        self._accountant = f"RDP accountant of Opacus {opacus.__version__}"

    @classmethod
    def check_recipe(cls, recipe: BaseRecipe) -> None:
        super().check_recipe(recipe)
        check_optimizer(recipe)
        training = recipe.training
        if not training.is_fp32 or training.gradient_checkpointing:
            raise ValueError("method federated computes in float32, without training.gradient_checkpointing")
        unused = {
            "training.max_grad_norm": training.max_grad_norm == 1,
            "training.report_to": training.report_to == "none",
        }
        unused["training.save_total_limit"] = training.save_total_limit == 2
        if given := [key for key, is_default in unused.items() if not is_default]:
            raise ValueError(f"method federated does not use {', '.join(given)}; leave it out")

    @classmethod
    def count_clients(cls, recipe: BaseRecipe) -> int:
        return int(recipe.settings.clients)

    def freeze(self, model: PeftModel) -> None:
        for path, layer in lora_layers(model).items():
            if ADAPTER not in layer.lora_B:
                raise ConfigError(
                    f"lora.target_modules: {path} is an embedding, whose B federated cannot train; leave it out."
                )
            layer.lora_A[ADAPTER].weight.requires_grad_(False)

    def check_rows(self, rows: Sequence[Row]) -> None:
        later = later_turn(rows)
        if later is not None:
            raise ConfigError(
                f"{self.recipe.data.name}: example {later + 1} is a later turn of the conversation of example "
                f"{later}. federated states epsilon for one example, so a conversation may have only one turn of the "
                "assistant."
            )

    def check(self, steps: int, examples: int) -> None:
        asked = self.settings
        if asked.clients > examples:
            raise ConfigError(
                f"federated.clients is {asked.clients}, and there are {examples} training examples, so some clients "
                "would have no rows; lower it."
            )
        if asked.noise_multiplier and asked.delta * examples >= 1:
            raise ConfigError(
                f"federated.delta is {asked.delta:g}, and there are {examples} training examples. Such a guarantee "
                f"would allow one of them to be published as it is; set delta well below {1 / examples:.2g}."
            )
        if asked.epsilon is None:
            return
        rate = self._rate(examples // asked.clients)
        spent = epsilon_of(asked.noise_multiplier, rate, steps, asked.delta)
        if spent > asked.epsilon:
            fit = steps_within(asked.epsilon, asked.noise_multiplier, rate, steps, asked.delta)
            advice = f"{fit} steps would fit: set training.max_steps, or raise" if fit else "No step would fit: raise"
            raise ConfigError(
                f"federated.epsilon is {asked.epsilon:g}, but {steps} steps, each of which draws a row with "
                f"probability {rate:.3g}, at noise_multiplier {asked.noise_multiplier:g}, spend {spent:.3g} at delta "
                f"{asked.delta:g}. {advice} federated.noise_multiplier or federated.epsilon."
            )

    def train(self, trainer: Trainer, checkpoint: Path | None, steps: int, progress: TrainingProgress) -> None:
        from opacus.grad_sample import GradSampleModule

        loader = trainer.get_train_dataloader()
        model = trainer.model.train()
        wrapped = GradSampleModule(model, loss_reduction="sum")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        seeds = np.random.SeedSequence(self.settings.noise_seed).generate_state(2, np.uint64).tolist()
        drawing = torch.Generator().manual_seed(seeds[0])
        noise = torch.Generator(trained[0].device).manual_seed(seeds[1])
        clients = self._make_clients(trainer.args, trained, len(loader.dataset), noise)
        rates = _learning_rates(trainer, steps)
        losses: list[float] = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # inputs of the first B need no gradient
            for begun in range(0, steps, self.settings.local_steps):
                mine = rates[begun : begun + self.settings.local_steps]
                average = [torch.zeros_like(b, dtype=torch.float64, device="cpu") for b in trained]
                shared = [b.detach().clone() for b in trained]
                for client in clients:
                    _copy(shared, trained)
                    for rate in mine:
                        losses += self._step(wrapped, loader, client, rate, drawing)
                    for total, b in zip(average, trained, strict=True):
                        total += b.detach().cpu().double() * (len(client.rows) / len(loader.dataset))
                _copy(average, trained)
                trainer.state.global_step = begun + len(mine)
                losses = self._log(trainer, begun, rates, losses, clients, progress.report)
                progress.advance(trainer.state.global_step)
        wrapped.to_standard_module()
        self.privacy = self._guarantee(clients, steps)

    def _rate(self, rows: int) -> float:
        return min(1.0, self.batch / rows)

    def _make_clients(
        self, asked: TrainingArguments, trained: list[torch.nn.Parameter], examples: int, noise: torch.Generator
    ) -> list[Client]:
        """Divide the rows at random, in numbers that differ by one at most."""
        from opacus.optimizers import DPOptimizer

        order = torch.randperm(examples, generator=torch.Generator().manual_seed(self.recipe.training.seed))
        clients = []
        for k in range(self.settings.clients):
            rows = order[k :: self.settings.clients]
            rate = self._rate(len(rows))
            optimizer = DPOptimizer(
                make_optimizer(asked, trained),
                noise_multiplier=self.settings.noise_multiplier,
                max_grad_norm=self.settings.clip,
                expected_batch_size=rate * len(rows),
                generator=noise,
            )
            clients.append(Client(rows, rate, optimizer))
        return clients

    def _step(
        self, wrapped: Any, loader: Any, client: Client, learning_rate: float, drawing: torch.Generator
    ) -> list[float]:
        """Take one step of a client; returns the losses of the rows that it drew, in nats per token."""
        from accelerate.utils import send_to_device

        drawn = client.rows[torch.rand(len(client.rows), generator=drawing) < client.rate]
        pieces = torch.split(drawn, self.recipe.training.micro_batch)
        optimizer, losses = client.optimizer, []
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        for k, piece in enumerate(pieces):
            optimizer.zero_grad()
            if len(piece):
                batch = loader.collate_fn([loader.dataset[i] for i in piece.tolist()])
                each = row_losses(wrapped, send_to_device(batch, optimizer.params[0].device))
                torch.autograd.backward(each.sum())
                _check_single_rows(wrapped, len(piece))
                losses += each.tolist()
            else:  # a step without rows still adds its noise
                for b in optimizer.params:
                    b.grad_sample = b.new_zeros(0, *b.shape)
            optimizer.signal_skip_step(do_skip=k < len(pieces) - 1)
            optimizer.step()
        optimizer.zero_grad()
        return losses

    def _log(
        self,
        trainer: Trainer,
        begun: int,
        rates: list[float],
        losses: list[float],
        clients: list[Client],
        report: Reporter,
    ) -> list[float]:
        """Log the mean loss since the last line, if one is due after this round; returns the losses still to log."""
        step, steps, every = trainer.state.global_step, len(rates), self.recipe.training.logging_steps
        if (step // every == begun // every and step < steps) or not losses:
            return losses
        loss = sum(losses) / len(losses)
        epsilon = self._guarantee(clients, step).epsilon
        output = Path(trainer.args.output_dir).parent
        log_measures(output, step, loss=loss, learning_rate=rates[step - 1], epsilon=epsilon)
        report.line(f"step {step:>5}/{steps}  loss {loss:.4f}")
        return []

    def _guarantee(self, clients: list[Client], steps: int) -> Privacy:
        asked, rate = self.settings, max(client.rate for client in clients)
        epsilon = epsilon_of(asked.noise_multiplier, rate, steps, asked.delta)
        return Privacy(
            epsilon=None if epsilon == inf else epsilon,
            delta=asked.delta,
            noise_multiplier=asked.noise_multiplier,
            clip=asked.clip,
            clients=asked.clients,
            sample_rate=rate,
            accountant=self._accountant,
            has_noise_seed=asked.noise_seed is not None,
        )


def row_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of each row over its completion tokens, in nats, for a causal model."""
    labels = batch["labels"][:, 1:]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1].float()
    nats = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return nats.view_as(labels).sum(1) / (labels != -100).sum(1).clamp_min(1)


def _check_single_rows(wrapped: Any, rows: int) -> None:
    """Raise ConfigError if what would be clipped are not the gradients of single rows."""
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and (parameter.grad_sample is None or len(parameter.grad_sample) != rows):
            found = 0 if parameter.grad_sample is None else len(parameter.grad_sample)
            raise ConfigError(
                f"lora.target_modules: {name.removeprefix('_module.')} has {found} gradients for {rows} rows. The "
                "model does not give this module its inputs by rows, so federated cannot clip the gradients of single "
                "rows; leave the module out."
            )


def epsilon_of(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """Return epsilon after some steps of the Poisson-sampled Gaussian mechanism; infinity without noise."""
    from opacus.accountants import RDPAccountant

    if not steps:
        return 0.0
    if not noise_multiplier:
        return inf
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, rate, steps)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is")  # the bound holds, and might be tighter
        return float(accountant.get_epsilon(delta))


def steps_within(epsilon: float, noise_multiplier: float, rate: float, steps: int, delta: float) -> int:
    """Return the largest number of steps, up to a limit, whose epsilon does not exceed a budget."""
    return bisect.bisect_right(range(1, steps + 1), epsilon, key=lambda n: epsilon_of(noise_multiplier, rate, n, delta))


@torch.no_grad()
def _copy(values: list[Tensor], parameters: list[torch.nn.Parameter]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _learning_rates(trainer: Trainer, steps: int) -> list[float]:
    """Return the learning rate of every step, by the Trainer's schedule."""
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=trainer.args.learning_rate)
    schedule = trainer.create_scheduler(steps, stand_in)
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        stand_in.step()
        schedule.step()
    return rates


class FederatedSettings(StrictModel):
    """Settings of `method: federated`."""

    method: ClassVar[type[TrainingMethod]] = Federated

    clients: int = Field(4, ge=1, description="Number of simulated clients, among which the rows are divided.")
    local_steps: int = Field(1, ge=1, description="Optimizer steps of a client between two averages of B.")
    clip: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Largest norm of the gradient of one example, over all modules."
    )
    noise_multiplier: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Standard deviation of the noise as a multiple of clip; 0: none."
    )
    epsilon: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Privacy budget that a run may not exceed; None: no limit."
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Delta at which epsilon is stated.")
    noise_seed: int | None = Field(
        None,
        ge=0,
        description="Seed of the noise and of the draws of rows, with which a run can be repeated. Whoever knows it "
        "can compute the noise. None: a seed from the operating system, which is not kept.",
    )
