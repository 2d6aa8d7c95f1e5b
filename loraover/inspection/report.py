"""Description of a folder, as `loraover inspect` gives it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover.overparam.round import Round
from loraover.training.run.failure import Failure
from loraover.training.run_result import RunResult

Kind = Literal["run", "checkpoint", "adapter", "folded adapter", "vLLM export", "ONNX export"]


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True)


class AdapterFacts(_Fact):
    """An adapter in PEFT's format."""

    kind: str = Field(description="PEFT's name of the method, such as LORA.")
    base_model: str | None = Field(description="Base model that the adapter names.")
    task: str | None = Field(None, description="Task, by PEFT's name; None: the adapter names none.")
    ranks: list[int] = Field(description="Ranks of the modules, each once.")
    lora_alpha: float = Field(description="Alpha of the modules without a pattern.")
    variants: list[str] = Field(description="Departures from plain LoRA: rsLoRA, DoRA.")
    targets: list[str] = Field(description="Names of the adapted modules, without their path.")
    modules: int = Field(description="Number of adapted modules.")
    parameters: int = Field(description="Numbers in the tensors.")
    dtypes: list[str] = Field(description="Data types of the tensors, as safetensors names them.")


class CoreFacts(_Fact):
    """Contents of a LoRA-Over checkpoint beside its adapter: the cores of the over-parameterised matrices."""

    decomposition: str = Field(description="Name of the decomposition.")
    sites: int = Field(description="Number of matrices with cores.")
    schedule: str = Field(description="How these matrices were chosen.")
    step: int = Field(description="Optimizer steps taken.")
    steps: int | None = Field(description="Optimizer steps of the run; None: unknown.")
    optimizer: str | None = Field(description="Optimizer whose state is stored; None: no state.")
    versions: dict[str, str] = Field(description="Versions that wrote the checkpoint.")
    rounds: list[Round] = Field(description="Every decision of the schedule with all scores.")


class RunFacts(_Fact):
    """A training run."""

    state: Literal["finished", "unfinished", "failed"] = Field(description="How far the run has come.")
    method: str | None = Field(None, description="Method of the recipe; None: no recipe is left.")
    model: str | None = Field(None, description="Base model of the recipe.")
    data: str | None = Field(None, description="Training data of the recipe.")
    can_resume: bool = Field(False, description="Whether a run with this recipe can be continued.")
    checkpoint_step: int | None = Field(None, description="Step of the newest checkpoint to resume from.")
    last_loss: float | None = Field(None, description="Last training loss of the log, in nats per token.")
    result: RunResult | None = Field(None, description="Result of a finished run.")
    failure: Failure | None = Field(None, description="Failure of the last attempt.")


class OnnxFacts(BaseModel):
    """Summary of an ONNX export."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    mode: str = Field(description="Merged: the adapter is in the weights; swappable: adapters are inputs.")
    precision: str = Field(description="Precision of the graph.")
    base_model: str = Field(description="Base model.")
    adapters: dict[str, str] = Field(description="Source of each adapter, by its name.")
    verdict: str = Field(description="Outcome of the check in ONNX Runtime.")


class VllmFacts(BaseModel):
    """Summary of the pre-flight of a vLLM export."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    verdict: str = Field(description="Outcome of the pre-flight.")
    vllm_version: str = Field(description="vLLM version whose rules were applied.")
    served_model: str = Field(description="Model to be served.")
    max_lora_rank: int | None = Field(None, description="Value of vLLM's --max-lora-rank that the adapter needs.")


class NextStep(_Fact):
    """Command that may be run on a folder."""

    what: str = Field(description="What it does.")
    command: str = Field(description="Complete command line.")


class FolderReport(_Fact):
    """Description of a folder: its kind, its training, and the commands that may be run on it."""

    path: str = Field(description="The folder.")
    kind: Kind = Field(description="Kind of the folder, in words.")
    adapter: AdapterFacts | None = Field(None, description="The adapter in it; for a run, the one that it trained.")
    cores: CoreFacts | None = Field(None, description="The cores in it; for a run, those that it trained.")
    run: RunFacts | None = Field(None, description="The training run.")
    vllm: VllmFacts | None = Field(None, description="The pre-flight for vLLM.")
    onnx: OnnxFacts | None = Field(None, description="The ONNX export.")
    verdicts: dict[str, str] = Field(default_factory=dict, description="Verdict of each certificate, by its file.")
    next_steps: list[NextStep] = Field(default_factory=list, description="Commands that may be run on the folder.")
