"""Tables on a terminal of 80 columns: none is cut off, with the widest contents that commands show."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from loraover.training.run_result import Measures, RunResult
from loraover.training.show import show_runs
from loraover_export.fold.request import FoldRequest
from loraover_export.fold.show import show_certificate
from loraover_export.onnx.report import CaseError, GraphCheck, GreedyCheck, OnnxReport
from loraover_export.onnx.request import OnnxRequest
from loraover_export.onnx.show import show_report as show_onnx
from loraover_serve.parity.judge.several import Together
from loraover_serve.parity.report.parity_report import ParityReport
from loraover_serve.parity.report.show import show_report as show_parity
from loraover_serve.parity.request import ParityRequest
from loraover_serve.verify.request import VerifyRequest
from loraover_serve.verify.show import show_report as show_verification

from support.reports import engine_result, fold_certificate, parity, verification

COLUMNS = 80


def parity_with(engine: str, concurrency: int | None) -> ParityReport:
    """The report of whole_report for one engine, with a switching arm and a long gap of answers."""
    content: Any = json.loads(parity().model_dump_json())
    for name in ("results", "latencies", "throughputs", "outputs", "runs"):
        for entry in content[name]:
            entry["engine"] = engine
            entry["concurrency"] = concurrency or entry["concurrency"]
    for entry in content["results"]:
        entry["arm"] = "switching" if entry["arm"] == "control" else entry["arm"]
        entry["verdict"] = "inconclusive"
    report = ParityReport.model_validate_json(json.dumps(content))
    distance = report.outputs[0].folded
    together = Together(
        engine=engine,
        concurrency=concurrency or 1,
        arm="switching",
        adapter="adapter12",
        prompts=8,
        alone_equal=1.0,
        distance=distance,
        agree=False,
    )
    return report.model_copy(update={"together": [together], "notes": [], "reason": ""})


def run_result() -> RunResult:
    measures = Measures(examples=32, loss=1.2345, exact_match=0.125)
    return RunResult(
        method="lora-over",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_origin="HuggingFaceTB/SmolLM2-135M-Instruct, commit 0123456789abcdef0123456789abcdef01234567",
        data_origin="word problems that are made here, 512 rows with seed 0",
        learning_rate=3e-3,
        seed=0,
        steps=60,
        train_seconds=100.0,
        timed_steps=60,
        peak_bytes=1,
        trained_parameters=1,
        hardware="",
        lora_parameters=2_442_240,
        added_parameters=195_360,
        update_norm=39.35,
        before=measures,
        after=measures,
        versions={},
    )


def onnx_check(adapter: str | None) -> GraphCheck:
    return GraphCheck(
        adapter=adapter,
        compared="change" if adapter else "logits",
        cases=[CaseError(case="1 x 8", max_logit=1.2e-5, mean_logit=1e-6)],
        noise=1e-5,
        noise_of="float32 and float64 in PyTorch",
        adapter_effect=1.23456,
        greedy=GreedyCheck(tokens=128, first_difference=117, gap=1.2e-3),
    )


def onnx_report() -> OnnxReport:
    return OnnxReport(
        verdict="passed",
        mode="swappable",
        precision="int4",
        device="cpu",
        cache=True,
        checked_on="cpu",
        base_model="owner/model",
        adapters={"lora-over": "runs/a/adapter"},
        checks=[onnx_check(None), onnx_check("lora-over")],
        matrices=[],
        versions={},
        hardware="",
    )


SHOWN: dict[str, Callable[[Console], object]] = {
    "fold": lambda console: show_certificate(fold_certificate(), FoldRequest("checkpoint", "folded"), console),
    "onnx": lambda console: show_onnx(onnx_report(), OnnxRequest("source", "onnx", "merged"), console),
    "verify": lambda console: show_verification(
        verification(engine_result("llamacpp", "inconclusive")), VerifyRequest("a"), console
    ),
    "parity": lambda console: show_parity(parity_with("onnx swappable", 1), ParityRequest("a"), console),
    "parity of many requests": lambda console: show_parity(parity_with("vllm", 128), ParityRequest("a"), console),
}


class Tables(Console):
    """A console that keeps the tables that are printed on it."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=COLUMNS)
        self.tables: list[Table] = []

    def print(self, *objects: Any, **options: Any) -> None:
        self.tables += [shown for shown in objects if isinstance(shown, Table)]
        super().print(*objects, **options)


@pytest.mark.parametrize("name", SHOWN)
def test_tables_fit_a_terminal(name: str) -> None:
    console = Tables()
    SHOWN[name](console)
    assert console.tables
    for table in console.tables:
        assert Console(width=400).measure(table).maximum <= COLUMNS, table.title


def test_runs_side_by_side_take_several_lines_but_lose_nothing() -> None:
    console = Tables()
    runs = {method: run_result().model_copy(update={"method": method}) for method in ("lora", "lora-over")}
    show_runs({f"runs/demo/{method}": run for method, run in runs.items()}, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= COLUMNS
    assert shown.count("base model") == 1, "what all runs have in common"
    assert "…" not in shown


def test_a_run_whose_start_was_not_measured_shows_its_end() -> None:
    console, end = Tables(), Measures(examples=32, loss=0.5, exact_match=0.75)
    runs = {"one": run_result(), "other": run_result().model_copy(update={"before": None, "after": end})}
    show_runs(runs, console)
    rows = {line.split()[0]: line for line in console.file.getvalue().splitlines() if line.split()}  # type: ignore[attr-defined]
    assert rows["before"].count("loss") == 1
    assert rows["after"].count("loss") == 2
