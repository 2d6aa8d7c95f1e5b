"""The real GRPOTrainer on the real vLLM for a CPU, right and with planted faults: the step at which each is named.

    cd tests && ../.venv/bin/python -m benchmarks.trl_rollouts "float32: none" "float32: served as base"
    cd tests && ../.venv/bin/python -m benchmarks.trl_rollouts --write

SmolLM2 is trained in float32 with a LoRA, and samples on vLLM in float32 or bfloat16, to which a stand-in for TRL's
`VLLMGeneration` sends each version of the adapter under a new name. Every run is kept in tests/serve/rollouts/trl.json
when it ends, so that the command goes on with the others; with `--write`, the table in `docs/rollouts.md` is written.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from loraover.common.atomic_output import publish_text
from loraover.models.load import resolve_model
from loraover_serve import VerifyRollouts
from loraover_serve.vllm.server import VllmServerConfig, serve_vllm

from benchmarks.page import ROOT, replaced
from support.online_trainers import online_trainer, planted
from support.trl_engine import VllmByHttp
from support.vllm_command import vllm_command

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
KEPT = ROOT / "tests" / "serve" / "rollouts" / "trl.json"
PAGE = ROOT / "docs" / "rollouts.md"
RATE, ROWS, COST_ROWS, NEW_TOKENS, SEED = 1e-3, 8, 32, 12, 0
PROMPTS = [f"What is {a} times {a + 3}? It is" for a in range(11, 35)]

RUNS: Mapping[str, tuple[str, str, int]] = {
    "float32: none": ("", "float32", 24),
    "bfloat16: none": ("", "bfloat16", 24),
    "float32: served as base": ("base", "float32", 5),
    "float32: stale by 1": ("stale", "float32", 5),
    "float32: half the scale": ("half", "float32", 5),
    "float32: every second row by the base model": ("mixed", "float32", 5),
    "float32: attention layers only": ("attention", "float32", 5),
    "bfloat16: served as base": ("base", "bfloat16", 12),
    "float32: cost": ("", "float32", 5),
    "bfloat16: cost": ("", "bfloat16", 5),
}
"""Fault, number format of the engine and optimizer steps of each run."""

COSTS = ("float32: cost", "bfloat16: cost")
"""Runs with as many rows as are run by default, of COST_ROWS in a step."""


@contextmanager
def served(dtype: str, folder: Path) -> Iterator[type[VllmByHttp]]:
    """The real vLLM in a number format, as a stand-in that asks it."""
    source = resolve_model(MODEL).location
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    options = ("--dtype", dtype, "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "16")
    config = VllmServerConfig(model=source, max_loras=2, plugin=settings, options=options)
    with serve_vllm(config, folder / "vllm.log", executable=str(vllm_command()), startup_timeout_s=900) as server:
        yield type("Asked", (VllmByHttp,), {"url": server.url, "base": source})


def run(name: str, engine: type[VllmByHttp], folder: Path) -> list[dict[str, Any]]:
    """Train, and return what is logged at each step."""
    fault, _, steps = RUNS[name]
    rows = COST_ROWS if name in COSTS else ROWS
    engine.folder = folder / name.replace(": ", "-").replace(" ", "-")
    with planted(fault, engine=engine):
        trainer = online_trainer(
            "GRPO",
            AutoModelForCausalLM.from_pretrained(engine.base, dtype="float32"),
            engine.folder / "run",
            prompts=PROMPTS,
            steps=steps,
            learning_rate=RATE,
            max_completion_length=NEW_TOKENS,
            per_device_train_batch_size=rows,
            processing_class=AutoTokenizer.from_pretrained(engine.base),
            peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=8, lora_alpha=16),
            seed=SEED,
        )
        trainer.remove_callback(PrinterCallback)
        return train(trainer, None if name in COSTS else rows)


def train(trainer: Any, rows: int | None) -> list[dict[str, Any]]:
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
                    "scalar": self.source.sink["sampling/sampling_logp_difference/mean"][-1],
                }
            )
            print(json.dumps(found[-1]), flush=True)

        def on_pre_optimizer_step(self, *args: Any, **options: Any) -> None:
            self.began = time.perf_counter()
            super().on_pre_optimizer_step(*args, **options)
            found[-1] |= {"check_s": time.perf_counter() - self.began, "step_s": time.perf_counter() - self.ended}

        def on_step_begin(self, *args: Any, **options: Any) -> None:
            self.ended = time.perf_counter()

    Seen(trainer, rows=rows, merged=False)
    trainer.train()
    return found


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
        if name in COSTS:
            continue
        dtype, _, fault = name.partition(": ")
        step, named = named_at(steps)
        right = runs.get(f"{dtype}: none", [])
        at = steps[step - 1] if step else steps[-1]
        value = at["strength"]
        cells = [
            dtype,
            fault,
            str(len(steps)),
            str(sum(each["verdict"] == "differs" for each in steps)),
            str(step or "never"),
            named,
            "" if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]",
            f"{at['scalar']:.2g}",
            f"{right[(step or len(steps)) - 1]['scalar']:.2g}" if len(right) >= (step or len(steps)) else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name in [name for name in COSTS if name in runs]:
        checks, whole = (sum(step[key] for step in runs[name]) for key in ("check_s", "step_s"))
        lines += ["", f"With the default, checks took {checks / whole:.1%} of steps of {COST_ROWS} rows ({name[:-6]})."]
    return "\n".join(lines) + "\n"


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
    for dtype in sorted({RUNS[name][1] for name in missing}):
        with tempfile.TemporaryDirectory() as folder, served(dtype, Path(folder)) as engine:
            for name in [name for name in missing if RUNS[name][1] == dtype]:
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
