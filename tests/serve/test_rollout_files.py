"""`loraover judge-rollouts`: files of made-up loops, their reports and exit codes, and files that cannot be used."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError, DataError, OutputError
from loraover_serve import RolloutJudge, RolloutReport, judge_rollout_file, scale_faults
from loraover_serve.judge.names import INTERMITTENT, NOT_APPLIED

from support.rollout_loop import EXACT, ROUNDED, Loop, Step

ROW = {"step": 0, "prompt_id": 1, "position": 0, "e": -1.0, "a": -1.0, "b": -1.5}
OTHER = ROW | {"prompt_id": "two"}


def rows_of(number: int, step: Step) -> list[dict[str, Any]]:
    """Rows of a file with the arrays of a step."""
    return [
        {
            "step": number,
            "prompt_id": step.prompt_ids[i],
            "row": step.rows[i],
            "position": step.positions[i],
            **{name: min(getattr(step, name)[i], 0.0) for name in ("e", "a", "b")},
            "earlier": [min(each[i], 0.0) for each in step.earlier],
            "candidates": {name: min(each[i], 0.0) for name, each in step.faults.items()},
        }
        for i in range(len(step.e))
    ]


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def dumped(path: Path, loop: Loop, steps: int, every: int = 1) -> Path:
    return write(path, (row for number, step in enumerate(loop.steps(steps)) for row in rows_of(every * number, step)))


def test_a_file_is_judged_as_the_loop_itself(tmp_path: Path) -> None:
    loop, judge = Loop(3, ROUNDED, 0.05, "base", since=3), RolloutJudge()
    report = judge_rollout_file(dumped(tmp_path / "loop.jsonl", loop, 6, every=10), scaling=4.0)
    for judged, step in zip(report.steps, loop.steps(6), strict=True):
        found = judge.step(**step.given | {"faults": step.faults | scale_faults(4.0)})
        assert (judged.verdict, judged.fault, judged.reason) == (found.verdict, found.fault, found.reason)
        assert judged.strength == found.strength
        off = [e - a for e, a in zip(step.e, step.a, strict=True)]
        assert judged.mean_difference == pytest.approx(sum(map(abs, off)) / len(off), rel=1e-3)
        assert judged.kl == pytest.approx(sum(off) / len(off), abs=1e-4)
    assert [each.step for each in report.steps] == [0, 10, 20, 30, 40, 50]
    assert (report.verdict, report.fault, report.decisive.step) == ("differs", NOT_APPLIED, 30)
    assert report.exit_code == 1


@pytest.mark.parametrize(
    ("loop", "steps", "verdict", "code"),
    [
        (Loop(0, EXACT, 0.02), 4, "as trained", 0),
        (Loop(0, EXACT, 0.02, "times 0.25", since=2), 4, "differs", 1),
        (Loop(0, ROUNDED, 0.01), 2, "too early", 3),
        (Loop(3, ROUNDED, 0.05), 3, "applied, scale not known yet", 3),
        (Loop(0, EXACT, 0.02), 1, None, 3),
    ],
)
def test_the_exit_code_is_that_of_the_run(
    loop: Loop, steps: int, verdict: str | None, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = dumped(tmp_path / "loop.jsonl", loop, steps)
    assert run(cli, ["judge-rollouts", str(file), "--json", "-o", str(tmp_path / "out")]) == code
    shown = capsys.readouterr()
    assert (verdict or "not judged") in shown.err
    report = RolloutReport.model_validate_json(shown.out)
    assert report.verdict == verdict
    assert report == RolloutReport.model_validate_json((tmp_path / "out" / "rollouts.json").read_text())
    page = (tmp_path / "out" / "rollouts.html").read_text()
    assert page.count("<figure>") == 3
    assert (verdict or "not judged") in page
    assert (tmp_path / "out" / "figures" / "strength.svg").is_file()


def test_a_fault_that_is_over_is_one_of_the_run(tmp_path: Path) -> None:
    right, wrong = (Loop(1, EXACT, 0.02, fault, tokens=8).steps(8) for fault in ("", "base"))
    steps = [bad if i in (3, 4) else good for i, (good, bad) in enumerate(zip(right, wrong, strict=True))]
    report = judge_rollout_file(
        write(tmp_path / "f", (row for i, step in enumerate(steps) for row in rows_of(i, step)))
    )
    assert (report.verdict, report.fault, report.steps[-1].verdict) == ("differs", NOT_APPLIED, "as trained")
    assert [span.name for span in report.spans if span.last.verdict == "differs"] == ["3 to 4"]


def test_a_step_that_shows_nothing_keeps_a_run_from_being_as_trained(tmp_path: Path) -> None:
    steps = [rows_of(i, step) for i, step in enumerate(Loop(0, EXACT, 0.02).steps(4))]
    one_prompt = [row | {"prompt_id": 1, "row": i} for i, row in enumerate(steps[2])]
    report = judge_rollout_file(write(tmp_path / "one", [*steps[0], *steps[1], *one_prompt, *steps[3]]))
    assert report.steps[-1].verdict == "as trained"
    assert (report.verdict, report.decisive.step, report.exit_code) == (None, 2, 3)
    read = [[row | {"engine_prompt_id": row["prompt_id"] // 2} for row in rows] for rows in steps]
    report = judge_rollout_file(write(tmp_path / "read", (row for rows in read for row in rows)))
    assert (report.verdict, report.exit_code) == ("not comparable", 3)


def test_an_adapter_that_is_zero_again_in_the_middle_of_a_run_is_not_judged(tmp_path: Path) -> None:
    steps = [rows_of(i, step) for i, step in enumerate(Loop(0, EXACT, 0.02).steps(4))]
    lost = [row | {"b": row["a"]} for row in steps[2]]
    report = judge_rollout_file(write(tmp_path / "f", [*steps[0], *steps[1], *lost, *steps[3]]))
    assert (report.verdict, report.decisive.step, report.exit_code) == (None, 2, 3)


def test_models_that_cannot_be_compared_are_told(tmp_path: Path) -> None:
    def rows(number: int, step: Step) -> list[dict[str, Any]]:
        return [row | {"candidates": {"mlp": None}, "earlier": [row["a"]]} for row in rows_of(number, step)]

    steps = enumerate(Loop(0, EXACT, 0.02).steps(4))
    last = judge_rollout_file(write(tmp_path / "f", (row for i, step in steps for row in rows(i, step)))).steps[-1]
    assert "mlp (not computed)" in last.not_excluded
    assert "stale by 1 (as the right adapter)" in last.not_excluded


def test_a_fault_of_every_second_of_many_rows_is_seen(tmp_path: Path) -> None:
    """Two replicas answer in turn, and one of them has the base model; only a part of the rows is looked at."""
    loops = (
        Loop(3, EXACT, 0.05, fault, prompts=64, answers=8, tokens=8, snapshots=0).steps(2) for fault in ("", "base")
    )
    rows: list[dict[str, Any]] = []
    for number, (right, wrong) in enumerate(zip(*loops, strict=True)):
        pairs = zip(rows_of(number, right), rows_of(number, wrong), strict=True)
        rows += [(bad if good["row"] % 2 else good) | {"candidates": {}} for good, bad in pairs]
    report = judge_rollout_file(write(tmp_path / "f", rows))
    assert (report.verdict, report.fault) == ("differs", INTERMITTENT)


def test_noise_that_a_fault_can_be_is_not_as_trained(tmp_path: Path) -> None:
    """The engine has another template from the first step on, which no candidate names."""
    loop = Loop(3, EXACT, 0.3, "template", snapshots=0)
    rows = [row | {"candidates": {}} for i, step in enumerate(loop.steps(8)) for row in rows_of(i, step)]
    report = judge_rollout_file(write(tmp_path / "f", rows))
    assert report.exit_code == 3
    assert report.steps[-1].noise > 0.08


def test_a_candidate_that_was_computed_for_some_rows_is_compared_there(tmp_path: Path) -> None:
    def rows(number: int, step: Step) -> list[dict[str, Any]]:
        return [
            row | {"candidates": {name: value if row["row"] % 2 else None for name, value in row["candidates"].items()}}
            for row in rows_of(number, step)
        ]

    loop = Loop(3, EXACT, 0.02, "attention")
    file = write(tmp_path / "f", (row for i, step in enumerate(loop.steps(3)) for row in rows(i, step)))
    assert judge_rollout_file(file).fault == "attention"


REFUSED: dict[str, tuple[list[Any], str]] = {
    "no rows": ([], "found no rows, expected one JSON object a line"),
    "no JSON": (["{"], "line 1: not valid JSON"),
    "NaN": (['{"step": 0, "e": NaN}'], "NaN is not a number; leave out the tokens that the trainer masks"),
    "a key twice": (['{"step": 0, "step": 1}'], "a key occurs twice"),
    "deep": (["[" * 5000], "not valid JSON"),
    "an array": ([[1, 2]], r"found \[1, 2\], expected an object with the keys step, prompt_id"),
    "no e": ([{k: v for k, v in ROW.items() if k != "e"}], "found no e, expected the keys"),
    "a key of its own": ([ROW | {"loss": 1}], "found the key 'loss'"),
    "infinite": (['{"step": 0, "prompt_id": 1, "position": 0, "e": -1e999, "a": -1, "b": -1}'], "e is -inf, expected"),
    "too large": ([ROW | {"a": -(10**400)}], "a is -1000"),
    "too small": ([ROW | {"e": -1e200}], "e is -1e"),
    "half a character": (
        ['{"step": 0, "prompt_id": 1, "position": 0, "e": -1, "a": -1, "b": -1, "candidates": {"\\ud800": -1}}'],
        "printable",
    ),
    "no name": ([ROW | {"candidates": {"": -1}}], "printable characters"),
    "above 0": ([ROW | {"b": 0.5}], "b is 0.5, expected a logprob in nats, from -10000 to 0"),
    "true": ([ROW | {"e": True}], "e is True"),
    "a text": ([ROW | {"e": "-1"}], "e is '-1'"),
    "null": ([ROW | {"a": None}], "a is None"),
    "a step as a float": ([ROW | {"step": 1.0}], "step is 1.0, expected an integer from 0"),
    "a negative position": ([ROW | {"position": -1}], "position is -1"),
    "a prompt as a list": ([ROW | {"prompt_id": [1]}], r"prompt_id is \[1\], expected an integer or a text"),
    "candidates as a list": ([ROW | {"candidates": [1]}], "expected an object of names"),
    "earlier as a number": ([ROW | {"earlier": -1}], "expected a list of logprobs"),
    "a taken name": ([ROW | {"candidates": {"stale by 1": -1}}], "give it another name"),
    "another length": (
        [ROW | {"earlier": [-1]}, OTHER | {"earlier": [-1, -2]}],
        "line 2: found .* 2 earlier; expected",
    ),
    "another candidate": ([ROW | {"candidates": {"mlp": -1}}, OTHER], "as in line 1 of the same step"),
    "a missing row": ([ROW | {"row": 1}, OTHER], "give each row of a step the same keys"),
    "a missing step": ([ROW, ROW | {"step": 1}, ROW | {"step": 3}], "line 3: step 3 follows step 1, expected 2"),
    "another stride": ([ROW, ROW | {"step": 10}, ROW | {"step": 11}], "step 11 follows step 10, expected 20"),
    "a step again": ([ROW, ROW | {"step": 1}, ROW], "step 0 follows step 1"),
    "a long line": ([ROW | {"token": "x" * 300_000}], "line 1: more than 262144 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_is_refused(case: str, tmp_path: Path) -> None:
    rows, message = REFUSED[case]
    file = write(tmp_path / "f.jsonl", rows)
    with pytest.raises(DataError, match=message):
        judge_rollout_file(file, output=tmp_path / "out")
    assert [*tmp_path.iterdir()] == [file]


def test_a_refusal_names_the_file_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["judge-rollouts", str(write(tmp_path / "f.jsonl", ["{"]))]) == 2
    assert f"{tmp_path / 'f.jsonl'}, line 1: not valid JSON" in "".join(capsys.readouterr().err.split("\n"))
    assert run(cli, ["judge-rollouts", str(tmp_path)]) == 2
    assert run(cli, ["judge-rollouts", str(tmp_path / "none")]) == 2


def test_requests_that_cannot_be_carried_out(tmp_path: Path) -> None:
    file = dumped(tmp_path / "f", Loop(0), 1)
    for more, message in (
        ({"ranks": 2}, "ranks needs scaling"),
        ({"noise": math.inf}, "noise is inf, expected"),
        ({"window": 10**20}, "window is 1000"),
        ({"scaling": 2.0, "ranks": 10**400}, "ranks is 1000"),
        ({"window": 0}, "window is 0, expected 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            judge_rollout_file(file, **more)
    with pytest.raises(OutputError):
        judge_rollout_file(file, output=tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from([*ROW, "row", "earlier", "candidates", "x"]), inner)
        ),
    )
)
def test_whatever_a_line_holds_it_is_judged_or_refused(value: Any) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        rows = [json.dumps({**ROW, **value} if isinstance(value, dict) else value), json.dumps(OTHER)]
        file.write("\n".join(rows))
        file.flush()
        with suppress(DataError):
            assert judge_rollout_file(Path(file.name)).exit_code in (0, 1, 3)
