"""The judge of rollouts inside the trainers of TRL: which rows it reads, when it runs the model, and what it logs."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraover.callbacks.seal_checkpoints import checkpoint_folder
from loraover.common.atomic_output import publish_text
from loraover.common.errors import CheckpointError, ConfigError, ParityError
from loraover_serve.judge.names import INTERMITTENT, NOT_APPLIED, SCALED, STALE
from loraover_serve.rollouts.case import FACTORS
from loraover_serve.rollouts.loop import RolloutJudge
from loraover_serve.rollouts.policy import Adapter, EngineNumbers, Policy, Row
from loraover_serve.rollouts.sources import source_of
from loraover_serve.rollouts.tokens import STALE_BY
from loraover_serve.rollouts.verdict import Finding, scale_faults

logger = logging.getLogger("loraover")

Action = Literal["warn", "stop"]
EngineDtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {name: getattr(torch, name) for name in get_args(EngineDtype)}

STATE_FILE, FAILURE_FILE = "verify_rollouts.json", "failure.json"
SCHEMA = 1

KEPT = 4
"""Number of earlier adapters that are kept, so that an engine can be found to have one of them."""

LOOK_BACK = 8
"""Number of checks after which the adapters of the last step and of the start are compared, even without an alarm."""

ALARMS = 2
"""Number of consecutive findings that differ, after which training is stopped."""

FEWEST_ROWS = 2
SHARES = {False: 1 / 16, True: 1 / 32}
"""Share of all rows that checks run by default; the key says whether the trainer's logprobs are computed again."""

FIRST_CHECKS = 4
"""Number of samplings at the start that are all checked by default, since most faults are there from the start."""

AT_START = "the adapter as this run began"
RAW = "logprobs before the temperature"

CODES = {"as trained": 1.0, "applied, scale not known yet": 0.5, "differs": -1.0}
"""Verdicts as numbers for the log; 0 means that it is too early, or that there is no verdict."""

REMEDIES = {
    NOT_APPLIED: "the sync has not reached the engine, or requests name the base model; compare the model's name in "
    "requests with /v1/models, and look for an error of the sync",
    INTERMITTENT: "some replicas have no adapter: load it on each replica, since a load request reaches only one",
    STALE: "the engine samples with an older adapter: load each version under a new name, or clear the prefix cache, "
    "and wait for the sync before you sample",
    SCALED: "the engine multiplies delta_W by another factor: compare lora_alpha, r and use_rslora of the synced file, "
    "and make sure that the adapter is not both merged into the base model and applied",
}
OTHER_REMEDY = "compare the adapter that the engine has loaded with the trainer's, tensor by tensor"


class VerifyRollouts(TrainerCallback):
    """Callback that checks, while TRL's online trainers run, whether the engine samples from the trained adapter.

    It adds itself to the trainer. Before each optimizer step, it compares the engine's logprobs of the sampled tokens
    with the trainer's, with the adapter and without it, on a part of the rows, and asks the engine nothing. After an
    alarm it also runs earlier adapters and parts of the adapter, so that the fault gets a name. The log has
    `verify/strength`, `low`, `high`, `effect` and `noise` (nats), and `verdict`: 1 as trained, 0.5 applied, 0 too
    early or none, -1 differs. A line of the log has the last check, or the last that differs since the line before.

    It works with GRPOTrainer and RLOOTrainer and those derived from them, AsyncGRPOTrainer, and OnlineDPOTrainer with
    a server, with LoRAs of PEFT and `LoraOverCallback`. Each process runs its rows, and all judge all of them.

    Args:
        trainer: The trainer, before `train`.
        every: Number of times that the engine samples between two checks. None checks each of the first four times, and
            each time after a check that differs; else as often as two rows are the default share of those that are
            sampled, for 8 rows every fourth time (eighth, where the share is halved). With `rows`, None is 1.
        action: Action after two consecutive checks that differ: "warn" continues training; "stop" saves a checkpoint,
            ends training, and raises ParityError. Both write `failure.json` into `output_dir`.
        rows: Number of rows of each process that are run at a check. None takes a sixteenth, or half as many if the
            engine's number format is not the trainer's or there is dropout; at least 2.
        engine_dtype: Number format of the engine; None asks it once.
        merged: Whether the engine gets weights with the adapter merged; None means that TRL's settings decide.
        max_staleness: Number of versions by which AsyncGRPOTrainer's samples may be older than the adapter; None takes
            its setting. TRL 1.16 exceeds that setting by one.
        judge: The judge; None makes one with its defaults.

    Raises:
        ConfigError: A trainer without an engine or a LoRA, or a TRL whose private names differ.

    Example:
        ```python
        from peft import LoraConfig
        from trl import GRPOConfig, GRPOTrainer
        from trl.rewards import think_format_reward

        from loraover_serve import VerifyRollouts


        def train(prompts):
            trainer = GRPOTrainer(
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                think_format_reward,
                GRPOConfig("run", use_vllm=True, vllm_mode="server"),
                prompts,
                peft_config=LoraConfig(target_modules="all-linear"),
            )
            VerifyRollouts(trainer, action="stop")
            trainer.train()
        ```
    """

    def __init__(
        self,
        trainer: Any,
        every: int | None = None,
        action: Action = "warn",
        *,
        rows: int | None = None,
        engine_dtype: EngineDtype | None = None,
        merged: bool | None = None,
        max_staleness: int | None = None,
        judge: RolloutJudge | None = None,
    ) -> None:
        too_few = (every is not None and every < 1) or (rows is not None and rows < FEWEST_ROWS)
        if too_few or action not in ("warn", "stop"):
            raise ConfigError(
                f"VerifyRollouts: every is {every}, action {action!r} and rows {rows}, expected at least 1, warn or "
                f"stop, and at least {FEWEST_ROWS}."
            )
        if any(isinstance(each, VerifyRollouts) for each in trainer.callback_handler.callbacks):
            raise ConfigError(
                "VerifyRollouts: the trainer already has VerifyRollouts, perhaps from its recipe; leave "
                "one of the two out."
            )
        self.trainer, self.action, self.most_rows = trainer, action, rows
        self.every = 1 if every is None and rows is not None else every
        self.judge = judge or RolloutJudge()
        self.source = source_of(trainer, max_staleness)
        dtype, is_raw = (engine_dtype, False) if engine_dtype else self._asked()
        if dtype not in DTYPES:
            raise ConfigError(f"VerifyRollouts: the engine's dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        form = EngineNumbers(DTYPES[dtype], self.source.merges if merged is None else merged)
        model = trainer.accelerator.unwrap_model(trainer.model)
        temperature = 1.0 if is_raw and not self.source.trains_on_logprobs else trainer.args.temperature
        rows_at_once = trainer.args.per_device_train_batch_size
        self.policy = Policy(model, form, temperature, rows_at_once, self.source.attention)
        self.factors = dict(FACTORS) | scale_faults(self.policy.scaling, trainer.accelerator.num_processes)
        self.finding: Finding | None = None
        self._versions = deque[tuple[int, Adapter]](maxlen=KEPT + 1)
        self._start: Adapter | None = None
        self._sampled = self._checks = self._alarms = self._unchecked = 0
        self._has_compared = self._is_judged = False
        trainer.add_callback(self)

    def _asked(self) -> tuple[str, bool]:
        """The engine's number format, and whether its logprobs lack the temperature; one process asks for all."""
        found: list[Any] = [None]
        if self.trainer.accelerator.is_main_process:
            try:
                found = [self.source.engine_settings()]
            except (AttributeError, KeyError, TypeError, OSError, RuntimeError) as error:
                found = [error]
        (told,) = broadcast_object_list(found)
        if isinstance(told, Exception):
            raise ConfigError(
                f"VerifyRollouts: the engine does not report its dtype ({told!r}); give engine_dtype."
            ) from told
        dtype, mode = told
        return dtype.removeprefix("torch."), mode.startswith("raw")

    @property
    def computes_again(self) -> bool:
        """Whether the trainer's own logprobs have another number format than the engine's, or dropout in them."""
        policy, args = self.policy, self.trainer.args
        return (
            policy.engine.dtype != torch.float32 or bool(policy.coarse) or args.bf16 or args.fp16 or policy.has_dropout
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the judge from the checkpoint that a run is resumed from; one process reads it for all."""
        if state.global_step == 0:
            return
        named = args.resume_from_checkpoint
        folder = Path(named) if isinstance(named, str) else checkpoint_folder(args, state)
        found: list[Any] = [None]
        if self.trainer.accelerator.is_main_process:
            try:
                found = [(folder / STATE_FILE).read_bytes()]
            except OSError as error:
                found = [error]
        (text,) = broadcast_object_list(found)
        if isinstance(text, FileNotFoundError):
            logger.warning("%s has no %s: the judge of rollouts begins anew", folder, STATE_FILE)
            return
        try:
            if isinstance(text, OSError):
                raise text
            kept = json.loads(text)
            if kept["schema"] != SCHEMA:
                raise ValueError(f"found schema {kept['schema']!r}, expected {SCHEMA}")
            self.judge.load_state_dict(kept["judge"])
            self._alarms, self._checks = int(kept["alarms"]), int(kept["checks"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / STATE_FILE}: {error}; remove it, and the judge begins anew.") from error

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the judge to the checkpoint."""
        if args.should_save:
            found = {"schema": SCHEMA, "judge": self.judge.state_dict(), "alarms": self._alarms, "checks": self._checks}
            publish_text(checkpoint_folder(args, state) / STATE_FILE, json.dumps(found))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the rows that the engine has sampled for this step, before the adapter changes."""
        rows = self.source.new_rows()
        self._remember(bool(rows))
        sampled = gather_object([len(rows)])[0]
        if not sampled:
            return
        self._sampled += 1
        self._unchecked += sampled
        if not self._is_due():
            return
        self._unchecked = 0
        finding = self._judged([row.scored() for row in rows])
        self._checks += 1
        self._has_compared |= finding.tokens > 0
        self._is_judged |= finding.verdict not in (None, "too early")
        self._log(finding)
        self._tell(finding, state.global_step + 1)
        self._alarms = self._alarms + 1 if finding.verdict == "differs" else 0
        if self._alarms >= ALARMS:
            self._write_failure(finding, state.global_step + 1)
            if self.action == "stop":
                control.should_training_stop = control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take empty lists out of the metrics, since OnlineDPOTrainer divides by their lengths."""
        for name in [name for name, values in self.source.sink.items() if name.startswith("verify/") and not values]:
            del self.source.sink[name]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise an error if the run was stopped by this callback, and report if nothing was judged.

        Raises:
            ParityError: The action is "stop", and two checks in a row differed, or no check had anything to compare.
        """
        if self._sampled and not self._is_judged:
            why = (
                "there was no check" if self.finding is None else f"the last of the checks says: {self.finding.reason}"
            )
            told = f"VerifyRollouts has not judged the engine in any step of this run: {why}"
            if self.action == "stop" and not self._has_compared:
                raise ParityError(
                    f"{told}. Leave VerifyRollouts out, or make sure that the engine's logprobs reach it."
                )
            logger.warning(told)
        if self.action == "stop" and self._alarms >= ALARMS and self.finding is not None:
            raise ParityError(
                f"Training was stopped after step {state.global_step}, since the engine does not sample from the "
                f"policy that is trained: {self.finding.reason}. What to do: {self.remedy(self.finding)}. See "
                f"{Path(args.output_dir) / FAILURE_FILE}."
            )

    def _is_due(self) -> bool:
        """Whether the rows that the engine has just sampled are checked; the same in all processes."""
        if self.every is not None:
            return (self._sampled - 1) % self.every == 0
        is_first = self._sampled <= FIRST_CHECKS
        return is_first or self._alarms > 0 or self._unchecked * SHARES[self.computes_again] >= FEWEST_ROWS

    def _remember(self, has_sampled: bool) -> None:
        """Keep a copy of the adapter that the engine has now, if it is a new one."""
        version = self.source.version
        if version is None:
            version = self._sampled + has_sampled
        if not self._versions or self._versions[0][0] != version:
            self._versions.appendleft((version, self.policy.copy()))
            if self._start is None:
                self._start = {} if self.policy.is_zero else self._versions[0][1]

    def _judged(self, rows: Sequence[Row]) -> Finding:
        """Judge a part of the rows; after an alarm, judge them again with all known faults."""
        chosen = self._chosen([row for row in rows if row.places])
        arrays = self._arrays(chosen)
        looks_back = self._checks % LOOK_BACK == LOOK_BACK - 1
        models = self._models(chosen, 1 if looks_back else 0, at_start=looks_back)
        finding = self._step(chosen, arrays, models)
        if finding.verdict == "differs":
            models = self._models(chosen, KEPT, at_start=True)
            for name, change in self.policy.changes(self.factors).items():
                models[name] = self._of_versions(chosen, change=change)
            if self.policy.temperature != 1:
                models[RAW] = self.policy.logprobs(chosen, temperature=1.0)
            finding = self._step(chosen, arrays, models, again=True)
        return finding

    def _chosen(self, rows: Sequence[Row]) -> list[Row]:
        """As many rows as a check may run, from as many prompts as possible."""
        share = SHARES[self.computes_again]
        most = self.most_rows or max(FEWEST_ROWS, math.ceil(len(rows) * share))
        seen: dict[Any, int] = {}
        turns = []
        for index, row in enumerate(rows):
            turns.append((seen.setdefault(row.prompt, 0), index))
            seen[row.prompt] += 1
        return [rows[index] for _, index in sorted(turns)[:most]]

    def _arrays(self, rows: Sequence[Row]) -> dict[str, list[float]]:
        """Logprobs by the engine, by the policy that should have sampled, and by the base model."""
        engine = [value for row in rows for value in row.engine]
        own = [value for row in rows for value in row.own or ()]
        again = not self.policy.is_zero and (self.computes_again or len(own) != len(engine))
        if again and self.policy.mixes:  # one run of the model in place of two
            told = self._of_versions([*rows, *(replace(row, is_base=True) for row in rows)])
            if self.policy.mixes:
                return {"e": engine, "a": told[: len(engine)], "b": told[len(engine) :]}
        base = self.policy.logprobs(rows, base=True)
        if self.policy.is_zero:
            return {"e": engine, "a": base, "b": base}
        if again:
            own = self._of_versions(rows)
        return {"e": engine, "a": own, "b": base}

    def _of_versions(
        self, rows: Sequence[Row], older: int = 0, change: Callable[[Adapter], Adapter] = lambda adapter: adapter
    ) -> list[float]:
        """Logprobs of each row by its own version of the adapter, changed or made older; NaN if it is not kept."""
        places = {version: place for place, (version, _) in enumerate(self._versions)}
        found: dict[int, list[float]] = {}
        by_place: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            place = places.get(row.version, len(places)) if row.version is not None else 0
            by_place.setdefault(place + older, []).append(index)
        for place, indices in by_place.items():
            mine = [rows[index] for index in indices]
            if place < len(self._versions):
                told = iter(self.policy.logprobs(mine, change(self._versions[place][1])))
            else:
                told = iter([math.nan] * sum(len(row.places) for row in mine))
            found |= {index: [next(told) for _ in rows[index].places] for index in indices}
        return [value for index in range(len(rows)) for value in found[index]]

    def _models(self, rows: Sequence[Row], earlier: int, *, at_start: bool) -> dict[str, list[float]]:
        """Logprobs of older adapters, as many as are kept, by name."""
        found = {}
        for older in range(1, min(earlier, len(self._versions) - 1) + 1):
            found[STALE_BY.format(older)] = self._of_versions(rows, older)
        if at_start and self._start and not any(adapter is self._start for _, adapter in self._versions):
            found[AT_START] = self.policy.logprobs(rows, self._start)
        return found

    def _step(
        self, rows: Sequence[Row], arrays: dict[str, list[float]], models: dict[str, list[float]], again: bool = False
    ) -> Finding:
        """Give the rows of all processes to the judge."""
        keys = [(row.prompt, index, place) for index, row in enumerate(rows) for place in row.places]
        told = gather_object([{"keys": keys, "arrays": arrays, "models": models}])
        each = {name: [value for one in told for value in one["arrays"][name]] for name in arrays}
        kept = [index for index, value in enumerate(each["a"]) if value == value]
        known = {}
        for name in told[0]["models"]:  # a process without rows may know fewer
            values = [value for one in told for value in one["models"].get(name, [math.nan] * len(one["keys"]))]
            known[name] = [None if math.isnan(values[index]) else values[index] for index in kept]
        numbers: dict[tuple[int, int], int] = {}  # of the rows of all processes
        places = [
            (prompt, numbers.setdefault((rank, index), len(numbers)), place)
            for rank, one in enumerate(told)
            for prompt, index, place in one["keys"]
        ]
        return self.judge.step(
            **{name: [values[index] for index in kept] for name, values in each.items()},
            prompt_ids=[places[index][0] for index in kept],
            rows=[places[index][1] for index in kept],
            positions=[places[index][2] for index in kept],
            faults={**self.factors, **known},
            again=again,
        )

    def _log(self, finding: Finding) -> None:
        """Add the finding to the trainer's next line of the log, which shows the last one, or the last that differs."""
        along = finding.strength
        numbers = {
            "strength": math.nan if along is None else along.value,
            "low": math.nan if along is None else along.low,
            "high": math.nan if along is None else along.high,
            "effect": finding.effect,
            "noise": finding.noise,
            "verdict": CODES.get(str(finding.verdict), 0.0),
        }
        waiting = self.source.sink.get("verify/verdict")
        if not (waiting == [CODES["differs"]] and finding.verdict != "differs"):  # the log would take their mean
            for name, value in numbers.items():
                self.source.sink[f"verify/{name}"] = [value]

    def _tell(self, finding: Finding, step: int) -> None:
        """Log one line when the verdict or the fault changes."""
        before, self.finding = self.finding, finding
        if before is not None and (before.verdict, before.fault) == (finding.verdict, finding.fault):
            return
        is_bad = "differs" in (finding.verdict, None if before is None else before.verdict)
        if self.trainer.accelerator.is_main_process:
            level = logging.WARNING if is_bad else logging.INFO
            logger.log(level, "step %d: rollouts: %s: %s", step, finding.verdict or "no verdict", finding.in_a_line)

    def remedy(self, finding: Finding) -> str:
        """Return what to do about a fault."""
        fault = SCALED if finding.fault in self.factors else str(finding.fault)
        return REMEDIES.get(fault, OTHER_REMEDY)

    def _write_failure(self, finding: Finding, step: int) -> None:
        if self.trainer.accelerator.is_main_process:
            told = {"schema": SCHEMA, "step": step, "to_do": self.remedy(finding), **asdict(finding)}
            folder = Path(self.trainer.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            publish_text(folder / FAILURE_FILE, json.dumps(_finite(told), indent=2) + "\n")


def _finite(value: Any) -> Any:
    """A value for JSON: null in place of a number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
