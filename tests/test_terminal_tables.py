"""Tables on a terminal of 80 columns: none is cut off, with the widest contents that commands show."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from pydantic import BaseModel
from rich.console import Console
from rich.protocol import rich_cast
from rich.table import Table

from loraover.adapters.combine.diff import DiffReport, LogitDiff, ModuleDiff
from loraover.adapters.combine.requests import DiffRequest
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.show import show_diff, show_lora
from loraover.adapters.uniform.certificate import LoraCertificate, ModuleCertificate
from loraover.checkpoint.metadata import Meta
from loraover.common.extras import install
from loraover.inspection.folder import read_schedule
from loraover.inspection.installation import Extra, Installation, ListedEngine, show_installation
from loraover.inspection.request import DoctorRequest
from loraover.reporting.reporter import print_rows
from loraover.reporting.schedule import show_schedule
from loraover.training.run_result import Measures, RunResult
from loraover_export.fold.report import show_certificate
from loraover_export.formats.onnx.report import CaseError, GraphCheck, GreedyCheck, OnnxReport
from loraover_export.formats.onnx.report import show_report as show_onnx
from loraover_export.merge.arithmetic import RoundingLoss
from loraover_export.merge.report import MergedWeight, MergeReport, show_merge
from loraover_export.prepare.report import show_report as show_fleet
from loraover_export.requests import FoldRequest, MergeRequest, OnnxRequest
from loraover_lab.cli import show_runs
from loraover_lab.evaluation.results import Evaluation, ModelResult, show_evaluation
from loraover_lab.study.forecast import PowerReport, TaskPower
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.show import show_power
from loraover_serve.judge.estimates import Interval
from loraover_serve.parity.answers import Together
from loraover_serve.parity.report import ParityReport
from loraover_serve.parity.request import ParityRequest
from loraover_serve.parity.tables import show_report as show_parity
from loraover_serve.verify.report import VerifyReport
from loraover_serve.verify.request import VerifyRequest
from loraover_serve.verify.show import show_report as show_verification

from support.reports import (
    CHECKPOINT,
    engine_result,
    fleet_report,
    fold_certificate,
    fold_outputs,
    parity,
    three_engines,
    verification,
)

COLUMNS = 80


Report = TypeVar("Report", bound=BaseModel)


def partly(model: type[Report], /, **values: Any) -> Report:
    """A report with only those of its fields that are shown."""
    return model.model_construct(**values)


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


def run_result(method: str) -> RunResult:
    measures = Measures(examples=32, loss=1.2345, exact_match=0.125)
    return partly(
        RunResult,
        method=method,
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_origin="HuggingFaceTB/SmolLM2-135M-Instruct, commit 0123456789abcdef0123456789abcdef01234567",
        data_origin="word problems that are made here, 512 rows with seed 0",
        learning_rate=3e-3,
        seed=0,
        steps=60,
        train_seconds=100.0,
        timed_steps=60,
        trained_parameters=1,
        lora_parameters=2_442_240,
        added_parameters=195_360,
        update_norm=39.35,
        before=measures,
        after=measures,
    )


def onnx_check(adapter: str | None) -> GraphCheck:
    return partly(
        GraphCheck,
        adapter=adapter,
        compared="change" if adapter else "logits",
        cases=[CaseError(case="1 x 8", max_logit=1.2e-5, mean_logit=1e-6)],
        noise=1e-5,
        noise_of="float32 and float64 in PyTorch",
        adapter_effect=1.23456,
        greedy=GreedyCheck(tokens=128, first_difference=117, gap=1.2e-3),
    )


def onnx_report() -> OnnxReport:
    checks = [onnx_check(None), onnx_check("lora-over")]
    shown = {"verdict": "passed", "mode": "swappable", "precision": "int4", "device": "cpu", "checked_on": "cpu"}
    return partly(OnnxReport, checks=checks, matrices=[], **shown)


def lora_certificate() -> LoraCertificate:
    shape = {"shape": (49152, 12288), "rank": 128, "norm": 12.3, "embedding": False}
    errors = {"truncation_error": 1.2, "arithmetic_bound": 1e-9, "storage_error": 1e-3}
    modules = [ModuleCertificate(module=name, **shape, **errors) for name in LONG]
    found = {"verdict": "passed", "rank": 128, "dtype": "bf16", "notes": [], "matrices": matrices()}
    return partly(LoraCertificate, modules=modules, **found)


def matrices() -> list[MatrixCertificate]:
    return [one.model_copy(update={"name": LONG[0], "shape": (128, 49152)}) for one in fold_certificate().matrices[:2]]


def merge_report() -> MergeReport:
    lost = RoundingLoss(erased=0.1234, error=0.987)
    weights = [
        MergedWeight(matrix=matrix, dtype="F8_E4M3", delta_to_weight=1.2e-3, stored=lost, four_bit=lost)
        for matrix in matrices()
    ]
    return partly(MergeReport, verdict="passed", weights=weights, stored=lost, four_bit=lost, untied=[])


def diff_report() -> DiffReport:
    angles = {"column_angles": [12.3, 89.9], "row_angles": [0.1, 89.9]}
    modules = [
        ModuleDiff(module=name, ranks=(128, 64), norms=(12.3, 0.123), difference=12.1, **angles) for name in LONG
    ]
    far = fold_outputs(1e-5, 2.0).error
    logits = partly(LogitDiff, tokens=496, prompt_source="a file", difference=far, effects=(far, far))
    return partly(DiffReport, modules=modules, other_tensors=[], logits=logits, norms=(12.3, 0.1), difference=12.1)


def evaluation() -> Evaluation:
    measures = {"strict-match": 0.1234, "flexible-extract": 0.1234}
    results = [
        partly(ModelResult, name=name, measures=measures, interval=(0.1, 0.2), missing=0, examples=[], failure=None)
        for name in ("base", "runs/a-long-name-of-a-run/adapter")
    ]
    origin = {"data_origin": "openai/gsm8k, commit 0123456", "model_origin": "a model", "settings": {}}
    return partly(Evaluation, task="gsm8k", questions=1319, is_right_or_wrong=True, results=results, **origin)


def power_report() -> PowerReport:
    one = partly(
        TaskPower,
        task="glue-qnli-t5-base",
        method="lora-over",
        baseline="lora",
        measured_on="glue-mnli-t5-base",
        measured_seeds=20,
        rows=12_345,
        seeds=20,
        smallest=0.123,
        rows_to_halve=9_876_543,
        seeds_to_halve=None,
        factor_to_halve=12.3,
    )
    return partly(PowerReport, tasks=[one], unknown=["dora"])


def by_reference() -> VerifyReport:
    strength = Interval(value=-0.00123, low=-0.00456, high=0.00789)
    result = engine_result("customer-support-german-v12", "inconclusive").model_copy(update={"strength": strength})
    return verification(result).model_copy(update={"reference": "the reference"})


def schedule() -> Meta:
    """A schedule of nine kinds of modules with 32 layers, whose map needs two tables."""
    parts = ("self_attn.q_proj", "linear_attn.in_proj_qkvz", "mlp.shared_expert_gate", "mlp.shared_expert.down_proj")
    kinds = [f"{part}_{k}" for part in parts for k in range(3)][:9]
    names = [f"model.layers.{layer}.{kind}.lora_{m}" for layer in range(32) for kind in kinds for m in "AB"]
    round_ = read_schedule(CHECKPOINT).rounds[0]
    rounds = [
        round_.model_copy(update={"chosen": names[k::12], "scores": dict.fromkeys(names, 1e-10)}) for k in range(11)
    ]
    return read_schedule(CHECKPOINT).model_copy(update={"rounds": rounds, "sites": []})


LONG = [f"model.language_model.layers.{k}.linear_attn.in_proj_qkvz.lora_A" for k in (7, 39)]
SHOWN: dict[str, Callable[[Console], object]] = {
    "fold": lambda console: show_certificate(
        fold_certificate().model_copy(update={"matrices": matrices()}), FoldRequest("checkpoint", "folded"), console
    ),
    "check of a fleet": lambda console: show_fleet(fleet_report(), console),
    "onnx": lambda console: show_onnx(onnx_report(), OnnxRequest("source", "onnx", "merged"), console),
    "verify": lambda console: show_verification(three_engines(), VerifyRequest("a"), console),
    "verify --reference": lambda console: show_verification(by_reference(), VerifyRequest("a"), console),
    "parity": lambda console: show_parity(parity_with("onnx swappable", 1), ParityRequest("a"), console),
    "parity of many requests": lambda console: show_parity(parity_with("vllm", 128), ParityRequest("a"), console),
    "convert, combine and shrink": lambda console: show_lora(lora_certificate(), FoldRequest("a", "b"), console),
    "merge": lambda console: show_merge(merge_report(), MergeRequest("a", "b"), console),
    "diff": lambda console: show_diff(diff_report(), DiffRequest("a", "b"), console),
    "eval": lambda console: show_evaluation(evaluation(), console),
    "study --power": lambda console: show_power(power_report(), StudyRequest(("a",), output="b"), console),
    "inspect --schedule": lambda console: show_schedule(schedule(), console),
}


class Tables(Console):
    """A console that keeps the tables that are printed on it."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=COLUMNS)
        self.tables: list[Table] = []

    def print(self, *objects: Any, **options: Any) -> None:
        self.tables += [table for shown in objects if isinstance(table := rich_cast(shown), Table)]
        super().print(*objects, **options)


def shown_on(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(table: Table, width: int) -> str:
    console = Console(file=(shown := io.StringIO()), width=width)
    console.print(table)
    return shown.getvalue()


@pytest.mark.parametrize("name", SHOWN)
def test_tables_fit_a_terminal(name: str) -> None:
    """Names are continued on the next line; every other cell stays whole."""
    console = Tables()
    SHOWN[name](console)
    assert console.tables
    for table in console.tables:
        shown = drawn(table, COLUMNS)
        assert max(map(len, shown.splitlines())) <= COLUMNS
        assert "…" not in shown
        names = [str(cell) for column in table.columns if not column.no_wrap for cell in column.cells]
        broken = {*drawn(table, 400).replace("─", "").split()} - {*shown.split()}
        assert broken <= {*" ".join(names).split()}


class Terminal(Console):
    """A terminal of 80 columns, and what is printed on it."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=COLUMNS, force_terminal=True, color_system=None)

    @property
    def lines(self) -> list[str]:
        return shown_on(self).splitlines()


def test_rows_of_names_and_values_are_broken_between_words() -> None:
    command = "pip install openvino-genai 'optimum-intel[openvino]', in a separate environment"
    engine = ListedEngine(
        name="OpenVINO GenAI", version=None, takes="adapters of `loraover export vllm`", install=command
    )
    found = partly(
        Installation,
        python="3.11",
        devices=[],
        libraries={},
        extras=[
            Extra(name="train", missing=[], install=install("train")),
            Extra(name="watch", missing=[], install=install("watch")),
            Extra(name="vllm", missing=["vllm"], install=install("vllm")),
        ],
        hub="reached",
        sandbox="ready",
        engines=[engine],
        faults=[],
    )
    for console in (terminal := Terminal(), pipe := Console(file=io.StringIO(), width=COLUMNS)):
        show_installation(found, DoctorRequest(), console)
    assert max(map(len, terminal.lines)) <= COLUMNS
    assert [line[:19].rstrip() for line in terminal.lines] == [
        "python",
        "extras complete",
        "extra vllm",
        "hub",
        "HumanEval sandbox",
        "OpenVINO GenAI",
        "",
        "",
    ]
    assert shown_on(pipe).splitlines() == terminal.lines, "what is copied into an issue fits, too"
    print_rows(whole := Tables(), [("name", "word " * 40)])
    assert len(shown_on(whole).splitlines()) == 1, "values that are read by programs stay on one line"


def test_runs_side_by_side_take_several_lines_but_lose_nothing() -> None:
    console = Tables()
    show_runs({f"runs/demo/{method}": run_result(method) for method in ("lora", "lora-over")}, console)
    shown = shown_on(console)
    assert max(map(len, shown.splitlines())) <= COLUMNS
    assert shown.count("base model") == 1, "what all runs have in common"
    assert "…" not in shown


def test_a_run_whose_start_was_not_measured_shows_its_end() -> None:
    console, end = Tables(), Measures(examples=32, loss=0.5, exact_match=0.75)
    runs = {"one": run_result("lora"), "other": run_result("lora").model_copy(update={"before": None, "after": end})}
    show_runs(runs, console)
    rows = {line.split()[0]: line for line in shown_on(console).splitlines() if line.split()}
    assert rows["before"].count("loss") == 1
    assert rows["after"].count("loss") == 2
