"""The functions for other loops get arrays in the form of each loop, of an engine that serves the base model."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from loraover_serve import RolloutJudge, judge_rollout_file
from loraover_serve.judge.names import NOT_APPLIED

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "judge_other_loops.py"
ROWS, TOKENS, PROMPT = 16, 12, 3


class Arrays(dict[str, Any]):
    """Arrays by name, with metadata as SkyRL has them."""

    metadata = {"uids": list(range(ROWS))}  # noqa: RUF012


@pytest.fixture
def example() -> ModuleType:
    spec = spec_from_file_location("judge_other_loops", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made() -> tuple[torch.Tensor, ...]:
    """Mask, engine's logprobs, and the trainer's with and without the adapter."""
    torch.manual_seed(0)
    mask, b = torch.ones(ROWS, TOKENS, dtype=torch.bool), -1 - torch.rand(ROWS, TOKENS)
    mask[::2, -3:] = False
    return mask, b - 1e-4 * torch.rand_like(b), b - 0.3 * torch.rand_like(b), b


def beside(values: torch.Tensor, before: int) -> torch.Tensor:
    """Values of answers in rows that begin with a prompt, `before` places before their tokens."""
    whole = torch.zeros(ROWS, PROMPT + TOKENS, dtype=values.dtype)
    whole[:, PROMPT - before : PROMPT - before + TOKENS] = values
    return whole


@pytest.mark.parametrize("loop", ["verl", "openrlhf", "skyrl", "areal"])
def test_a_loop_whose_engine_serves_the_base_model_is_told(
    loop: str, example: ModuleType, made: tuple[torch.Tensor, ...]
) -> None:
    mask, e, a, b = made
    prompts = [f"prompt {row}" for row in range(ROWS)]
    names = ("action_mask", "rollout_log_probs", "action_log_probs", "base_action_log_probs")
    ids = torch.arange(ROWS)[:, None].repeat(1, PROMPT + TOKENS)
    given = {
        "verl": SimpleNamespace(
            batch={"response_mask": mask, "rollout_log_probs": e, "old_log_probs": a, "ref_log_prob": b},
            non_tensor_batch={"uid": prompts},
        ),
        "openrlhf": [
            SimpleNamespace(prompts=prompts[part], **{n: v[part] for n, v in zip(names, made, strict=True)})
            for part in (slice(0, 4), slice(4, ROWS))
        ],
        "skyrl": Arrays(loss_mask=mask.float(), rollout_logprobs=e, action_log_probs=a, base_action_log_probs=b),
        "areal": [
            {
                "loss_mask": beside(mask.long(), 0),
                "logprobs": beside(e, 0),
                "prox_logp": beside(a, 1),
                "ref_logp": beside(b, 1),
                "input_ids": ids,
            }
        ],
    }
    example.judge = RolloutJudge()  # type: ignore[attr-defined]
    found = getattr(example, f"judge_{loop}")(given[loop])
    assert (found.verdict, found.fault) == ("differs", NOT_APPLIED), found.reason
    assert (found.prompts, found.tokens) == (ROWS, int(mask.sum()))


def test_lines_of_prime_rl_and_a_step_of_any_loop_are_files_that_are_judged(
    example: ModuleType, made: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    mask, e, a, b = (each.tolist() for each in made)
    rows = []
    for row in range(ROWS):
        line = {
            "step": 0,
            "token_ids": [row] * (PROMPT + TOKENS),
            "loss_mask": [False] * PROMPT + mask[row],
            "inference_logprobs": [0.0] * PROMPT + e[row],
            "trainer_logprobs": [0.0] * PROMPT + a[row],
        }
        rows += example.rows_of_prime_rl(line, str(row), [0.0] * PROMPT + b[row])
    (tmp_path / "prime.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "any.jsonl").open("w") as file:
        flat = example.flat(made[0], *made[1:])
        example.write_step(file, 0, *flat[2:], flat[0], [str(row) for row in flat[0]], flat[1])
    for name in ("prime", "any"):
        report = judge_rollout_file(tmp_path / f"{name}.jsonl")
        assert [(step.verdict, step.fault) for step in report.steps] == [("differs", NOT_APPLIED)]
