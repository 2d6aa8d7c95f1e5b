"""The real trainers of GRPO on the real vLLM for a CPU, right and with planted faults: when each is named.

    cd tests && ../.venv/bin/python -m benchmarks.trl_rollouts "float32: none" "float32: served as base"
    cd tests && ../.venv/bin/python -m benchmarks.trl_rollouts --write

SmolLM2 is trained in float32 with a LoRA, and samples on vLLM in float32 or bfloat16. GRPOTrainer has a stand-in for
TRL's `VLLMGeneration`, which sends each version of the adapter under a new name; AsyncGRPOTrainer does so itself.
Every run is kept in tests/serve/rollouts/trl.json when it ends, so that the command goes on with the others; with
`--write`, the table in `docs/rollouts.md` is written.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from loraover.common.atomic_output import publish_text
from loraover.models.load import resolve_model
from loraover_serve import VerifyRollouts
from loraover_serve.rollouts.trl import FIRST_CHECKS
from loraover_serve.vllm.server import VllmServerConfig, serve_vllm

from benchmarks.page import ROOT, replaced
from support.async_trainer import served_async_trainer
from support.online_trainers import online_trainer, planted
from support.trl_engine import VllmByHttp
from support.vllm_command import vllm_command

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
KEPT = ROOT / "tests" / "serve" / "rollouts" / "trl.json"
PAGE = ROOT / "docs" / "rollouts.md"
RATE, NEW_TOKENS, SEED = 1e-3, 12, 0
PROMPTS = [f"What is {a} times {a + 3}? It is" for a in range(11, 35)]


@dataclass(frozen=True)
class Run:
    """A run of a trainer.

    Args:
        fault: Fault that is planted; empty: none.
        dtype: Number format of the engine.
        steps: Number of optimizer steps.
        max_staleness: AsyncGRPOTrainer's option; None takes GRPOTrainer. TRL exceeds it by one, which the judge allows
            where it is not 0.
        rows: Number of rows of a step.
        is_cost: Whether checks are as by default, and not of all rows at each step, so that their time is measured.
    """

    fault: str = ""
    dtype: str = "float32"
    steps: int = 5
    max_staleness: int | None = None
    rows: int = 8
    is_cost: bool = False

    @property
    def is_async(self) -> bool:
        """Whether the trainer is AsyncGRPOTrainer."""
        return self.max_staleness is not None


RUNS: Mapping[str, Run] = {
    "float32: none": Run(steps=24),
    "bfloat16: none": Run(dtype="bfloat16", steps=24),
    "float32: served as base": Run("base"),
    "float32: stale by 1": Run("stale"),
    "float32: half the scale": Run("half"),
    "float32: every second row by the base model": Run("mixed"),
    "float32: attention layers only": Run("attention"),
    "bfloat16: served as base": Run("base", "bfloat16", 12),
    "float32, AsyncGRPO: none": Run(steps=24, max_staleness=1),
    "float32, AsyncGRPO: none, max_staleness=0": Run(max_staleness=0),
    "float32, AsyncGRPO: served as base": Run("base", max_staleness=1),
    "float32, AsyncGRPO: stale by 1": Run("stale", max_staleness=1),
    "float32, AsyncGRPO: half the scale": Run("half", max_staleness=1),
    "bfloat16, AsyncGRPO: none": Run(dtype="bfloat16", steps=24, max_staleness=1),
    "float32: cost": Run(steps=12, rows=32, is_cost=True),
    "float32: cost of 8 rows": Run(steps=12, is_cost=True),
    "bfloat16: cost": Run(dtype="bfloat16", steps=12, rows=32, is_cost=True),
    "bfloat16: cost of 8 rows": Run(dtype="bfloat16", steps=20, is_cost=True),
}
"""Runs by the names that the table has."""


@contextmanager
def served(dtype: str, folder: Path) -> Iterator[type[VllmByHttp]]:
    """The real vLLM in a number format, as a stand-in that asks it."""
    source = resolve_model(MODEL).location
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    options = ("--dtype", dtype, "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "16")
    config = VllmServerConfig(model=source, max_loras=3, plugin=settings, options=options)
    with serve_vllm(config, folder / "vllm.log", executable=str(vllm_command()), startup_timeout_s=900) as server:
        yield type("Asked", (VllmByHttp,), {"url": server.url, "base": source})


def run(name: str, engine: type[VllmByHttp], folder: Path) -> list[dict[str, Any]]:
    """Train, and return what is logged at each step."""
    made = RUNS[name]
    engine.folder = folder / name.replace(": ", "-").replace(" ", "-")
    with pytest.MonkeyPatch.context() as patch, planted(made.fault, engine=engine):
        trainer = async_run(made, engine, patch) if made.is_async else synchronous_run(made, engine)
        trainer.remove_callback(PrinterCallback)
        allowed = made.max_staleness + 1 if made.max_staleness else None
        return train(trainer, None if made.is_cost else made.rows * (1 + made.is_async), allowed)


def synchronous_run(made: Run, engine: type[VllmByHttp]) -> Any:
    """GRPOTrainer, with the stand-in for its `VLLMGeneration`."""
    return online_trainer(
        "GRPO",
        AutoModelForCausalLM.from_pretrained(engine.base, dtype="float32"),
        engine.folder / "run",
        prompts=PROMPTS * (1 + made.rows // 48),  # two answers each
        steps=made.steps,
        learning_rate=RATE,
        max_completion_length=NEW_TOKENS,
        per_device_train_batch_size=made.rows,
        processing_class=AutoTokenizer.from_pretrained(engine.base),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=8, lora_alpha=16),
        seed=SEED,
    )


def async_run(made: Run, engine: type[VllmByHttp], patch: pytest.MonkeyPatch) -> Any:
    """AsyncGRPOTrainer with its own worker, which loads each version of the adapter into the engine."""
    return served_async_trainer(
        Path(engine.base),
        engine.folder / "run",
        patch,
        engine.url,
        PROMPTS,
        made.fault,
        max_steps=made.steps,
        learning_rate=RATE,
        max_completion_length=NEW_TOKENS,
        max_staleness=made.max_staleness,
        seed=SEED,
    )


def train(trainer: Any, rows: int | None, max_staleness: int | None) -> list[dict[str, Any]]:
    """Train with the judge, which runs so many rows, and return its finding and TRL's scalar at each step."""
    found: list[dict[str, Any]] = []

    class Seen(VerifyRollouts):
        def _log(self, finding: Any) -> None:
            super()._log(finding)
            along = finding.strength
            found.append(
                {
                    "verdict": finding.verdict,
                    "fault": finding.fault,
                    "reason": finding.reason,
                    "strength": None if along is None else [along.value, along.low, along.high],
                    "effect": finding.effect,
                    "noise": finding.noise,
                    "scalar": scalar(self.source.sink),
                }
            )
            print(json.dumps(found[-1]), flush=True)

        def on_pre_optimizer_step(self, *args: Any, **options: Any) -> None:
            self.began, checks = time.perf_counter(), len(found)
            super().on_pre_optimizer_step(*args, **options)
            if len(found) == checks:
                found.append({})
            found[-1] |= {"check_s": time.perf_counter() - self.began, "step_s": time.perf_counter() - self.ended}

        def on_step_begin(self, *args: Any, **options: Any) -> None:
            self.ended = time.perf_counter()

    Seen(trainer, rows=rows, merged=False, max_staleness=max_staleness)
    trainer.train()
    return found


def scalar(sink: Mapping[str, Sequence[float]]) -> float | None:
    """TRL's mean of abs(e - a), which AsyncGRPO does not log."""
    values = sink.get("sampling/sampling_logp_difference/mean")
    return None if values is None else values[-1]


def named_at(steps: Sequence[Mapping[str, Any]]) -> tuple[int | None, str]:
    """The first step that differs, and the fault that is then named."""
    for index, step in enumerate(steps):
        if step["verdict"] == "differs":
            return index + 1, str(step["fault"] or "unknown")
    return None, ""


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The table, as Markdown."""
    lines = [
        "| engine | fault | steps | alarms | named at step | as | strength there | TRL's scalar | in the right run |",
        "| --- | --- | ---: | ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for name, steps in runs.items():
        if RUNS[name].is_cost:
            continue
        engine, _, fault = name.partition(": ")
        step, named = named_at(steps)
        right = runs.get(f"{engine}: none", [])
        at = steps[step - 1] if step else steps[-1]
        value = at["strength"]
        cells = [
            engine,
            fault,
            str(len(steps)),
            str(sum(each["verdict"] == "differs" for each in steps)),
            str(step or "never"),
            named,
            "" if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]",
            told(at),
            told(right[(step or len(steps)) - 1]) if len(right) >= (step or len(steps)) else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name in [name for name in runs if RUNS[name].is_cost]:
        after = runs[name][FIRST_CHECKS:]
        checks, whole = (sum(step[key] for step in after) for key in ("check_s", "step_s"))
        share, rows, dtype = checks / whole, RUNS[name].rows, RUNS[name].dtype
        count = sum("verdict" in step for step in after)
        lines += ["", f"By default, {count} checks took {share:.1%} of {len(after)} steps of {rows} rows ({dtype})."]
    return "\n".join(lines) + "\n"


def told(step: Mapping[str, Any]) -> str:
    """TRL's scalar of a step as a cell."""
    return "" if step["scalar"] is None else f"{step['scalar']:.2g}"


@click.command()
@click.argument("names", nargs=-1)
@click.option("--write", is_flag=True, help="Write the table of the kept runs into the documentation.")
def main(names: Sequence[str], write: bool) -> None:
    """Make runs by their names, or those that are not kept yet."""
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    if write:
        publish_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), "trl_rollouts", f"\n{table(kept)}", PAGE))
        return
    missing = names or [name for name in RUNS if name not in kept]
    for dtype in sorted({RUNS[name].dtype for name in missing}):
        with tempfile.TemporaryDirectory() as folder, served(dtype, Path(folder)) as engine:
            for name in [name for name in missing if RUNS[name].dtype == dtype]:
                kept[name] = run(name, engine, Path(folder))
                ordered = {each: kept[each] for each in [*RUNS, *kept] if each in kept}
                publish_text(KEPT, json.dumps(_rounded(ordered)) + "\n")


def _rounded(value: Any) -> Any:
    """Numbers with five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
