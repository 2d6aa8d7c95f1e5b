"""Each report's page, from real or made-up data."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.verdict import Deviation
from loraover.inspection.folder import inspect_folder, read_schedule
from loraover.inspection.show import to_page as inspect_page
from loraover.reporting.html_page import Page
from loraover.reporting.schedule import schedule_figures
from loraover.training.plan import TrainingPlan
from loraover.training.plan import to_page as plan_page
from loraover.training.run_result import Lengths
from loraover_export.fold.report import FoldCertificate, OutputCertificate
from loraover_export.fold.report import to_page as fold_page
from loraover_export.merged.report import InspectMergeReport, ModuleStrength, ParameterState, sentence_of
from loraover_export.merged.report import to_page as merged_page
from loraover_export.prepare.report import FleetReport, FleetRow
from loraover_export.prepare.report import to_page as fleet_page
from loraover_lab.study.report import StudyReport
from loraover_lab.study.show import to_page as study_page
from loraover_serve.judge.estimates import Interval
from loraover_serve.judge.names import STALE_OF_EARLIER
from loraover_serve.judge.results import Caches, GreedyAgreement, LogprobDistance, Suspect, WarmAnswers
from loraover_serve.parity.page import to_page as parity_page
from loraover_serve.rollouts.report import JudgedStep, RolloutReport
from loraover_serve.rollouts.show import to_page as rollouts_page
from loraover_serve.verify.report import EngineResult, VerifyReport
from loraover_serve.verify.request import VerifyRequest
from loraover_serve.verify.show import to_page as verify_page
from loraover_serve.watch.canary import Canary
from loraover_serve.watch.config import AdapterSettings, ServerSettings, WatchConfig, Watched, WatchTarget
from loraover_serve.watch.history import Check, History
from loraover_serve.watch.page import to_page as watch_page

from support.clockwork import whole_report

ROOT = Path(__file__).parents[2]
KEPT_STUDY = ROOT / "docs" / "study" / "smollm2" / "study.json"
CHECKPOINT = ROOT / "tests" / "golden" / "schema_3" / "dynamic"
DAY, NOW = "2026-03-01", 1_700_000_000.0
HOSTILE = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">$\\frac$ & 'q' \""

Report = TypeVar("Report", bound=BaseModel)


def kept_study() -> StudyReport:
    return StudyReport.model_validate_json(KEPT_STUDY.read_text())


def engine_result(engine: str, verdict: Any, reason: str = "", *, off: float = 2e-4, **more: Any) -> EngineResult:
    """A result of an engine whose base model is 1e-4 nats off, and whose noise explains 3e-4."""
    found = {
        "base": LogprobDistance(rms=1e-4, error=1e-5, largest=4e-4, positions=64, prompts=8),
        "adapter": LogprobDistance(rms=off, error=1e-5, largest=9 * off, positions=64, prompts=8),
        "strength": Interval(value=1.0, low=0.999, high=1.001),
        "allowed_strength": (0.998, 1.002),
        "effect": 0.19,
        "allowed": 3e-4,
        "number_format": "fp32",
        "compared": "all tokens",
        "greedy": GreedyAgreement(equal=1.0, gap=0.0, allowed=1e-3),
        "seconds": 4.0,
    }
    return EngineResult(engine=engine, version="1.2.3", verdict=verdict, reason=reason, **(found | more))


SCALED = Suspect(fault="wrong scaling", detail="the scaling is left out (times 0.333)", rms=2e-4, explains=True)
LEFT_OUT = Suspect(fault="modules left out", detail="only attention is adapted", rms=0.09, explains=False)

LOST: dict[str, Any] = {
    "fault": "wrong scaling",
    "suspects": [SCALED, LEFT_OUT],
    "strength": Interval(value=0.333, low=0.331, high=0.335),
}


STRENGTH = "33.3 % of the adapter is applied (33.1 to 33.5 %), where 99.8 to 100.2 % is right"
WHOLE = "100 % of the adapter is applied (99.9 to 100.1 %), and nothing else differs"
NEAREST = f"wrong scaling: {SCALED.detail}, so that {STRENGTH}"
UNCHECKED = ["generated texts: the server does not tell which tokens it generates", "servers without the adapter"]


def verification(*results: EngineResult) -> VerifyReport:
    """A report on these engines, whose verdict is the worst of theirs."""
    order = ("differs", "failed", "inconclusive", "as trained")
    return VerifyReport(
        verdict=min((result.verdict for result in results), key=order.index),
        engines=list(results),
        adapter="runs/demo/lora-over/adapter",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        reference="the unfolded checkpoint",
        sensitivity=1.4,
        bias=0.98,
        served_format="bf16",
        prompts=8,
        prompt_source="the built-in prompts",
        new_tokens=8,
        device="cpu",
        command="loraover verify " + "a-rather-long-folder-name/" * 9 + "adapter --engine onnx",
        versions={"python": "3.12.3", "torch": "2.13.0"},
        hardware="a processor of some name with several cores",
        date=DAY,
    )


def three_engines() -> VerifyReport:
    return verification(
        engine_result("onnx", "as trained", WHOLE, not_checked=UNCHECKED),
        engine_result("vllm", "differs", NEAREST, off=0.14, **LOST),
        EngineResult(engine="llamacpp", verdict="failed", reason="the server ended with code 1", seconds=2.0),
    )


def matrix(name: str, worst: float) -> MatrixCertificate:
    return MatrixCertificate(
        name=name,
        shape=(8, 576),
        over_parameterised=True,
        relative_error=1.2e-7,
        relative_bound=2.4e-7,
        worst_to_bound=worst,
        flushed_to_zero=0,
        subnormal=0,
    )


def fold_outputs(error: float, effect: float) -> OutputCertificate:
    """A check of outputs whose noise is 1e-5."""
    far, noise = (
        Deviation(max_logit=size, mean_logit=size / 9, max_kl=1e-9, mean_kl=1e-10, top1_agreement=1.0)
        for size in (error, 1e-5)
    )
    return OutputCertificate(
        base="folder base",
        device="cpu",
        compute_dtype="fp32",
        prompts=8,
        tokens=496,
        compared_tokens=496,
        prompt_source="8 of the built-in prompts",
        error=far,
        noise=noise,
        twins=3,
        adapter_effect=effect,
    )


def fold_certificate(
    verdict: Any = "passed", *, worst: float = 0.97, error: float | None = 1.2e-5, effect: float = 2.1
) -> FoldCertificate:
    """A certificate of 60 matrices, and of outputs whose noise is 1e-5 unless `error` is None."""
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    names = [f"model.layers.{i}.{kind}.lora_{m}" for i in range(10) for kind in kinds for m in "AB"]
    outputs = None if error is None else fold_outputs(error, effect)
    return FoldCertificate(
        verdict=verdict,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        dtype="fp32",
        decomposition="mpo",
        step=60,
        seed=0,
        matrices=[matrix(name, worst - 0.01 * (i % 40)) for i, name in enumerate(names)],
        outputs=outputs,
        output_bound=None if outputs is None else outputs.bound,
        versions={"torch": "2.13.0"},
        hardware="a processor of some name",
        date=DAY,
    )


def hostile(report: Report, keys: Collection[str]) -> Report:
    """The report with a hostile text in place of every text under these keys."""

    def spoilt(content: Any, is_meant: bool = False) -> Any:
        if isinstance(content, Mapping):
            return {name: spoilt(value, is_meant or name in keys) for name, value in content.items()}
        if isinstance(content, list):
            return [spoilt(value, is_meant) for value in content]
        return HOSTILE if is_meant and isinstance(content, str) else content

    return type(report).model_validate_json(json.dumps(spoilt(json.loads(report.model_dump_json()))))


def merge_report() -> InspectMergeReport:
    """A module of each kind of verdict, and tensors that changed beside them."""
    shown = {
        "merged": (0.998, 0.0),
        "not merged": (0.001, 1.0),
        "another factor": (0.5, 0.5),
        "rounded away": (0.0, 1.0),
    }
    modules = [
        ModuleStrength.model_validate(
            {"module": f"model.layers.{k}.self_attn.q_proj", "verdict": verdict, "dtype": "BF16", "strength": strength}
            | {"interval": [strength - 0.01, strength + 0.01], "expected": 0.998, "residual": residual}
            | {"rounding": 0.06, "erased": 0.2, "reason": "alpha was left out" if residual == 0.5 else ""}
        )
        for k, (verdict, (strength, residual)) in enumerate(shown.items())
    ]
    others = [ParameterState(name="lm_head.weight", state="changed", reason="it differs by 0.1 of its norm")]
    tokenizer = ["the tokenizer of folder merged lacks 3 tokens of folder base, such as '<new>'"]
    return InspectMergeReport(
        verdict="failed",
        sentence=sentence_of(modules, others, tokenizer),
        adapter="my-lora",
        peft_type="LORA",
        merged="folder merged",
        base_model="folder base",
        dtypes={"BF16": 4},
        erased=0.2,
        modules=modules,
        others=others,
        equal=12,
        tokenizer=tokenizer,
        not_compared=["model.layers.4.mlp.down_proj: it is U8, a quantised or an integer type"],
        versions={"loraover": "0.1.0"},
    )


def fleet_report() -> FleetReport:
    """One adapter of each verdict, with the engines of a check, and texts as long as real ones."""
    engines = dict.fromkeys(("vllm", "llamacpp", "onnx", "openvino", "mlx", "torch"), "right")
    wrong = engines | {"llamacpp": "refused", "openvino": "wrong silently", "mlx": "refused"}
    whole = FleetRow(
        source="a", address="owner/a-plain-adapter@0123456789abcdef", verdict="right", kind="LORA", rank=16
    )
    reason = "target_modules names layers that the base model lacks: model.layers.32.self_attn.q_proj and 15 others"
    reasons = "\n".join(f"{engine}: {verdict}: {reason}" for engine, verdict in wrong.items() if verdict != "right")
    rows = (
        whole.model_copy(update={"engines": engines, "exported": engines, "seconds": 0.25}),
        whole.model_copy(
            update={
                "verdict": "right as exported",
                "engines": wrong,
                "exported": engines,
                "done": "the export fixes it for llamacpp, openvino, mlx",
                "reason": reasons,
            }
        ),
        FleetRow(source="b", address="adapters/loha", verdict="prepared", kind="LOHA", rank=64, error=1e-7),
        FleetRow(
            source="c",
            address="adapters/broken",
            verdict="refused",
            kind="IA3",
            reason=reasons,
            engines=wrong,
            exported=dict.fromkeys(wrong, "refused"),
        ),
        FleetRow(source="d", address="bucket/gone", verdict="failed", reason="the server does not answer"),
    )
    return FleetReport(rows=rows, seconds=12.5)


def canary(now: float, text: str | None = None) -> Canary:
    """A canary with an adapter of each verdict, one of a short interval and one that was not checked yet."""
    verdicts = ("as trained", "differs", "inconclusive", "failed", "as trained", None)
    settings = AdapterSettings(reference=Path("reference.json.gz"))
    server = ServerSettings(name=text or "production-europe-1", url="http://localhost:8000", adapters=[settings])
    request = VerifyRequest(references=(settings.reference,), endpoint=server.url)
    targets = [
        WatchTarget(server, f"{text or 'shop'}-{k}", request, 900.0 if k == 4 else 3600.0, 0)
        for k in range(len(verdicts))
    ]
    found = Canary(Watched(WatchConfig(servers=[server]), tuple(targets), Path()), History(Path(":memory:")), now)
    for target, verdict in zip(targets, verdicts, strict=True):
        for hour in range(24 if verdict else 0):
            fault = "the scaling is left out" if verdict == "differs" else None
            distance = None if verdict == "failed" else 0.01 * (1 + hour % 3)
            at, reason = now - 3600.0 * (24 - hour), text or f"{STRENGTH}, and no known fault explains it"
            found.end(target, Check(*target.key, at, str(verdict), text or fault, reason, distance, 0.05, 1.0, 2.5, 0))
    return found


def judged_step(step: int, verdict: Any, value: float, **more: Any) -> JudgedStep:
    """A step of a loop, whose adapter changes 0.01 nats more at each step."""
    found: dict[str, Any] = {
        "fault": None,
        "reason": f"{100 * value:g} % of the adapter is applied in what the engine samples, where 80 to 104 % is right",
        "strength": Interval(value=value, low=value - 0.3, high=value + 0.3) if step else None,
        "allowed": (0.8, 1.04),
        "effect": 0.01 * step,
        "distance": 0.04,
        "noise": 0.04,
        "tokens": 512,
        "prompts": 32,
        "mean_difference": 0.02,
        "kl": -0.001 * step,
        "suspects": [],
        "not_excluded": ["stale by 1"],
    }
    return JudgedStep(step=step, verdict=verdict, **found | more)


def rollouts() -> RolloutReport:
    """A run whose engine loses the adapter at step 12."""
    wrong = {"fault": "served as base", "suspects": [SCALED, LEFT_OUT]}
    steps = [
        judged_step(0, None, 0.0),
        *(judged_step(step, "too early", 0.5) for step in range(1, 4)),
        *(judged_step(step, "applied, scale not known yet", 0.9) for step in range(4, 8)),
        *(judged_step(step, "as trained", 1.0) for step in range(8, 12)),
        *(judged_step(step, "differs", 0.0, **wrong) for step in range(12, 24)),
    ]
    return RolloutReport(
        verdict="differs",
        fault="served as base",
        steps=steps,
        file="rollouts.jsonl",
        window=8,
        command="loraover judge-rollouts rollouts.jsonl -o judged",
        versions={"python": "3.12.3"},
        hardware="a processor of some name with several cores",
        date=DAY,
    )


@dataclass(frozen=True)
class Made:
    """How a report's page is made."""

    title: str
    page: Callable[[], Page]
    hostile: Callable[[], Page]


def _inspected(is_hostile: bool = False) -> Page:
    report = inspect_folder(CHECKPOINT)
    if is_hostile:
        report = hostile(report, ("path", "base_model", "targets", "decomposition", "versions", "next_steps"))
    return inspect_page(report, schedule_figures(read_schedule(CHECKPOINT)), "loraover inspect checkpoint")


DEMO_RUN: dict[str, Any] = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "steps": 8,
    "served_rank": 8,
    "trained_parameters": 2_637_600,
    "lora_parameters": 2_442_240,
    "before": {"examples": 32, "loss": 1.998, "exact_match": 0.094},
    "after": {"examples": 32, "loss": 0.066, "exact_match": 0.688},
}
DEMO_METRICS = [
    {"step": 0, "eval_loss": 1.998},
    {"step": 1, "loss": 1.997},
    {"step": 4, "loss": 1.413},
    {"step": 8, "loss": 0.46},
]


def caches(verdict: Any, fault: str | None, off: float) -> Caches:
    """Answers on kept keys and values that are this far from those without."""
    noise, far = (LogprobDistance(rms=each, error=each, largest=each, positions=32, prompts=8) for each in (1e-6, off))
    warm = [WarmAnswers("adapter", "after what the server had before", 4096, far, {})]
    return Caches(verdict, f"off by {off}", fault, 4096, warm, noise=noise)


def demo_checks(fault: str | None = STALE_OF_EARLIER) -> tuple[VerifyReport, VerifyReport]:
    """The checks of an adapter that replaced an earlier version, on vLLM as it comes and with the plug-in."""
    stale, right = caches("differs", fault, 0.3), caches("as trained", None, 1e-6)
    return (
        verification(engine_result("demo", "differs", f"{fault}; {WHOLE}", fault=fault, caches=stale)),
        verification(engine_result("demo", "as trained", WHOLE, caches=right)),
    )


def demo_page(run: Mapping[str, Any], *checks: VerifyReport) -> Page:
    page: Page = runpy.run_path(str(ROOT / "docs" / "examples" / "demo_page.py"))["page_of"](
        run, DEMO_METRICS, fold_certificate(), *checks
    )
    return page


def training_plan() -> TrainingPlan:
    histogram, first = {64: 3, 128: 900, 65_536: 7}, [4, 19, "812 of file chats.jsonl"]
    lengths = Lengths(
        examples=910,
        max_length=128,
        cut=7,
        unlabelled=0,
        longest=40_000,
        keeps_99=128,
        cut_rows=first,
        histogram=histogram,
    )
    sizes = dict.fromkeys(("weights", "adapter", "cores", "gauge", "gradients", "optimizer_states"), 10**9)
    counts = {"steps": 114, "examples": 910, "tokens": 116_480, "activations": None}
    return TrainingPlan(model="folder base", method="lora-over", lengths=lengths, **sizes, **counts)


RUN_KEYS = ("base_model", "command", "reason", "hardware", "versions", "engine")
parity = cache(whole_report)
REPORTS = {
    "parity": Made(
        "Parity: ",
        lambda: parity_page(parity().model_copy(update={"date": DAY})),
        lambda: parity_page(hostile(parity(), (*RUN_KEYS, "adapters", "notes"))),
    ),
    "study": Made(
        "Study",
        lambda: study_page(kept_study()),
        lambda: study_page(hostile(kept_study(), ("task", "method", "baseline", "words", "command", "hardware"))),
    ),
    "verify": Made(
        "Verification: ",
        lambda: verify_page(three_engines()),
        lambda: verify_page(hostile(three_engines(), (*RUN_KEYS, "adapter", "fault", "detail", "reference"))),
    ),
    "rollouts": Made(
        "Rollouts: ",
        lambda: rollouts_page(rollouts()),
        lambda: rollouts_page(hostile(rollouts(), (*RUN_KEYS, "fault", "detail", "reason", "file"))),
    ),
    "fold": Made(
        "Fold: ",
        lambda: fold_page(fold_certificate(), "loraover export fold checkpoint -o folded --check-error"),
        lambda: fold_page(hostile(fold_certificate(), (*RUN_KEYS, "name", "base", "prompt_source")), HOSTILE),
    ),
    "merged": Made(
        "Merge: ",
        lambda: merged_page(merge_report(), "loraover export inspect-merge my-lora merged"),
        lambda: merged_page(
            hostile(merge_report(), (*RUN_KEYS, "module", "name", "merged", "tokenizer", "sentence")), HOSTILE
        ),
    ),
    "demo": Made(
        "Demo: ",
        lambda: demo_page(DEMO_RUN, *demo_checks()),
        lambda: demo_page(
            DEMO_RUN | {"model": HOSTILE},
            *(hostile(check, (*RUN_KEYS, "fault", "detail", "after")) for check in demo_checks()),
        ),
    ),
    "plan": Made(
        "Plan",
        lambda: plan_page(training_plan(), "loraover train demo --plan --html plan.html"),
        lambda: plan_page(hostile(training_plan(), ("model", "method")), HOSTILE),
    ),
    "inspect": Made("Folder: ", _inspected, lambda: _inspected(is_hostile=True)),
    "fleet": Made(
        "Fleet of adapters",
        lambda: fleet_page(fleet_report(), "loraover check adapters.txt"),
        lambda: fleet_page(hostile(fleet_report(), ("address", "kind", "done", "reason")), HOSTILE),
    ),
    "watch": Made(
        "Watch: adapters on servers",
        lambda: watch_page(canary(NOW), NOW, "loraover serve watch watch.yaml", None),
        lambda: watch_page(canary(NOW, HOSTILE), NOW, HOSTILE, HOSTILE),
    ),
}
