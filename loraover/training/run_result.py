"""Result of a finished run: `run.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from loraover.common.strict_json import StrictModel, read_json
from loraover.data.sources import Counted

RUN_FILE = "run.json"


class Measures(StrictModel):
    """Held-out measures at one moment."""

    model_config = ConfigDict(allow_inf_nan=False)

    examples: int = Field(description="Number of held-out examples behind the loss.")
    loss: float = Field(description="Nats per completion token.")
    exact_match: float | None = Field(
        None, description="Share of the held-out examples answered exactly; None: not measured."
    )

    def __str__(self) -> str:
        accuracy = "" if self.exact_match is None else f", exact match {self.exact_match:.1%}"
        return f"held-out loss {self.loss:.4f}{accuracy} ({self.examples} examples)"


class Privacy(StrictModel):
    """Guarantee of differential privacy for one training example, see `loraover_lab.methods.federated`."""

    model_config = ConfigDict(allow_inf_nan=False)

    epsilon: float | None = Field(description="Epsilon that the run has spent; None: no noise, so no guarantee.")
    delta: float = Field(description="Delta at which epsilon is stated.")
    noise_multiplier: float = Field(description="Standard deviation of the noise as a multiple of clip.")
    clip: float = Field(description="Largest norm of the gradient of one example.")
    clients: int = Field(description="Number of clients with disjoint examples.")
    sample_rate: float = Field(description="Probability with which a step draws an example of the smallest client.")
    accountant: str = Field(description="What computed epsilon.")
    has_noise_seed: bool = Field(
        description="Whether federated.noise_seed gives the noise, so that epsilon presumes a secret seed."
    )

    def __str__(self) -> str:
        if self.epsilon is None:
            return "none: no noise was added"
        found = f"epsilon {self.epsilon:.4g} at delta {self.delta:g}, for one example"
        return found + (", as long as federated.noise_seed is secret" if self.has_noise_seed else "")


class Lengths(StrictModel):
    """Lengths of the training examples, and what `training.max_length` cuts of them."""

    examples: int = Field(description="Number of training examples.")
    max_length: int = Field(description="Tokens that are kept of an example.")
    cut: int = Field(description="Number of examples that are longer.")
    unlabelled: int = Field(description="Number of examples whose prompt leaves no room, so that nothing is learned.")
    longest: int = Field(description="Tokens of the longest example.")
    keeps_99: int = Field(description="Smallest max_length that keeps 99 % of the examples whole.")
    cut_rows: list[int | str] = Field(description="The first three rows that are cut, by their numbers from 1.")
    unlabelled_rows: list[int | str] = Field([], description="The first three rows of which nothing is learned.")
    histogram: dict[int, int] = Field(description="Number of examples up to each length, and above half of it.")

    @property
    def cut_share(self) -> float:
        """Share of the examples that is cut."""
        return self.cut / self.examples


class StartSource(StrictModel):
    """An adapter that A and B started from."""

    model_config = ConfigDict(allow_inf_nan=False)

    path: str = Field(description="Folder or address of the adapter, or its name on the hub with the commit.")
    weight: float = Field(description="Factor of its update in the sum.")
    sha256: dict[str, str] = Field(description="SHA-256 of each of its files that was read, in hexadecimal digits.")


class StartedFrom(StrictModel):
    """Adapters that A and B started from, see `loraover.training.start`."""

    model_config = ConfigDict(allow_inf_nan=False)

    sources: list[StartSource] = Field(description="Adapters, in the order of the recipe.")
    relative_error: float = Field(
        description="Frobenius norm, over all modules, of what the rank left out of the adapters' update, as a share "
        "of the update's norm; 0: nothing but rounding."
    )
    modules: int = Field(description="Number of modules that started from the adapters.")
    fresh_modules: int = Field(description="Number of modules that the adapters do not have, which started with B = 0.")

    def __str__(self) -> str:
        named = ", ".join(one.path if one.weight == 1 else f"{one.weight:g} * {one.path}" for one in self.sources)
        lost = f"the rank leaves out {self.relative_error:.3g} of the update's norm" if self.relative_error else "exact"
        return f"{named} ({self.modules} modules; {lost})"


class RunResult(StrictModel):
    """Contents of `run.json`."""

    model_config = ConfigDict(allow_inf_nan=False)

    schema_version: Literal[1] = 1
    method: str = Field(description="Method of the recipe, such as lora or lora-over.")
    model: str = Field(description="Base model, as the recipe names it.")
    model_origin: str = Field(description="Base model with its commit or folder, for people.")
    data_origin: str = Field(description="Training data with its commit or file, for people.")
    learning_rate: float = Field(description="Peak learning rate.")
    seed: int = Field(description="Seed of the recipe.")
    steps: int = Field(description="Optimizer steps of the run.")
    best_step: int | None = Field(
        None, description="Step whose weights the result has, by load_best_model_at_end; None: the last one."
    )
    train_seconds: float = Field(description="Seconds of training in this process; a resumed run trained longer.")
    processes: int = Field(1, description="Processes that trained the run, each with its own micro-batches.")
    timed_steps: int = Field(description="Optimizer steps within train_seconds.")
    peak_bytes: int = Field(description="Largest memory in bytes: PyTorch's on a CUDA device, else the process's.")
    lora_parameters: int = Field(description="Numbers in A and B, which are served; for method full, all weights.")
    served_rank: int | None = Field(None, description="Largest rank of a module as served; None: there is no adapter.")
    served_bytes: int | None = Field(None, description="Bytes of A and B as served; None: there is no adapter.")
    served_error: float | None = Field(
        None,
        description="Frobenius norm, over all modules, of what the served adapter leaves out of the trained update; "
        "None: nothing.",
    )
    trained_parameters: int = Field(description="Numbers trained at the same time: of A, B and the cores.")
    started_from: StartedFrom | None = Field(
        None, description="Adapters that A and B started from; None: from PEFT's draws."
    )
    privacy: Privacy | None = Field(None, description="Guarantee of differential privacy; None: there is none.")
    added_parameters: int = Field(description="Numbers in the cores beyond those of the matrices that they represent.")
    gauge_numbers: int = Field(0, description="Numbers in bases that are not trained, and in their moments.")
    update_norm: float | None = Field(
        description="Frobenius norm, over all modules, of the change of scaling * B A during the run; None where more "
        "than B A is trained (full fine-tuning, DoRA)."
    )
    before: Measures | None = Field(description="Held-out measures before training; None: not measured.")
    after: Measures | None = Field(description="Held-out measures after training; None: not measured.")
    lengths: Lengths | None = Field(None, description="Lengths of the training examples; None: none can be cut.")
    filtered: Counted = Field(Counted(), description="Rows that data.keep did not let through.")
    skipped: Counted = Field(Counted(), description="Rows that data.skip_bad_rows left out.")
    unread: dict[str, Counted] = Field({}, description="Columns that were not learned, with the rows that have them.")
    versions: dict[str, str] = Field(description="Versions of Python and of the libraries.")
    hardware: str = Field(description="Processor and accelerator.")

    def facts(self) -> dict[str, str]:
        """Name and value of each row of a table."""
        rows = {
            "method": self.method,
            "base model": self.model_origin,
            "training data": self.data_origin,
            "steps, learning rate, seed": f"{self.steps}, {self.learning_rate:g}, {self.seed}",
            **({} if self.best_step is None else {"weights of the best step": str(self.best_step)}),
            **({} if self.processes == 1 else {"processes": str(self.processes)}),
            "parameters served": f"{self.lora_parameters:,}",
            "parameters added while training": f"{self.added_parameters:,}",
            "parameters trained": f"{self.trained_parameters:,}",
        }
        if self.served_rank is not None:
            rows["rank and bytes served"] = f"{self.served_rank}, {self.served_bytes:,}"
        if self.served_error is not None:
            rows["norm left out of the served update"] = f"{self.served_error:.2g}"
        if self.started_from is not None:
            rows["started from"] = str(self.started_from)
        if self.privacy is not None:
            rows["differential privacy"] = str(self.privacy)
        if self.gauge_numbers:
            rows["numbers in bases and moments"] = f"{self.gauge_numbers:,}"
        if self.update_norm is not None:
            rows["norm of delta(B A)"] = f"{self.update_norm:.4g}"
        measured = {"before": self.before, "after": self.after}
        rows |= {name: str(measures) for name, measures in measured.items() if measures is not None}
        return rows


def read_run(folder: str | Path) -> RunResult:
    """Read the result of a finished run.

    Args:
        folder: The run's folder.

    Raises:
        CheckpointError: No run there, or one that is not finished.
    """
    return read_json(Path(folder) / RUN_FILE, RunResult)
