"""The sentence at the head of an inspected folder's page."""

from __future__ import annotations

from typing import Any

import pytest

from loraover.inspection.report import AdapterFacts, CoreFacts, FolderReport, Kind, OnnxFacts, RunFacts, VllmFacts
from loraover.inspection.verdict import verdict_of
from loraover.training.failure import Failure
from loraover.training.run_result import Measures, RunResult

ADAPTER = AdapterFacts(
    kind="LORA",
    base_model="owner/model",
    ranks=[8],
    lora_alpha=16,
    variants=[],
    targets=["q_proj"],
    modules=210,
    parameters=2_442_240,
    dtypes=["F32"],
)
CORES = CoreFacts(
    decomposition="mpo", sites=420, schedule="all", step=6, steps=10, optimizer="AdamW", versions={}, rounds=[]
)
RESULT = RunResult(
    method="lora",
    model="owner/model",
    model_origin="owner/model",
    data_origin="rows",
    learning_rate=1e-3,
    seed=0,
    steps=60,
    train_seconds=1.0,
    timed_steps=60,
    peak_bytes=1,
    trained_parameters=1,
    hardware="",
    lora_parameters=1,
    added_parameters=0,
    update_norm=None,
    before=Measures(examples=8, loss=2.0),
    after=Measures(examples=8, loss=1.5),
    versions={},
)
ONNX = OnnxFacts(mode="merged", precision="fp32", base_model="owner/model", adapters={}, verdict="inconclusive")
VLLM = VllmFacts(verdict="passed", vllm_version="0.32.0", served_model="model")


def report(kind: Kind, **facts: Any) -> FolderReport:
    return FolderReport(path="folder", kind=kind, **facts)


@pytest.mark.parametrize(
    ("found", "tone", "expected"),
    [
        (
            report("checkpoint", adapter=ADAPTER, cores=CORES),
            "plain",
            "A checkpoint: LORA of rank 8 on 210 modules, 2,442,240 numbers. 420 matrices have cores (mpo), after 6 "
            "of 10 "
            "steps.",
        ),
        (
            report("folded adapter", adapter=ADAPTER, verdicts={"fold_certificate.json": "passed"}),
            "good",
            "A folded adapter: LORA of rank 8 on 210 modules, 2,442,240 numbers. fold_certificate.json: passed.",
        ),
        (
            report("vLLM export", adapter=ADAPTER, vllm=VLLM, verdicts={"preflight.json": "failed"}),
            "bad",
            "A vLLM export: LORA of rank 8 on 210 modules, 2,442,240 numbers. Checked against the loading rules of "
            "vLLM "
            "0.32.0. preflight.json: failed.",
        ),
        (
            report("ONNX export", onnx=ONNX),
            "open",
            "An ONNX export. The check in ONNX Runtime: inconclusive.",
        ),
        (
            report("run", run=RunFacts(state="finished", result=RESULT)),
            "good",
            "A run. The run is finished, after 60 steps; held-out loss 2.0000 before training, 1.5000 after training.",
        ),
        (
            report("run", run=RunFacts(state="unfinished", checkpoint_step=20)),
            "open",
            "A run. The run is not finished; its newest checkpoint is of step 20.",
        ),
        (
            report("run", run=RunFacts(state="failed", failure=Failure(kind="out_of_memory", message="no room."))),
            "bad",
            "A run. The run failed: no room.",
        ),
    ],
)
def test_each_kind_has_its_figures(found: FolderReport, tone: str, expected: str) -> None:
    verdict = verdict_of(found)
    assert (verdict.tone, verdict.word, verdict.sentence) == (tone, found.kind, expected)
